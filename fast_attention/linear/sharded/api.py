"""Linear attention of sequences that lie across the devices of a mesh: whole arrays in and out.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
M features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.feature_maps.base import FeatureMap, Parameters
from fast_attention.linear.checks import check_shapes, per_key, spread_segments
from fast_attention.linear.sharded.shard import linear_attention_of_shard
from fast_attention.linear.state import LinearAttentionState
from fast_attention.linear.types import SavedStates
from fast_attention.mesh.layout import AxisName, layout_of


@overload
def sharded_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh,
    axis: AxisName,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = ...,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    return_state: Literal[False] = ...,
    spec: PartitionSpec | None = ...,
    parameter_spec: Any = ...,
    normalize: bool = ...,
    epsilon: float = ...,
    chunk_size: int | None = ...,
    unroll: int | None = ...,
    saved_states: SavedStates | None = ...,
    implementation: str | Sequence[str] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
) -> Array: ...


@overload
def sharded_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mesh: Mesh,
    axis: AxisName,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = ...,
    key_mask: Array | None = ...,
    key_bias: Array | None = ...,
    segment_ids: Array | None = ...,
    initial_state: LinearAttentionState | None = ...,
    return_state: Literal[True],
    spec: PartitionSpec | None = ...,
    parameter_spec: Any = ...,
    normalize: bool = ...,
    epsilon: float = ...,
    chunk_size: int | None = ...,
    unroll: int | None = ...,
    saved_states: SavedStates | None = ...,
    implementation: str | Sequence[str] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
) -> tuple[Array, LinearAttentionState]: ...


def sharded_linear_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    *,
    mesh: Mesh,
    axis: AxisName,
    feature_map: FeatureMap,
    parameters: Parameters,
    causal: bool = False,
    key_mask: Bool[Array, "*#B S"] | Bool[Array, "*#B S K"] | None = None,
    key_bias: Float[Array, "*#B S"] | Float[Array, "*#B S K"] | None = None,
    segment_ids: Int[Array, "*#B T"] | None = None,
    initial_state: LinearAttentionState | None = None,
    return_state: bool = False,
    spec: PartitionSpec | None = None,
    parameter_spec: Any = None,
    normalize: bool = True,
    epsilon: float = 0.0,
    chunk_size: int | None = None,
    unroll: int | None = None,
    saved_states: SavedStates | None = None,
    implementation: str | Sequence[str] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Array | tuple[Array, LinearAttentionState]:
    """Linear attention, each device holding a stretch of the sequence.

    Equal to :func:`~fast_attention.linear.linear_attention` of the whole, up to rounding.
    Devices exchange states alone (``K V M`` numbers a sequence and round), forward and backward:
    what passes between them does not depend on the length. A device needs memory for its own
    stretch.

    Args:
      query: ``[*B, T, H, D]``, any length; it is filled up to a multiple of the devices, and what
        is filled in is not seen.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``.
      mesh: the devices.
      axis: the axis of the mesh, or a tuple of axes, along which the sequence lies.
      feature_map: as in :func:`~fast_attention.linear.linear_attention`, and so are
        those without an explanation here.
      parameters: of the feature map.
      causal: position t sees keys 0..t.
      key_mask: ``[*B, S]`` or ``[*B, S, K]``.
      key_bias: ``[*B, S]`` or ``[*B, S, K]``.
      segment_ids: ``[*B, T]``; runs of equal ids may lie across any number of devices.
      initial_state: keys before the first one.
      return_state: also return the state after the last key.
      spec: how query, key and value ``[*B, T, H, D]`` lie on the mesh, with ``axis`` for the
        length; batch and heads may lie along other axes, the width along none. None is
        ``axis`` for the length and nothing else.
      parameter_spec: how the parameters lie on the mesh, a PartitionSpec or a tree of them, for
        parameters with leading head or batch axes that lie as those of ``spec``. None is the same
        parameters on all devices.
      normalize: divide by the sum of weights.
      epsilon: guard of denominators.
      chunk_size: positions handled at once on a device.
      unroll: chunks unrolled in the compiled loop.
      saved_states: what the backward pass of causal attention keeps.
      implementation: of the causal pass on each device.
      precision: of products of features and values.

    Returns:
      ``[*B, T, H, V]``, laid out as the query. With ``return_state`` also the
      :class:`LinearAttentionState`, the same on all devices of ``axis``.

    Raises:
      ValueError: for shapes, options or a layout that do not fit together.
    """
    check_shapes(query, key, value, causal, segment_ids)
    layout = layout_of(mesh, axis, spec, query.ndim)
    batch, length, keys = query.shape[:-3], query.shape[-3], key.shape[-3]
    if keys % layout.shards and key_mask is None:
        key_mask = jnp.ones(key.shape[:-2], bool)

    arrays: dict[str, Any] = {
        "query": layout.fill(query),
        "key": layout.fill(key),
        "value": layout.fill(value),
        "parameters": parameters,
    }
    specs: dict[str, Any] = dict.fromkeys(arrays, layout.spec(heads=True, width=True))
    specs["parameters"] = PartitionSpec() if parameter_spec is None else parameter_spec
    for name, x in (("key_mask", key_mask), ("key_bias", key_bias)):
        x = per_key(x, key, name)
        if x is not None:
            arrays[name] = layout.fill(x.reshape(*batch, *x.shape[1:]))
            specs[name] = layout.spec(heads=x.shape[-1] > 1, width=x.shape[-1] == 1)
    if segment_ids is not None:
        ids = spread_segments(segment_ids, query).reshape(*batch, length)
        # What is filled in belongs to the last segment, whose state is returned.
        arrays["segment_ids"] = layout.fill(ids, edge=True)
        specs["segment_ids"] = layout.spec()
    if initial_state is not None:
        arrays["initial_state"] = initial_state
        specs["initial_state"] = layout.spec(length=False, heads=True)

    options: dict[str, Any] = {
        "axis_name": axis,
        "feature_map": feature_map,
        "causal": causal,
        "return_state": return_state,
        "normalize": normalize,
        "epsilon": epsilon,
        "chunk_size": chunk_size,
        "unroll": unroll,
        "saved_states": saved_states,
        "implementation": implementation,
        "precision": precision,
    }

    def attend(arrays: dict[str, Any]) -> Any:
        return linear_attention_of_shard(**arrays, **options)

    out_spec: Any = specs["query"]
    if return_state:
        out_spec = out_spec, layout.spec(length=False, heads=True)
    result: Any = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=out_spec)(arrays)
    out, *state = result if return_state else (result,)
    out = out if length % layout.shards == 0 else out[..., :length, :, :]
    return (out, *state) if return_state else out
