"""Evaluation on FASTA files, beside baselines, every figure over the same residues.

Figures are means over residues: perplexity exp(sum of losses / residues), accuracy hits / residues.
Each has a standard error over proteins, or over groups of relatives, which move together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fast_attention.protein_lm.data.corpus import Corpus, FastaPaths, load_corpus
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.data.held_out import sequence_hashes
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.evaluation import groups, protein_scores
from fast_attention.protein_lm.evaluation.baselines import ProteinSums, fit_ngrams
from fast_attention.protein_lm.evaluation.groups import Groups
from fast_attention.protein_lm.evaluation.ngrams import NGram
from fast_attention.protein_lm.evaluation.ngrams import load_baselines as load_baselines
from fast_attention.protein_lm.evaluation.ngrams import save_baselines as save_baselines
from fast_attention.protein_lm.evaluation.protein_scores import MODEL, ProteinScores
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.modeling import metrics
from fast_attention.protein_lm.modeling.batches import select
from fast_attention.protein_lm.runs import model_file
from fast_attention.protein_lm.runs.run_folder import RunFolder

Row = dict[str, Any]

LENGTH_BINS = (100, 200, 400, 700, 1022)
"""Last lengths of the bins of whole proteins; longer ones are the last bin."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      result: Figures, fit for JSON; see `evaluate_on`.
      per_protein: The columns of the table of single proteins.
    """

    result: dict[str, Any]
    per_protein: dict[str, Sequence[Any]]


def baselines_of(folder: RunFolder) -> list[NGram]:
    """The n-grams of a run; none for a model that was not trained by ``protein-lm train``.

    Raises:
      RunError: If the file is damaged, or missing though the model is of such a training.
    """
    if not folder.baselines.exists() and model_file.read(folder.model)["training"] is None:
        return []
    return load_baselines(folder.baselines)


def fit_baselines(
    train: FastaPaths,
    domain: DiscreteDomain,
    *,
    valid: FastaPaths | None = None,
    on_error: str = "raise",
    held_out: FastaPaths | None = None,
) -> list[NGram]:
    """The n-grams that a model is shown beside, see `baselines.fit_ngrams`.

    Args:
      train: FASTA files to count.
      domain: Of the model, whose vocabulary has the outcomes.
      valid: FASTA files to tune on, or None.
      on_error: See `load_corpus`.
      held_out: FASTA files whose sequences are not counted, or None.
    """
    counted, tuned, left_out = (
        None
        if files is None
        else load_corpus(files, domain, on_error=on_error, skipped=SkippedRecords())
        for files in (train, valid, held_out)
    )
    assert counted is not None
    if left_out is not None:
        copies = np.isin(sequence_hashes(counted), sequence_hashes(left_out))
        counted = select(counted, np.flatnonzero(~copies))
    return fit_ngrams(counted, valid=tuned)


def evaluate_on(
    model: FlaxModel,
    fasta: FastaPaths,
    ngrams: Sequence[NGram],
    *,
    batch_size: int | None = None,
    seed: int = 0,
    num_seeds: int = 1,
    split_file: str | os.PathLike[str] | None = None,
    families: str | os.PathLike[str] | None = None,
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
) -> Evaluation:
    """Scores a model and baselines on the same residues, see `protein_scores.score_proteins`.

    Args:
      model: The model.
      fasta: One FASTA file or several, or folders of them.
      ngrams: Baselines, from `fit_baselines`.
      batch_size: Proteins per batch; None takes the model's. It does not change the result.
      seed: Of what is hidden; a causal model hides nothing.
      num_seeds: Number of passes of a model that hides residues, with the seeds ``seed``,
        ``seed + 1``, ...
      split_file: A table with columns ``accession`` and ``component``; errors are over components
        then. Otherwise they are over proteins.
      families: A table whose first column has ids and whose second has families. Failing that
        components are the families.
      on_error: What to do with a record that cannot be read, see `read_proteins`.
      skipped: Collects what ``on_error="skip"`` leaves out, which needs it.

    Returns:
      Its ``result`` has ``objective``, ``fasta``, ``digest`` (SHA-256 of the sequences in their
      order), ``proteins``, ``left_out`` (number of skipped records, if any), ``residues`` (number
      of those scored), ``max_residues`` (per protein), ``seed``, ``num_seeds`` and ``corruption``
      (options of the objective) where they matter, ``errors`` (``over`` what, and how many
      ``groups``), ``scores``: a list of
      rows with ``name``, ``perplexity`` and ``accuracy``, each with its ``.._error``, the model's
      first; ``by_length``: such lists for proteins of like length; and with families ``by_family``.

    Raises:
      FastaError: If a file cannot be read.
      RunError: If a table cannot be read, or lacks proteins of the files.
      ValueError: If `num_seeds` is not positive.
    """
    if num_seeds < 1:
        raise ValueError(f"the number of seeds must be at least 1; got {num_seeds}")
    paths = [fasta] if isinstance(fasta, (str, os.PathLike)) else list(fasta)
    ids: list[str] = []
    corpus = load_corpus(paths, model.domain, on_error=on_error, skipped=skipped, ids=ids)
    clusters = Groups("protein", ids, np.arange(len(ids)))
    family = None
    if split_file is not None:
        clusters = family = groups.read_groups(
            split_file, ids, key="accession", value="component", name="component"
        )
    if families is not None:
        family = groups.read_groups(families, ids, key=None, value=None, name="family")
    scores = protein_scores.score_proteins(
        model,
        corpus,
        ngrams,
        batch_size=batch_size,
        seeds=range(seed, seed + num_seeds),
    )
    result: dict[str, Any] = {
        "objective": model.objective.name,
        "fasta": [str(path) for path in paths],
        "digest": _digest(corpus),
        "max_residues": scores.max_residues,
    }
    if skipped is not None and skipped.count:
        result["left_out"] = skipped.count
    if model.objective.corrupts:
        corruption = dataclasses.asdict(model.objective)
        result |= {"seed": seed, "num_seeds": num_seeds, "corruption": corruption}
    result |= _figures(scores.sums, clusters.of, np.arange(len(ids)))
    result["errors"] = {"over": clusters.name, "groups": len(set(clusters.of.tolist()))}
    result["by_length"] = _by_length(scores, clusters)
    if family is not None:
        result["by_family"] = _by_family(scores, family)
    return Evaluation(result, _per_protein(ids, scores, family))


def _digest(corpus: Corpus) -> str:
    """The SHA-256 of the sequences, whatever files they are from."""
    digest = hashlib.sha256(f"{corpus.tokens.dtype} {len(corpus)}".encode())
    digest.update(np.ascontiguousarray(corpus.offsets).data)
    digest.update(np.ascontiguousarray(corpus.tokens).data)
    return digest.hexdigest()


def _figures(
    sums: dict[str, ProteinSums], clusters: np.ndarray, proteins: np.ndarray
) -> dict[str, Any]:
    rows = []
    for name, found in sums.items():
        loss, correct, residues = (values[proteins] for values in found)
        perplexity = metrics.perplexity(loss.sum() / residues.sum())
        error = groups.ratio_error(loss, residues, clusters[proteins])
        rows.append(
            {
                "name": name,
                "perplexity": perplexity,
                # The first order of exp around the mean loss.
                "perplexity_error": None if error is None else perplexity * error,
                "accuracy": float(correct.sum() / residues.sum()),
                "accuracy_error": groups.ratio_error(correct, residues, clusters[proteins]),
            }
        )
    residues = int(sums[MODEL].residues[proteins].sum())
    return {"proteins": len(proteins), "residues": residues, "scores": rows}


def _by_length(scores: ProteinScores, clusters: Groups) -> list[Row]:
    bins = np.searchsorted(LENGTH_BINS, scores.lengths)
    lows = [1, *(last + 1 for last in LENGTH_BINS)]
    names = [f"{low}-{last}" for low, last in zip(lows[:-1], LENGTH_BINS, strict=True)]
    names.append(f"{lows[-1]} and more")
    return [
        {"length": names[number]}
        | _figures(scores.sums, clusters.of, np.flatnonzero(bins == number))
        for number in np.unique(bins)
    ]


def _by_family(scores: ProteinScores, family: Groups) -> list[Row]:
    """The families of the most residues first; errors are over the proteins of a family."""
    each = np.arange(len(family.of))
    rows = [
        {"family": label} | _figures(scores.sums, each, np.flatnonzero(family.of == number))
        for number, label in enumerate(family.labels)
    ]
    return sorted(rows, key=lambda row: -row["residues"])


def _per_protein(
    ids: Sequence[str], scores: ProteinScores, family: Groups | None
) -> dict[str, Sequence[Any]]:
    columns: dict[str, Sequence[Any]] = {"id": ids, "length": scores.lengths.tolist()}
    if family is not None:
        columns[family.name] = [family.labels[number] for number in family.of]
    residues = scores.sums[MODEL].residues
    columns["residues_scored"] = residues.astype(int).tolist()
    for name, (loss, correct, _) in scores.sums.items():
        if name.startswith("uniform"):
            continue
        prefix = "" if name == MODEL else f"{name}_"
        columns[f"{prefix}perplexity"] = np.exp(loss / residues).tolist()
        columns[f"{prefix}accuracy"] = (correct / residues).tolist()
    return columns
