"""Calibration of random features on the inputs of a model's attention layers.

Shape letters: B batch, T length, S keys, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from fast_attention.arrays.explicit_axes import explicit_mesh, sharded_alike
from fast_attention.feature_maps.moments import Moments, measure_visible, merge_moments
from fast_attention.layers.attention.multi_axis import MultiAxisAttention
from fast_attention.layers.attention.multi_head import MultiHeadAttention
from fast_attention.layers.attention.observing import AttentionCall, observed_copy, place_name
from fast_attention.layers.attention.stored_projections import (
    held_projection,
    hold,
    recalibrate_held,
)
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.favor.calibration import retune, tuned_map


def calibrate(model: nnx.Module, *args: Any, **kwargs: Any) -> int:
    """Runs a model on samples and fits its random features to the queries and keys.

    This applies to layers whose attention function has a tuned estimator with stored parameters,
    such as ``make_fast_softmax_attention(unidirectional=True, estimator="wderf_s")``. For each key
    head, the parameters are fitted to the queries and keys of the call (after rotary positions,
    without padding), pooled over the batch. They are stored with the model, and used by calls and
    decoding until calibrated again. The inputs of a layer depend on the layers before it: calibrate
    twice if that matters. With ``calibration="trained"``, training continues from these parameters.

    Args:
      model: Any module with `MultiHeadAttention` or `MultiAxisAttention` layers inside.
      *args: Arguments of a call of the model, such as tokens.
      **kwargs: Of that call.

    Returns:
      The number of calibrated groups of heads.

    Raises:
      ValueError: If the model has nothing to calibrate.
    """
    met = query_key_moments(model, *args, where=_is_fitted, **kwargs)
    if not met:
        raise ValueError(
            f"{type(model).__name__} has no attention with stored parameters to calibrate: make "
            "its attention_fn with make_fast_softmax_attention(estimator='wderf_s', "
            "calibration='stored'), which is the default with unidirectional=True."
        )
    for path, module in nnx.iter_modules(model):
        for index, (function, held) in enumerate(_held_by(module)):
            moments = met.get(place_name(path, index))
            if moments is not None:
                hold(held, retune(tuned_map(function), held_projection(held), moments))
    return len(met)


def query_key_moments(
    model: nnx.Module, *args: Any, where: Callable[[Any], bool] | None = None, **kwargs: Any
) -> dict[str, Moments]:
    """Calls a model and measures the queries and keys of its attention layers.

    Rows of the batch and calls of a tied layer are pooled, after rotary positions and without
    padding. The model is not changed. It may be called under jit.

    Args:
      model: As for `calibrate`.
      *args: Arguments of the call, such as tokens.
      where: Function that selects attention functions to measure; None measures all.
      **kwargs: Of that call.

    Returns:
      `Moments` with leading axis K, by `place_name` of the layer and its group of heads.
    """
    met: dict[str, Moments] = {}

    def measure(call: AttentionCall) -> None:
        seen = call.visible
        moments = measure_visible(call.query, call.key, seen.query_mask, seen.key_mask)
        known = [met[call.name]] if call.name in met else []
        met[call.name] = functools.reduce(merge_moments, [*known, moments])

    observed_copy(model, measure, where or (lambda function: True))(*args, **kwargs)
    mesh = explicit_mesh((args, kwargs))
    # What was measured inside, where Explicit axes are Auto ones, is whole on every device.
    return met if mesh is None else sharded_alike(met, mesh, ())


def recalibrate(model: nnx.Module) -> int:
    """Fits random features to the running averages that layers kept in training.

    For attention functions made with ``moment_decay``. It costs two decompositions of a [D, D]
    matrix per head, and may be compiled (``nnx.jit``). `redraw` does the same.

    Args:
      model: As for `calibrate`.

    Returns:
      The number of groups of heads with running averages. Heads without data do not change.

    Raises:
      ValueError: If no layer keeps running averages.
    """
    count = 0
    for _, module in nnx.iter_modules(model):
        if not isinstance(module, MultiHeadAttention):
            continue
        for group, held, moments in zip(
            module.config.groups, module.projections, module.moments, strict=True
        ):
            if moments is not None:
                recalibrate_held(group.attention_fn, held, moments)
                count += 1
    if not count:
        raise ValueError(
            f"{type(model).__name__} keeps no running moments: make its attention_fn with "
            "make_fast_softmax_attention(..., moment_decay=0.99), or use calibrate(model, inputs)."
        )
    return count


def _held_by(module: Any) -> list[tuple[Any, Any]]:
    """Attention functions of a layer, with their stored parameters."""
    if isinstance(module, MultiHeadAttention):
        functions = [group.attention_fn for group in module.config.groups]
        return list(zip(functions, module.projections, strict=True))
    if isinstance(module, MultiAxisAttention):
        return [(module.attention_fn, module.projection)]
    return []


def _is_fitted(function: AttentionFn) -> bool:
    return function.calibration in ("stored", "trained")
