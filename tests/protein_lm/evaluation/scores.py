"""Figures of baselines over all residues of some proteins, and n-grams of any weights."""

from typing import NamedTuple

import numpy as np

from fast_attention.protein_lm.data.corpus import Corpus, load_corpus
from fast_attention.protein_lm.data.domains import make_protein_domain
from fast_attention.protein_lm.evaluation.baselines import fit_ngrams, ngram_name, ngram_sums


class Score(NamedTuple):
    name: str
    perplexity: float
    accuracy: float
    num_residues: int


def fit_ngram(train, order, *, alpha=1, back_off=None):
    (ngram,) = fit_ngrams(train, (order,))
    longer = ngram.weights[1:] if back_off is None else back_off
    return ngram._replace(weights=(ngram.outcomes.number * alpha, *longer))


def evaluate_ngram(ngram, proteins):
    corpus = proteins
    if not isinstance(proteins, Corpus):
        corpus = load_corpus(proteins, make_protein_domain())
    loss, correct, residues = (float(values.sum()) for values in ngram_sums(ngram, corpus))
    name = ngram_name(ngram.order)
    return Score(name, float(np.exp(loss / residues)), correct / residues, int(residues))
