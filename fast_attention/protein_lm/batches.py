"""Sequences given by a caller, and parts of corpora, in the form that the data pipeline takes.

Shape letters: B batch, T length, N sequences.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fast_attention.protein_lm import data
from fast_attention.protein_lm.corpus import Corpus, join_rows
from fast_attention.protein_lm.domains import DiscreteDomain
from fast_attention.protein_lm.masking import MaskingConfig
from fast_attention.protein_lm.vocabulary import Vocabulary

# Seeds of unlike draws differ in this number (others are in packing.py and data.py).
_WEIGHTED = 6


def is_batch(xs: Any) -> bool:
    """Whether `xs` is one batch of the form of `data.make_dataset`."""
    return isinstance(xs, Mapping) and "inputs" in xs


def as_corpus(sequences: Iterable[Any], domain: DiscreteDomain) -> Corpus:
    """Gathers sequences into a corpus.

    Padding and end tokens at the end of a row of ids are dropped. A sequence is then taken to be
    whole, and gets one end token, unless it fills the domain's length without one.

    Args:
      sequences: Strings, or rows of ids (an integer array [N, T] or lists of any lengths).
      domain: Gives the vocabulary and the greatest length.

    Raises:
      KeyError: At a letter that the vocabulary lacks.
      ValueError: If there is no sequence, one is empty or longer than the domain allows, or one
        has a special token other than at its end.
    """
    vocab = domain.vocab
    rows = []
    for number, sequence in enumerate(sequences):
        ids = np.asarray(vocab.encode(sequence) if isinstance(sequence, str) else sequence)
        ended = np.isin(ids, [token for token in (vocab.eos, vocab.pad) if token is not None])
        length = int(np.argmax(ended)) if ended.any() else len(ids)
        body = ids[:length]
        if not ended[length:].all() or not vocab.are_ordinary(body).all() or not length:
            raise ValueError(
                f"sequence {number} must be one or more of the ids {vocab.ordinary_ids[0]} .. "
                f"{vocab.ordinary_ids[-1]}, then nothing but end or padding tokens; got "
                f"{ids.tolist()}"
            )
        if length > domain.length:
            raise ValueError(
                f"sequence {number} has {length} residues, more than the {domain.length} of the "
                "domain: crop it first"
            )
        if vocab.eos is not None and (length < domain.length or ended.any()):
            body = np.append(body, vocab.eos)
        rows.append(body)
    if not rows:
        raise ValueError("no sequence was given")
    return join_rows(rows, vocab)


def training_batches(
    xs: Any,
    domain: DiscreteDomain,
    *,
    objective: str,
    masking: MaskingConfig | None,
    batch_size: int,
    seed: int,
    epochs: int = 1,
    example_weights: Any = None,
) -> Iterator[Mapping[str, Any]]:
    """Batches to train on, of what a caller gave.

    Args:
      xs: Strings, rows of ids (see `as_corpus`), or batches of the form of `data.make_dataset`.
      domain: What is modelled.
      objective: "causal" or "masked".
      masking: Of a masked model.
      batch_size: Rows per batch.
      seed: Of order and masks.
      epochs: How often to go through `xs`; 1 for an iterator of batches.
      example_weights: What each sequence counts, see `weighted`; None counts all equally.

    Raises:
      ValueError: If batches were given weights, or an iterator should be repeated.
    """
    found = as_batches(xs)
    if found is not None:
        if example_weights is not None:
            raise ValueError(
                "example_weights are for sequences; a batch has its own 'weights' [B, T]"
            )
        if epochs != 1 and isinstance(xs, Iterator):
            raise ValueError(f"an iterator can be read once, but epochs is {epochs}")
        return itertools.chain.from_iterable(itertools.repeat(found, epochs))
    corpus = as_corpus(xs, domain)
    if example_weights is not None:
        return weighted(
            corpus,
            domain,
            example_weights,
            batch_size=batch_size,
            seed=seed,
            epochs=epochs,
            objective=objective,
            masking=masking,
        )
    return iter(
        data.make_dataset(
            corpus,
            domain,
            length=int(corpus.lengths.max()),
            batch_size=batch_size,
            seed=seed,
            pack=False,
            num_epochs=epochs,
            objective=objective,
            masking=masking,
        )
    )


def joined(parts: Iterable[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """One batch with the rows of several of one length.

    Raises:
      ValueError: If there is none.
    """
    found = list(parts)
    if not found:
        raise ValueError("there is no batch: nothing was given, or no batch was asked for")
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def select(corpus: Corpus, proteins: Sequence[int] | np.ndarray) -> Corpus:
    """The corpus of some proteins, in the given order."""
    rows = [corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]] for i in proteins]
    return join_rows(rows, corpus.vocab)


def spread(corpus: Corpus, number: int | None) -> Corpus:
    """At most `number` proteins, evenly spaced through the corpus; None takes all."""
    if number is None or number >= len(corpus):
        return corpus
    return select(corpus, np.linspace(0, len(corpus) - 1, number).round().astype(int))


def crop(corpus: Corpus, length: int) -> Corpus:
    """The first `length` tokens of every protein."""
    lengths = corpus.lengths
    within = np.arange(len(corpus.tokens)) - np.repeat(corpus.offsets[:-1], lengths)
    offsets = np.cumsum([0, *np.minimum(lengths, length)], dtype=np.int64)
    return dataclasses.replace(corpus, tokens=corpus.tokens[within < length], offsets=offsets)


def as_batches(xs: Any) -> Iterable[Mapping[str, Any]] | None:
    """The batches that `xs` is or holds, or None where it holds sequences.

    Args:
      xs: One batch, several, an iterator (taken to be of batches), or sequences.
    """
    if is_batch(xs):
        return [xs]
    if isinstance(xs, Iterator):
        return xs
    if isinstance(xs, Iterable) and is_batch(next(iter(xs), None)):
        return xs
    return None


def weighted(
    corpus: Corpus,
    domain: DiscreteDomain,
    example_weights: Any,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    objective: str,
    masking: MaskingConfig | None,
) -> Iterator[data.Batch]:
    """Batches in which each protein counts as it should, one a row, shuffled in every epoch.

    Args:
      corpus: N proteins.
      domain: Of the model.
      example_weights: [N]. With 2 a protein counts as if it were there twice, with 0 as if it were
        not there; a negative weight makes it less likely.
      batch_size: Rows of a batch.
      seed: Of order and masks.
      epochs: Passes through the proteins.
      objective: Of the model.
      masking: Of a masked model.

    Raises:
      ValueError: If the weights are not one finite number for each protein.
    """
    weights = np.asarray(example_weights, np.float32)
    if weights.shape != (len(corpus),) or not np.isfinite(weights).all():
        raise ValueError(
            f"expected one finite weight for each of the {len(corpus)} sequences; got "
            f"{np.shape(example_weights)}"
        )
    length = int(corpus.lengths.max())
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, _WEIGHTED, epoch])
        order = rng.permutation(len(corpus))
        for first in range(0, len(order), batch_size):
            members = order[first : first + batch_size]
            dataset = data.make_dataset(
                select(corpus, members),
                domain,
                length=length,
                batch_size=batch_size,
                seed=int(rng.integers(2**31)),
                pack=False,
                shuffle=False,
                num_epochs=1,
                objective=objective,
                crop="start",
                masking=masking,
            )
            batch = next(iter(dataset))
            missing = (0, batch_size - len(members))
            yield batch | {"weights": batch["weights"] * np.pad(weights[members], missing)[:, None]}


def in_order(corpus: Corpus, domain: DiscreteDomain, objective: str) -> data.Batch:
    """One batch of all proteins, one a row in their order, with nothing masked."""
    dataset = data.make_dataset(
        corpus,
        domain,
        length=int(corpus.lengths.max()),
        batch_size=len(corpus),
        seed=0,
        pack=False,
        shuffle=False,
        num_epochs=1,
        crop="start",
    )
    batch = next(iter(dataset))
    return batch if objective == "causal" else batch | {"inputs": batch["targets"]}


def unpacked(ids: np.ndarray, vocab: Vocabulary) -> data.Batch:
    """The batch of rows that hold one sequence each, for scoring.

    Args:
      ids: int [N, T]; a row ends at its first end token, or before its first padding token.
      vocab: Says which those are.
    """
    before = np.cumsum(ids == vocab.eos, axis=1) - (ids == vocab.eos)
    visible = (before == 0) & (ids != vocab.pad)
    return {
        "inputs": ids,
        "targets": ids,
        "weights": visible.astype(np.float32),
        "segment_ids": visible.astype(np.int32),
        "positions": np.where(visible, np.arange(ids.shape[1])[None], 0).astype(np.int32),
    }
