"""Scores of the proteins of FASTA files, as a table, by a command that can be resumed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.files.tables import Write, open_table
from fast_attention.protein_lm.inference import partial_work, scoring
from fast_attention.protein_lm.inference.model_inputs import (
    Done,
    naming_the_longest,
    record_cost,
)
from fast_attention.protein_lm.modeling import token_batches
from fast_attention.protein_lm.modeling.encoding import Encoded, encode_sequences
from fast_attention.protein_lm.modeling.token_batches import TOKENS_PER_BATCH

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel

_EXACT = ("log_likelihood", "log_likelihood_with_end", "mean_log_likelihood", "perplexity")
_PSEUDO = ("pseudo_log_likelihood", "mean_pseudo_log_likelihood", "pseudo_perplexity")
_MOST = 2**16
"""Proteins of a window, whose rows are in memory together."""


class _Protein(NamedTuple):
    id: str
    residues: int
    encoded: Encoded


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
    settings = {
        "command": "score",
        "model": partial_work.fingerprint(model),
        "tokens_per_batch": tokens_per_batch,
        "max_length": max_length,
        "devices": model.mesh.size,
        **(origin or {}),
    }
    proteins = _encode(model, records, max_length)
    with (
        partial_work.open_work(output, settings) as work,
        open_table(output, columns) as write,
    ):
        done = _score_proteins(model, proteins, names, write, work, tokens_per_batch, progress)
    partial_work.remove_parts(work)
    return done


def _score_proteins(
    model: BuiltModel,
    proteins: Iterable[_Protein],
    names: tuple[str, ...],
    write: Write,
    work: partial_work.Work,
    tokens_per_batch: int,
    progress: Callable[[int], None] | None,
) -> Done:
    """Writes the rows of proteins, window by window."""
    shapes: set[token_batches.Shape] = set()

    def cost(protein: _Protein) -> int:
        return max(scoring.computed_tokens(model, protein.encoded), record_cost(protein.id))

    done = Done(0, 0, 0, 0)
    for number, window in enumerate(
        token_batches.windows(proteins, cost, tokens_per_batch, most=_MOST)
    ):
        encoded = [protein.encoded for protein in window]
        ids = [protein.id for protein in window]
        scored = [len(item.residues) for item in encoded]
        digest = partial_work.window_digest(work, ids, encoded)
        resumed = partial_work.has_part(work, number, digest)
        if not resumed:
            with naming_the_longest(ids, scored):
                values = _score(model, encoded, names, tokens_per_batch, shapes, progress)
            partial_work.save_part(work, number, digest, {"values": values})
        else:
            values = partial_work.read_part(work, number, digest, ["values"])["values"]
            scoring.plan_encoded(model, encoded, tokens_per_batch, shapes)
        for protein, length, row in zip(window, scored, values.tolist(), strict=True):
            write([protein.id, protein.residues, length, *row])
        done = Done(
            done.proteins + len(window),
            done.residues + sum(scored),
            done.longer + sum(length > model.domain.length for length in scored),
            done.computed + (0 if resumed else sum(scored)),
        )
    return done


def _encode(
    model: BuiltModel, records: Iterable[FastaRecord], max_length: int | None
) -> Iterator[_Protein]:
    for record in records:
        (encoded,) = encode_sequences(model, [record.sequence], max_length=max_length)
        yield _Protein(record.id, len(record.sequence), encoded)


def _score(
    model: BuiltModel,
    proteins: list[Encoded],
    names: tuple[str, ...],
    tokens_per_batch: int,
    shapes: set[token_batches.Shape],
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    """The scores of a window, float64 ``[proteins, names]``."""
    found = scoring.score_encoded(model, proteins, tokens_per_batch, shapes, progress)
    scores = map(scoring.sum_up(model), found)
    return np.array([[getattr(score, name) for name in names] for score in scores], np.float64)
