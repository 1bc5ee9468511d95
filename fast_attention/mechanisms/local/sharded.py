"""Local attention of sequences that lie across the devices of a mesh.

A device needs the keys and values within reach of its own positions: those at the edges of its
neighbours, or all of several neighbours where a window is longer than a device's stretch. What
passes between devices depends on the window alone, not on the length.

Shape letters: B batch, T positions, H heads, K key/value heads, D head width, V value width, W
window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.mechanisms.checks import fold_batch
from fast_attention.mechanisms.local.blocks import tiled_attention
from fast_attention.mechanisms.local.tile import Choices, Sight
from fast_attention.mechanisms.local.window import LocalWindow, check_shapes
from fast_attention.mechanisms.shared_qk import unit_keys
from fast_attention.mechanisms.softmax.blocks import run_bounds
from fast_attention.mesh.layout import AxisName, move_along


def local_attention_of_shard(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    window: LocalWindow,
    *,
    axis_name: AxisName,
    shared_qk: bool = False,
    key_mask: Bool[Array, "*B T"] | None = None,
    segment_ids: Int[Array, "*B T"] | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*B T H V"]:
    """Attends from this device's stretch of a sequence, inside ``jax.shard_map``.

    Equal to :func:`~fast_attention.local_attention` of the whole sequence, whose stretches lie
    along ``axis_name`` in the order of the devices.

    Args:
      query: ``[*B, T, H, D]``, the positions of this device.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      window: which keys a position sees.
      axis_name: the mesh axis, or a tuple of axes, along which the sequence is sharded.
      shared_qk: queries and keys are the same vectors.
      key_mask: ``[*B, T]``.
      segment_ids: ``[*B, T]``; runs of equal ids may lie across any number of devices.
      precision: of the two products.

    Returns:
      ``[*B, T, H, V]``.

    Raises:
      ValueError: for shapes that do not fit together.
    """
    check_shapes(query, key, value)
    *batch, length, _, _ = query.shape
    count, place = lax.axis_size(axis_name), lax.axis_index(axis_name)
    total = count * length
    choices = Choices(
        block=1,
        # A reach beyond all positions is as good as one to the ends.
        back=min(window.back, total),
        ahead=min(window.ahead, total),
        causal=window.causal,
        shared=shared_qk,
        precision=precision,
    )
    dtype = jnp.result_type(query, key, value)
    key = unit_keys(key.astype(dtype)) if shared_qk else key.astype(dtype)

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
    query, key, value = vary_alike((query, key, value), place)
    out = tiled_attention(
        query,
        around(key),
        around(value.astype(dtype)),
        Sight(first, last, key_mask),
        None,
        choices,
        around=True,
    )
    return out.reshape(*batch, *out.shape[1:])


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
        return move_along(piece, axis_name, pairs)

    def rows_of(reach: int) -> list[int]:
        """How many entries the devices within reach send, the nearest first."""
        return [min(length, reach - start) for start in range(0, reach, length)]

    before = [sent(1 + i, rows) for i, rows in enumerate(rows_of(back))]
    behind = [sent(-1 - i, rows) for i, rows in enumerate(rows_of(ahead))]
    return jnp.concatenate([*reversed(before), x, *behind], axis=1)
