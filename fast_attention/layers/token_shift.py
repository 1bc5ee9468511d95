"""Token shift: half of the channels of a position come from the position before it.

It gives every layer the neighbouring token for the price of a copy, which linear attention, whose
kernels are smooth, is slow to pick out by itself.

Shape letters: B batch, T length, M features.

Reference: the ``shift_tokens`` of performer-pytorch (there with shifts 0 and 1 for causal models).
"""

from __future__ import annotations

import jax.numpy as jnp

from fast_attention.array_types import Array, Bool, Float


def shift_tokens(
    x: Float[Array, "B T M"],
    *,
    starts: Bool[Array, "B T"] | None = None,
    before: Float[Array, "B M"] | None = None,
) -> Float[Array, "B T M"]:
    """Moves the second half of the channels on by one position.

    Args:
      x: ``[B, T, M]``.
      starts: ``[B, T]``; where True the position before belongs to something else (another
        sequence of a packed row, or padding) and ``before`` takes its place.
      before: ``[B, M]``, what stood before the first position; zeros if None.

    Returns:
      ``[B, T, M]``.
    """
    kept = x.shape[-1] - x.shape[-1] // 2
    if before is None:
        before = jnp.zeros_like(x[:, 0])
    before = before[:, None, kept:]
    moved = jnp.concatenate([before, x[:, :-1, kept:]], axis=1)
    if starts is not None:
        moved = jnp.where(starts[..., None], before, moved)
    return jnp.concatenate([x[..., :kept], moved], axis=-1)


def last_visible(
    x: Float[Array, "B T M"],
    key_mask: Bool[Array, "B T"] | None,
    before: Float[Array, "B M"],
) -> Float[Array, "B M"]:
    """Returns each row's last visible position, or ``before`` where a row has none."""
    if key_mask is None:
        return x[:, -1]
    length = x.shape[1]
    last = length - 1 - jnp.argmax(jnp.flip(key_mask, 1), axis=1)
    picked = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
    return jnp.where(key_mask.any(axis=1)[:, None], picked, before)


def starts_of_runs(segment_ids: Array | None, key_mask: Array | None) -> Bool[Array, "B T"] | None:
    """Tells where a position's predecessor is of another segment or is padding."""
    starts = None
    if segment_ids is not None:
        changed = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = jnp.pad(changed, ((0, 0), (1, 0)), constant_values=True)
    if key_mask is not None:
        after_padding = jnp.pad(~key_mask[:, :-1], ((0, 0), (1, 0)))
        starts = after_padding if starts is None else starts | after_padding
    return starts
