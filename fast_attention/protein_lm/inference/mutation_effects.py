"""Effects of mutations by a model: how much more probable a variant is.

Every score is a difference of natural logarithms of probabilities, variant less wild type: below 0
the model finds the variant less probable, which usually means that it works less well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference import prefix_scoring
from fast_attention.protein_lm.inference.mutations import Variant
from fast_attention.protein_lm.inference.scoring import residue_log_likelihoods
from fast_attention.protein_lm.modeling import token_batches
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.encoding import (
    Encoded,
    encode_sequences,
    longest_protein,
    row_lengths,
)
from fast_attention.protein_lm.modeling.objectives import OBJECTIVES
from fast_attention.protein_lm.ranges import check_choice

_COLUMNS = {
    "log-likelihood-ratio": ("log_likelihood_ratio", "log_likelihood_ratio_with_end"),
    "masked-marginals": ("masked_marginal",),
    "wt-marginals": ("wt_marginal",),
    "pseudo-log-likelihood-ratio": ("pseudo_log_likelihood_ratio",),
}
METHODS = tuple(_COLUMNS)
"""All methods; those of a model are the `methods` of its objective, the first the default."""


def choose_method(model: BuiltModel, method: str | None = None) -> str:
    """The method that is meant, or the default one of the model.

    Raises:
      RunError: If the model cannot do it.
      ValueError: If there is no such method.
    """
    possible = model.objective.methods
    if method is None:
        return possible[0]
    check_choice("method", method, METHODS)
    if method not in possible:
        others = [name for name, objective in OBJECTIVES.items() if method in objective.methods]
        raise RunError(
            f"{type(model).__name__} ({model.objective.name}) does not give {method}: use a run "
            f"with the objective {' or '.join(others)}, or take {' or '.join(possible)}"
        )
    return method


def score_columns(method: str) -> tuple[str, ...]:
    """Names of what `score_variants` returns, the most important first."""
    return _COLUMNS[method]


def score_variants(
    model: BuiltModel,
    wild_type: str,
    variants: Sequence[Variant],
    *,
    method: str | None = None,
    tokens_per_batch: int = token_batches.TOKENS_PER_BATCH,
    progress: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Scores variants of a protein.

    ``log-likelihood-ratio`` (`FlaxLM`) gives ``log_likelihood_ratio``, ``log p(variant) -
    log p(wild type)`` of all residues, and ``log_likelihood_ratio_with_end``, the same with the
    probabilities that the proteins end where they do (NaN where a model has no end token).

    ``masked-marginals`` (`FlaxBERT`) gives ``masked_marginal``, the sum over the mutated positions
    of ``log p(new) - log p(old)``, all of them hidden at once (Meier et al. 2021,
    doi:10.1101/2021.07.09.450648). ``wt-marginals`` gives ``wt_marginal``, the same with nothing
    hidden: one pass for all variants. ``pseudo-log-likelihood-ratio`` gives
    ``pseudo_log_likelihood_ratio``, the difference of the pseudo-log-likelihoods
    (`scoring.PseudoScore`): n passes for each variant of n residues.

    The score of a variant does not depend on the others, and that of the wild type is 0.

    Args:
      model: The model.
      wild_type: Residues, in upper case.
      variants: From `mutations`.
      method: One of `METHODS`; None takes the model's first.
      tokens_per_batch: Most tokens of a batch, padding included.
      progress: Called with the number of proteins read since its last call.

    Returns:
      float64 [N] for each of `score_columns`.

    Raises:
      RunError: If the model cannot do what is asked, marginals of indels among it.
      ValueError: If a protein has a letter that the model does not know, or is too long.
    """
    method = choose_method(model, method)
    progress = progress or (lambda number: None)
    _check(model, wild_type, variants)
    changed = [i for i, variant in enumerate(variants) if variant.edits]
    some = [variants[i] for i in changed]
    if method == "log-likelihood-ratio":
        found = _likelihood_ratios(model, wild_type, some, tokens_per_batch, progress)
    elif method == "pseudo-log-likelihood-ratio":
        found = _differences(model, wild_type, some, tokens_per_batch, progress)[:, :1]
    else:
        hide = method == "masked-marginals"
        found = _marginals(model, wild_type, some, hide, tokens_per_batch, progress)[:, None]
    scores = np.zeros((len(variants), len(_COLUMNS[method])))
    scores[changed] = found
    return dict(zip(_COLUMNS[method], scores.T, strict=True))


def _check(model: BuiltModel, wild_type: str, variants: Sequence[Variant]) -> None:
    vocab, longest = model.domain.vocab, longest_protein(model)
    letters = "".join(vocab.letters)
    proteins = [("the wild type", wild_type, len(wild_type))]
    proteins += [
        (v.name, "".join(edit.residues for edit in v.edits), len(wild_type) + v.growth)
        for v in variants
    ]
    for name, residues, length in proteins:
        unknown = set(residues) - set(letters)
        if unknown:
            raise ValueError(
                f"{name}: {sorted(unknown)[0]!r} is none of the residues {letters} that the model "
                "knows"
            )
        if longest is not None and length > longest:
            raise ValueError(
                f"{name}: {length} residues are more than the {longest} that the model's learned "
                "positions have room for: cut the protein around the mutations, or train a model "
                "with positions='rotary'"
            )


def _likelihood_ratios(
    model: BuiltModel,
    wild_type: str,
    variants: Sequence[Variant],
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> np.ndarray:
    if not prefix_scoring.can_share_prefixes(model):
        return _differences(model, wild_type, variants, tokens_per_batch, progress)
    ratios = prefix_scoring.likelihood_ratios(
        model, wild_type, variants, tokens_per_batch=tokens_per_batch, progress=progress
    )
    return np.array(ratios, np.float64).reshape(-1, 2)


def _differences(
    model: BuiltModel,
    wild_type: str,
    variants: Sequence[Variant],
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> np.ndarray:
    """Differences of whole (pseudo-)log-likelihoods, without and with the end, [N, 2]."""
    sequences = itertools.chain([wild_type], (variant.apply(wild_type) for variant in variants))
    found = []
    for values, end in residue_log_likelihoods(model, sequences, tokens_per_batch=tokens_per_batch):
        total = values.sum(dtype=np.float64)
        found.append((total, total + end))
        progress(1)
    return np.array(found[1:]).reshape(-1, 2) - np.array(found[0])


class _Hidden(NamedTuple):
    """The wild type with some places hidden, and the places to predict."""

    hidden: tuple[int, ...]
    asked: tuple[int, ...]


def _marginals(
    model: BuiltModel,
    wild_type: str,
    variants: Sequence[Variant],
    hide: bool,
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> np.ndarray:
    for variant in variants:
        if not variant.substitutes_only:
            raise RunError(
                f"{variant.name} changes the length of the protein, and marginals compare residues "
                "at the same place: use a run of FlaxLM, which gives log-likelihood ratios of "
                "insertions and deletions, or take pseudo-log-likelihood-ratio"
            )
    (wild,) = encode_sequences(model, [wild_type])
    asked = [tuple(place for place, _ in variant.substitutions) for variant in variants]
    if hide:
        views = [_Hidden(places, places) for places in dict.fromkeys(asked)]
    else:
        every = tuple(sorted({place for places in asked for place in places}))
        views = [_Hidden((), every)] if every else []
    tables = _log_probabilities(model, wild, views, tokens_per_batch, progress)
    found = {
        view.asked: dict(zip(view.asked, rows, strict=True))
        for view, rows in zip(views, tables, strict=True)
    }
    tokens = model.domain.vocab.letters
    scores = []
    for variant, places in zip(variants, asked, strict=True):
        table = found[places if hide else views[0].asked]
        scores.append(
            sum(
                table[place][tokens[new]] - table[place][tokens[wild_type[place]]]
                for place, new in variant.substitutions
            )
        )
    return np.array(scores, np.float64)


def _log_probabilities(
    model: BuiltModel,
    wild: Encoded,
    views: Sequence[_Hidden],
    tokens_per_batch: int,
    progress: Callable[[int], object],
) -> list[np.ndarray]:
    """For each view float64 [asked, V]."""
    tokens, first = model.objective.read(model.domain.vocab, wild), model.objective.first

    def compute(items: list[_Hidden], shape: token_batches.Shape):
        rows = [tokens] * len(items)
        inputs = token_batches.fill(rows, shape)
        for row, item in enumerate(items):
            inputs[row, np.array(item.hidden, int) + first] = model.domain.vocab.mask
        place = np.broadcast_to(np.arange(shape[1]), shape)
        visible = place < row_lengths(rows, shape[0])[:, None]
        return model.logits(
            {
                "inputs": inputs,
                "positions": np.where(visible, place, 0).astype(np.int32),
                "segment_ids": visible.astype(np.int32),
            }
        )

    def take(logits: np.ndarray, row: int, item: _Hidden) -> np.ndarray:
        values = logits[row, np.array(item.asked, int) + first].astype(np.float64)
        values -= values.max(-1, keepdims=True)
        return values - np.log(np.exp(values).sum(-1, keepdims=True))

    def report(items: list[_Hidden]) -> None:
        progress(len(items))

    return list(
        token_batches.compute_stream(
            views,
            lambda view: len(tokens),
            compute,
            take,
            tokens_per_batch,
            set(),
            devices=model.mesh.size,
            progress=report,
        )
    )
