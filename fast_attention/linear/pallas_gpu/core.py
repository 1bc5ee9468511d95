"""Linear attention on exponential features as one differentiable operation of the GPU kernels.

A first kernel makes the states of the keys of segments, a second one reads: causally inside a
segment and from the states of earlier ones; or, bidirectional, from all states. All arrays are
padded to whole tiles.

Shape letters: B batch, N segments of a sequence, R = B N rows, T queries, S keys, H heads, K
key/value heads, D head width, V value width, M features.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_gpu.backward import Cotangents, Given, backward_memory
from fast_attention.linear.pallas_gpu.backward_keys import KeyGradients, key_gradients
from fast_attention.linear.pallas_gpu.backward_queries import query_gradients
from fast_attention.linear.pallas_gpu.forward import absorb_keys, forward
from fast_attention.linear.pallas_gpu.program import (
    SHARED_BYTES,
    Division,
    Operands,
    Sizes,
    shared_bytes,
)
from fast_attention.linear.pallas_gpu.state import Sources, State
from fast_attention.linear.pallas_gpu.tiles import split
from fast_attention.linear.types import inverse_slope, safe_inverse


class Keys(NamedTuple):
    """Keys of segments. Log-features are ``x @ weights^T``, plus ``log`` for keys.

    Attributes:
      key: ``[R, S, K, D]``.
      value: ``[R, S, K, V]``.
      log: float32 ``[R, K, S]``, ``MASKED_LOG`` where a key is masked.
    """

    key: Array
    value: Array
    log: Array


class Attended(NamedTuple):
    """Attention, and the state after the last key.

    Attributes:
      numerator: ``[R, T, H, V]``; divided if there is a division, else float32.
      denominator: float32 ``[R, H, T]``.
      log_scale: of both, ``[R, H, T]``; a constant.
      wide: 1 where a row has a pair of :mod:`fast_attention.linear.chunked.wide_pairs`, which
        kernels lose, else 0, ``[R, H, T]``; None if not causal.
      any_wide: largest of them in parts, of any shape; None if not causal.
      state: ``[B, K, ...]``, None if not asked for; its scale is a constant.
    """

    numerator: Array
    denominator: Array
    log_scale: Array
    wide: Array | None
    any_wide: Array | None
    state: State | None


@dataclasses.dataclass(frozen=True)
class Choices:
    """The static choices of one call.

    Attributes:
      causal: position t sees keys 0..t.
      parts: bfloat16 parts in which features and values are multiplied.
      division: how numerators are divided by denominators, None if they are not.
      segments: of each sequence, N.
      groups: query heads that share a key head, H / K.
      features: M before padding.
      with_state: whether to return the state after the last key.
      interpret: run the kernels on plain operations.
    """

    causal: bool
    parts: int
    division: Division | None
    segments: int
    groups: int
    features: int
    with_state: bool
    interpret: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(
    choices: Choices, query: Array, keys: Keys, weights: Array, initial: State | None
) -> Attended:
    """Computes linear attention on features ``exp(x @ weights^T)``.

    Args:
      choices: static ones.
      query: ``[R, T, H, D]``.
      keys: of all segments.
      weights: the projection, float32 ``[B or 1, K or 1, M, D]``.
      initial: the state before the first key, ``[B, K, ...]``, None if it is empty. Its scale is a
        constant.
    """
    return _forward(choices, query, keys, weights, initial)[0]


def _forward(
    choices: Choices, query: Array, keys: Keys, weights: Array, initial: State | None
) -> tuple[Attended, Any]:
    sources = Sources(initial, None)
    if choices.segments > 1 or not choices.causal:
        own = absorb_keys(
            _sizes(choices, None, keys, weights), _operands(choices, (), keys, weights)
        )
        sources = sources._replace(own=own)
    sizes = _sizes(choices, query, keys, weights)
    out = forward(sizes, _operands(choices, query, keys, weights), sources, causal=choices.causal)
    log_scale, state = out.maxima.row_max, None
    if choices.causal:
        log_scale = log_scale + out.maxima.pair_max
    if choices.with_state:
        state = jax.tree.map(lambda x: _of_key_heads(sizes, x)[:, -1], out.state)
    attended = Attended(out.numerator, out.denominator, log_scale, out.wide, out.any_wide, state)
    after = None if choices.causal else out.state
    divided = None if choices.division is None else (out.numerator, out.denominator)
    return attended, (query, keys, weights, sources, out.maxima, after, divided)


def _backward(
    choices: Choices, residuals: Any, cotangents: Attended
) -> tuple[Array, Keys, Array, State | None]:
    query, keys, weights, sources, maxima, after, divided = residuals
    sizes = _sizes(choices, query, keys, weights)
    d_numerator, d_denominator = cotangents.numerator, cotangents.denominator
    if choices.division is not None:
        d_numerator, d_denominator = _pull_back_division(choices.division, divided, d_numerator)
    of_results = Cotangents(
        split(d_numerator, sizes.parts),
        d_denominator,
        None if cotangents.state is None else _of_last_segment(sizes, cotangents.state),
    )
    operands = _operands(choices, query, keys, weights)
    given = Given(operands, after, sources, maxima, of_results)
    of_queries = query_gradients(sizes, given, causal=choices.causal)
    of_keys = None
    if choices.causal:
        of_keys = key_gradients(sizes, given, causal=True)
        d_state = jax.tree.map(lambda x: _sum_groups(sizes, x), of_keys.state)
        scale = _of_key_heads(sizes, maxima.scales[:, :, 0])
        seen = jnp.tril(jnp.ones((sizes.segments, sizes.segments), bool), -1)
        of_keys = _of_key_heads_alone(sizes, of_keys)
    else:
        d_state = of_queries.state
        d_state = jax.tree.map(lambda x: _sum_groups(sizes, x).sum(1, keepdims=True), d_state)
        scale = _of_key_heads(sizes, after.log_scale)[:, :1]
        seen = jnp.ones((1, sizes.segments), bool)
    d_initial, d_own = _pull_back_sources(sources, scale, seen, d_state)
    if d_own is not None:
        of_states = Cotangents((), None, d_own._replace(log_scale=None))
        own = Given(_operands(choices, (), keys, weights), sources.own, None, None, of_states)
        sizes_of_keys = _sizes(choices, None, keys, weights)
        of_keys = key_gradients(sizes_of_keys, own, causal=False, others=of_keys)
    assert of_keys is not None
    d_weights = _sum_groups(sizes, of_queries.weights)
    d_weights = d_weights + of_keys.weights.reshape(d_weights.shape)
    return (
        of_queries.query.astype(query.dtype),
        Keys(
            of_keys.key.astype(keys.key.dtype),
            of_keys.value.astype(keys.value.dtype),
            of_keys.key_log,
        ),
        _sum_shared(d_weights, weights.shape),
        d_initial,
    )


attend.defvjp(_forward, _backward)


def check_shared_memory(choices: Choices, query: Array, keys: Keys, weights: Array) -> None:
    """Refuses a call whose kernels, backward included, need more shared memory than there is.

    Args:
      choices: static ones.
      query: padded, as the others.
      keys: of all segments.
      weights: the projection.

    Raises:
      NotImplementedError: if they do.
    """
    sizes = _sizes(choices, query, keys, weights)
    needed = shared_bytes(backward_memory(sizes, 1 if sizes.bfloat16 else 3))
    if needed > SHARED_BYTES:
        raise NotImplementedError(
            f"The GPU kernels would need {needed} bytes of shared memory for head width "
            f"{sizes.head_dim}, value width {sizes.value_dim}, {query.dtype} inputs and "
            f"{choices.parts} parts a feature; there are {SHARED_BYTES}."
        )


def _of_key_heads_alone(sizes: Sizes, gradients: KeyGradients) -> KeyGradients:
    """Adds up those of query heads that share a key head; without the state."""
    if sizes.groups == 1:
        return gradients._replace(state=None)

    def summed(x: Array) -> Array:
        return x.reshape(*x.shape[:2], -1, sizes.groups, x.shape[-1]).sum(3)

    def merged(x: Array) -> Array:
        x = _sum_groups(sizes, x)
        return x.reshape(-1, *x.shape[2:])

    return KeyGradients(
        summed(gradients.key),
        summed(gradients.value),
        merged(gradients.key_log),
        merged(gradients.weights),
        None,
    )


def _pull_back_division(
    division: Division, divided: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    """Returns the cotangents of numerators and denominators, given that of their quotients."""
    mean, denominator = divided
    cotangent = cotangent.astype(jnp.float32)
    inverse = jnp.swapaxes(safe_inverse(denominator, division.epsilon), 1, 2)
    along = jnp.sum(cotangent * mean.astype(jnp.float32), axis=-1)
    slope = inverse_slope(denominator, division.epsilon)
    return cotangent * inverse[..., None], jnp.swapaxes(along, 1, 2) * slope


def _pull_back_sources(sources: Sources, scale: Array, seen: Array, d_state: State) -> Sources:
    """Pulls cotangents of sums of states back to the states.

    Args:
      sources: the states.
      scale: of P sums, ``[B, P, K, M]``.
      seen: bool ``[P, N]``, which segments are in which sum.
      d_state: cotangents ``[B, P, K, ...]``.
    """
    initial, own = sources

    def pulled(of_source: Array, seen: Array) -> State:
        """Returns cotangents ``[B, N, K, ...]`` of states with scales ``[B, N, K, M]``."""
        exponents = of_source[:, None] - scale[:, :, None]
        factor = jnp.exp(jnp.where(seen[:, :, None, None], exponents, -jnp.inf))
        return State(
            (factor[..., None] * d_state.kv[:, :, None]).sum(1),
            (factor * d_state.k_sum[:, :, None]).sum(1),
            jnp.zeros_like(of_source),
        )

    d_initial = d_own = None
    if initial is not None:
        everywhere = jnp.ones((seen.shape[0], 1), bool)
        d_initial = jax.tree.map(lambda x: x[:, 0], pulled(initial.log_scale[:, None], everywhere))
    if own is not None:
        of_segments = own.log_scale.reshape(scale.shape[0], -1, *own.log_scale.shape[1:])
        merged = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
        d_own = jax.tree.map(merged, pulled(of_segments, seen))
    return Sources(d_initial, d_own)


def _of_last_segment(sizes: Sizes, cotangent: State) -> State:
    """Gives cotangents of final states, ``[B, K, ...]``, to one head of each group."""

    def spread(x: Array) -> Array:
        x = x[:, None, :, None]
        widths = [(0, 0), (sizes.segments - 1, 0), (0, 0), (0, sizes.groups - 1)]
        x = jnp.pad(x, widths + [(0, 0)] * (x.ndim - 4))
        return x.reshape(sizes.batch, sizes.heads, *x.shape[4:])

    return State(spread(cotangent.kv), spread(cotangent.k_sum), None)


def _of_key_heads(sizes: Sizes, x: Array) -> Array:
    """Takes ``[R, H, ...]`` of the first query head of each group, ``[B, N, K, ...]``."""
    x = x[:, :: sizes.groups]
    return x.reshape(-1, sizes.segments, *x.shape[1:])


def _sum_groups(sizes: Sizes, x: Array) -> Array:
    """Adds up the query heads that share a key head: ``[R, H, ...]`` to ``[B, N, K, ...]``."""
    x = x.reshape(-1, sizes.segments, x.shape[1] // sizes.groups, sizes.groups, *x.shape[2:])
    return x.sum(3)


def _sum_shared(x: Array, shape: tuple[int, ...]) -> Array:
    """Adds up what segments, batch rows and heads share: ``[B, N, K, ...]`` to ``shape``."""
    axes = (1, *(axis for axis, size in ((0, shape[0]), (2, shape[1])) if size == 1))
    return x.sum(axes).reshape(shape)


def _sizes(choices: Choices, query: Array | None, keys: Keys, weights: Array) -> Sizes:
    """Returns the sizes of the kernels; without queries, those of key heads alone."""
    heads = keys.key.shape[2] if query is None else query.shape[2]
    return Sizes(
        batch=keys.key.shape[0],
        segments=choices.segments,
        heads=heads,
        groups=1 if query is None else choices.groups,
        queries=0 if query is None else query.shape[1],
        keys=keys.key.shape[1],
        head_dim=weights.shape[-1],
        value_dim=keys.value.shape[-1],
        features=weights.shape[-2],
        real_features=choices.features,
        parts=choices.parts,
        division=choices.division,
        bfloat16=keys.key.dtype == jnp.bfloat16,
        interpret=choices.interpret,
    )


def _operands(choices: Choices, query: Array | tuple[()], keys: Keys, weights: Array) -> Operands:
    return Operands(
        query=query if isinstance(query, tuple) else split(query, 3),
        key=split(keys.key, 3),
        value=split(keys.value, choices.parts),
        key_log=keys.log,
        weights=split(weights, 3),
    )
