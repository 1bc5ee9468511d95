"""What both directions share: chunks, products, states and their scale.

Chunks have positions in the last axis, ``[B, H, D, C]``, as XLA lays ``[B, T, H, D]`` out on a TPU
for D below 128, so that moving the axis costs nothing. Heads of whole lanes keep their order of
axes outside the chunks (:class:`Operand`). The rows of a state
below its values are the sums of features: values get rows of ones, and one product makes numerators
and denominators.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, G = H / K, D head width,
V value width, M features, C chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.state import EMPTY_LOG_SCALE, LinearAttentionState
from fast_attention.linear.time_minor_chunks.features import FeatureFunctions, feature_functions
from fast_attention.linear.types import Inputs, Plan, safe_inverse

LANES = 128
"""Numbers in a row of a TPU's registers."""

EXTRA = 16
"""Rows of ones below values: a tile of bfloat16."""

LIMIT = 80
"""Upper bound of a log-feature of a key, to base 2, relative to its scale.

A product of features that underflows loses at most ``2^(LIMIT - 126)`` of a denominator, which is
at least 1, and sums of ``2^LIMIT`` are far from overflow.
"""


class State(NamedTuple):
    """The sums over keys so far.

    Attributes:
      rows: float32 ``[B, K, V + 16, M]``; the last 16 are sums of features.
      scale: the logarithm of their unit, ``[B, K, M]``; None for maps without exponents. Some key
        seen before attains it, or the sum of their features does.
    """

    rows: Array
    scale: Array | None


class Operand(NamedTuple):
    """Queries, keys, values or outputs, in the order of axes of their layout on a TPU.

    Attributes:
      array: ``[B, H, D, T]``, or ``[B, T, H, D]`` if D fills whole lanes.
      time_last: which of the two.
    """

    array: Array
    time_last: bool


def operand(x: Array) -> Operand:
    """Returns ``[B, T, H, D]`` as an operand."""
    if x.shape[-1] % LANES == 0:
        return Operand(x, False)
    return Operand(jnp.transpose(x, (0, 2, 3, 1)), True)


class Call(NamedTuple):
    """One call in the layout of this package.

    Attributes:
      features: of queries and keys.
      low: products take bfloat16 operands.
      precision: of the others.
      query: of H heads.
      key: of K heads.
      value: of K heads.
      groups: G.
      key_mask: bool ``[B, K or 1, S]``, or None.
      key_bias: ``[B, K or 1, S]``, or None.
    """

    features: FeatureFunctions
    low: bool
    precision: Any
    query: Operand
    key: Operand
    value: Operand
    groups: int
    key_mask: Array | None
    key_bias: Array | None

    def product(self, subscripts: str, left: Array, right: Array) -> Array:
        """Returns a product in float32; ``g`` in the subscripts is the axis G if there is one."""
        if self.groups == 1:
            subscripts = subscripts.replace("g", "")
        kind = jnp.bfloat16 if self.low else jnp.float32
        return jnp.einsum(
            subscripts,
            left.astype(kind),
            right.astype(kind),
            precision=None if self.low else self.precision,
            preferred_element_type=jnp.float32,
        )

    def stored(self, x: Array) -> Array:
        """Returns ``x`` as the operand of several products, computed once."""
        return lax.optimization_barrier(x.astype(jnp.bfloat16) if self.low else x)


def call_of(plan: Plan, inputs: Inputs) -> Call:
    """Brings the arrays of a call to the layout."""
    default = plan.precision in (None, "default", lax.Precision.DEFAULT)
    low = default and inputs.query.dtype == jnp.bfloat16
    return Call(
        features=feature_functions(plan, inputs, low=low),
        low=low,
        precision=lax.Precision.HIGHEST if default else plan.precision,
        query=operand(inputs.query),
        key=operand(inputs.key),
        value=operand(inputs.value),
        groups=inputs.query.shape[2] // inputs.key.shape[2],
        key_mask=None if inputs.key_mask is None else jnp.swapaxes(inputs.key_mask, 1, 2),
        key_bias=None if inputs.key_bias is None else jnp.swapaxes(inputs.key_bias, 1, 2),
    )


class Keys(NamedTuple):
    """A chunk of keys; what is not seen is 0.

    Attributes:
      key: ``[B, K, D, C]``.
      value: with rows of ones, ``[B, K, V + 16, C]``.
      bias: ``[B, K or 1, C]``, or None.
      seen: bool ``[B, K or 1, C]``, or None for all.
    """

    key: Array
    value: Array
    bias: Array | None
    seen: Array | None


def load(x: Operand, start: Array | int, size: int) -> Array:
    """Returns positions ``[start, start + size)``, ``[B, H, D, C]``."""
    if not x.time_last:
        piece = lax.dynamic_slice_in_dim(x.array, start, size, axis=1)
        return jnp.transpose(piece, (0, 2, 3, 1))
    return _slice(x.array, start, size)


def load_queries(call: Call, start: Array | int, size: int) -> Array:
    """Returns a chunk of queries, ``[B, K, G, D, C]``, without the axis G if it is 1."""
    return in_groups(call, load(call.query, start, size))


def in_groups(call: Call, x: Array) -> Array:
    """Returns ``[B, K, G, ...]`` of ``[B, H, ...]``, without the axis G if it is 1."""
    if call.groups == 1:
        return x
    batch, heads, *rest = x.shape
    return x.reshape(batch, heads // call.groups, call.groups, *rest)


def _slice(x: Array, start: Array | int, size: int) -> Array:
    """Returns ``[start, start + size)`` of the last axis of ``[B, ..., T]``.

    The axes between are one while it is cut: else XLA moves the width behind time in the whole
    array of keys, before the loop, to spare the chunks doing so.
    """
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    piece = lax.dynamic_slice_in_dim(flat, start, size, axis=-1)
    return piece.reshape(*x.shape[:-1], size)


def load_keys(call: Call, start: Array | int, size: int) -> Keys:
    """Returns a chunk of keys."""
    key, value = load(call.key, start, size), load(call.value, start, size)
    seen = None if call.key_mask is None else _slice(call.key_mask, start, size)
    if seen is not None:
        # Whatever lies in padding, nan and inf included, must not reach a product.
        key = jnp.where(seen[:, :, None], key, 0)
        value = jnp.where(seen[:, :, None], value, 0)
    bias = None if call.key_bias is None else _slice(call.key_bias, start, size)
    value = jnp.pad(value, ((0, 0), (0, 0), (0, EXTRA), (0, 0)), constant_values=1)
    return Keys(key, value, None if bias is None else bias.astype(jnp.float32), seen)


def query_features(call: Call, query: Array, scale: Array | None) -> Array:
    """Returns features of queries ``[B, K, G, C, M]``, on a scale the largest of a row 1."""
    return query_features_of(call, call.features.of_queries(query), scale)


def query_features_of(call: Call, x: Array, scale: Array | None) -> Array:
    """Returns the same of what the map returned."""
    if scale is not None:
        x = x + beside_groups(scale[:, :, None], x)
        x = call.features.exp(x - jnp.max(x, axis=-1, keepdims=True))
    return call.stored(x)


def beside_groups(x: Array, rows: Array) -> Array:
    """Returns ``[B, K, 1, ...]`` of ``[B, K, ...]`` if rows have an axis G behind these two."""
    return x if x.ndim == rows.ndim else x[:, :, None]


def first_state(call: Call, inputs: Inputs) -> State:
    """Returns the state before the first key."""
    state = inputs.state
    batch, kv_heads, features = state.k_sum.shape
    sums = jnp.broadcast_to(state.k_sum[:, :, None], (batch, kv_heads, EXTRA, features))
    # Else XLA makes constant zeros part of each round of the loop.
    rows = lax.optimization_barrier(jnp.concatenate([state.kv, sums], axis=2))
    if state.log_scale is None:
        return State(rows, None)
    scale = jnp.broadcast_to(state.log_scale, state.k_sum.shape) * call.features.unit
    return normalised(call, State(rows, scale))


def last_state(call: Call, state: State, inputs: Inputs) -> LinearAttentionState:
    """Returns a state as other implementations have it."""
    value_dim = inputs.value.shape[-1]
    kv, k_sum = state.rows[:, :, :value_dim], state.rows[:, :, value_dim]
    if state.scale is None:
        return LinearAttentionState(kv, k_sum, None)
    scale = jnp.where(k_sum == 0, EMPTY_LOG_SCALE, state.scale / call.features.unit)
    return LinearAttentionState(kv, k_sum, lax.stop_gradient(scale))


def normalised(call: Call, state: State) -> State:
    """Returns a state whose sums of features are at most 1."""
    assert state.scale is not None
    rise = call.features.log(jnp.maximum(state.rows[:, :, -1], 1))
    rows = state.rows * call.features.exp(-rise)[:, :, None]
    return State(rows, state.scale + rise)


def of_heads(chosen: Array, new: State, old: State) -> State:
    """Returns the new state of the heads that are chosen, bool ``[B, K]``, else the old one."""
    assert new.scale is not None and old.scale is not None
    chosen = chosen[..., None]
    return State(
        jnp.where(chosen[..., None], new.rows, old.rows), jnp.where(chosen, new.scale, old.scale)
    )


def with_first_scale(call: Call, state: State, keys: Keys) -> State:
    """Gives a state without a scale that of the first key of a chunk that is seen."""
    if state.scale is None:
        return state
    size = keys.key.shape[-1]
    place = jnp.zeros((1, 1), jnp.int32) if keys.seen is None else jnp.argmax(keys.seen, axis=-1)
    here = jnp.arange(size)[None, None] == place[..., None]
    key = jnp.where(here[:, :, None], keys.key, 0).sum(axis=-1, keepdims=True)
    bias = keys.bias
    if bias is not None:
        bias = jnp.where(here, bias, 0).sum(axis=-1, keepdims=True)
    log = call.features.of_keys(key.astype(keys.key.dtype), bias, None)[:, :, 0]
    if keys.seen is not None:
        log = jnp.where(keys.seen.any(axis=-1)[..., None], log, EMPTY_LOG_SCALE)
    empty = state.scale <= 0.5 * EMPTY_LOG_SCALE
    return state._replace(scale=jnp.where(empty, log, state.scale))


def exceeding(before: State, after: Array) -> Array:
    """Returns which heads may have a key in a chunk that exceeds the scale, bool ``[B, K]``.

    A feature above the limit shows in the sum of features. The other way round a head may be
    named without such a key.

    Args:
      before: the state before the chunk.
      after: rows of the state after it.
    """
    added = after[:, :, -1] - before.rows[:, :, -1]
    return jnp.any(added > 2.0 ** (LIMIT - 1), axis=-1)


def where_needed(condition: Array, body: Callable[[], Any], usual: Any) -> Any:
    """Returns ``body()`` if a condition holds anywhere, else ``usual``.

    A branch stays one under ``vmap``. Its derivatives, of any order, compute it again: nothing is
    kept of a branch that is seldom taken.
    """
    return lax.cond(_anywhere(condition), jax.checkpoint(body), lambda: usual)


@custom_vmap
def _anywhere(condition: Array) -> Array:
    return jnp.any(condition)


@_anywhere.def_vmap
def _(axis_size: int, in_batched: Any, condition: Array) -> Any:
    del axis_size, in_batched
    return _anywhere(condition), False


def buffer(shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns an array to be overwritten, with any content.

    Under ``vmap`` it has no axis of rows until it is written to, unlike ``lax.empty`` up to JAX
    0.10: ``jax.jacfwd`` and ``jax.hessian`` need values that do not differ between tangents.
    """

    @custom_vmap
    def allocate(nothing: Array) -> Array:
        del nothing
        return lax.empty(shape, dtype)

    @allocate.def_vmap
    def _(axis_size: int, in_batched: Any, nothing: Array) -> Any:
        del axis_size, in_batched
        return allocate(nothing), False

    return allocate(jnp.zeros(()))


def empty_output(inputs: Inputs) -> Array:
    """Returns the buffer of outputs, the array of an :class:`Operand`."""
    batch, length, heads, _ = inputs.query.shape
    value_dim = inputs.value.shape[-1]
    dtype = jnp.result_type(inputs.query, inputs.key, inputs.value)
    if value_dim % LANES == 0:
        return buffer((batch, length, heads, value_dim), dtype)
    return buffer((batch, heads, value_dim, length), dtype)


def write(call: Call, plan: Plan, out: Array, rows: Array, start: Array | int) -> Array:
    """Divides rows ``[B, K, G, V + 16, C]`` by their last ones and writes them at ``start``."""
    value_dim = rows.shape[-2] - EXTRA
    rows = rows.reshape(rows.shape[0], -1, *rows.shape[-2:])
    new = rows[:, :, :value_dim] * safe_inverse(rows[:, :, value_dim], plan.epsilon)[:, :, None]
    return store(Operand(out, call.value.time_last), new, start)


def denominators(rows: Array) -> Array:
    """Returns those of rows ``[B, K, G, V + 16, C]``, ``[B, K, G, C]``."""
    return rows[..., rows.shape[-2] - EXTRA, :]


def empty_denominators(inputs: Inputs) -> Array:
    """Returns the buffer of denominators, ``[B, H, T]``."""
    batch, length, heads, _ = inputs.query.shape
    return buffer((batch, heads, length), jnp.float32)


def write_denominators(kept: Array | None, rows: Array, start: Array | int) -> Array | None:
    """Writes the denominators of a chunk into the buffer, if there is one."""
    if kept is None:
        return None
    new = denominators(rows).reshape(*kept.shape[:2], -1)
    return lax.dynamic_update_slice_in_dim(kept, new, start, axis=-1)


def load_denominators(call: Call, kept: Array, start: Array | int, size: int) -> Array:
    """Returns those of a chunk, ``[B, K, G, C]``."""
    return in_groups(call, lax.dynamic_slice_in_dim(kept, start, size, axis=-1))


def store(x: Operand, new: Array, start: Array | int) -> Array:
    """Returns the array of ``x`` with positions ``[B, H, D, C]`` written at ``start``."""
    new = new.astype(x.array.dtype)
    if x.time_last:
        return lax.dynamic_update_slice_in_dim(x.array, new, start, axis=-1)
    return lax.dynamic_update_slice_in_dim(x.array, jnp.transpose(new, (0, 3, 1, 2)), start, axis=1)


def finished(call: Call, out: Array) -> Array:
    """Returns ``[B, T, H, V]`` of the buffer."""
    return heads_last(Operand(out, call.value.time_last))


def heads_last(x: Operand) -> Array:
    """Inverse of :func:`operand`."""
    return jnp.transpose(x.array, (0, 3, 1, 2)) if x.time_last else x.array


def varying(inputs: Inputs, tree: Any) -> Any:
    """Lets the carry of a loop differ over the axes of a mesh over which the inputs do."""
    return vary_alike(tree, jax.tree.leaves(inputs))
