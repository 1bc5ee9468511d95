"""From a stream of sequences of any length to batches of few shapes with little padding.

The stream is taken window by window, so that results come back in its order and no more than a
window is ever in memory. A window is sorted by length and cut into batches of at most
``tokens_per_batch`` tokens, padding included; a sequence longer than that has a batch of its own.

A compiled program serves one shape. Widths are therefore taken from a grid of four per octave, and
of these only as many are used as earn their compilation in less padding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fast_attention.protein_lm.distributed import process_arrays

Item = TypeVar("Item")
Result = TypeVar("Result")

Shape = tuple[int, int]
"""Rows and width."""

TOKENS_PER_BATCH = 16384
WINDOW = 64
"""Batches of a window, about; the more, the less padding, and the later the first result."""

_COMPILATION = 2**15
"""What a new program costs at least, in tokens: about what a CPU computes in the time."""

_SHARE = 32
"""A new program must also save this part of the window's tokens, which keeps programs few."""

_FINEST = 16
"""Step of the grid of widths at its narrow end."""

_AHEAD = 2
"""Batches handed to the device before the first of their results is waited for."""


class TokenBatch(NamedTuple):
    """Which sequences of a window share a batch.

    Attributes:
      members: Their places in the window, at most `rows`; rows without a sequence are padding.
      rows: Rows of the batch.
      width: Padded length.
    """

    members: tuple[int, ...]
    rows: int
    width: int


def windows(
    items: Iterable[Item],
    length: Callable[[Item], int],
    tokens_per_batch: int = TOKENS_PER_BATCH,
    batches: int = WINDOW,
    most: int | None = None,
) -> Iterator[list[Item]]:
    """Cuts a stream into lists that hold the tokens of about `batches` full batches.

    Args:
      items: The stream; it is read no further than the window that is given out.
      length: Tokens of an item.
      tokens_per_batch: The budget of a batch.
      batches: The size of a window; a longer item is a window of its own.
      most: The maximum number of items in a window; None sets no maximum.

    Yields:
      Lists of one or more items, in order.

    Raises:
      ValueError: If the budget is not positive.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1, but got {tokens_per_batch}.")
    room = tokens_per_batch * batches
    window: list[Item] = []
    tokens = 0
    for item in items:
        size = length(item)
        if window and (tokens + size > room or len(window) == most):
            yield window
            window, tokens = [], 0
        window.append(item)
        tokens += size
    if window:
        yield window


def plan_batches(
    lengths: Sequence[int],
    tokens_per_batch: int,
    shapes: set[Shape],
    *,
    devices: int = 1,
) -> list[TokenBatch]:
    """Cuts a window into batches.

    Args:
      lengths: Tokens of each sequence.
      tokens_per_batch: Most tokens of a batch, padding included, unless it has a single row.
      shapes: Of programs that exist; those of the plan are added. Equal windows and equal shapes
        give equal plans.
      devices: The rows of full batches are a multiple of it, where they are as many.

    Returns:
      Batches that hold every sequence once, the shortest first.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(sizes, kind="stable")

    def full(width: int) -> int:
        rows = max(1, tokens_per_batch // width)
        return rows - rows % devices if rows >= devices else rows

    known = {width for rows, width in shapes if rows == full(width)}
    widths = _choose_widths(sizes[order], max(_COMPILATION, int(sizes.sum()) // _SHARE), known)
    ends = np.searchsorted(sizes[order], widths, side="right")
    batches: list[TokenBatch] = []
    waiting: list[int] = []
    start = 0
    for width, end, wider in zip(widths, ends.tolist(), [*widths[1:], None], strict=True):
        waiting += order[start:end].tolist()
        start = end
        rows = full(width)
        while waiting:
            # Too few for a batch go with the next wider ones, where that costs less.
            if len(waiting) < rows and wider and len(waiting) * wider <= rows * width:
                break
            members, waiting = waiting[:rows], waiting[rows:]
            if len(members) < rows and (rows, width) not in shapes:
                rows = min(rows, 1 << (len(members) - 1).bit_length())
            shapes.add((rows, width))
            batches.append(TokenBatch(tuple(members), rows, width))
    return batches


def compute_window(
    window: Sequence[Item],
    length: Callable[[Item], int],
    compute: Callable[[list[Item], Shape], Any],
    take: Callable[[Any, int, Item], Result],
    tokens_per_batch: int,
    shapes: set[Shape],
    *,
    devices: int = 1,
    progress: Callable[[list[Item]], None] | None = None,
) -> list[Result]:
    """Computes something for every item of a window, batch by batch.

    Args:
      window: The items.
      length: Tokens of an item.
      compute: From the items of a batch, at most as many as its rows, and its shape to a pytree
        of arrays on the device.
      take: From the pytree of a batch, on the host, a row and its item to the item's result.
      tokens_per_batch: As for `plan_batches`.
      shapes: As for `plan_batches`.
      devices: As for `plan_batches`.
      progress: Called with the items of each batch when it is computed.

    Returns:
      The result of each item, in the order of the window.
    """
    results: list[Any] = [None] * len(window)
    running: deque[tuple[TokenBatch, Any]] = deque()

    def collect() -> None:
        batch, computed = running.popleft()
        computed = process_arrays.fetch(computed)
        for row, place in enumerate(batch.members):
            results[place] = take(computed, row, window[place])
        if progress is not None:
            progress([window[place] for place in batch.members])

    for batch in plan_batches(
        [length(item) for item in window], tokens_per_batch, shapes, devices=devices
    ):
        members = [window[place] for place in batch.members]
        running.append((batch, compute(members, (batch.rows, batch.width))))
        if len(running) > _AHEAD:
            collect()
    while running:
        collect()
    return results


def plan_stream(
    lengths: Iterable[int], tokens_per_batch: int, shapes: set[Shape], *, devices: int = 1
) -> None:
    """Adds the shapes that `compute_stream` would, without computing anything.

    Args:
      lengths: Tokens of each item.
      tokens_per_batch: As for `plan_batches`, as are the others.
      shapes: Takes the shapes.
      devices: How many devices share a batch.
    """
    for window in windows(lengths, int, tokens_per_batch):
        plan_batches(window, tokens_per_batch, shapes, devices=devices)


def compute_stream(
    items: Iterable[Item],
    length: Callable[[Item], int],
    compute: Callable[[list[Item], Shape], Any],
    take: Callable[[Any, int, Item], Result],
    tokens_per_batch: int,
    shapes: set[Shape],
    *,
    devices: int = 1,
    progress: Callable[[list[Item]], None] | None = None,
) -> Iterator[Result]:
    """Computes something for every item of a stream, in its order.

    The arguments are those of `windows` and `compute_window`.
    """
    for window in windows(items, length, tokens_per_batch):
        yield from compute_window(
            window,
            length,
            compute,
            take,
            tokens_per_batch,
            shapes,
            devices=devices,
            progress=progress,
        )


def fill(rows: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
    """Returns int32 ``[rows, width]`` that holds the given rows from the left, then zeros."""
    filled = np.zeros(shape, np.int32)
    for row, tokens in zip(filled, rows, strict=False):
        row[: len(tokens)] = tokens
    return filled


def _choose_widths(sizes: np.ndarray, price: int, known: set[int]) -> list[int]:
    """The widths that cost least, padding and the price of unknown ones taken together.

    Args:
      sizes: int [N], rising.
      price: Tokens that a width costs which is not in `known`.
      known: Widths without price.
    """
    grid = np.array(sorted({*_grid(int(sizes[-1])), *known}))
    fitting = np.searchsorted(sizes, grid, side="right")
    # cost[j]: the least cost of all rows that fit into grid[j - 1], whose width is used.
    cost, before = np.zeros(len(grid) + 1), np.zeros(len(grid) + 1, int)
    fitted = np.concatenate([[0], fitting])
    for j, width in enumerate(grid.tolist(), 1):
        costs = cost[:j] + (fitted[j] - fitted[:j]) * width
        before[j] = np.argmin(costs)
        cost[j] = costs[before[j]] + (0 if width in known else price)
    whole = np.flatnonzero(fitted == len(sizes))
    j = int(whole[np.argmin(cost[whole])])
    chosen = []
    while j:
        if fitted[j] > fitted[before[j]]:
            chosen.append(int(grid[j - 1]))
        j = int(before[j])
    return chosen[::-1]


def _grid(longest: int) -> list[int]:
    widths = [_FINEST]
    while widths[-1] < longest:
        octave = 1 << (widths[-1].bit_length() - 1)
        widths.append(widths[-1] + max(_FINEST, octave // 4))
    return widths
