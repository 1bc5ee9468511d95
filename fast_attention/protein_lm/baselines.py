r"""Baselines that need no neural network: uniform, unigram, and n-grams with back-off.

An n-gram of order n interpolates from the shortest context to the longest,

    p_n(w | h) = (c(h w) + k_n p_{n-1}(w | h')) / (c(h) + k_n),    p_0(w) = 1 / 26,

with ``c`` the counts in the training proteins, ``h'`` the context ``h`` without its oldest token,
and ``k_n`` the weight of the shorter context. Order 1 with ``k_1 = 26 alpha`` is the empirical
distribution with Laplace smoothing ``(c(w) + alpha) / (c + 26 alpha)``, the baseline of the
ProGen (arXiv:2004.03497) and Performer (arXiv:2009.14794) papers.

Protocol: the first 1022 residues of each protein are scored, with the 26 outcomes ``20 + BOUXZ +
end``. The end is an outcome, and counted in training, but not scored. Contexts begin with BOS.

References:
  MacKay and Peto. A hierarchical Dirichlet language model. Natural Language Engineering 1 (1995).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fast_attention.protein_lm.corpus import Corpus, FastaPaths, load_corpus
from fast_attention.protein_lm.domains import make_protein_domain
from fast_attention.protein_lm.vocabulary import STANDARD_RESIDUES

MAX_RESIDUES = 1022
MAX_ORDER = 5

_VOCAB = make_protein_domain(include_pad=False, include_mask=False).vocab
_BOS, _EOS = _VOCAB.encode("<>")
_BASE = len(_VOCAB)
_NUM_OUTCOMES = _BASE - 1
_TOKENS_AT_ONCE = 2**20

# Weights of the shorter contexts that give the least perplexity on the bundled validation split.
_TUNED_BACK_OFF = {
    1: (),
    2: (0.5,),
    3: (473.8, 3556.9),
    4: (1061.2, 7966.4, 3556.9),
    5: (2376.7, 7966.4, 5323.1, 1588.1),
}


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


@dataclasses.dataclass(frozen=True, eq=False)
class NGram:
    """Conditional probabilities of the next token.

    Attributes:
      order: n; the last ``n - 1`` tokens are the context.
      probabilities: float64 ``[27 ** (n - 1), 27]``, rows sum to 1; BOS has probability 0.
    """

    order: int
    probabilities: np.ndarray


def fit_ngram(
    train: FastaPaths | Corpus,
    order: int = 2,
    *,
    alpha: float | int = 1,
    back_off: Sequence[float | int] | None = None,
) -> NGram:
    """Counts the n-grams of some proteins; order 1 is the unigram baseline.

    Args:
      train: FASTA files, or proteins loaded with a domain of ``make_protein_domain``.
      order: n, at most 5 (the table has ``8 * 27 ** n`` bytes).
      alpha: Laplace smoothing of the unigram.
      back_off: ``k_2 .. k_n``; None takes weights tuned on the bundled validation split.

    Raises:
      FastaError: if a file cannot be read.
      ValueError: if the order, ``alpha`` or the number or sign of the weights does not fit.
    """
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order must be in 1 .. {MAX_ORDER}, but got {order}.")
    weights = (_NUM_OUTCOMES * alpha, *(_TUNED_BACK_OFF[order] if back_off is None else back_off))
    if len(weights) != order or min(weights) <= 0:
        raise ValueError(
            f"Order {order} needs alpha and {order - 1} back-off weights, all positive, but got "
            f"alpha={alpha} and back_off={back_off}."
        )
    counts = np.zeros(_BASE**order, np.int64)
    for part in _parts(_load(train)):
        contexts, tokens = _contexts_and_tokens(part, order)
        counts += np.bincount(contexts * _BASE + tokens, minlength=len(counts))

    probabilities = np.full((1, _BASE), 1 / _NUM_OUTCOMES)
    probabilities[:, _BOS] = 0
    for length, weight in enumerate(weights):
        # The oldest token of a context is its highest digit: summing it out shortens the context.
        shorter = (-1, _BASE**length, _BASE)
        count = counts.reshape(shorter).sum(0).reshape(-1, len(probabilities), _BASE)
        total = count.sum(-1, keepdims=True)
        probabilities = ((count + weight * probabilities[None]) / (total + weight)).reshape(
            -1, _BASE
        )
    return NGram(order, probabilities)


def evaluate_ngram(model: NGram, fasta: FastaPaths | Corpus) -> BaselineScore:
    """Scores the residues of some proteins under an n-gram.

    Args:
      model: the n-gram.
      fasta: FASTA files, or proteins loaded with a domain of ``make_protein_domain``.
    """
    contexts, tokens = _contexts_and_tokens(_load(fasta), model.order)
    residues = tokens != _EOS
    contexts, tokens = contexts[residues], tokens[residues]
    log_likelihood = np.log(model.probabilities[contexts, tokens]).mean()
    guesses = model.probabilities[:, _VOCAB.ordinary_ids].argmax(-1)
    name = {1: "unigram", 2: "bigram", 3: "trigram"}.get(model.order, f"{model.order}-gram")
    accuracy = (guesses[contexts] == tokens).mean()
    return BaselineScore(name, float(np.exp(-log_likelihood)), float(accuracy), len(tokens))


def baseline_scores(
    train: FastaPaths | Corpus, test: FastaPaths | Corpus, orders: Sequence[int] = (1, 2)
) -> list[BaselineScore]:
    """Returns the scores of both uniform baselines and of n-grams of some orders.

    The first uniform baseline spreads over all 26 outcomes, the second over the 20 standard
    residues and is scored at those only; their accuracy is that of a random guess.

    Args:
      train: proteins to count, as in ``fit_ngram``.
      test: proteins to score, as in ``evaluate_ngram``.
      orders: which n-grams.
    """
    train, test = _load(train), _load(test)
    _, tokens = _contexts_and_tokens(test, 1)
    num_residues = int((tokens != _EOS).sum())
    num_standard = int((tokens < len(STANDARD_RESIDUES)).sum())
    scores = [
        BaselineScore(f"uniform over {outcomes}", float(outcomes), 1 / outcomes, number)
        for outcomes, number in (
            (_NUM_OUTCOMES, num_residues),
            (len(STANDARD_RESIDUES), num_standard),
        )
    ]
    return scores + [evaluate_ngram(fit_ngram(train, order), test) for order in orders]


def _load(fasta: FastaPaths | Corpus) -> Corpus:
    return fasta if isinstance(fasta, Corpus) else load_corpus(fasta, make_protein_domain())


def _parts(corpus: Corpus) -> Iterator[Corpus]:
    """Successive proteins, so many that what is computed of them takes little memory."""
    first = 0
    while first < len(corpus):
        after = np.searchsorted(corpus.offsets, corpus.offsets[first] + _TOKENS_AT_ONCE)
        last = max(first + 1, int(after) - 1)
        begin, end = corpus.offsets[first], corpus.offsets[last]
        yield Corpus(corpus.tokens[begin:end], corpus.offsets[first : last + 1] - begin)
        first = last


def _contexts_and_tokens(corpus: Corpus, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the context (``order - 1`` digits to the base 27) of each token that counts."""
    lengths = corpus.lengths
    within = np.arange(len(corpus.tokens)) - np.repeat(corpus.offsets[:-1], lengths)
    # A protein of more residues is cropped, and its end is not seen.
    kept = np.where(lengths <= MAX_RESIDUES + 1, lengths, MAX_RESIDUES)
    contexts = np.zeros(len(corpus.tokens), np.int64)
    for lag in range(1, order):
        previous = np.where(within >= lag, np.roll(corpus.tokens, lag), _BOS)
        contexts += previous * np.int64(_BASE ** (lag - 1))
    counts = within < np.repeat(kept, lengths)
    return contexts[counts], corpus.tokens[counts]
