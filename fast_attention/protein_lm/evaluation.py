"""Evaluation on FASTA files, beside baselines, every figure over the same residues.

Protocol: the first 1022 residues of each protein are scored (or as many as the model has room
for), the end token is not, and probabilities are those of the full vocabulary.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fast_attention.protein_lm import batches, data, metrics, train_state
from fast_attention.protein_lm.baselines import MAX_RESIDUES, NGram, evaluate_ngram, fit_ngram
from fast_attention.protein_lm.corpus import Corpus, FastaPaths, domain_letters, load_corpus
from fast_attention.protein_lm.domains import DiscreteDomain, make_protein_domain
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.run_folder import write_file
from fast_attention.protein_lm.skipped_records import SkippedRecords

Row = dict[str, Any]


def fit_baselines(
    train: FastaPaths, *, on_error: str = "raise", alphabet: str | None = None
) -> list[NGram]:
    """The unigram and the bigram of some proteins; for the arguments see `load_corpus`."""
    corpus = load_corpus(
        train,
        make_protein_domain(),
        on_error=on_error,
        skipped=SkippedRecords(),
        alphabet=alphabet,
    )
    return [fit_ngram(corpus, order) for order in (1, 2)]


def save_baselines(path: Path, ngrams: Sequence[NGram]) -> None:
    """Writes n-grams, so that an evaluation needs no training data."""
    tables = {str(ngram.order): ngram.probabilities for ngram in ngrams}
    archive = io.BytesIO()
    np.savez(archive, allow_pickle=False, **tables)
    write_file(path, archive.getvalue())


def load_baselines(path: Path) -> list[NGram]:
    """Reads what `save_baselines` wrote."""
    with np.load(path) as tables:
        return [NGram(int(order), tables[order]) for order in tables]


def evaluate_on(
    model: FlaxModel,
    fasta: FastaPaths,
    ngrams: Sequence[NGram],
    *,
    batch_size: int | None = None,
    seed: int = 0,
    on_error: str = "raise",
    skipped: SkippedRecords | None = None,
) -> dict[str, Any]:
    """Scores a model and baselines on the same residues.

    A causal model is asked for every residue. A masked model is asked for the residues that
    `seed` chooses, and is shown the others; of the baselines only those that look at no
    neighbours can be compared then.

    Args:
      model: The model.
      fasta: One FASTA file or several, or folders of them.
      ngrams: Baselines, from `fit_baselines`.
      batch_size: Proteins per batch; None takes the model's. It does not change the result.
      seed: Of the masks; a causal model has none.
      on_error: What to do with a record that cannot be read, see `read_proteins`.
      skipped: Collects what ``on_error="skip"`` leaves out, which needs it.

    Returns:
      ``objective``, ``fasta``, ``proteins``, ``left_out`` (how many were, if any), ``residues``
      (how many were scored), ``max_residues`` (per protein), ``seed`` where it matters, and
      ``scores``: a list of rows with ``name``, ``perplexity`` and ``accuracy``, the model's first.

    Raises:
      FastaError: If a file cannot be read.
    """
    length = min(MAX_RESIDUES, model.max_length)
    corpus = load_corpus(fasta, model.domain, on_error=on_error, skipped=skipped)
    found = list(
        data.eval_batches(
            corpus,
            model.domain,
            length=length,
            batch_size=batch_size or model.batch_size,
            objective=model.objective,
            seed=seed,
            masking=model.masking,
            score_eos=False,
        )
    )
    values = metrics.combine_metrics(model.batch_sums(found))
    residues = int(values["denominator"])
    rows = [_row("this model", values["perplexity"], values["accuracy"])]
    if model.objective == "causal":
        whole = load_corpus(
            fasta,
            make_protein_domain(),
            on_error=on_error,
            skipped=SkippedRecords(),
            alphabet=domain_letters(model.domain),
        )
        rows += _causal_baselines(batches.crop(whole, length), ngrams)
    else:
        rows += _masked_baselines(found, model.domain, ngrams)
    paths = [fasta] if isinstance(fasta, (str, os.PathLike)) else fasta
    result = {
        "objective": model.objective,
        "fasta": [str(path) for path in paths],
        "proteins": len(corpus),
        "residues": residues,
        "max_residues": length,
        "scores": rows,
    }
    if skipped is not None and skipped.count:
        result["left_out"] = skipped.count
    return result if model.objective == "causal" else result | {"seed": seed}


def _row(name: str, perplexity: float, accuracy: float) -> Row:
    return {"name": name, "perplexity": perplexity, "accuracy": accuracy}


def _uniform(outcomes: int) -> Row:
    return _row(f"uniform over {outcomes}", float(outcomes), 1 / outcomes)


def _causal_baselines(corpus: Corpus, ngrams: Sequence[NGram]) -> list[Row]:
    scores = [evaluate_ngram(ngram, corpus) for ngram in ngrams]
    outcomes = len(make_protein_domain().vocab.ordinary_ids) + 1
    return [_uniform(outcomes)] + [
        _row(score.name, score.perplexity, score.accuracy) for score in scores
    ]


def _masked_baselines(
    found: Iterable[train_state.Batch], domain: DiscreteDomain, ngrams: Sequence[NGram]
) -> list[Row]:
    """Only residues are asked for, so that the end of a sequence is no possible outcome."""
    full = make_protein_domain().vocab
    unigram = next(ngram for ngram in ngrams if ngram.order == 1).probabilities[0]
    residues = unigram[full.ordinary_ids] / unigram[full.ordinary_ids].sum()
    letters = [domain.vocab.tokens[i] for i in domain.vocab.ordinary_ids]
    probabilities = np.array([residues[full.encode(letter)[0]] for letter in letters])
    targets = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in found])
    perplexity = float(np.exp(-np.log(probabilities[targets]).mean()))
    accuracy = float((targets == probabilities.argmax()).mean())
    return [_uniform(len(letters)), _row("unigram", perplexity, accuracy)]
