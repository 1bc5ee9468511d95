"""The window of local attention: its options and what they mean, and checks of shapes.

Shape letters: B batch, T length, H heads, K key/value heads, D head width, V value width, W window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.mechanisms.checks import check_count


@dataclasses.dataclass(frozen=True)
class Window:
    """Which keys a position sees.

    Attributes:
      size: W.
      causal: none behind its own position.
      look_backward: blocks before its own.
      look_forward: blocks behind its own.
      exact: no farther than ``W * look_backward`` and ``W * look_forward`` positions either.
    """

    size: int
    causal: bool
    look_backward: int
    look_forward: int
    exact: bool

    def bounds(self, position: Array) -> tuple[Array, Array]:
        """First and last position in sight of each position; they may lie beyond the ends."""
        back, ahead = self.size * self.look_backward, self.size * self.look_forward
        if self.exact:
            first, last = position - back, position + ahead
        else:
            block = position // self.size * self.size
            first, last = block - back, block + self.size - 1 + ahead
        return first, position if self.causal else last


def make_window(
    window_size: int, causal: bool, look_backward: int, look_forward: int | None, exact_window: bool
) -> Window:
    """Checks the options of :func:`local_attention`, see there.

    Raises:
      ValueError: for numbers out of range, or a causal window that looks forward.
    """
    if look_forward is None:
        look_forward = 0 if causal else 1
    for name, number, least in (
        ("window_size", window_size, 1),
        ("look_backward", look_backward, 0),
        ("look_forward", look_forward, 0),
    ):
        check_count(name, number, least)
    if causal and look_forward > 0:
        raise ValueError(
            f"Causal attention cannot look forward, but look_forward={look_forward}: leave it out "
            "or pass 0."
        )
    sizes = int(window_size), int(look_backward), int(look_forward)
    return Window(sizes[0], causal, *sizes[1:], exact_window)


def check_shapes(query: Array, key: Array, value: Array, *, cached: bool = False) -> None:
    """Checks operands of self-attention.

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      cached: the query is one, and the keys are as many as they like.

    Raises:
      ValueError: if they do not fit together.
    """
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim >= 3:
        raise ValueError(
            f"Expected query [*B, T, H, D], key [*B, T, K, D] and value [*B, T, K, V], got {shapes}"
        )
    queries = (*query.shape[:-3], key.shape[-3]) if cached else query.shape[:-2]
    if not queries == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(
            "Local attention is self-attention: batch axes and lengths of queries, keys and values "
            f"must be equal, got {shapes}. Use linear or exact attention to attend to another "
            "sequence."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"Queries and keys must have the same width D, got {shapes}.")
    if key.shape[-2] != value.shape[-2] or query.shape[-2] % max(1, key.shape[-2]):
        raise ValueError(
            "The key/value heads must be as many as each other and divide the query heads, got "
            f"{shapes}; the layout is [*B, length, heads, width]."
        )


def fold_batch(name: str, x: Array, batch: Sequence[int], tail: tuple[int, ...]) -> Array:
    """Makes one batch axis, of length 1 if all rows share `x`; other axes of length 1 stay."""
    x, full = jnp.asarray(x), (*batch, *tail)
    padded = (1,) * (len(full) - x.ndim) + x.shape
    if len(padded) != len(full) or any(
        n not in (1, wanted) for n, wanted in zip(padded, full, strict=True)
    ):
        raise ValueError(f"{name} must broadcast to {full}, but its shape is {x.shape}.")
    own = padded[len(batch) :]
    if math.prod(padded) == math.prod(own):
        return x.reshape(1, *own)
    return jnp.broadcast_to(x.reshape(padded), (*batch, *own)).reshape(-1, *own)
