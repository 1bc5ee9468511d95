"""``linear_attention``: queries, keys, values and a feature map in, attention out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, overload

import jax
import jax.numpy as jnp

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.feature_maps.base import FeatureMap, Features, LogKind, Parameters
from fast_attention.linear_attention import chunked, reference
from fast_attention.linear_attention.inputs import (
    Inputs,
    Output,
    Parts,
    Plan,
    finish,
    merge_parts,
)
from fast_attention.linear_attention.state import LinearAttentionState, empty_state

Implementation = Callable[[Plan, Inputs], tuple[Array | Parts, LinearAttentionState]]

IMPLEMENTATIONS: dict[str, Implementation] = {
    "chunked": chunked.attend,
    "reference": reference.attend,
}
"""Implementations by name. One raises NotImplementedError for calls it cannot serve."""

DEFAULT_ORDER = ("chunked",)


@overload
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = ...,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    return_state: Literal[False] = ...,
    normalize: bool = ...,
    epsilon: float = ...,
    chunk_size: int | None = ...,
    unroll: int = ...,
    implementation: str | Sequence[str] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
) -> Array: ...


@overload
def linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = ...,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    return_state: Literal[True],
    normalize: bool = ...,
    epsilon: float = ...,
    chunk_size: int | None = ...,
    unroll: int = ...,
    implementation: str | Sequence[str] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
) -> tuple[Array, LinearAttentionState]: ...


def linear_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    *,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = False,
    key_mask: Bool[Array, "*#B S"] | Bool[Array, "*#B S #K"] | None = None,
    key_bias: Float[Array, "*#B S"] | Float[Array, "*#B S #K"] | None = None,
    segment_ids: Int[Array, "*#B T"] | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    normalize: bool = True,
    epsilon: float = 0.0,
    chunk_size: int | None = None,
    unroll: int = 1,
    implementation: str | Sequence[str] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, LinearAttentionState]:
    r"""Attention with weights ``phi(q_t) . phi(k_s)``, in time and memory linear in the length.

    .. math::
        y_t = \frac{\sum_s \phi(q_t) \cdot \phi(k_s) \, v_s}{\sum_s \phi(q_t) \cdot \phi(k_s)}

    with the sums over ``s <= t`` if causal. Exponential maps are evaluated with running maxima that
    never look ahead: nothing overflows, and outputs up to t do not change by a single bit,
    whatever comes after t.

    Shape letters: B batch (any number of axes, none included), T queries, S keys, H heads, K
    key/value heads (a divisor of H: query head h reads key head ``h // (H / K)``), D head width,
    V value width.

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``; S = T if causal.
      value: ``[*B, S, K, V]``.
      feature_map: phi, see :mod:`fast_attention.feature_maps`.
      parameters: of the feature map, as from ``feature_map.init``; their leading axes, if any,
        broadcast against ``[K]`` or ``[prod(B), K]``.
      causal: position t sees keys 0..t.
      key_mask: ``[*B, S]`` or ``[*B, S, K]``; a key where it is False contributes nothing, neither
        to outputs nor to the state, whatever it holds.
      key_bias: ``[*B, S]`` or ``[*B, S, K]``; multiplies the weights of a key by ``exp(bias)``.
      segment_ids: ``[*B, T]``, self-attention only: positions see their own run of equal ids.
        A new run starts from an empty state.
      initial_state: keys seen before the first one; with segments it belongs to the first run.
      return_state: also return the state after the last key (of the last run). With
        ``initial_state`` it cuts a sequence in two: both are differentiable.
      normalize: divide by the sum of weights; if False return the numerator at its true scale.
      epsilon: denominators are inverted as ``den / (den^2 + epsilon^2)``. Not needed for positive
        maps; for signed ones it bounds outputs where a denominator vanishes.
      chunk_size: positions handled at once (1: token by token); None for the implementation's own.
      unroll: chunks unrolled in the compiled loop.
      implementation: a name of :data:`IMPLEMENTATIONS`, several to try in order, or None for the
        best of the platform.
      precision: of products of features and values; exponents are computed at the highest.

    Returns:
      ``[*B, T, H, V]`` in the promoted type of query, key and value; a row that sees no key is 0.
      With ``return_state`` a pair of that and the :class:`LinearAttentionState`.

    Raises:
      ValueError: for shapes or options that do not fit together.
      NotImplementedError: if the one implementation asked for cannot serve the call.

    References:
      arXiv:2009.14794 (FAVOR+); arXiv:2006.16236 (linear attention and its state).
    """
    _check_shapes(query, key, value, causal, segment_ids)
    for name, number in (("chunk_size", chunk_size), ("unroll", unroll)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if key_bias is not None and feature_map.log_kind == "none":
        feature_map = _WithScale(inner=feature_map)
        if initial_state is not None and initial_state.log_scale is None:
            zeros = jnp.zeros_like(initial_state.k_sum[..., :1])
            initial_state = dataclasses.replace(initial_state, log_scale=zeros)

    batch_shape = query.shape[:-3]
    batch = math.prod(batch_shape)
    compute = jnp.promote_types(jnp.result_type(query, key, value), jnp.float32)
    state = initial_state
    if state is None:
        state = empty_state(
            feature_map,
            parameters,
            batch_shape,
            key.shape[-2],
            key.shape[-1],
            value.shape[-1],
            compute,
        )
    _check_state(state, batch_shape, key, value)
    inputs = Inputs(
        query=query.reshape(batch, *query.shape[-3:]),
        key=key.reshape(batch, *key.shape[-3:]),
        value=value.reshape(batch, *value.shape[-3:]),
        parameters=parameters,
        key_mask=_per_key(key_mask, key, "key_mask"),
        key_bias=_per_key(key_bias, key, "key_bias"),
        segment_ids=None
        if segment_ids is None
        else jnp.broadcast_to(segment_ids, query.shape[:-2]).reshape(batch, -1),
        state=jax.tree.map(
            lambda x: x.astype(compute).reshape(batch, *x.shape[len(batch_shape) :]), state
        ),
    )
    plan = Plan(
        feature_map=feature_map,
        causal=causal,
        output="mean" if normalize else "sum",
        epsilon=epsilon,
        chunk_size=chunk_size,
        unroll=unroll,
        precision=precision,
    )
    out, state = _run(plan, inputs, _names(implementation))
    out = out.reshape(*batch_shape, *out.shape[1:])
    if not return_state:
        return out
    return out, jax.tree.map(lambda x: x.reshape(*batch_shape, *x.shape[1:]), state)


def _run(
    plan: Plan, inputs: Inputs, names: tuple[str, ...]
) -> tuple[Array, LinearAttentionState]:
    if inputs.segment_ids is not None and not plan.causal:
        return _both_directions(plan, inputs, names)
    errors: list[NotImplementedError] = []
    for name in names:
        try:
            return IMPLEMENTATIONS[name](plan, inputs)  # pyright: ignore[reportReturnType]
        except NotImplementedError as error:
            if len(names) == 1:
                raise
            errors.append(error)
    raise ExceptionGroup(f"No implementation of {names} can serve this call.", errors)


def _both_directions(
    plan: Plan, inputs: Inputs, names: tuple[str, ...]
) -> tuple[Array, LinearAttentionState]:
    """Attention within segments, both ways: one causal pass from each side, merged.

    The second pass runs over the reversed sequence with keys moved on by one, so that it covers
    exactly the keys after a position.
    """
    assert inputs.segment_ids is not None
    one_way = dataclasses.replace(plan, causal=True, output="parts")
    if plan.output == "sum":
        # Parts carry their scale; the map must still give complete features.
        one_way = dataclasses.replace(one_way, feature_map=_Complete(inner=plan.feature_map))
    left, state = _run(one_way, inputs, names)
    ids = jnp.flip(inputs.segment_ids, 1)
    mask = jnp.ones((*ids.shape, 1), bool)
    if inputs.key_mask is not None:
        mask = jnp.flip(inputs.key_mask, 1)
    same = ids[:, 1:] == ids[:, :-1]
    mask = jnp.pad(mask[:, :-1] & same[:, :, None], ((0, 0), (1, 0), (0, 0)))

    def moved(x: Array | None) -> Array | None:
        if x is None:
            return None
        return jnp.pad(jnp.flip(x, 1)[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * (x.ndim - 2))

    key, value = moved(inputs.key), moved(inputs.value)
    assert key is not None and value is not None
    right, _ = _run(
        one_way,
        inputs._replace(
            query=jnp.flip(inputs.query, 1),
            key=key,
            value=value,
            key_mask=mask,
            key_bias=moved(inputs.key_bias),
            segment_ids=ids,
            state=_emptied(inputs.state),
        ),
        names,
    )
    right = jax.tree.map(lambda x: jnp.flip(x, 1), right)
    assert isinstance(left, Parts)
    out = finish(merge_parts(left, right), plan.output, plan.epsilon)
    return out.astype(jnp.result_type(inputs.query, inputs.key, inputs.value)), state


def _emptied(state: LinearAttentionState) -> LinearAttentionState:
    scale = state.log_scale
    return LinearAttentionState(
        jnp.zeros_like(state.kv),
        jnp.zeros_like(state.k_sum),
        None if scale is None else jnp.full_like(scale, -1e30),
    )


@dataclasses.dataclass(frozen=True)
class _Wrapped(FeatureMap):
    inner: FeatureMap = dataclasses.field(kw_only=True)

    def num_features(self, parameters: Parameters, head_dim: int) -> int:
        return self.inner.num_features(parameters, head_dim)


@dataclasses.dataclass(frozen=True)
class _WithScale(_Wrapped):
    """A map without exponents, given one log-scale a position to carry a key bias."""

    log_kind: ClassVar[LogKind] = "position"

    def apply(
        self, x: Array, parameters: Parameters, *, is_query: bool, exact_scale: bool
    ) -> Features:
        features = self.inner.apply(
            x, parameters, is_query=is_query, exact_scale=exact_scale
        )
        return Features(features.values, jnp.zeros_like(x[..., :1]))


@dataclasses.dataclass(frozen=True)
class _Complete(_Wrapped):
    """A map that never leaves out factors that cancel under normalisation."""

    @property
    def log_kind(self) -> LogKind:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.log_kind

    def apply(
        self, x: Array, parameters: Parameters, *, is_query: bool, exact_scale: bool
    ) -> Features:
        return self.inner.apply(x, parameters, is_query=is_query, exact_scale=True)


def _names(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    if implementation is None:
        return DEFAULT_ORDER
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(
            f"Unknown implementation {unknown}; choose from {sorted(IMPLEMENTATIONS)}."
        )
    return names


def _per_key(x: Array | None, key: Array, name: str) -> Array | None:
    """Brings ``[*B, S]`` or ``[*B, S, K or 1]`` to ``[B, S, K or 1]``."""
    if x is None:
        return None
    shape = key.shape[:-2]
    heads = 1
    if x.ndim == len(shape) + 1:
        heads = x.shape[-1]
        target = (*shape, heads)
    elif x.ndim == len(shape):
        x, target = x[..., None], (*shape, 1)
    else:
        target = ()
    if heads not in (1, key.shape[-2]) or not target:
        raise ValueError(
            f"{name} must have shape {shape} or {(*shape, key.shape[-2])} to go with key of shape "
            f"{key.shape}, got {x.shape}."
        )
    try:
        x = jnp.broadcast_to(x, target)
    except ValueError as error:
        raise ValueError(
            f"{name} of shape {x.shape} cannot be broadcast to {target}, the leading shape of key."
        ) from error
    return x.reshape(math.prod(shape[:-1]), shape[-1], heads)


def _check_shapes(
    query: Array, key: Array, value: Array, causal: bool, segment_ids: Array | None
) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if min(query.ndim, key.ndim, value.ndim) < 3 or not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            "query, key and value must all be [*B, length, heads, width] with the same number of "
            f"axes, got {shapes}."
        )
    if query.shape[:-3] != key.shape[:-3] or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "query and key must agree in their batch axes, key and value in all axes but the "
            f"last, got {shapes}."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same width, got {shapes}.")
    if 0 in query.shape or 0 in key.shape or 0 in value.shape:
        raise ValueError(f"query, key and value must not be empty, got {shapes}.")
    heads, kv_heads = query.shape[-2], key.shape[-2]
    swapped = (
        " Length comes before heads, [*B, length, heads, width]: are the two swapped?"
        if query.shape[-3] != key.shape[-3]
        else ""
    )
    if heads % kv_heads:
        raise ValueError(
            f"The number of query heads must be a multiple of that of key heads, got {heads} and "
            f"{kv_heads} ({shapes}).{swapped}"
        )
    length, keys = query.shape[-3], key.shape[-3]
    if causal and length != keys:
        raise ValueError(
            f"Causal attention needs as many keys as queries, got {keys} and {length}. To continue "
            "a sequence pass the keys before it as initial_state; for a single query over a cache "
            "use causal=False with a key_mask."
        )
    if segment_ids is not None and length != keys:
        raise ValueError(
            f"segment_ids are for self-attention, but there are {length} queries and {keys} keys; "
            "use a key_mask."
        )


def _check_state(
    state: LinearAttentionState, batch_shape: tuple[int, ...], key: Array, value: Array
) -> None:
    expected = (*batch_shape, key.shape[-2], value.shape[-1])
    if state.kv.shape[:-1] != expected:
        raise ValueError(
            f"initial_state.kv must have shape {(*expected, 'M')} to go with key {key.shape} and "
            f"value {value.shape}, got {state.kv.shape}."
        )


__all__ = ["IMPLEMENTATIONS", "Output", "linear_attention"]
