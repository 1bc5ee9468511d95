"""Effects of mutations in parts, from which the same command resumes after it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.inference import mutation_effects, partial_work
from fast_attention.protein_lm.inference.mutations import Variant
from fast_attention.protein_lm.inference.partial_work import Work
from fast_attention.protein_lm.modeling import token_batches

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel

_MOST_EDITS = 2**14
"""Edits of the mutants that are in memory together."""

_FEWEST = 32
"""Mutants of a part, at least: some methods score the wild type once for each part."""


class Scored(NamedTuple):
    """Some variants of a wild type, with their scores.

    Attributes:
      wild_type: The protein.
      begins: Whether they are the first variants of it.
      variants: In their order.
      scores: float64 ``[variants, columns]``, see `mutation_effects.score_columns`.
      resumed: Whether an earlier call had computed them.
    """

    wild_type: FastaRecord
    begins: bool
    variants: list[Variant]
    scores: np.ndarray
    resumed: bool


def score_in_parts(
    model: BuiltModel,
    work: Work,
    proteins: Iterable[tuple[FastaRecord, Iterable[Variant]]],
    *,
    method: str,
    tokens_per_batch: int = token_batches.TOKENS_PER_BATCH,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Scored]:
    """Scores variants of proteins, each part of which is stored before it is given out.

    Args:
      model: The model.
      work: From `partial_work.open_work`; its settings name the model, the method and the budget.
      proteins: Wild types, and the variants of each; read as they are needed.
      method: See `mutation_effects.score_variants`, as the others.
      tokens_per_batch: Most tokens of a batch; a part has about `token_batches.WINDOW` batches.
      progress: Called with the number of proteins read since its last call.

    Raises:
      OutputError: If a part cannot be written.
      RunError, ValueError: As `mutation_effects.score_variants`.
    """
    columns = mutation_effects.score_columns(method)
    number = 0
    for wild_type, variants in proteins:
        begins = True
        for group in _groups(variants, len(wild_type.sequence), method, tokens_per_batch):
            digest = partial_work.content_digest(work, [_content(wild_type, group)])
            resumed = partial_work.has_part(work, number, digest)
            if not resumed:
                found = mutation_effects.score_variants(
                    model,
                    wild_type.sequence,
                    group,
                    method=method,
                    tokens_per_batch=tokens_per_batch,
                    progress=progress,
                )
                scores = np.stack([found[name] for name in columns], axis=-1)
                partial_work.save_part(work, number, digest, {"scores": scores})
            stored = partial_work.read_part(work, number, digest, ["scores"])["scores"]
            yield Scored(wild_type, begins, group, stored, resumed)
            begins = False
            number += 1


def _groups(
    variants: Iterable[Variant], residues: int, method: str, tokens_per_batch: int
) -> Iterator[list[Variant]]:
    """Yields lists of variants that take about as long as a window of batches."""
    room = tokens_per_batch * token_batches.WINDOW
    group: list[Variant] = []
    edits = tokens = 0
    places: list[int] | None = None
    for variant in variants:
        before, places = places, [edit.start for edit in variant.edits]
        group.append(variant)
        edits += 1 + len(variant.edits)
        length = residues + max(0, variant.growth)
        if method == "pseudo-log-likelihood-ratio":
            tokens += length**2
        elif method == "log-likelihood-ratio" or (
            method == "masked-marginals" and places != before
        ):
            # Variants that hide the same places share a pass.
            tokens += length
        if edits >= _MOST_EDITS or (tokens >= room and len(group) >= _FEWEST):
            yield group
            group, edits, tokens, places = [], 0, 0, None
    if group:
        yield group


def _content(wild_type: FastaRecord, variants: list[Variant]) -> bytes:
    return json.dumps([wild_type.id, wild_type.sequence, variants]).encode()
