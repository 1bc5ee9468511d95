"""Scores of the proteins of FASTA files, as a table."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from fast_attention.protein_lm.fasta import FastaRecord
from fast_attention.protein_lm.model_inputs import Done
from fast_attention.protein_lm.scoring import score_sequences
from fast_attention.protein_lm.tables import open_table
from fast_attention.protein_lm.token_batches import TOKENS_PER_BATCH

if TYPE_CHECKING:
    from fast_attention.protein_lm.flax_model import FlaxModel

_EXACT = ("log_likelihood", "log_likelihood_with_end", "mean_log_likelihood", "perplexity")
_PSEUDO = ("pseudo_log_likelihood", "mean_pseudo_log_likelihood", "pseudo_perplexity")


def score_to_file(
    model: FlaxModel,
    records: Iterable[FastaRecord],
    output: str | os.PathLike[str],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Done:
    """Scores proteins and writes a table of them, in their order.

    Its columns are ``id``, ``residues`` of the protein, ``residues_scored`` (fewer only if it was
    cropped) and those of `SequenceScore` or `PseudoScore`.

    Args:
      model: A `FlaxLM` or a `FlaxBERT`.
      records: Proteins; read as they are needed.
      output: The table, see `tables.open_table`.
      tokens_per_batch: See `scoring.residue_log_likelihoods`, as the others.
      max_length: Crops proteins to so many residues.
      progress: Called with the number of residues scored since its last call.

    Raises:
      ValueError: As `score_sequences` and `open_table`.
    """
    names = _EXACT if model.objective == "causal" else _PSEUDO
    columns: dict[str, type] = {"id": str, "residues": int, "residues_scored": int}
    columns |= dict.fromkeys(names, float)
    waiting: deque[FastaRecord] = deque()

    def sequences() -> Iterator[str]:
        for record in records:
            waiting.append(record)
            yield record.sequence

    proteins = residues = longer = 0
    with open_table(output, columns) as write:
        for score in score_sequences(
            model,
            sequences(),
            tokens_per_batch=tokens_per_batch,
            max_length=max_length,
            progress=progress,
        ):
            record = waiting.popleft()
            values = [getattr(score, name) for name in names]
            write([record.id, len(record.sequence), score.num_residues, *values])
            proteins += 1
            residues += score.num_residues
            longer += score.num_residues > model.domain.length
    return Done(proteins, residues, longer, residues)
