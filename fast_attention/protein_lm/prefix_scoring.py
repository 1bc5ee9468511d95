"""Log-likelihood ratios of variants, without reading again what they share with the wild type.

A causal model reads the residues before the first change as it reads those of the wild type, and
finds them as probable. The wild type is therefore read once, from stride to stride, and the state
after each stride is where the variants begin that change in the next one.

Letters: B rows, W tokens behind the stride.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.protein_lm import token_batches, train_state
from fast_attention.protein_lm.encoding import Encoded, longest_input, with_begin, with_end
from fast_attention.protein_lm.flax_model import FlaxModel

_MOST_STRIDES = 8
_BATCHES_OF_A_STRIDE = 4
"""A stride has a program of its own, which must be worth its compilation."""


class Ratio(NamedTuple):
    """How much more probable a variant is than the wild type, natural logarithms.

    Attributes:
      residues: ``log p(variant) - log p(wild type)``, of the residues.
      with_end: The same with the probabilities that the proteins end there; NaN where the model
        has no end token, or no room for it.
    """

    residues: float
    with_end: float


class _Row(NamedTuple):
    """A sequence to be read.

    Attributes:
      index: Of the variant; -1 is the wild type.
      inputs: What the model reads.
      targets: What it is asked for, of the same length.
      first: The first target that is not that of the wild type.
      num_residues: Of the sequence.
    """

    index: int
    inputs: np.ndarray
    targets: np.ndarray
    first: int
    num_residues: int


def can_share_prefixes(model: FlaxModel) -> bool:
    """Whether the model can go on reading from a state."""
    transformer = nnx.merge(model.graphdef, model.state.parameters, model.state.variables)
    return bool(getattr(transformer, "can_decode", False))


def likelihood_ratios(
    model: FlaxModel,
    wild_type: Encoded,
    variants: Sequence[tuple[Encoded, int]],
    *,
    tokens_per_batch: int = token_batches.TOKENS_PER_BATCH,
    progress: Callable[[int], None] | None = None,
) -> list[Ratio]:
    """Compares variants with the wild type.

    Args:
      model: A causal model that can decode.
      wild_type: Its residues.
      variants: The residues of each, and the place of the first one that is not the wild type's.
      tokens_per_batch: Most tokens of a batch, padding included.
      progress: Called with the number of variants read since its last call.

    Returns:
      The ratio of each variant.
    """
    wild = _row(model, -1, wild_type, 0)
    rows = [_row(model, i, item, first) for i, (item, first) in enumerate(variants)]
    length = len(wild.inputs)
    strides = len(rows) * length // (_BATCHES_OF_A_STRIDE * tokens_per_batch)
    stride = max(16, -(-length // min(max(strides, 1), _MOST_STRIDES)))
    groups: dict[int, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.first // stride * stride, []).append(row)
    plan = [
        (start, part, width)
        for start, group in sorted(groups.items())
        for part, width in _batches(
            group, wild, start, stride, longest_input(model), tokens_per_batch
        )
    ]
    room = max((start + width for start, _, width in plan), default=length)
    arrays = (model.graphdef, model.state.parameters, model.state.variables)
    state, read = _begin(arrays[0], *arrays[1:], room), 0
    found: list[Ratio] = [Ratio(0.0, 0.0)] * len(rows)
    reference = np.zeros(0)
    for start, part, width in plan:
        if read < start:
            state, read = _read(*arrays, state, wild.inputs, read, start, stride), start
            reference = np.zeros(0)
        values = np.asarray(_score(*arrays, state, **_batch(model, part, start, width)), np.float64)
        for row, value in zip(part, values, strict=False):
            if row.index < 0:
                reference = value
            else:
                found[row.index] = _compare(row, value, wild, reference, start)
        if progress is not None:
            progress(sum(row.index >= 0 for row in part))
    return found


def _row(model: FlaxModel, index: int, item: Encoded, first: int) -> _Row:
    targets = with_end(model, item)
    return _Row(index, with_begin(model, targets[:-1]), targets, first, len(item.residues))


def _batches(
    group: list[_Row], wild: _Row, start: int, stride: int, longest: int | None, budget: int
) -> Iterator[tuple[list[_Row], int]]:
    """Cuts what begins at a stride into batches; the first of them begins with the wild type."""
    rest = [wild, *sorted(group, key=lambda row: len(row.inputs))]
    while rest:
        width, number = 0, 0
        for number, row in enumerate(rest, 1):
            # Widths differ by strides, so that there are few programs.
            beyond = max(0, len(row.inputs) - len(wild.inputs))
            fitting = len(wild.inputs) - start + -(-beyond // stride) * stride
            fitting = min(fitting, (longest or start + fitting) - start)
            if number > 1 and number * fitting > budget:
                number -= 1
                break
            width = fitting
        yield rest[:number], width
        rest = rest[number:]


def _batch(model: FlaxModel, rows: list[_Row], start: int, width: int) -> dict[str, Any]:
    # A power of two where that is not full, again for few programs.
    number = 1 << (len(rows) - 1).bit_length()
    shape = (number, width)
    lengths = np.array([len(row.inputs) - start for row in rows] + [width] * (number - len(rows)))
    batch: dict[str, Any] = {
        "inputs": token_batches.fill([row.inputs[start:] for row in rows], shape, 0),
        "targets": token_batches.fill([row.targets[start:] for row in rows], shape, 0),
        "visible": np.arange(width)[None] < lengths[:, None],
    }
    if batch["visible"].all():
        batch["visible"] = None
    return train_state.shard_batch(batch, model.mesh)


def _compare(row: _Row, value: np.ndarray, wild: _Row, reference: np.ndarray, start: int) -> Ratio:
    def total(values: np.ndarray, end: int) -> float:
        return float(values[row.first - start : end - start].sum())

    residues = total(value, row.num_residues) - total(reference, wild.num_residues)
    ends = []
    for values, sequence in ((value, row), (reference, wild)):
        ended = len(sequence.targets) > sequence.num_residues
        ends.append(values[sequence.num_residues - start] if ended else math.nan)
    return Ratio(residues, residues + float(ends[0] - ends[1]))


def _read(
    graphdef: Any,
    parameters: Any,
    variables: Any,
    state: Any,
    tokens: np.ndarray,
    read: int,
    until: int,
    stride: int,
) -> Any:
    for start in range(read, until, stride):
        part = jnp.asarray(tokens[None, start : start + stride])
        state = _advance(graphdef, parameters, variables, state, part)
    return state


@functools.partial(jax.jit, static_argnames=("graphdef", "room"))
def _begin(graphdef: Any, parameters: Any, variables: Any, room: int) -> Any:
    return nnx.merge(graphdef, parameters, variables).init_state(1, room)


@functools.partial(jax.jit, static_argnames="graphdef")
def _advance(
    graphdef: Any, parameters: Any, variables: Any, state: Any, tokens: Int[Array, "1 T"]
) -> Any:
    return nnx.merge(graphdef, parameters, variables).prefill(state, tokens)[1]


@functools.partial(jax.jit, static_argnames="graphdef")
def _score(
    graphdef: Any,
    parameters: Any,
    variables: Any,
    state: Any,
    inputs: Int[Array, "B W"],
    targets: Int[Array, "B W"],
    visible: Bool[Array, "B W"] | None,
) -> Float[Array, "B W"]:
    """Log-probabilities of the targets, every row read from the same state of one row."""
    model = nnx.merge(graphdef, parameters, variables)
    state = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (len(inputs), *leaf.shape[1:])) if leaf.ndim else leaf,
        state,
    )
    logits, _ = model.prefill(state, inputs, visible)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
