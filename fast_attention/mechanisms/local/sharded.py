"""Local attention of sequences that lie across the devices of a mesh.

A device needs the keys and values within reach of its own positions: those at the edges of its
neighbours, or all of several neighbours where a window is longer than a device's stretch. What
passes between devices depends on the window alone, not on the length.

Shape letters: B batch, T positions, H heads, K key/value heads, D head width, V value width, W
window.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.local.blocks import tiled_attention
from fast_attention.mechanisms.local.op import check_distance_bias, normalized
from fast_attention.mechanisms.local.tile import Choices, Sight
from fast_attention.mechanisms.local.window import (
    Window,
    check_shapes,
    fold_batch,
    make_window,
)
from fast_attention.mechanisms.softmax.blocks import run_bounds
from fast_attention.mesh.layout import AxisName, layout_of


def sharded_local_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    *,
    mesh: Mesh,
    axis: AxisName,
    window_size: int,
    causal: bool = False,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_window: bool = False,
    shared_qk: bool = False,
    key_mask: Bool[Array, "*B T"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    distance_bias: Float[Array, "heads distances"] | None = None,
    spec: PartitionSpec | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*B T H V"]:
    """Local attention, each device holding a stretch of the sequence.

    Equal to :func:`~fast_attention.local_attention` of the whole.

    Args:
      query: ``[*B, T, H, D]``, any length; it is filled up to a multiple of the devices.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      mesh: the devices.
      axis: the axis of the mesh, or a tuple of axes, along which the sequence lies.
      window_size: as for :func:`~fast_attention.local_attention`, and so are those without an
        explanation here. Masks and biases ``[T, T]`` and dropout there are not.
      causal: position t sees keys 0..t of its window.
      look_backward: blocks in sight before a position's own.
      look_forward: blocks in sight behind it.
      exact_window: the reach is counted from each position.
      shared_qk: queries and keys are the same vectors.
      key_mask: ``[*B, T]``.
      segment_ids: ``[*B, T]``; runs of equal ids may lie across any number of devices.
      distance_bias: ``[H or 1, distances]``, the same on all devices.
      spec: how ``[*B, T, H, D]`` lies on the mesh, with ``axis`` for the length; batch axes may lie
        along others. None is ``axis`` for the length and nothing else.
      precision: of the two products.

    Returns:
      ``[*B, T, H, V]``, laid out as the query.

    Raises:
      ValueError: for shapes, options or a layout that do not fit together.
    """
    check_shapes(query, key, value)
    layout = layout_of(mesh, axis, spec, query.ndim)
    if layout.heads is not None and distance_bias is not None:
        raise ValueError(
            f"distance_bias is the same on all devices, but spec={spec} lays heads along "
            f"{layout.heads!r}; lay them along no axis."
        )
    rows, length = query.shape[:-2], query.shape[-3]
    if length % layout.shards and key_mask is None:
        key_mask = jnp.ones(rows, bool)
    whole = layout.spec(heads=True, width=True)
    arrays = {"query": query, "key": key, "value": value}
    specs: dict[str, Any] = dict.fromkeys(arrays, whole)
    for name, x in (("key_mask", key_mask), ("segment_ids", segment_ids)):
        if x is not None:
            arrays[name] = jnp.broadcast_to(x, rows)
            specs[name] = layout.spec()
    arrays = {name: layout.fill(x) for name, x in arrays.items()}
    if distance_bias is not None:
        arrays["distance_bias"], specs["distance_bias"] = distance_bias, PartitionSpec()

    def attend(arrays: dict[str, Array]) -> Array:
        return local_attention_of_shard(
            **arrays,
            axis_name=axis,
            window_size=window_size,
            causal=causal,
            look_backward=look_backward,
            look_forward=look_forward,
            exact_window=exact_window,
            shared_qk=shared_qk,
            precision=precision,
        )

    out: Any = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=whole)(arrays)
    return out[..., :length, :, :] if length % layout.shards else out


def local_attention_of_shard(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    *,
    axis_name: AxisName,
    window_size: int,
    causal: bool = False,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_window: bool = False,
    shared_qk: bool = False,
    key_mask: Bool[Array, "*B T"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    distance_bias: Float[Array, "heads distances"] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*B T H V"]:
    """Attends from this device's stretch of a sequence, inside ``jax.shard_map``.

    The stretches lie along ``axis_name`` in the order of the devices.

    Args:
      query: ``[*B, T, H, D]``, the positions of this device.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      axis_name: the mesh axis, or a tuple of axes, along which the sequence lies.
      window_size: as for :func:`sharded_local_attention`, and so are all others, of this device's
        positions.
      causal: see there.
      look_backward: see there.
      look_forward: see there.
      exact_window: see there.
      shared_qk: see there.
      key_mask: ``[*B, T]``.
      segment_ids: ``[*B, T]``.
      distance_bias: see there.
      precision: see there.

    Returns:
      ``[*B, T, H, V]``.

    Raises:
      ValueError: for shapes or options that do not fit together.
    """
    window = make_window(window_size, causal, look_backward, look_forward, exact_window)
    check_shapes(query, key, value)
    *batch, length, heads, _ = query.shape
    count, place = lax.axis_size(axis_name), lax.axis_index(axis_name)
    total = count * length
    reach = Choices(
        block=1,
        back=_reach(window, look_backward),
        ahead=0 if causal else _reach(window, window.look_forward),
        causal=causal,
        shared=shared_qk,
        precision=precision,
    )
    check_distance_bias(distance_bias, heads, reach)
    # A reach beyond all positions is as good as one to the ends.
    choices = reach._replace(back=min(reach.back, total), ahead=min(reach.ahead, total))
    if distance_bias is not None:
        start = reach.ahead - choices.ahead
        distance_bias = distance_bias[:, start : reach.ahead + choices.back + 1]
    dtype = jnp.result_type(query, key, value)
    key = normalized(key.astype(dtype)) if shared_qk else key.astype(dtype)

    def around(x: Array) -> Array:
        """``[B, T, ...]`` to ``[B, back + T + ahead, ...]``."""
        return _with_neighbours(x, choices.back, choices.ahead, axis_name)

    position = place * length + jnp.arange(length, dtype=jnp.int32)
    first, last = (bound[None] for bound in window.bounds(position))
    first, last = jnp.maximum(first, 0), jnp.minimum(last, total - 1)
    first, last = first - place * length, last - place * length
    if segment_ids is not None:
        ids = fold_batch("segment_ids", segment_ids, batch, (length,))
        bounds = run_bounds(around(vary_alike(ids, place)))
        # Runs are cut where what was fetched ends, which no window reaches beyond.
        run_first, run_last = (
            bound[:, choices.back : choices.back + length] - choices.back for bound in bounds
        )
        first, last = jnp.maximum(first, run_first), jnp.minimum(last, run_last)
    if key_mask is not None:
        key_mask = fold_batch("key_mask", key_mask.astype(bool), batch, (length,))
        key_mask = around(vary_alike(key_mask, place))
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query.astype(dtype), key, value))
    query, key, value, distance_bias = vary_alike((query, key, value, distance_bias), place)
    out, _ = tiled_attention(
        query,
        around(key),
        around(value.astype(dtype)),
        Sight(first, last, key_mask),
        distance_bias,
        None,
        choices,
        around=True,
    )
    return out.reshape(*batch, *out.shape[1:])


def _reach(window: Window, blocks: int) -> int:
    """The farthest that a position sees in one direction, over a number of blocks."""
    return window.size * blocks + (0 if window.exact else window.size - 1)


def _with_neighbours(x: Array, back: int, ahead: int, axis_name: AxisName) -> Array:
    """Puts what lies before and behind on other devices around ``[B, T, ...]``; zeros at the ends.

    Devices up to ``ceil(back / T)`` places before send their last entries, and as far behind their
    first ones.
    """
    count, length = lax.axis_size(axis_name), x.shape[1]

    def sent(distance: int, rows: int) -> Array:
        """The last rows of the device ``distance`` places before, or the first of one behind."""
        piece = x[:, length - rows :] if distance > 0 else x[:, :rows]
        pairs = [(i, i + distance) for i in range(count) if 0 <= i + distance < count]
        if not pairs:
            return jnp.zeros_like(piece)
        return lax.ppermute(piece, axis_name, pairs)

    def rows_of(reach: int) -> list[int]:
        """How many entries the devices within reach send, the nearest first."""
        return [min(length, reach - start) for start in range(0, reach, length)]

    before = [sent(1 + i, rows) for i, rows in enumerate(rows_of(back))]
    behind = [sent(-1 - i, rows) for i, rows in enumerate(rows_of(ahead))]
    return jnp.concatenate([*reversed(before), x, *behind], axis=1)
