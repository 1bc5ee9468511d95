"""How far the attention of a protein model is from exact softmax attention, on some proteins.

Proteins are read as they are scored or embedded: behind the begin token by a causal model, with the
end token and nothing hidden by a masked one. These tokens count as positions.

Letters: B rows, T length, S keys, H heads, R rows of a matrix.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fast_attention import make_fast_softmax_attention
from fast_attention.diagnostics.errors import Recommendation, attention_matrix, recommend_features
from fast_attention.feature_maps import TUNED_ESTIMATORS
from fast_attention.feature_maps.moments import Moments, merge_moments
from fast_attention.layers.attention.calibration import query_key_moments
from fast_attention.layers.attention.fidelity import (
    FidelitySums,
    LayerFidelity,
    add_sums,
    exact_call,
    fidelity_sums,
    parameters_from_moments,
    summarize_fidelity,
)
from fast_attention.layers.attention.observing import AttentionCall, observed_copy
from fast_attention.mechanisms.favor.fn import FastAttention
from fast_attention.protein_lm.modeling import token_batches, train_state
from fast_attention.protein_lm.modeling.encoding import (
    Encoded,
    encode_sequences,
    number_rows,
    row_lengths,
)

if TYPE_CHECKING:
    from fast_attention.protein_lm.flax_model import FlaxModel

MAX_LENGTH = 512

_TOKENS_PER_BATCH = 8192
_RECOMMENDED_ON = 4
"""Proteins on which numbers of features are tried."""

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Features:
    """Random features that could take the place of a model's attention.

    Attributes:
      estimator: As for `make_fast_softmax_attention`.
      nb_features: M.
      projection: As there; by default "orthogonal_antithetic" for estimators with parameters from
        data, and the estimator's own default for others.
      exact_window: As there.
    """

    estimator: str = "wderf_s"
    nb_features: int = 256
    projection: str | None = None
    exact_window: int | None = None

    def attention_fn(self, causal: bool, nb_features: int | None = None) -> FastAttention:
        """Makes the attention function, or one with another number of features."""
        projection = self.projection
        if projection is None and self.estimator in TUNED_ESTIMATORS:
            projection = "orthogonal_antithetic"
        return make_fast_softmax_attention(
            nb_features=self.nb_features if nb_features is None else nb_features,
            estimator=self.estimator,
            projection=projection,
            exact_window=self.exact_window,
            unidirectional=causal,
        )


class Diagnosis(NamedTuple):
    """What `diagnose` found.

    Attributes:
      layers: One entry per layer and group of heads.
      proteins: How many were looked at.
      calibrated_on: How many others the features' parameters are from; 0 where they need none.
      recommended: For each entry of `layers` the number of features for the target error; None
        without a target.
      features: What was judged in place of the model's own attention, or None.
      parameters: The projection of each layer, see `fidelity_sums`; None for the model's own.
    """

    layers: list[LayerFidelity]
    proteins: int
    calibrated_on: int
    recommended: list[Recommendation] | None
    features: Features | None
    parameters: Mapping[str, Any] | None


def spread_evenly(items: Iterable[Item], number: int) -> list[Item]:
    """Chooses items evenly over a stream of unknown length, keeping twice `number` at most.

    Args:
      items: The stream.
      number: How many to choose; all of them, if there are fewer.
    """
    kept: list[Item] = []
    stride = 1
    for place, item in enumerate(items):
        if place % stride == 0:
            kept.append(item)
        if len(kept) > 2 * number:
            kept = kept[::2]
            stride *= 2
    if len(kept) <= number:
        return kept
    return [kept[i] for i in np.linspace(0, len(kept) - 1, number).round().astype(int)]


def diagnose(
    model: FlaxModel,
    sequences: Sequence[str],
    *,
    features: Features | None = None,
    target_error: float | None = None,
    max_length: int | None = MAX_LENGTH,
    seed: int = 0,
) -> Diagnosis:
    """Compares every layer and head of a model with exact softmax attention.

    Args:
      model: The model.
      sequences: Residues, in upper case. Where `features` need parameters from data, as those of a
        causal model do, these are from every second protein, and the others are judged.
      features: What to judge in place of the model's own attention, with which it still computes:
        on the queries and keys of each layer, as the model has them.
      target_error: Also find how many such features bring the matrices of each layer within this
        relative error, on four of the proteins.
      max_length: Crops proteins to this many residues; None takes them whole.
      seed: Of the features drawn.

    Raises:
      ValueError: If there are too few proteins, a `target_error` has no features, or as
        `encode_sequences`.
    """
    encoded = list(encode_sequences(model, sequences, max_length=max_length))
    attention_fn = None if features is None else features.attention_fn(model.objective.causal)
    if target_error is not None and features is None:
        raise ValueError("target_error needs features: give features, too.")
    judged, others, parameters = encoded, [], None
    moments: dict[str, Moments] = {}
    if attention_fn is not None:
        if attention_fn.calibration == "stored":
            judged, others = encoded[::2], encoded[1::2]
        if attention_fn.calibration == "stored" and not others:
            raise ValueError(
                "the parameters of these features are calibrated on some proteins and measured on "
                f"others, which needs 2 or more proteins, but there {_are(len(encoded))}."
            )
        moments = _moments(model, others or judged[:1])
        parameters = parameters_from_moments(attention_fn, moments, jax.random.key(seed))
    if not judged:
        raise ValueError("there are no proteins to measure on.")
    layers = summarize_fidelity(_sums(model, judged, attention_fn, parameters))
    recommended = None
    if features is not None and target_error is not None:
        recommended = _recommend(model, judged, features, moments, target_error, seed)
    return Diagnosis(layers, len(judged), len(others), recommended, features, parameters)


def head_matrices(
    model: FlaxModel,
    sequence: str,
    layer: int,
    head: int,
    *,
    features: Features | None = None,
    parameters: Mapping[str, Any] | None = None,
    max_length: int | None = MAX_LENGTH,
) -> dict[str, np.ndarray]:
    """Writes out the attention of one head for one protein, exact and as it is.

    Args:
      model: As for `diagnose`, and so are the others.
      sequence: Residues.
      layer: From 1.
      head: Of the layer, from 1.
      features: What to write out in place of the model's own attention.
      parameters: Of these features, from a `Diagnosis`.
      max_length: Crops the protein.

    Returns:
      float32 ``[T, S]`` each, "exact" and "implicit".

    Raises:
      ValueError: If the model has no such layer or head.
    """
    (item,) = encode_sequences(model, [sequence], max_length=max_length)
    attention_fn = None if features is None else features.attention_fn(model.objective.causal)

    @jax.jit
    def write(weights: Any, variables: Any, batch: Any, own: Any) -> list[Any]:
        number, start, found = 0, 0, []

        def look(call: AttentionCall) -> None:
            nonlocal number, start
            if call.group == 0:
                number, start = number + 1, 0
            heads = call.query.shape[2]
            if number == layer and start < head <= start + heads:
                judged = call
                if attention_fn is not None:
                    options = {"projection": own[call.name]}
                    judged = call._replace(function=attention_fn, options=options)
                for one in (exact_call(call), judged):
                    found.append(_matrix(one)[0, head - 1 - start])
            start += heads

        _observe(nnx.merge(model.graphdef, weights, variables), batch, look)
        return found

    batch = _batch(model, [item], (1, len(_tokens(model, item))))
    found = write(model.weights, model.variables, batch, parameters)
    if not found:
        raise ValueError(f"the model has no head {head} in a layer {layer}; both count from 1.")
    return dict(zip(("exact", "implicit"), map(np.asarray, found), strict=True))


def _matrix(call: AttentionCall) -> jax.Array:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return call.attend(query=query, key=key, value=value)

    return attention_matrix(attend, call.query, call.key)


def _sums(
    model: FlaxModel, items: Sequence[Encoded], attention_fn: Any, parameters: Any
) -> list[FidelitySums]:
    arrays = (model.weights, model.variables)
    found = (
        jax.device_get(_sums_of_batch(model.graphdef, attention_fn, *arrays, batch, parameters))
        for batch in _batches(model, items)
    )
    return functools.reduce(add_sums, found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums_of_batch(
    graphdef: Any, attention_fn: Any, weights: Any, variables: Any, batch: Any, parameters: Any
) -> list[FidelitySums]:
    inputs, options = _inputs(batch)
    model = nnx.merge(graphdef, weights, variables)
    return fidelity_sums(model, inputs, attention_fn=attention_fn, parameters=parameters, **options)


def _moments(model: FlaxModel, items: Sequence[Encoded]) -> dict[str, Moments]:
    def merge(left: dict[str, Moments], right: dict[str, Moments]) -> dict[str, Moments]:
        return {name: merge_moments(left[name], right[name]) for name in left}

    arrays = (model.weights, model.variables)
    found = (_moments_of_batch(model.graphdef, *arrays, batch) for batch in _batches(model, items))
    return functools.reduce(merge, found)


@functools.partial(jax.jit, static_argnums=0)
def _moments_of_batch(
    graphdef: Any, weights: Any, variables: Any, batch: Any
) -> dict[str, Moments]:
    inputs, options = _inputs(batch)
    return query_key_moments(nnx.merge(graphdef, weights, variables), inputs, **options)


def _recommend(
    model: FlaxModel,
    items: Sequence[Encoded],
    features: Features,
    moments: Mapping[str, Moments],
    target_error: float,
    seed: int,
) -> list[Recommendation]:
    some = spread_evenly(items, _RECOMMENDED_ON)
    causal = model.objective.causal

    @jax.jit
    def step(weights: Any, variables: Any, batch: Any) -> list[Any]:
        calls: list[AttentionCall] = []
        _observe(nnx.merge(model.graphdef, weights, variables), batch, calls.append)
        names.extend(call.name for call in calls)
        return [(call.query, call.key, call.visible.key_mask) for call in calls]

    names: list[str] = []
    length = max(len(_tokens(model, item)) for item in some)
    batch = _batch(model, some, (len(some), length))
    arrays = step(model.weights, model.variables, batch)
    found = []
    for name, (query, key, mask) in zip(names, arrays, strict=True):

        def make(number: int, name: str = name) -> Callable[..., Any]:
            function = features.attention_fn(causal, number)
            drawn = parameters_from_moments(function, moments, jax.random.key(seed))
            return functools.partial(function, projection=drawn[name])

        found.append(
            recommend_features(
                query, key, target_error, make_attention=make, is_causal=causal, key_mask=mask
            )
        )
    return found


def _observe(model: Any, batch: Any, tell: Callable[[AttentionCall], None]) -> None:
    inputs, options = _inputs(batch)
    observed_copy(model, tell)(inputs, **options)


def _inputs(batch: Mapping[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
    positions, visible = number_rows(batch["inputs"], batch["lengths"])
    return jnp.asarray(batch["inputs"]), {"positions": positions, "key_mask": visible}


def _batches(model: FlaxModel, items: Sequence[Encoded]) -> Iterator[Mapping[str, Any]]:
    lengths = [len(_tokens(model, item)) for item in items]
    for plan in token_batches.plan_batches(
        lengths, _TOKENS_PER_BATCH, set(), devices=model.mesh.size
    ):
        yield _batch(model, [items[i] for i in plan.members], (plan.rows, plan.width))


def _batch(
    model: FlaxModel, items: Sequence[Encoded], shape: token_batches.Shape
) -> Mapping[str, Any]:
    rows = [_tokens(model, item) for item in items]
    batch = {"inputs": token_batches.fill(rows, shape), "lengths": row_lengths(rows, shape[0])}
    return train_state.shard_batch(batch, model.mesh)


def _tokens(model: FlaxModel, item: Encoded) -> np.ndarray:
    return model.objective.read(model.domain.vocab, item)


def _are(number: int) -> str:
    return "is 1" if number == 1 else f"are {number}"
