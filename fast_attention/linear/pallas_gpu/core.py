"""Linear attention on exponential features as one differentiable operation of the GPU kernels.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
M features.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.wide_pairs import HEADROOM, pair_limit
from fast_attention.linear.pallas_gpu.backward import Cotangents, Given, backward_memory
from fast_attention.linear.pallas_gpu.backward_keys import key_gradients
from fast_attention.linear.pallas_gpu.backward_queries import query_gradients
from fast_attention.linear.pallas_gpu.forward import forward
from fast_attention.linear.pallas_gpu.program import (
    SHARED_BYTES,
    Operands,
    Sizes,
    shared_bytes,
)
from fast_attention.linear.pallas_gpu.state import State
from fast_attention.linear.pallas_gpu.tiles import TILE, split
from fast_attention.linear.state import EMPTY_LOG_SCALE, MASKED_LOG


class Arguments(NamedTuple):
    """What is differentiated. Log-features are ``x @ weights^T``, plus ``key_log`` for keys.

    Attributes:
      query: ``[B, T, H, D]``.
      key: ``[B, S, K, D]``.
      value: ``[B, S, K, V]``.
      key_log: float32 ``[B, K, S]``, ``MASKED_LOG`` where a key is masked.
      weights: float32 ``[B or 1, K or 1, M, D]``.
      kv: float32 ``[B, K, V, M]``, as in :class:`fast_attention.linear.state.LinearAttentionState`.
      k_sum: float32 ``[B, K, M]``.
      log_scale: float32 ``[B, K, M]``; a constant.
    """

    query: Array
    key: Array
    value: Array
    key_log: Array
    weights: Array
    kv: Array
    k_sum: Array
    log_scale: Array


class Attended(NamedTuple):
    """Attention before its division, and the state after the last key.

    Attributes:
      numerator: float32 ``[B, T, H, V]``.
      denominator: float32 ``[B, H, T]``.
      log_scale: of both, ``[B, H, T]``; a constant.
      wide: 1 where a row has a pair of :mod:`fast_attention.linear.chunked.wide_pairs`, which
      kernels lose, ``[B, H, T]``. state: as given, after the last key.
    """

    numerator: Array
    denominator: Array
    log_scale: Array
    wide: Array
    state: tuple[Array, Array, Array]


@dataclasses.dataclass(frozen=True)
class Choices:
    """The static choices of one call.

    Attributes:
      causal: position t sees keys 0..t.
      parts: bfloat16 parts in which features and values are multiplied.
      interpret: run the kernels on plain operations.
    """

    causal: bool
    parts: int
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_with_kernels(choices: Choices, arguments: Arguments) -> Attended:
    """Computes linear attention on features ``exp(x @ weights^T)``."""
    return _forward(choices, arguments)[0]


def _forward(choices: Choices, arguments: Arguments) -> tuple[Attended, Any]:
    sizes = sizes_of(choices, arguments)
    operands, state = _operands(sizes, arguments)
    out = forward(sizes, operands, state, causal=choices.causal)
    length, width = arguments.query.shape[1], arguments.value.shape[-1]
    log_scale = out.maxima.row_max
    wide = jnp.zeros_like(log_scale)
    if choices.causal:
        log_scale = log_scale + out.maxima.pair_max
        wide = _wide_rows(out.maxima.key_shift, out.maxima.pair_max)
    after = [x[:, :: sizes.groups, : sizes.real_features] for x in out.state]
    attended = Attended(
        out.numerator[:, :length, :, :width],
        out.denominator[:, :, :length],
        log_scale[:, :, :length],
        wide[:, :, :length],
        (jnp.swapaxes(after[0][..., :width], -1, -2), after[1], after[2]),
    )
    return attended, (arguments, out.maxima, out.state)


def _wide_rows(key_shift: Array, pair_max: Array) -> Array:
    """Tells which rows have wide pairs, ``[B, H, T]``."""
    shift = key_shift.reshape(*key_shift.shape[:-1], -1, TILE)
    # Rows read the first key of a chunk on the scale of the state with it.
    key_max = (shift + HEADROOM).at[..., 0].set(MASKED_LOG)
    key_max = jax.lax.cummax(key_max, axis=key_max.ndim - 1).reshape(pair_max.shape)
    return (key_max - pair_max > pair_limit(pair_max.dtype)).astype(pair_max.dtype)


def _backward(choices: Choices, residuals: Any, cotangents: Attended) -> tuple[Arguments]:
    arguments, maxima, after = residuals
    sizes = sizes_of(choices, arguments)
    operands, state = _operands(sizes, arguments)
    given = Given(operands, after, None, maxima, _cotangents(sizes, cotangents))
    if choices.causal:
        initial = jnp.repeat(state.log_scale, sizes.groups, axis=1)[:, :, None]
        before = jnp.concatenate([initial, maxima.scales[:, :, :-1]], axis=2)
        given = given._replace(state=state, before=before)
    queries = query_gradients(sizes, given, causal=choices.causal)
    if not choices.causal:
        d_kv, d_k_sum, _ = queries.state
        given = given._replace(cotangents=given.cotangents._replace(kv=d_kv, k_sum=d_k_sum))
    keys = key_gradients(sizes, given, causal=choices.causal)
    d_kv, d_k_sum, _ = keys.state
    if not choices.causal:
        decay = jnp.exp(jnp.repeat(state.log_scale, sizes.groups, axis=1) - after.log_scale)
        d_kv, d_k_sum = d_kv * decay[..., None], d_k_sum * decay
    d_weights = (queries.weights + keys.weights)[:, :, : sizes.real_features]
    return (
        Arguments(
            query=_like(arguments.query, queries.query),
            key=_like(arguments.key, _sum_groups(keys.key, sizes.groups, 2)),
            value=_like(arguments.value, _sum_groups(keys.value, sizes.groups, 2)),
            key_log=_like(arguments.key_log, _sum_groups(keys.key_log, sizes.groups, 1)),
            weights=_like(
                arguments.weights,
                _sum_shared(_sum_groups(d_weights, sizes.groups, 1), arguments.weights.shape),
            ),
            kv=_like(arguments.kv, jnp.swapaxes(_sum_groups(d_kv, sizes.groups, 1), -1, -2)),
            k_sum=_like(arguments.k_sum, _sum_groups(d_k_sum, sizes.groups, 1)),
            log_scale=jnp.zeros_like(arguments.log_scale),
        ),
    )


attend_with_kernels.defvjp(_forward, _backward)


def check_shared_memory(choices: Choices, arguments: Arguments) -> None:
    """Refuses a call whose kernels, backward included, need more shared memory than there is.

    Raises:
      NotImplementedError: if they do.
    """
    sizes = sizes_of(choices, arguments)
    input_parts = 1 if arguments.query.dtype == jnp.bfloat16 else 3
    needed = shared_bytes(backward_memory(sizes, input_parts))
    if needed > SHARED_BYTES:
        raise NotImplementedError(
            f"The GPU kernels would need {needed} bytes of shared memory for head width "
            f"{sizes.head_dim}, value width {sizes.value_dim}, {arguments.query.dtype} inputs and "
            f"{sizes.parts} parts a feature; there are {SHARED_BYTES}."
        )


def sizes_of(choices: Choices, arguments: Arguments) -> Sizes:
    """Returns the sizes of the kernels, padded to whole tiles."""
    query, key, value = arguments.query, arguments.key, arguments.value
    return Sizes(
        batch=query.shape[0],
        heads=query.shape[2],
        groups=query.shape[2] // key.shape[2],
        queries=_padded(query.shape[1]),
        keys=_padded(key.shape[1]),
        head_dim=_padded(query.shape[-1]),
        value_dim=_padded(value.shape[-1]),
        features=_padded(arguments.weights.shape[-2]),
        real_features=arguments.weights.shape[-2],
        parts=choices.parts,
        interpret=choices.interpret,
    )


def _operands(sizes: Sizes, arguments: Arguments) -> tuple[Operands, State]:
    query, key = (_pad(x, {1: 0, 3: 0}) for x in (arguments.query, arguments.key))
    value = _pad(arguments.value, {1: 0, 3: 0})
    operands = Operands(
        query=split(query, 3),
        key=split(key, 3),
        value=split(value, sizes.parts),
        key_log=_pad(arguments.key_log, {2: MASKED_LOG}),
        weights=split(_pad(arguments.weights, {2: 0, 3: 0}), 3),
    )
    state = State(
        jnp.swapaxes(_pad(arguments.kv, {2: 0, 3: 0}), -1, -2),
        _pad(arguments.k_sum, {2: 0}),
        _pad(arguments.log_scale, {2: EMPTY_LOG_SCALE}),
    )
    return operands, state


def _cotangents(sizes: Sizes, cotangents: Attended) -> Cotangents:
    d_kv, d_k_sum, _ = cotangents.state
    # The heads of a group end with the same state; the first of them takes its cotangent.
    first = jnp.arange(sizes.heads) % sizes.groups == 0
    d_kv = jnp.where(first[:, None, None], jnp.repeat(d_kv, sizes.groups, axis=1), 0)
    d_k_sum = jnp.where(first[:, None], jnp.repeat(d_k_sum, sizes.groups, axis=1), 0)
    return Cotangents(
        numerator=tuple(split(_pad(cotangents.numerator, {1: 0, 3: 0}), sizes.parts)),
        denominator=_pad(cotangents.denominator, {2: 0}),
        kv=jnp.swapaxes(_pad(d_kv, {2: 0, 3: 0}), -1, -2),
        k_sum=_pad(d_k_sum, {2: 0}),
    )


def _sum_groups(x: Array, groups: int, axis: int) -> Array:
    """Adds up the query heads that share a key head."""
    shape = (*x.shape[:axis], x.shape[axis] // groups, groups, *x.shape[axis + 1 :])
    return x.reshape(shape).sum(axis + 1)


def _sum_shared(x: Array, shape: tuple[int, ...]) -> Array:
    """Adds up what batch rows and heads share, ``[B, K, ...]`` to ``[B or 1, K or 1, ...]``."""
    axes = tuple(i for i in range(2) if shape[i] == 1)
    return x.sum(axes, keepdims=True)


def _like(x: Array, gradient: Array) -> Array:
    """Cuts a gradient to the sizes before padding, in the type of ``x``."""
    return jax.lax.slice(gradient, (0,) * x.ndim, x.shape).astype(x.dtype)


def _padded(size: int) -> int:
    return -(-size // TILE) * TILE


def _pad(x: Array, axes: dict[int, float]) -> Array:
    """Fills axes up to whole tiles, each with a value of its own."""
    for axis, value in axes.items():
        missing = _padded(x.shape[axis]) - x.shape[axis]
        if missing:
            widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
            x = jnp.pad(x, widths, constant_values=value)
    return x
