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

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.protein_lm.inference.mutations import Variant
from fast_attention.protein_lm.modeling import token_batches, train_state
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.encoding import (
    Encoded,
    encode_sequences,
    longest_input,
    with_end,
)

_MOST_STRIDES = 8
_BATCHES_OF_A_STRIDE = 4
"""A stride has a program of its own, which must be worth its compilation."""

_SHORTEST = 16


class Ratio(NamedTuple):
    """How much more probable a variant is than the wild type, natural logarithms.

    Attributes:
      residues: ``log p(variant) - log p(wild type)``, of the residues.
      with_end: The same with the probabilities that the proteins end there; NaN where the model
        has no end token.
    """

    residues: float
    with_end: float


class _Row(NamedTuple):
    """A sequence to be read.

    Attributes:
      index: Of the variant; -1 is the wild type.
      variant: Which.
      first: The first residue that is not that of the wild type.
      num_residues: Of the sequence.
      num_tokens: That the model reads, and is asked for: one more where there is an end token.
    """

    index: int
    variant: Variant
    first: int
    num_residues: int
    num_tokens: int


def can_share_prefixes(model: BuiltModel) -> bool:
    """Whether the model can continue from a state."""
    transformer = nnx.merge(model.graphdef, model.weights, model.variables)
    return bool(getattr(transformer, "can_decode", False))


def likelihood_ratios(
    model: BuiltModel,
    wild_type: str,
    variants: Sequence[Variant],
    *,
    tokens_per_batch: int = token_batches.TOKENS_PER_BATCH,
    progress: Callable[[int], object] | None = None,
) -> list[Ratio]:
    """Compares variants with the wild type.

    Args:
      model: A causal model that can decode.
      wild_type: Residues.
      variants: Of it, none without an edit.
      tokens_per_batch: Most tokens of a batch, padding included.
      progress: Called with the number of variants read since its last call.

    Returns:
      The ratio of each variant.

    Raises:
      ValueError: If a sequence has a letter that the model does not know, or is too long.
    """
    wild = _row(model, -1, Variant("WT", ()), 0, len(wild_type))
    rows = [
        _row(model, i, variant, variant.edits[0].start, len(wild_type) + variant.growth)
        for i, variant in enumerate(variants)
    ]
    strides = len(rows) * wild.num_tokens // (_BATCHES_OF_A_STRIDE * tokens_per_batch)
    stride = max(_SHORTEST, -(-wild.num_tokens // min(max(strides, 1), _MOST_STRIDES)))
    groups: dict[int, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.first // stride * stride, []).append(row)
    limits = _Limits(wild.num_tokens, stride, longest_input(model), tokens_per_batch)
    plan = [
        (start, part, width)
        for start, group in sorted(groups.items())
        for part, width in _batches([wild, *group], start, limits)
    ]
    room = max((start + width for start, _, width in plan), default=1)
    arrays = (model.graphdef, model.weights, model.variables)
    state, read = _begin(*arrays, room), 0
    inputs, _ = _tokens(model, wild_type)
    found: list[Ratio] = [Ratio(0.0, 0.0)] * len(rows)
    reference = np.zeros(0)
    for start, part, width in plan:
        while read < start:
            state = _advance(*arrays, state, jnp.asarray(inputs[None, read : read + stride]))
            read += stride
        batch = _batch(model, wild_type, part, start, width)
        values = np.asarray(_score(*arrays, state, **batch), np.float64)
        for row, value in zip(part, values, strict=False):
            if row.index < 0:
                reference = value
            else:
                found[row.index] = _compare(row, value, wild, reference, start)
        if progress is not None:
            progress(sum(row.index >= 0 for row in part))
    return found


class _Limits(NamedTuple):
    """What the shapes of batches depend on."""

    wild_tokens: int
    stride: int
    longest: int | None
    budget: int


def _row(model: BuiltModel, index: int, variant: Variant, first: int, num_residues: int) -> _Row:
    end = (
        len(with_end(model.domain.vocab, Encoded(np.zeros(num_residues, np.int32), True)))
        - num_residues
    )
    return _Row(index, variant, first, num_residues, num_residues + end)


def _tokens(model: BuiltModel, sequence: str) -> tuple[np.ndarray, np.ndarray]:
    """What the model reads, and what it predicts."""
    (item,) = encode_sequences(model, [sequence])
    (question,) = model.objective.questions(model.domain.vocab, item)
    return question.inputs, question.targets


def _batches(group: list[_Row], start: int, limits: _Limits) -> Iterator[tuple[list[_Row], int]]:
    """Cuts what begins at a stride into batches; the first of them begins with the wild type."""
    wild, *others = group
    rest = [wild, *sorted(others, key=lambda row: row.num_tokens)]
    while rest:
        number, width = 0, 0
        for row in rest:
            # Widths differ by strides and heights by factors of two, so that programs are few.
            beyond = -(-max(0, row.num_tokens - limits.wild_tokens) // limits.stride)
            wider = limits.wild_tokens + beyond * limits.stride
            wider = (wider if limits.longest is None else min(wider, limits.longest)) - start
            most = 1 << (max(1, limits.budget // max(wider, 1)).bit_length() - 1)
            if number >= most:
                break
            number, width = number + 1, wider
        yield rest[:number], width
        rest = rest[number:]


def _batch(
    model: BuiltModel, wild_type: str, rows: list[_Row], start: int, width: int
) -> dict[str, Any]:
    number = 1 << (len(rows) - 1).bit_length()
    pairs = [_tokens(model, row.variant.apply(wild_type)) for row in rows]
    inputs, targets = ([tokens[start:] for tokens in column] for column in zip(*pairs, strict=True))
    lengths = np.array([len(tokens) for tokens in inputs] + [width] * (number - len(rows)))
    visible = np.arange(width)[None] < lengths[:, None]
    batch: dict[str, Any] = {
        "inputs": token_batches.fill(inputs, (number, width)),
        "targets": token_batches.fill(targets, (number, width)),
        "visible": None if visible.all() else visible,
    }
    return train_state.shard_batch(batch, model.mesh)


def _compare(row: _Row, value: np.ndarray, wild: _Row, reference: np.ndarray, start: int) -> Ratio:
    def total(values: np.ndarray, end: int) -> float:
        return float(values[row.first - start : end - start].sum())

    residues = total(value, row.num_residues) - total(reference, wild.num_residues)
    ends = []
    for values, sequence in ((value, row), (reference, wild)):
        ended = sequence.num_tokens > sequence.num_residues
        ends.append(values[sequence.num_residues - start] if ended else math.nan)
    return Ratio(residues, residues + float(ends[0] - ends[1]))


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
