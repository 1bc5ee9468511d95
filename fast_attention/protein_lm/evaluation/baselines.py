r"""Baselines that need no neural network: uniform, unigram, and n-grams with back-off.

An n-gram of order n interpolates from the shortest context to the longest,

    p_n(w | h) = (c(h w) + k_n p_{n-1}(w | h')) / (c(h) + k_n),    p_0(w) = 1 / V,

with ``c`` the counts in the training proteins, ``h'`` the context ``h`` without its oldest token,
and ``k_n`` the weight of the shorter context. Order 1 with ``k_1 = V alpha`` is the empirical
distribution with Laplace smoothing ``(c(w) + alpha) / (c + V alpha)``, the baseline of the
ProGen (arXiv:2004.03497) and Performer (arXiv:2009.14794) papers.

The V outcomes are those of the vocabulary of the corpus: its ordinary tokens, and the end where it
has an end token. For the protein vocabulary these are 26, ``20 + BOUXZ + end``.

Protocol: the first 1022 residues of each protein are scored. The end is an outcome, and counted in
training, but not scored. Contexts begin with the begin.

References:
  MacKay and Peto. A hierarchical Dirichlet language model. Natural Language Engineering 1 (1995).

Shape letters: N proteins or contexts, S scored residues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fast_attention.protein_lm.data.corpus import Corpus, FastaPaths, load_corpus
from fast_attention.protein_lm.data.domains import make_protein_domain
from fast_attention.protein_lm.evaluation.ngrams import NGram, NGramCounts, Outcomes

MAX_RESIDUES = 1022
MAX_ORDER = 5
ORDERS = (1, 2, 3, 5)
"""Of the n-grams that a model is shown beside."""

# Weights of the shorter contexts that give the least perplexity on the bundled validation split.
_TUNED_BACK_OFF = {
    1: (),
    2: (0.5,),
    3: (473.8, 3556.9),
    4: (1061.2, 7966.4, 3556.9),
    5: (2376.7, 7966.4, 5323.1, 1588.1),
}
# This number of residues gives the weights to three digits of the perplexity.
_TUNING_RESIDUES = 50_000
_CELLS_AT_ONCE = 1 << 20
_TOKENS_AT_ONCE = 1 << 20


class BaselineScore(NamedTuple):
    """How well residues are predicted.

    Attributes:
      name: of the baseline.
      perplexity: exp of the mean negative log-likelihood of a residue.
      accuracy: share of the residues that were the most probable one, in [0, 1].
      num_residues: how many were scored.
    """

    name: str
    perplexity: float
    accuracy: float
    num_residues: int


class ProteinSums(NamedTuple):
    """Sums over the residues of each protein, float64 ``[N]``.

    Attributes:
      loss: negative log-likelihoods, in nats.
      correct: residues that were the most probable one.
      residues: how many were scored.
    """

    loss: np.ndarray
    correct: np.ndarray
    residues: np.ndarray


def fit_ngram(
    train: FastaPaths | Corpus,
    order: int = 2,
    *,
    alpha: float | int = 1,
    back_off: Sequence[float | int] | None = None,
) -> NGram:
    """Counts the n-grams of some proteins; order 1 is the unigram baseline.

    Args:
      train: FASTA files, or proteins already loaded, over any vocabulary.
      order: n, at most 5.
      alpha: Laplace smoothing of the unigram.
      back_off: ``k_2 .. k_n``; None takes weights tuned on the bundled validation split.

    Raises:
      FastaError: if a file cannot be read.
      ValueError: if the order, ``alpha`` or the number or sign of the weights does not fit.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must be in 1 .. {MAX_ORDER}, but got {order}.")
    corpus = _load(train)
    outcomes = Outcomes.of(corpus.vocab)
    weights = (outcomes.number * alpha, *(_TUNED_BACK_OFF[order] if back_off is None else back_off))
    if len(weights) != order or min(weights) <= 0:
        raise ValueError(
            f"Order {order} needs alpha and {order - 1} back-off weights, all positive, but got "
            f"alpha={alpha} and back_off={back_off}."
        )
    return NGram(_count(corpus, order), weights)


def fit_ngrams(
    train: FastaPaths | Corpus,
    orders: Sequence[int] = ORDERS,
    *,
    valid: FastaPaths | Corpus | None = None,
) -> list[NGram]:
    """Counts once for n-grams of several orders.

    Args:
      train: FASTA files to count, or proteins already loaded, over any vocabulary.
      orders: of the results, at most 5 each. Orders whose n-grams do not fit into 64 bits are left
        out: of 5,000 tokens or more, 5-grams.
      valid: proteins whose likelihood decides the weights of the shorter contexts; None takes
        those tuned on the bundled validation split.

    Raises:
      FastaError: if a file cannot be read.
    """
    corpus = _load(train)
    outcomes = Outcomes.of(corpus.vocab)
    orders = [order for order in orders if order <= outcomes.max_order]
    counts = _count(corpus, max(orders))
    found = [
        NGram(counts.shorten(order), (float(outcomes.number), *_TUNED_BACK_OFF[order]))
        for order in orders
    ]
    if valid is None:
        return found
    valid = _load(valid)
    return [tune_back_off(ngram, valid) for ngram in found]


def tune_back_off(ngram: NGram, valid: FastaPaths | Corpus) -> NGram:
    """Chooses the weights of the shorter contexts that make other proteins likeliest.

    Each weight in turn is multiplied or divided by a step while that helps, with steps from 4
    down to 1.2.

    Args:
      ngram: whose smoothing of the unigram and counts are kept.
      valid: proteins that were not counted; at most about 50,000 of their residues are looked at.
    """
    contexts, tokens, _ = _scored(_load(valid), ngram.order)
    stride = -(-len(tokens) // _TUNING_RESIDUES)
    base = ngram.outcomes.base
    seen = ngram.counts.occurrences(contexts[::stride] * base + tokens[::stride])

    def loss(weights: tuple[float, ...]) -> float:
        probability = np.full(len(seen[0][0]), 1 / ngram.outcomes.number)
        for (count, total), weight in zip(seen, weights, strict=True):
            probability = (count + weight * probability) / (total + weight)
        return -float(np.log(probability).mean())

    best = (loss(ngram.weights), ngram.weights)
    for step in (4.0, 2.0, 1.4, 1.2):
        improved = True
        while improved:
            improved = False
            for place in range(1, ngram.order):
                for factor in (step, 1 / step):
                    weights = list(best[1])
                    # Beyond these limits a context has no information: no weight is best.
                    weights[place] = min(max(weights[place] * factor, 1e-3), 1e7)
                    found = (loss(tuple(weights)), tuple(weights))
                    if found[0] < best[0] - 1e-7:
                        best, improved = found, True
                        break
    return ngram._replace(weights=best[1])


def ngram_name(order: int) -> str:
    """What the n-gram of an order is called in tables."""
    return {1: "unigram", 2: "bigram", 3: "trigram"}.get(order, f"{order}-gram")


def ngram_sums(model: NGram, corpus: Corpus) -> ProteinSums:
    """Scores each protein under an n-gram.

    Args:
      model: the n-gram.
      corpus: proteins already loaded, over any vocabulary.
    """
    _check_outcomes(model, corpus)
    sums = ProteinSums(*np.zeros((3, len(corpus))))
    first = 0
    for part in _parts(corpus):
        last = first + len(part)
        for whole, found in zip(sums, _sums_of_part(model, part), strict=True):
            whole[first:last] = found
        first = last
    return sums


def _sums_of_part(model: NGram, corpus: Corpus) -> ProteinSums:
    contexts, tokens, proteins = _scored(corpus, model.order)
    rows_at_once = max(1, _CELLS_AT_ONCE // model.outcomes.base)
    distinct, place = np.unique(contexts, return_inverse=True)
    guesses = np.empty(len(distinct), np.int64)
    log_likelihood = np.empty(len(tokens))
    order = np.argsort(place, kind="stable")
    bounds = np.searchsorted(place[order], np.arange(0, len(distinct) + 1, rows_at_once))
    for number, first in enumerate(range(0, len(distinct), rows_at_once)):
        probabilities = model.predict(distinct[first : first + rows_at_once])
        # No residue is the end, so that the end is never the guess.
        guesses[first : first + rows_at_once] = probabilities[:, : model.outcomes.begin].argmax(-1)
        end = bounds[number + 1] if number + 1 < len(bounds) else len(order)
        rows = order[bounds[number] : end]
        log_likelihood[rows] = np.log(probabilities[place[rows] - first, tokens[rows]])
    number = len(corpus)
    return ProteinSums(
        np.bincount(proteins, -log_likelihood, number),
        np.bincount(proteins, guesses[place] == tokens, number),
        np.bincount(proteins, minlength=number).astype(np.float64),
    )


def evaluate_ngram(model: NGram, fasta: FastaPaths | Corpus) -> BaselineScore:
    """Scores the residues of some proteins under an n-gram.

    Args:
      model: the n-gram.
      fasta: FASTA files, or proteins already loaded, over any vocabulary.
    """
    loss, correct, residues = (float(values.sum()) for values in ngram_sums(model, _load(fasta)))
    name = ngram_name(model.order)
    return BaselineScore(name, float(np.exp(loss / residues)), correct / residues, int(residues))


def _load(fasta: FastaPaths | Corpus) -> Corpus:
    return fasta if isinstance(fasta, Corpus) else load_corpus(fasta, make_protein_domain())


def _count(corpus: Corpus, order: int) -> NGramCounts:
    outcomes = Outcomes.of(corpus.vocab)
    if order > outcomes.max_order:
        raise ValueError(
            f"{order}-grams of {outcomes.number} outcomes do not fit into 64 bits: take an order "
            f"of at most {outcomes.max_order}."
        )
    found = None
    for part in _parts(corpus):
        contexts, tokens, _ = _contexts_and_tokens(part, order)
        counts = NGramCounts.of(contexts * outcomes.base + tokens, order, outcomes)
        found = counts if found is None else found.merge(counts)
    return found or NGramCounts.of(np.zeros(0, np.int64), order, outcomes)


def _parts(corpus: Corpus) -> Iterator[Corpus]:
    """Yields successive proteins, in parts whose arrays take little memory."""
    first = 0
    while first < len(corpus):
        after = np.searchsorted(corpus.offsets, corpus.offsets[first] + _TOKENS_AT_ONCE)
        last = max(first + 1, int(after) - 1)
        begin, end = corpus.offsets[first], corpus.offsets[last]
        offsets = corpus.offsets[first : last + 1] - begin
        yield Corpus(corpus.tokens[begin:end], offsets, corpus.vocab)
        first = last


def _check_outcomes(model: NGram, corpus: Corpus) -> None:
    outcomes = Outcomes.of(corpus.vocab)
    if outcomes != model.outcomes:
        raise ValueError(
            f"the n-gram was counted over {model.outcomes.number} outcomes, but the vocabulary of "
            f"the proteins has {outcomes.number}: count it over the same vocabulary."
        )


def _scored(corpus: Corpus, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    contexts, tokens, proteins = _contexts_and_tokens(corpus, order)
    residues = tokens < Outcomes.of(corpus.vocab).num_ordinary
    return contexts[residues], tokens[residues], proteins[residues]


def _contexts_and_tokens(corpus: Corpus, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the context (``order - 1`` digits) of each token, its digit, and its protein."""
    outcomes, lengths = Outcomes.of(corpus.vocab), corpus.lengths
    digits = outcomes.digits(corpus.tokens, corpus.vocab)
    within = np.arange(len(digits)) - np.repeat(corpus.offsets[:-1], lengths)
    # A protein of more residues is cropped, and its end is not seen.
    kept = np.where(lengths <= MAX_RESIDUES + outcomes.has_end, lengths, MAX_RESIDUES)
    contexts = np.zeros(len(digits), np.int64)
    for lag in range(1, order):
        previous = np.where(within >= lag, np.roll(digits, lag), outcomes.begin)
        contexts += previous * np.int64(outcomes.base ** (lag - 1))
    counts = within < np.repeat(kept, lengths)
    proteins = np.repeat(np.arange(len(corpus)), lengths)
    return contexts[counts], digits[counts], proteins[counts]
