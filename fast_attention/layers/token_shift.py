"""Token shift: groups of channels are moved between neighbouring positions.

It gives every layer access to neighbouring tokens at the cost of a copy. Linear attention has
smooth kernels, so it learns attention to neighbours slowly.

Shape letters: B batch, T length, M features.

Reference: the ``shift_tokens`` of performer-pytorch (there (0, 1) for causal models, otherwise
(-1, 0, 1)) and of linear-attention-transformer ((1, 0) and (1, 0, -1)).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp

from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float


@runs_on_auto_axes
def shift_tokens(
    x: Float[Array, "B T M"],
    shifts: Sequence[int] = (0, 1),
    *,
    key_mask: Bool[Array, "B T"] | None = None,
    starts: Bool[Array, "B T"] | None = None,
    before: Float[Array, "B M"] | None = None,
) -> Float[Array, "B T M"]:
    """Moves equal groups of channels along the length, each by its own shift.

    Group i of n, channels ``i (M // n)`` to ``(i + 1) (M // n)``, of position t is that of position
    ``t - shifts[i]``, or zero if there is none. Remaining channels do not move.

    Args:
      x: ``[B, T, M]``.
      shifts: One per group; negative shifts look ahead and are not for causal layers.
      key_mask: ``[B, T]``; where False, `x` is treated as zero.
      starts: ``[B, T]``; True if the previous position belongs to another sequence of a packed row
        or is padding. No group is moved across; ``before`` replaces that position.
      before: ``[B, M]``, the position before the first one; zeros if None.

    Returns:
      ``[B, T, M]``.

    Raises:
      ValueError: If there are more groups than channels, or `before` is given for shifts that need
        more than one position before the first.
    """
    width = x.shape[-1] // len(shifts) if shifts else 0
    if not width:
        raise ValueError(
            f"shifts must be one per group of channels, got {tuple(shifts)} for {x.shape[-1]} "
            "channels."
        )
    if before is not None and not set(shifts) <= {0, 1}:
        raise ValueError(
            "before holds one position before the first: it supports only shifts of 0 and 1, got "
            f"{tuple(shifts)}."
        )
    if key_mask is not None:
        x = jnp.where(key_mask[..., None], x, 0)
    groups = []
    for i, shift in enumerate(shifts):
        channels = slice(i * width, (i + 1) * width)
        fill = jnp.zeros_like(x[:, 0]) if before is None else before
        groups.append(_shift_group(x[..., channels], shift, starts, fill[:, None, channels]))
    return jnp.concatenate([*groups, x[..., len(shifts) * width :]], axis=-1)


def _shift_group(x: Array, shift: int, starts: Array | None, fill: Array) -> Array:
    if shift == 0:
        return x
    moved = _moved(x, shift, fill)
    if starts is None:
        return moved
    # A running number of starts would need all positions, where these lie across devices.
    nearby = range(shift) if shift > 0 else range(shift, 0)
    none = jnp.zeros_like(starts[:, :1])
    elsewhere = functools.reduce(jnp.logical_or, (_moved(starts, n, none) for n in nearby))
    return jnp.where(elsewhere[..., None], fill, moved)


def _moved(x: Array, shift: int, fill: Array) -> Array:
    """Moves position t - shift to t; uses ``fill``, of length 1, if there is none."""
    length = x.shape[1]
    count = min(abs(shift), length)
    # Padded, not concatenated: across devices that costs an exchange of edges, and no more.
    kept, widths = (x[:, : length - count], (count, 0)) if shift > 0 else (x[:, count:], (0, count))
    moved = jnp.pad(kept, [(0, 0), widths, *[(0, 0)] * (x.ndim - 2)])
    place = jnp.arange(length) - (0 if shift > 0 else length - count)
    there = (place < 0) | (place >= count)
    return jnp.where(there.reshape(1, -1, *[1] * (x.ndim - 2)), moved, fill)


def last_visible(
    x: Float[Array, "B T M"],
    key_mask: Bool[Array, "B T"] | None,
    before: Float[Array, "B M"],
) -> Float[Array, "B M"]:
    """Returns each row's last visible position, or ``before`` if there is none."""
    if key_mask is None:
        return x[:, -1]
    length = x.shape[1]
    last = length - 1 - jnp.argmax(jnp.flip(key_mask, 1), axis=1)
    picked = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return jnp.where(key_mask.any(axis=1)[:, None], picked, before)


def starts_of_runs(segment_ids: Array | None, key_mask: Array | None) -> Bool[Array, "B T"] | None:
    """Returns where the previous position is in another segment or is padding."""
    starts = None
    if segment_ids is not None:
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)
    if key_mask is not None:
        after_padding = jnp.pad(~key_mask[:, :-1], ((0, 0), (1, 0)))
        starts = after_padding if starts is None else starts | after_padding
    return starts
