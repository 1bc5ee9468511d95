"""Sequences given by a caller, and parts of corpora, in the form that the data pipeline takes.

Shape letters: B batch, T length, N sequences.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fast_attention.protein_lm.data.corpus import Corpus, join_rows
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.modeling import pairs, pipeline
from fast_attention.protein_lm.modeling.objectives import Objective

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel

# Seeds of unlike draws differ in this number (others are in packing.py and data.py).
_WEIGHTED = 6


def is_batch(xs: Any) -> bool:
    """Whether `xs` is one batch of the form of `data.make_dataset`."""
    return isinstance(xs, Mapping) and not pairs.is_pairs(xs)


def as_corpus(sequences: Iterable[Any], domain: DiscreteDomain) -> Corpus:
    """Gathers sequences into a corpus.

    Padding and end tokens at the end of a row of ids are dropped. A sequence is then taken to be
    whole, and gets one end token, unless it fills the domain's length without one.

    Args:
      sequences: Strings, or rows of ids (an integer array [N, T] or lists of any lengths).
      domain: Gives the vocabulary and the greatest length.

    Raises:
      KeyError: At a letter that the vocabulary lacks.
      TypeError: If `sequences` is one string.
      ValueError: If there is no sequence, one is empty or longer than the domain allows, or one
        has a special token other than at its end.
    """
    if isinstance(sequences, str):
        raise TypeError("expected several sequences, but got one string: give [sequence]")
    vocab = domain.vocab
    rows = []
    for number, sequence in enumerate(sequences):
        ids = np.asarray(vocab.encode(sequence) if isinstance(sequence, str) else sequence)
        ended = np.isin(ids, [token for token in (vocab.eos, vocab.pad) if token is not None])
        length = int(np.argmax(ended)) if ended.any() else len(ids)
        body = ids[:length]
        if not ended[length:].all() or not vocab.are_ordinary(body).all() or not length:
            raise ValueError(
                f"sequence {number} must be one or more ids of ordinary tokens, such as "
                f"{vocab.ordinary_ids[0]} .. {vocab.ordinary_ids[-1]}, then nothing but end or "
                f"padding tokens; got {ids.tolist()}"
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
    model: BuiltModel,
    xs: Any,
    *,
    batch_size: int,
    epochs: int = 1,
    example_weights: Any = None,
) -> Iterator[Mapping[str, Any]]:
    """Batches to train on, of what a caller gave.

    Args:
      model: To be trained; its seed and its step decide order and masks.
      xs: Strings, rows of ids (see `as_corpus`), pairs (see `pairs.as_pairs`), or batches (see
        `one_batch`).
      batch_size: Rows per batch.
      epochs: How often to go through `xs`; 1 for an iterator of batches.
      example_weights: What each sequence counts, see `weighted`; None counts all equally.

    Raises:
      ValueError: If batches or pairs were given weights, or an iterator should be repeated.
    """
    seed = model.random_seed + model.step
    given = as_batches(xs)
    if example_weights is not None and (given is not None or pairs.is_pairs(xs)):
        raise ValueError("example_weights are for sequences; pairs and batches have 'weights'")
    if pairs.is_pairs(xs):
        rows = pairs.as_pairs(xs, model.tokens)
        return pairs.pair_batches(
            rows, model.tokens, batch_size=batch_size, epochs=epochs, seed=seed
        )
    if given is not None:
        if epochs != 1 and isinstance(xs, Iterator):
            raise ValueError(f"an iterator can be read once, but epochs is {epochs}")
        again = itertools.chain.from_iterable(itertools.repeat(given, epochs))
        return (one_batch(model, batch, seed + step) for step, batch in enumerate(again))
    corpus = as_corpus(xs, model.domain)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "objective": model.objective,
    }
    if example_weights is not None:
        return weighted(corpus, model.domain, example_weights, epochs=epochs, **options)
    length = int(corpus.lengths.max())
    return iter(
        pipeline.make_dataset(
            corpus, model.domain, length=length, pack=False, num_epochs=epochs, **options
        )
    )


def evaluation_batches(
    model: BuiltModel, xs: Any, *, batch_size: int, seed: int
) -> Iterator[Mapping[str, Any]]:
    """Batches to evaluate, of what a caller gave, each sequence once.

    Args:
      model: To be evaluated.
      xs: As for `training_batches`, or a `Corpus`.
      batch_size: Rows per batch.
      seed: Of what is hidden, where the objective hides residues.
    """
    if pairs.is_pairs(xs):
        rows = pairs.as_pairs(xs, model.tokens)
        return pairs.pair_batches(rows, model.tokens, batch_size=batch_size)
    given = as_batches(xs)
    if given is not None:
        return (one_batch(model, batch, seed + step) for step, batch in enumerate(given))
    corpus = xs if isinstance(xs, Corpus) else as_corpus(xs, model.domain)
    return pipeline.eval_batches(
        corpus,
        model.domain,
        length=int(corpus.lengths.max()),
        batch_size=batch_size,
        objective=model.objective,
        seed=seed,
    )


def one_batch(model: BuiltModel, batch: Any, seed: int) -> Mapping[str, Any]:
    """One batch of the form of `data.make_dataset`.

    Args:
      model: That reads it.
      batch: Such a batch, pairs (see `pairs.as_pairs`), or sequences (see `as_corpus`), of which
        ids [B, T] keep their T.
      seed: Of what is hidden, where the objective hides residues.

    Raises:
      ValueError: If it is one sequence, or as `pairs.as_pairs` or `as_corpus`.
    """
    if pairs.is_pairs(batch):
        return pairs.pair_batch(pairs.as_pairs(batch, model.tokens), model.tokens)
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, str) or np.ndim(batch) < 1:
        raise ValueError(f"expected a batch of sequences, but got {batch!r}: give [sequence]")
    if np.ndim(batch) == 1 and not isinstance(batch[0], str):
        raise ValueError(f"expected a batch of sequences, but got one, {batch}: give [sequence]")
    corpus = as_corpus(batch, model.domain)
    longest = int(corpus.lengths.max())
    length = longest if np.ndim(batch) < 2 else max(longest, np.shape(batch)[1])
    return _rows_of(corpus, model.domain, model.objective, length=length, seed=seed)


def _rows_of(
    corpus: Corpus,
    domain: DiscreteDomain,
    objective: Objective | str,
    *,
    length: int,
    seed: int,
    batch_size: int | None = None,
) -> pipeline.Batch:
    """One batch of all proteins, one a row in their order; then empty rows up to `batch_size`."""
    dataset = pipeline.make_dataset(
        corpus,
        domain,
        length=length,
        batch_size=batch_size or len(corpus),
        seed=seed,
        pack=False,
        shuffle=False,
        num_epochs=1,
        objective=objective,
        crop="start",
    )
    return next(iter(dataset))


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


def as_batches(xs: Any) -> Iterable[Any] | None:
    """The batches that `xs` is or holds, for `one_batch`, or None where it holds sequences.

    Args:
      xs: One batch, several, an iterator (taken to be of batches), or sequences.
    """
    if is_batch(xs):
        return [xs]
    if isinstance(xs, Iterator):
        return xs
    if not isinstance(xs, Iterable):
        return None
    first = next(iter(xs), None)
    return xs if isinstance(first, Mapping) or pairs.is_pairs(first) or _is_table(first) else None


def _is_table(first: Any) -> bool:
    return hasattr(first, "shape") and len(first.shape) == 2


def weighted(
    corpus: Corpus,
    domain: DiscreteDomain,
    example_weights: Any,
    *,
    batch_size: int,
    seed: int,
    epochs: int,
    objective: Objective,
) -> Iterator[pipeline.Batch]:
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
            chosen, own_seed = select(corpus, members), int(rng.integers(2**31))
            batch = _rows_of(
                chosen, domain, objective, length=length, seed=own_seed, batch_size=batch_size
            )
            missing = (0, batch_size - len(members))
            yield batch | {"weights": batch["weights"] * np.pad(weights[members], missing)[:, None]}


def in_order(corpus: Corpus, domain: DiscreteDomain, objective: Objective) -> pipeline.Batch:
    """One batch of all proteins, one a row in their order, with nothing masked."""
    used = objective if objective.enclose else "causal"
    batch = _rows_of(corpus, domain, used, length=int(corpus.lengths.max()), seed=0)
    return batch if objective.begins else batch | {"inputs": batch["targets"]}
