"""Linear attention in GPU kernels written with Pallas (Mosaic GPU), for Hopper.

Queries, keys, values and the projection go in; features are made and used a tile at a time in
shared memory, forward and backward, so that no array of T x M is ever in global memory. Served are
the maps whose log-features are ``w . x - |x|^2 / 2`` (:class:`.PositiveFeatures` and
:class:`.HyperbolicFeatures`); norms, masks and biases are one number a key and are added to its
logs. Everything else is refused with NotImplementedError, so that the next implementation gets it.
Rows of a causal call whose exponents are too far apart for the kernels
(:mod:`fast_attention.linear.chunked.wide_pairs`) are computed in chunks on XLA; if there are any,
so are all gradients of the call.

What is known of it: interpreted, the kernels agree with the definition, values and gradients. They
compile for an H100 (sm_90a) ahead of time; at head width 64 those of bfloat16 inputs spill no
register (``python -m benchmarks.ahead_of_time.gpu``). They have not been run on a GPU, and no speed
is claimed; that is why no default order names this implementation. Interpreted, matrix products and
copies are plain ones (see :mod:`.tiles`), the rest is the same code.

A program serves one batch row, one query head and one segment of the sequence, over which it walks;
:mod:`.segments` cuts sequences so that all multiprocessors have work. Query heads that share a key
head each build the state of a segment anew.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
M features.

Reference: arXiv:2009.14794 (FAVOR+); the chunked form is that of arXiv:2202.10447, section 3.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.softmax import HyperbolicFeatures, PositiveFeatures
from fast_attention.linear.chunked import api as chunked
from fast_attention.linear.chunked.loops import run_if
from fast_attention.linear.state import MASKED_LOG, LinearAttentionState
from fast_attention.linear.types import Inputs, Parts, Plan, finish

CHUNK = 64


def attend(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes linear attention and the state after the last key, on a Hopper GPU.

    Args:
      plan: static choices.
      inputs: arrays, see :class:`fast_attention.linear.types.Inputs`.

    Returns:
      As :func:`fast_attention.linear.chunked.api.attend`.

    Raises:
      NotImplementedError: for a call, or on a platform, that the kernels do not serve.
    """
    _check_platform()
    return attend_on(plan, inputs, interpret=False)


def attend_interpreted(plan: Plan, inputs: Inputs) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes the same with the kernels interpreted, slowly, on any platform."""
    return attend_on(plan, inputs, interpret=True)


def attend_on(
    plan: Plan, inputs: Inputs, *, interpret: bool
) -> tuple[Array | Parts, LinearAttentionState]:
    """Computes the same without a look at the platform, as lowering for another one needs.

    Args:
      plan: static choices.
      inputs: arrays.
      interpret: interpret the kernels instead of compiling them.
    """
    _check_call(plan, inputs)
    attended: Any = _attend(plan, interpret, inputs)
    out, state = attended
    if plan.output == "parts":
        return out, state
    if plan.output == "sum":
        out = finish(out, "sum", plan.epsilon)
    return out.astype(_out_dtype(inputs)), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan: Plan, interpret: bool, inputs: Inputs) -> Any:
    """Attends with the kernels, and in chunks on XLA for rows that have wide pairs.

    Returns:
      Averages, or :class:`Parts` for other outputs, and the state after the last key.
    """
    attended = _with_kernels(plan, interpret, inputs)
    return _corrected(plan, inputs, attended), attended.state


def _forward(plan: Plan, interpret: bool, inputs: Inputs) -> tuple[Any, Any]:
    def attend(smooth: Inputs) -> tuple[Any, Any]:
        attended = _with_kernels(plan, interpret, smooth._replace(key_mask=inputs.key_mask))
        return (attended.out, attended.state), attended

    _, pull_back, attended = jax.vjp(attend, inputs._replace(key_mask=None), has_aux=True)
    out = _corrected(plan, inputs, attended), attended.state
    return out, (inputs, pull_back, attended.any_wide)


def _backward(plan: Plan, interpret: bool, residuals: Any, cotangents: Any) -> tuple[Inputs]:
    del interpret
    inputs, pull_back, any_wide = residuals
    gradients = pull_back(cotangents)[0]
    if any_wide is None:
        return (gradients,)

    def of_chunks(_: Inputs, constants: Any) -> Inputs:
        inputs, cotangents = constants
        smooth = inputs._replace(key_mask=None)
        out, pull_back = jax.vjp(lambda x: _in_chunks(plan, x, inputs.key_mask), smooth)
        return pull_back(jax.tree.map(lambda x, like: x.astype(like.dtype), cotangents, out))[0]

    return (_replace_if(any_wide, of_chunks, gradients, (inputs, cotangents)),)


_attend.defvjp(_forward, _backward)


def _corrected(plan: Plan, inputs: Inputs, attended: Any) -> Any:
    """Replaces the rows that have wide pairs; states are right as they are."""
    from fast_attention.linear.pallas_gpu.segments import joined

    out = attended.out
    if attended.wide is None:
        return out

    def of_chunks(out: Any, constants: Any) -> Any:
        inputs, wide = constants
        wide = joined(wide, *inputs.query.shape[:2])
        right, _ = _in_chunks(plan, inputs, inputs.key_mask)

        def chosen(right: Array, x: Array) -> Array:
            rows = wide.reshape(*wide.shape, *(1,) * (x.ndim - wide.ndim))
            return jnp.where(rows > 0, right.astype(x.dtype), x)

        return jax.tree.map(chosen, right, out)

    return _replace_if(attended.any_wide, of_chunks, out, (inputs, attended.wide))


def _replace_if(
    condition: Array, body: Callable[[Any, Any], Any], carry: Any, constants: Any
) -> Any:
    """Returns ``body(carry, constants)`` if ``condition`` holds, else ``carry``.

    Arrays go into the loop with one axis, and so in the kernels' layout. XLA would choose one that
    suits the body, which hardly ever runs, and copy all of them to it.
    """

    def flat(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1), tree)

    def like(tree: Any, shapes: Any) -> Any:
        return jax.tree.map(lambda x, y: x.reshape(y.shape), tree, shapes)

    fixed = flat(constants)

    def replace(flat_carry: Any) -> Any:
        # Otherwise XLA moves what changes constants alone, and their layout, out of the loop.
        flat_carry, constants_inside = jax.lax.optimization_barrier((flat_carry, fixed))
        return flat(body(like(flat_carry, carry), like(constants_inside, constants)))

    return like(run_if(condition, replace, flat(carry)), carry)


def _in_chunks(plan: Plan, inputs: Inputs, key_mask: Array | None) -> Any:
    plan = dataclasses.replace(
        plan,
        complete=plan.exact_scale,
        output="mean" if plan.output == "mean" else "parts",
        # A program has memory for this, although it is hardly ever run.
        chunk_size=CHUNK,
        saved_states="few",
    )
    return chunked.attend(plan, inputs._replace(key_mask=key_mask))


def _with_kernels(plan: Plan, interpret: bool, inputs: Inputs) -> Any:
    """Returns what :func:`.segments.attend` does, with a state."""
    # Pallas takes long to import and few calls need it.
    from fast_attention.linear.pallas_gpu import segments

    state, scale = inputs.state, inputs.state.log_scale
    assert scale is not None
    # A state from a map without exponents brings one scale for all features.
    state = state._replace(log_scale=jnp.broadcast_to(scale, state.k_sum.shape))
    attended = segments.attend(
        segments.Arguments(
            query=inputs.query,
            key=_without_padding(inputs, inputs.key),
            value=_without_padding(inputs, inputs.value),
            key_log=_key_logs(plan, inputs),
            weights=_weights(plan, inputs),
            state=state if plan.carries_state else None,
        ),
        causal=plan.causal,
        parts=_value_parts(plan, inputs),
        division=_division(plan, inputs),
        with_state=plan.carries_state,
        interpret=interpret,
    )
    out = attended.out
    if plan.exact_scale and isinstance(out, Parts):
        out = _exact_parts(plan, inputs, out)
    return attended._replace(
        out=out,
        # The state is not used if the call neither starts from one nor returns it.
        state=state if attended.state is None else attended.state,
    )


def _exact_parts(plan: Plan, inputs: Inputs, parts: Parts) -> Parts:
    # The kernels leave out what all features of a query have in common.
    common = _half_norms(inputs.query) - _half_log_count(plan, inputs)
    constant = jax.lax.stop_gradient(common)
    factor = jnp.exp(common - constant)
    assert parts.log_scale is not None
    return Parts(
        parts.numerator * factor[..., None],
        parts.denominator * factor,
        parts.log_scale + constant,
    )


def _key_logs(plan: Plan, inputs: Inputs) -> Array:
    """Returns what is added to all log-features of a key, ``[B, K, S]``."""
    logs = _half_norms(_without_padding(inputs, inputs.key))
    if plan.exact_scale:
        logs = logs - _half_log_count(plan, inputs)
    if inputs.key_bias is not None:
        logs = logs + inputs.key_bias.astype(jnp.float32)
    if inputs.key_mask is not None:
        logs = jnp.where(inputs.key_mask, logs, MASKED_LOG)
    return jnp.swapaxes(logs, 1, 2)


def _half_norms(x: Array) -> Array:
    """Returns ``-|x|^2 / 2`` of the scaled vectors, ``[B, T, H]``."""
    x = x.astype(jnp.float32)
    return -0.5 * x.shape[-1] ** -0.5 * jnp.sum(x * x, axis=-1)


def _half_log_count(plan: Plan, inputs: Inputs) -> float:
    features = plan.feature_map.num_features(inputs.parameters, inputs.query.shape[-1])
    return 0.5 * math.log(features)


def _weights(plan: Plan, inputs: Inputs) -> Array:
    """Returns the projection with the scale of the inputs in it, ``[B or 1, K or 1, M, D]``."""
    weights = inputs.parameters.astype(jnp.float32) * inputs.query.shape[-1] ** -0.25
    if isinstance(plan.feature_map, HyperbolicFeatures):
        weights = jnp.concatenate([weights, -weights], axis=-2)
    return weights.reshape((1,) * (4 - weights.ndim) + weights.shape)


def _without_padding(inputs: Inputs, x: Array) -> Array:
    # Whatever lies in padding, nan and inf included, must not reach a product.
    return x if inputs.key_mask is None else jnp.where(inputs.key_mask[..., None], x, 0)


def _division(plan: Plan, inputs: Inputs) -> Any:
    from fast_attention.linear.pallas_gpu.program import Division

    if plan.output != "mean":
        return None
    bfloat16 = _out_dtype(inputs) == jnp.bfloat16
    return Division(plan.epsilon, jnp.bfloat16 if bfloat16 else jnp.float32)


def _out_dtype(inputs: Inputs) -> Any:
    return jnp.result_type(inputs.query, inputs.key, inputs.value)


def _value_parts(plan: Plan, inputs: Inputs) -> int:
    """Returns in how many bfloat16 parts features and values are multiplied."""
    precision = plan.precision
    if isinstance(precision, str):
        precision = jax.lax.Precision[precision.upper()]
    if precision in (None, jax.lax.Precision.DEFAULT):
        return 1 if inputs.query.dtype == jnp.bfloat16 else 2
    if precision == jax.lax.Precision.HIGH:
        return 2
    if precision == jax.lax.Precision.HIGHEST:
        return 3
    raise NotImplementedError(
        f"The GPU kernels support the precisions default, high and highest, got {precision!r}."
    )


def _check_platform() -> None:
    device = jax.local_devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform != "gpu" or capability.partition(".")[0] != "9":
        raise NotImplementedError(
            "The GPU kernels need an NVIDIA GPU of the Hopper generation (compute capability 9), "
            f"got {device.device_kind} {capability}; use implementation='chunked', or "
            "'pallas_gpu_interpret' to interpret them."
        )


def _check_call(plan: Plan, inputs: Inputs) -> None:
    if type(plan.feature_map) not in (PositiveFeatures, HyperbolicFeatures):
        raise NotImplementedError(
            "The GPU kernels support PositiveFeatures and HyperbolicFeatures, got "
            f"{type(plan.feature_map).__name__}."
        )
    if inputs.segment_ids is not None:
        raise NotImplementedError("The GPU kernels do not support segment_ids.")
    if inputs.state.kv.dtype != jnp.float32:
        raise NotImplementedError(
            f"The GPU kernels compute in float32, got {inputs.state.kv.dtype}."
        )
    if plan.chunk_size not in (None, CHUNK):
        raise NotImplementedError(
            f"The GPU kernels work in chunks of {CHUNK}, got chunk_size={plan.chunk_size}."
        )
    if plan.saved_states == "all":
        raise NotImplementedError("The GPU kernels save no states, got saved_states='all'.")
    if plan.unroll not in (None, 1):
        raise NotImplementedError(f"The GPU kernels do not unroll, got unroll={plan.unroll}.")
