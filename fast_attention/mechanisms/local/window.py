"""The window of local attention: its options, and checks of shapes.

Shape letters: B batch, T length, H heads, K key/value heads, D head width, V value width, W window.
"""

from __future__ import annotations

import dataclasses

from fast_attention.arrays.types import Array
from fast_attention.mechanisms.checks import check_count


@dataclasses.dataclass(frozen=True)
class LocalWindow:
    """Which keys a position sees.

    Attributes:
      window_size: W, positions in a block.
      causal: position t sees keys 0..t of its window.
      look_backward: number of visible blocks before a position's own block.
      look_forward: number of visible blocks after it; None becomes 0 if causal, else 1.
      exact_window: the window ends ``W * look_backward`` positions before each position and ``W *
        look_forward`` after it; otherwise it ends with a block.
    """

    window_size: int
    causal: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    exact_window: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for numbers out of range, or a causal window that looks forward."""
        forward = self.look_forward
        if forward is None:
            forward = 0 if self.causal else 1
        for name, number, least in (
            ("size", check_count("window_size", self.window_size), 1),
            ("look_backward", self.look_backward, 0),
            ("look_forward", forward, 0),
        ):
            object.__setattr__(self, name, check_count(name, number, least))
        if self.causal and forward > 0:
            raise ValueError(
                f"Causal attention cannot look forward, but look_forward={forward}: leave it out "
                "or pass 0."
            )

    @property
    def back(self) -> int:
        """Maximum distance of a visible earlier key."""
        return self.window_size * self.look_backward + (
            0 if self.exact_window else self.window_size - 1
        )

    @property
    def ahead(self) -> int:
        """Maximum distance of a visible later key."""
        assert self.look_forward is not None
        inside = 0 if self.exact_window else self.window_size - 1
        return 0 if self.causal else self.window_size * self.look_forward + inside

    def bounds(self, position: Array) -> tuple[Array, Array]:
        """First and last visible position of each position; they may be beyond the ends."""
        assert self.look_forward is not None
        back, ahead = self.window_size * self.look_backward, self.window_size * self.look_forward
        if self.exact_window:
            first, last = position - back, position + ahead
        else:
            block = position // self.window_size * self.window_size
            first, last = block - back, block + self.window_size - 1 + ahead
        return first, position if self.causal else last


def check_shapes(query: Array, key: Array, value: Array, *, cached: bool = False) -> None:
    """Checks operands of self-attention.

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, T, K, D]``.
      value: ``[*B, T, K, V]``.
      cached: one query, any number of keys.

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
