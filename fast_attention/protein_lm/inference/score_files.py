"""Scores of the proteins of FASTA files, as a table, by a command that can be resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.files.tables import open_table
from fast_attention.protein_lm.inference import partial_work, scoring
from fast_attention.protein_lm.inference.model_inputs import record_cost
from fast_attention.protein_lm.inference.partial_work import Arrays, Done, Protein
from fast_attention.protein_lm.modeling import token_batches
from fast_attention.protein_lm.modeling.encoding import Encoded
from fast_attention.protein_lm.modeling.token_batches import TOKENS_PER_BATCH

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel

_EXACT = ("log_likelihood", "log_likelihood_with_end", "mean_log_likelihood", "perplexity")
_PSEUDO = ("pseudo_log_likelihood", "mean_pseudo_log_likelihood", "pseudo_perplexity")
_MOST = 2**16
"""Proteins of a window, whose rows are in memory together."""


def score_to_file(
    model: BuiltModel,
    records: Iterable[FastaRecord],
    output: str | os.PathLike[str],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    max_length: int | None = None,
    origin: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Done:
    """Scores proteins and writes a table of them, in their order.

    Its columns are ``id``, ``residues`` of the protein, ``residues_scored`` (fewer only if it was
    cropped) and those of `SequenceScore` or `PseudoScore`.

    If the call is interrupted, the same call resumes: the scores of finished windows are in a
    folder beside the output, see `partial_work`, which is removed at the end.

    Args:
      model: A `FlaxLM` or a `FlaxBERT`.
      records: Proteins; read as they are needed.
      output: The table, see `tables.open_table`.
      tokens_per_batch: See `scoring.residue_log_likelihoods`, as the others.
      max_length: Crops proteins to so many residues.
      origin: Whatever else must not change between a call and its resumption, as JSON.
      progress: Called with the number of residues scored since its last call.

    Raises:
      RunError: If a call with another model or other arguments was stopped.
      ValueError: As `score_sequences` and `open_table`.
    """
    names = _EXACT if model.objective.exact else _PSEUDO
    columns: dict[str, type] = {"id": str, "residues": int, "residues_scored": int}
    columns |= dict.fromkeys(names, float)
    settings = partial_work.settings("score", model, tokens_per_batch, max_length, origin or {})
    proteins = partial_work.encode_records(model, records, max_length)
    shapes: set[token_batches.Shape] = set()
    done = Done()

    def cost(protein: Protein) -> int:
        return max(scoring.computed_tokens(model, protein.encoded), record_cost(protein.id))

    def compute(window: list[Protein]) -> Arrays:
        encoded = [protein.encoded for protein in window]
        found = scoring.score_encoded(model, encoded, tokens_per_batch, shapes, progress)
        scores = map(scoring.sum_up(model), found)
        rows = [[getattr(score, name) for name in names] for score in scores]
        return {"values": np.array(rows, np.float64)}

    def pass_over(encoded: list[Encoded]) -> None:
        scoring.plan_encoded(model, encoded, tokens_per_batch, shapes)

    with (
        partial_work.open_work(output, settings) as work,
        open_table(output, columns) as write,
    ):
        windows = token_batches.windows(proteins, cost, tokens_per_batch, most=_MOST)
        for part in partial_work.complete_parts(model, work, windows, compute, pass_over):
            stored = partial_work.read_part(work, part.number, part.digest, ["values"])["values"]
            done = part.done
            for protein, row in zip(part.proteins, stored.tolist(), strict=True):
                write([protein.id, protein.residues, protein.read, *row])
    partial_work.remove_parts(work)
    return done
