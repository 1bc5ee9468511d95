"""Inputs with the targets to predict at each position, as a caller gives them.

Shape letters: N rows, T length, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fast_attention.protein_lm.modeling.model_config import ModelTokens

# Seeds of unlike draws differ in this number (others are in packing.py, data.py and batches.py).
_PAIRS = 7

_FORMS = (
    "(inputs, targets), (inputs, targets, weights), or a dict with 'inputs', 'targets' and perhaps "
    "'weights', each [N, T]"
)


class Pairs(NamedTuple):
    """Rows to read and to predict.

    Attributes:
      inputs: int32 [N, T], ids that the model reads, as they are: nothing is shifted or masked.
      targets: int32 [N, T], ids to predict at the same positions.
      weights: float32 [N, T], what each position counts.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def is_pairs(xs: Any) -> bool:
    """Whether `xs` has one of the forms of `as_pairs`."""
    if isinstance(xs, Mapping):
        return "segment_ids" not in xs
    return isinstance(xs, tuple) and len(xs) in (2, 3) and all(_is_table(part) for part in xs)


def as_pairs(xs: Any, tokens: ModelTokens) -> Pairs:
    """Reads ``(inputs, targets)``, ``(inputs, targets, weights)`` or a dict of these.

    Args:
      xs: For which `is_pairs` is true. Without weights, every position counts 1 but for those whose
        target is padding.
      tokens: Of the model.

    Raises:
      ValueError: If a part is missing, has another shape than the inputs, or holds something else
        than ids of the model, or finite weights.
    """
    parts = (
        dict(xs)
        if isinstance(xs, Mapping)
        else dict(zip(("inputs", "targets", "weights"), xs, strict=False))
    )
    unknown = sorted(set(parts) - {"inputs", "targets", "weights"}, key=str)
    if unknown or not {"inputs", "targets"} <= set(parts):
        raise ValueError(f"expected {_FORMS}; got a dict with {sorted(map(str, parts))}")
    if isinstance(parts["targets"], Mapping):
        raise ValueError(
            "expected one array of targets, but got a dict of them: 'regression' targets are "
            "trained by 'protein-lm fine-tune', and 'classification' ones are given alone"
        )
    inputs = np.asarray(parts["inputs"])
    found = {}
    for name in ("inputs", "targets"):
        ids = np.asarray(parts[name])
        if ids.ndim != 2 or ids.shape != inputs.shape:
            raise ValueError(f"expected {_FORMS}; got {name} of shape {ids.shape}")
        if ids.dtype.kind not in "iu" or not ((ids >= 0) & (ids < tokens.vocab_size)).all():
            raise ValueError(f"{name} must be ids from 0 to {tokens.vocab_size - 1}; got {ids}")
        found[name] = ids.astype(np.int32)
    weights = parts.get("weights")
    if weights is None:
        weights = np.ones(inputs.shape) if tokens.pad is None else found["targets"] != tokens.pad
    weights = np.asarray(weights, np.float32)
    if weights.shape != inputs.shape or not np.isfinite(weights).all():
        raise ValueError(f"weights must be finite numbers {inputs.shape}; got {weights.shape}")
    return Pairs(found["inputs"], found["targets"], weights)


def pair_batch(pairs: Pairs, tokens: ModelTokens, rows: int | None = None) -> dict[str, np.ndarray]:
    """One batch of the form of `data.make_dataset`, filled up with rows of weight 0.

    Args:
      pairs: At most as many as there are rows.
      tokens: Of the model: padding among the inputs is not attended to.
      rows: B; None is as many as there are.
    """
    number, length = pairs.inputs.shape
    visible = np.ones((number, length), bool) if tokens.pad is None else pairs.inputs != tokens.pad
    batch = {
        "inputs": pairs.inputs,
        "targets": pairs.targets,
        "weights": pairs.weights,
        "segment_ids": visible.astype(np.int32),
        "positions": np.where(visible, np.arange(length), 0).astype(np.int32),
    }
    missing = (0 if rows is None else rows) - number
    if missing <= 0:
        return batch
    return {name: np.pad(array, ((0, missing), (0, 0))) for name, array in batch.items()}


def pair_batches(
    pairs: Pairs, tokens: ModelTokens, *, batch_size: int, epochs: int = 1, seed: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of all rows, once an epoch.

    Args:
      pairs: The rows.
      tokens: Of the model.
      batch_size: B.
      epochs: How often to go through the rows.
      seed: Of their order in each epoch; None keeps the order.
    """
    for epoch in range(epochs):
        order = np.arange(len(pairs.inputs))
        if seed is not None:
            order = np.random.default_rng([seed, _PAIRS, epoch]).permutation(order)
        for first in range(0, len(order), batch_size):
            members = order[first : first + batch_size]
            part = Pairs(*(array[members] for array in pairs))
            yield pair_batch(part, tokens, batch_size)


def _is_table(part: Any) -> bool:
    try:
        return np.ndim(part) == 2
    except ValueError:  # Rows of unlike lengths.
        return False
