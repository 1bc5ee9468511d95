"""Linear attention in TPU kernels written with Pallas (Mosaic).

Queries, keys, values and weights go in; features are made and used in vector memory, forward and
backward, so that no array of T x M exists. Served are maps of the form of :mod:`.affine`, with key
masks, biases, decay, states and shared key heads; everything else is refused with
NotImplementedError, so that the next implementation gets it.

What is known of it: interpreted, the kernels agree with the definition, values and gradients; they
compile for v5e, and speed is estimated from what the compiler says
(``docs/accelerators.md``). They have not been run on a TPU.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
M features.

Reference: arXiv:2009.14794 (FAVOR+); the chunked form is that of arXiv:2202.10447, section 3.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_tpu.affine import Affine, AffineMap, affine_map, why_not_affine
from fast_attention.linear.state import EMPTY_LOG_SCALE, MASKED_LOG, LinearAttentionState
from fast_attention.linear.types import Inputs, Parts, Plan

# Query heads of one key head that a program holds at once.
MOST_GROUPS = 8
# Rows of a state in the kernels below its values.
EXTRA = 16
CHUNKS = (128, 256, 512)


def attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes linear attention and the state after the last key, on a TPU.

    Args:
      plan: static choices.
      inputs: arrays, see :class:`fast_attention.linear.types.Inputs`.

    Returns:
      ``[B, T, H, V]`` and the state. The state is NaN unless
        ``plan.carries_state``.

    Raises:
      NotImplementedError: for a call that the kernels do not serve.
    """
    return attend_on(plan, inputs, interpret=False)


def attend_interpreted(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes the same with the kernels interpreted, slowly, on any platform.

    Inside ``jax.shard_map`` JAX's interpreter needs ``check_vma=False``.
    """
    return attend_on(plan, inputs, interpret=True)


def attend_on(
    plan: Plan, inputs: Inputs, *, interpret: Any
) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes the same with the kernels compiled or interpreted.

    Args:
      plan: static choices.
      inputs: arrays.
      interpret: False, True, or ``pltpu.InterpretParams``.
    """
    reason = why_not(plan, inputs, interpret=interpret)
    if reason is not None:
        raise NotImplementedError(reason)
    # Pallas takes long to import, and most programs need none of it.
    from fast_attention.linear.pallas_tpu import core, program

    key = _unmasked(inputs, inputs.key)
    affine = affine_map(plan.feature_map, inputs.parameters, key, plan.exact_scale)
    batch, length, heads, width = inputs.query.shape
    kv_heads, value_dim = inputs.value.shape[2:]
    groups, features = heads // kv_heads, affine.key.weights.shape[-2]
    exponential, decays = affine.kind == "exp", inputs.log_decay is not None
    unit = program.LOG2_E if exponential else 1.0
    chunk, block = _sizes(
        plan, max(length, inputs.key.shape[1]), -(-features // 128) * 128, interpret
    )
    static = program.Program(
        causal=plan.causal,
        kind=affine.kind,
        epsilon=affine.epsilon,
        norm=affine.norm * unit,
        # In the units of decaying rows of exponentials any size may be right.
        denominator_epsilon=0.0 if decays and exponential else plan.epsilon,
        low=_low(plan, inputs),
        features=features,
        head_dim=_tiles(width),
        value_dim=_tiles(value_dim),
        queries=length,
        keys=inputs.key.shape[1],
        groups=groups,
        heads=2 if groups == 1 and kv_heads % 2 == 0 else 1,
        kv_heads=kv_heads,
        chunk=chunk,
        block=block,
        interpret=interpret,
        decay=decays,
    )
    padded = static.padded_features

    def weights(side: Affine) -> tuple[Array, Array]:
        matrix = jnp.swapaxes(_sets(side.weights, 2, kv_heads) * unit, 1, 2)
        matrix = _pad(_pad(matrix, 1, static.head_dim), 2, padded)
        offset = jnp.zeros((matrix.shape[0], 1, features), jnp.float32)
        if side.offset is not None:
            offset = jnp.broadcast_to(_sets(side.offset, 1, kv_heads)[:, None] * unit, offset.shape)
        # Features that pad the lanes are 0.
        return matrix, _pad(offset, 2, padded, -1e30 if exponential else 0.0)

    key_log = _key_log(affine, inputs)
    scale, before = _first_state(plan, affine, inputs, key, key_log)
    query_weights, query_offset = weights(affine.query)
    key_weights, key_offset = weights(affine.key)
    low_type = jnp.bfloat16 if inputs.query.dtype == jnp.bfloat16 else jnp.float32
    arguments = core.Arguments(
        query=_positions_last(inputs.query.astype(low_type), static.head_dim),
        key=_positions_last(inputs.key.astype(low_type), static.head_dim),
        value=_positions_last(inputs.value.astype(low_type), static.value_dim),
        query_weights=query_weights,
        key_weights=key_weights,
        query_offset=query_offset,
        key_offset=key_offset,
        key_log=None if key_log is None else _key_rows(key_log * unit).astype(jnp.float32),
        scale=jax.lax.stop_gradient(_pad(_flat(scale)[:, None] * unit, 2, padded)),
        kv=None if before is None else _rows_of_state(*before, static.value_dim, padded),
        log_decay=None if inputs.log_decay is None else _key_rows(inputs.log_decay),
        alive=_alive(inputs) if decays and exponential else None,
    )
    attended: Any = core.attend_with_kernels(static, plan.carries_state, vary_alike(arguments))
    out, state = attended
    out = out[:, :value_dim].reshape(batch, heads, value_dim, length)
    out_type = jnp.result_type(inputs.query, inputs.key, inputs.value)
    out = jnp.transpose(out, (0, 3, 1, 2)).astype(out_type)
    return out, _state(inputs, state, static.value_dim, unit)


def why_not(plan: Plan, inputs: Inputs, *, interpret: Any = False) -> str | None:
    """Returns why the kernels do not serve a call, or None if they do.

    Args:
      plan: static choices.
      inputs: arrays, or their shapes.
      interpret: as in :func:`attend_on`.
    """
    groups = inputs.query.shape[2] // inputs.key.shape[2]
    if plan.output != "mean":
        return f"The TPU kernels return only normalised outputs, got output={plan.output!r}."
    if inputs.segment_ids is not None:
        return "The TPU kernels do not support segment_ids."
    if inputs.state.kv.dtype != jnp.float32:
        return f"The TPU kernels compute in float32, got {inputs.state.kv.dtype}."
    if groups > MOST_GROUPS:
        return (
            f"The TPU kernels support up to {MOST_GROUPS} query heads per key head, got {groups}."
        )
    if plan.chunk_size is not None and plan.chunk_size not in CHUNKS and not interpret:
        return f"The TPU kernels work in chunks of {CHUNKS}, got chunk_size={plan.chunk_size}."
    if plan.saved_states is not None:
        return f"The TPU kernels save no states, got saved_states={plan.saved_states!r}."
    if plan.unroll not in (None, 1):
        return f"The TPU kernels do not unroll, got unroll={plan.unroll}."
    if _precision(plan) not in _PRECISIONS:
        return f"The TPU kernels support jax.lax.Precision, got precision={plan.precision!r}."
    reason = why_not_affine(plan.feature_map)
    if reason is not None:
        return reason
    widths = (inputs.key.shape[3], inputs.value.shape[3])
    if max(widths) > 256:
        return f"The TPU kernels support heads up to a width of 256, got {widths}."
    features = inputs.state.kv.shape[-1]
    if features > 2048:
        return f"The TPU kernels support up to 2048 features, got {features}."
    return None


def describe(plan: Plan, inputs: Inputs) -> str:
    """Says how the kernels cut a call that they serve."""
    length = max(inputs.query.shape[1], inputs.key.shape[1])
    features = -(-inputs.state.kv.shape[-1] // 128) * 128
    chunk, block = _sizes(plan, length, features, interpret=False)
    operands = "bfloat16" if _low(plan, inputs) else "float32"
    return f"chunks of {chunk} in blocks of {block}, products of {operands} operands"


_PRECISIONS = (None, *jax.lax.Precision)


def _precision(plan: Plan) -> Any:
    name = str(plan.precision).upper()
    return jax.lax.Precision.__members__.get(name, plan.precision)


def _low(plan: Plan, inputs: Inputs) -> bool:
    default = _precision(plan) in (None, jax.lax.Precision.DEFAULT)
    return default and inputs.query.dtype == jnp.bfloat16


def _sizes(plan: Plan, length: int, features: int, interpret: Any) -> tuple[int, int]:
    """Returns chunk and block."""
    if plan.chunk_size is not None:
        chunk = -(-plan.chunk_size // 8) * 8 if interpret else plan.chunk_size
        return chunk, chunk * (2 if length > chunk else 1)
    # The block that was estimated to be the fastest of 512 and 1024; less of it for many features,
    # which have to fit in vector memory, and for lengths that would fill it badly.
    largest = max(256, min(1024, 1024 * 256 // features))
    block = 128
    while block < largest and block < length:
        block *= 2
    if block > 256 and -length % block > block // 2:
        block //= 2
    return min(block, 256), block


def _tiles(width: int) -> int:
    return -(-width // 16) * 16


def _pad(x: Array, axis: int, size: int, value: float = 0.0) -> Array:
    more = size - x.shape[axis]
    if not more:
        return x
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], constant_values=value)


def _flat(x: Array) -> Array:
    """``[B, K, ...]`` as ``[B K, ...]``."""
    return x.reshape(-1, *x.shape[2:])


def _sets(x: Array, rank: int, kv_heads: int) -> Array:
    """``[*B, ...]`` as ``[P, ...]`` with P of 1, K or B K, and ``rank`` axes kept."""
    leading, own = x.shape[: x.ndim - rank], x.shape[x.ndim - rank :]
    if math.prod(leading[:-1]) > 1:
        # What differs by row has an entry for each head of a row, also where these share it.
        x = jnp.broadcast_to(x, (*leading[:-1], kv_heads, *own))
    return x.reshape(-1, *own)


def _positions_last(x: Array, width: int) -> Array:
    """``[B, T, H, D]`` as ``[B H, D, T]``."""
    return _pad(_flat(jnp.transpose(x, (0, 2, 3, 1))), 1, width)


def _key_rows(x: Array) -> Array:
    """``[B, S, K]`` as ``[B K, 1, S]``."""
    return _flat(jnp.swapaxes(x, 1, 2))[:, None]


def _unmasked(inputs: Inputs, x: Array) -> Array:
    # Whatever lies in padding, nan and inf included, must not reach a product.
    return x if inputs.key_mask is None else jnp.where(inputs.key_mask[..., None], x, 0)


def _key_log(affine: AffineMap, inputs: Inputs) -> Array | None:
    """Returns what is added to all log-features of a key outside the kernels, ``[B, S, K]``."""
    total = affine.common
    if inputs.key_bias is not None:
        bias = inputs.key_bias.astype(jnp.float32)
        total = bias if total is None else total + bias
    shape = inputs.key.shape[:3]
    if inputs.key_mask is not None:
        total = jnp.where(inputs.key_mask, 0.0 if total is None else total, MASKED_LOG)
    return None if total is None else jnp.broadcast_to(total, shape)


def _first_state(
    plan: Plan, affine: AffineMap, inputs: Inputs, key: Array, key_log: Array | None
) -> tuple[Array, tuple[Array, Array] | None]:
    """Returns the scale of the first keys, ``[B, K, M]``, and the state before on it, if any.

    Where the state is empty, the scale is that of the first key that is seen: every row that sees a
    key sees this one.
    """
    state, features = inputs.state, affine.key.weights.shape[-2]
    shape = (*state.k_sum.shape[:2], features)
    if affine.kind != "exp":
        scale = jnp.zeros(shape, jnp.float32)
        return scale, ((state.kv, state.k_sum) if plan.carries_state else None)
    if inputs.key_mask is None:
        first, log, seen = key[:, 0], None if key_log is None else key_log[:, 0], None
    else:
        mask = jnp.broadcast_to(inputs.key_mask, key.shape[:3])
        place, seen = jnp.argmax(mask, axis=1, keepdims=True), mask.any(axis=1)
        first = jnp.take_along_axis(key, place[..., None], axis=1)[:, 0]
        assert key_log is not None
        log = jnp.take_along_axis(key_log, place, axis=1)[:, 0]
    first = first.astype(jnp.float32)
    scale = jnp.matmul(affine.key.weights, first[..., None], precision=jax.lax.Precision.HIGHEST)[
        ..., 0
    ]
    scale = scale - affine.norm * jnp.sum(first**2, axis=-1, keepdims=True)
    if affine.key.offset is not None:
        offset = affine.key.offset
        scale = scale + offset.reshape((1,) * (scale.ndim - offset.ndim) + offset.shape)
    if log is not None:
        scale = scale + log[..., None]
    if seen is not None:
        scale = jnp.where(seen[..., None], scale, 0)
    scale = jax.lax.stop_gradient(jnp.broadcast_to(scale, shape))
    if not plan.carries_state:
        return scale, None
    assert state.log_scale is not None
    before = jax.lax.stop_gradient(jnp.broadcast_to(state.log_scale, shape))
    if inputs.log_decay is not None:
        # Where a state has decayed, its scale may be far from what it holds.
        sums = jax.lax.stop_gradient(state.k_sum)
        before_decay = before + jnp.log(jnp.where(sums > 0, sums, 1))
        scale = jnp.where(before > 0.5 * EMPTY_LOG_SCALE, before_decay, scale)
    else:
        scale = jnp.where(before > 0.5 * EMPTY_LOG_SCALE, before, scale)
    factor = jnp.exp(before - scale)
    return scale, (state.kv * factor[..., None, :], state.k_sum * factor)


def _alive(inputs: Inputs) -> Array | None:
    """Returns 1 for tokens at which some key has been seen, ``[B K, 1, S]``; None for all."""
    if inputs.key_mask is None:
        return None
    mask = jnp.broadcast_to(inputs.key_mask, inputs.key.shape[:3])
    since = jnp.where(mask.any(axis=1), jnp.argmax(mask, axis=1), mask.shape[1])
    alive = jnp.arange(mask.shape[1])[None, :, None] >= since[:, None]
    if inputs.state.log_scale is not None:
        begun = (inputs.state.log_scale > 0.5 * EMPTY_LOG_SCALE).any(axis=-1)
        alive = alive | begun[:, None]
    return _key_rows(alive.astype(jnp.float32))


def _rows_of_state(kv: Array, k_sum: Array, value_dim: int, features: int) -> Array:
    """Returns ``[B K, V + 16, M]`` of ``[B, K, V, M]`` and ``[B, K, M]``, padded."""
    rows = jnp.concatenate([_pad(kv, 2, value_dim), k_sum[:, :, None]], axis=2)
    return _pad(_pad(_flat(rows), 1, value_dim + EXTRA), 2, features)


def _state(
    inputs: Inputs, state: tuple[Array, Array] | None, value_dim: int, unit: float
) -> LinearAttentionState:
    """Returns the final state; NaN where it was not asked for."""
    like = inputs.state
    if state is None:
        nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), like)
        return nothing
    shape, features = like.kv.shape, like.kv.shape[-1]
    kv, scale = (x[..., :features].reshape(*shape[:2], *x.shape[1:2], features) for x in state)
    k_sum = kv[:, :, value_dim]
    if like.log_scale is None:
        scale = None
    else:
        scale = jnp.where(k_sum == 0, EMPTY_LOG_SCALE, scale[:, :, 0] / unit)
        scale = jax.lax.stop_gradient(scale)
    return LinearAttentionState(kv[:, :, : shape[2]], k_sum, scale)
