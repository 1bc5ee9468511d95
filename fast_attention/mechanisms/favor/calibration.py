"""Parameters of random features from the queries and keys they will meet.

An attention function made with one of the tuned estimators (see
:mod:`fast_attention.feature_maps.gaussian_family`) has its parameters from each call, stored or
trained:

* ``calibration="call"``: from the moments of the very queries and keys of a call, row by row and
  head by head, without the masked positions. Bidirectional attention only.
* ``calibration="stored"``: given as ``projection=``, as :func:`calibrate` makes them from samples.
  Causal attention can have no others: what came from the whole sequence would know the future.
  Until they are calibrated they are those of plain FAVOR+.
* ``calibration="trained"``: given as ``projection=``, too, and changed by the optimiser, see
  :mod:`fast_attention.feature_maps.trained`. Layers hold them as ``nnx.Param``. They begin as those
  of plain FAVOR+ or as :func:`calibrate` finds them. ("wderf" and "wderf_s".)

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, R rows drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import jax

from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.feature_maps.gaussian_family import tune
from fast_attention.feature_maps.moments import Moments, measure, measure_visible
from fast_attention.feature_maps.trained import SMALLEST_KEPT, TrainedParameters, begin_training
from fast_attention.feature_maps.tuned import TunedFeatures, TunedParameters, fold
from fast_attention.linear.checks import split_bias
from fast_attention.mechanisms.call import Call

if TYPE_CHECKING:
    from fast_attention.mechanisms.attention_fn import AttentionFn

Calibration = Literal["call", "stored", "trained"]

MOST_POSITIONS = 512
"""Positions of each row and head from which the moments of a call are taken, at most: with more of
them their cost would show, their errors no longer do."""


@runs_on_auto_axes
def calibrate(
    attention_fn: AttentionFn,
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    *,
    query_mask: Bool[Array, "*B T"] | None = None,
    key_mask: Bool[Array, "*B S"] | None = None,
    projection: TunedParameters | TrainedParameters | Float[Array, "*K R D"] | None = None,
) -> TunedParameters | TrainedParameters:
    """Returns parameters for queries and keys like these, for each key head.

    Args:
      attention_fn: made with a tuned estimator.
      query: ``[*B, T, H, D]``, after rotary positions, as the function will be given.
      key: ``[*B, S, K, D]``.
      query_mask: ``[*B, T]``, positions that count; by default `key_mask` where T = S.
      key_mask: ``[*B, S]``.
      projection: rows to keep, or parameters with rows to keep; by default the function's own.

    Returns:
      What to pass as ``projection=`` to calls, ``prefill`` and ``step``; leading axis K.

    Raises:
      ValueError: If the function's features have no parameters from data.
    """
    feature_map = tuned_map(attention_fn)
    moments = measure_visible(query, key, query_mask, key_mask)
    parameters = attention_fn.resolve_parameters(projection, query.shape[-1])
    return retune(feature_map, parameters, moments)


@runs_on_auto_axes
def retune(
    feature_map: TunedFeatures, parameters: TunedParameters | TrainedParameters, moments: Moments
) -> Any:
    """Returns parameters with the same rows, for queries and keys of other moments.

    They are `TrainedParameters` for a map that is trained, else `TunedParameters`.
    """
    count = parameters.rows.shape[-2] * (2 if feature_map.both_signs else 1)
    if feature_map.trained:
        tuning = tune(feature_map.estimator, moments, count, smallest_kept=SMALLEST_KEPT)
        return begin_training(parameters.rows, tuning, feature_map.estimator)
    return fold(parameters.rows, tune(feature_map.estimator, moments, count))


def parameters_of_call(
    feature_map: TunedFeatures,
    parameters: TunedParameters,
    call: Call,
) -> TunedParameters:
    """Returns parameters from the moments of a call, with leading axes ``[prod(B), K]``."""
    if call.segment_ids is not None:
        raise ValueError(
            f"estimator={feature_map.estimator!r} computes its parameters from the queries and "
            "keys of a call, which would mix several segments. Do not pack segments, or make the "
            "function with calibration='stored' and pass calibrate(...) as projection=."
        )
    # A bias may mask keys, too.
    _, key_mask = split_bias(call.key_bias, call.key_mask)
    query_mask = None
    if call.query_mask is not None:
        query_mask = call.query_mask[..., None]
    elif call.query.shape[-3] == call.key.shape[-3]:
        query_mask = key_mask
    moments = measure(
        call.query, call.key, query_mask=query_mask, key_mask=key_mask, most=MOST_POSITIONS
    )
    flat: Moments = jax.tree.map(
        lambda x, rank=call.query.ndim - 3: x.reshape(-1, *x.shape[rank:]), moments
    )
    return retune(feature_map, parameters, flat)


def without_unused(parameters: Any, exact_scale: bool) -> Any:
    """Leaves out arrays that features do not read, and whose gradients need not be computed."""
    if not isinstance(parameters, TunedParameters):
        return parameters
    parameters = parameters._replace(rows=None, stretch=None)
    return parameters if exact_scale else parameters._replace(query_norm=None, log_stretch=None)


def tuned_map(attention_fn: AttentionFn) -> TunedFeatures:
    """Returns the feature map of a function with parameters from data, or raises ValueError."""
    feature_map = attention_fn.tuned_map
    if feature_map is None:
        raise ValueError(
            f"Only features with parameters from data can be calibrated, got {attention_fn!r}; "
            "make it with make_fast_softmax_attention(estimator='wderf_s')."
        )
    return feature_map
