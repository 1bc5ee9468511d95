"""Parameters of random features from what a model's own attention layers see.

Shape letters: B batch, T length, S keys, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fast_attention.array_types import Array
from fast_attention.calibration import retune, tuned_map
from fast_attention.feature_maps.moments import Moments, measure_visible, merge_moments
from fast_attention.layers.held import (
    held_projection,
    hold,
    recalibrate_held,
)
from fast_attention.layers.multi_axis import MultiAxisAttention
from fast_attention.layers.multi_head import MultiHeadAttention
from fast_attention.layers.stack import Stack


def calibrate(model: nnx.Module, *args: Any, **kwargs: Any) -> int:
    """Runs a model on samples and fits its random features to the queries and keys inside.

    Layers whose attention function has a tuned estimator with stored parameters, such as
    ``make_fast_softmax_attention(unidirectional=True, estimator="wderf_s")``, get for each key head
    the parameters for the queries and keys (after rotary positions, without padding) that they met,
    all rows of the batch together. The parameters are stored with the model, and used by calls and
    by decoding until calibrated again. Calibrating deeper layers changes nothing before them, but
    what layers see depends on the layers before: calibrate twice where that matters. With
    ``calibration="trained"`` this is where training goes on from.

    Args:
      model: Any module with `MultiHeadAttention` or `MultiAxisAttention` layers inside.
      *args: Of a call of the model, such as tokens.
      **kwargs: Of that call.

    Returns:
      How many groups of heads were calibrated.

    Raises:
      ValueError: If the model has nothing to calibrate.
    """
    met: dict[tuple[Any, ...], Moments] = {}
    # Sums of moments are kept as they come: no programs around the layers.
    copy = nnx.clone(model)
    for path, module in nnx.iter_modules(copy):
        if isinstance(module, MultiHeadAttention):
            groups = tuple(
                dataclasses.replace(
                    group, attention_fn=_observed(group.attention_fn, met, (path, index))
                )
                for index, group in enumerate(module.config.groups)
            )
            module.config = dataclasses.replace(module.config, groups=groups)
        elif isinstance(module, MultiAxisAttention):
            module.attention_fn = _observed(module.attention_fn, met, (path, 0))
        elif isinstance(module, Stack):
            module.config = dataclasses.replace(module.config, remat=False, reverse_threshold=2**62)
    copy(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    if not met:
        raise ValueError(
            f"{type(model).__name__} has no attention with stored parameters to calibrate: make "
            "its attention_fn with make_fast_softmax_attention(estimator='wderf_s', "
            "calibration='stored'), which is the default with unidirectional=True."
        )
    for path, module in nnx.iter_modules(model):
        for index, (function, held) in enumerate(_held_by(module)):
            moments = met.get((path, index))
            if moments is not None:
                hold(held, retune(tuned_map(function), held_projection(held), moments))
    return len(met)


def recalibrate(model: nnx.Module) -> int:
    """Fits random features to the running averages that layers kept in training.

    For attention functions made with ``moment_decay``. It costs two decompositions of a [D, D]
    matrix per head, may be compiled (``nnx.jit``), and is what `redraw` does too.

    Args:
      model: As for `calibrate`.

    Returns:
      How many groups of heads have running averages. Heads that have seen nothing stay as they are.

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
    """Functions of a layer and what it holds for them."""
    if isinstance(module, MultiHeadAttention):
        functions = [group.attention_fn for group in module.config.groups]
        return list(zip(functions, module.projections, strict=True))
    if isinstance(module, MultiAxisAttention):
        return [(module.attention_fn, module.projection)]
    return []


def _observed(
    function: Callable[..., Any], met: dict[tuple[Any, ...], Moments], place: tuple[Any, ...]
) -> Any:
    """The same function, telling what it is called with; others are left alone."""
    if getattr(function, "calibration", None) not in ("stored", "trained"):
        return function
    return _Observed(function, met, place)


class _Observed:
    """An attention function that also measures queries and keys."""

    def __init__(
        self,
        function: Callable[..., Any],
        met: dict[tuple[Any, ...], Moments],
        place: tuple[Any, ...],
    ):
        self.function, self.met, self.place = function, met, place
        self.__signature__ = inspect.signature(function)

    def __call__(self, query: Array, key: Array, value: Array, **options: Any) -> Any:
        self._measure(query, key, options.get("query_mask"), options.get("key_mask"))
        return self.function(query, key, value, **options)

    def prefill(self, state: Any, query: Array, key: Array, value: Array, **options: Any) -> Any:
        """Reads on from causal memory, whose keys count too.

        Reading the memory itself asks nothing: its queries are zeros, and do not count.
        """
        mask = options.get("key_mask")
        asked = jnp.any(query != 0, axis=(-2, -1))
        self._measure(query, key, asked if mask is None else asked & mask, mask)
        function: Any = self.function
        return function.prefill(state, query, key, value, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)

    def _measure(
        self, query: Array, key: Array, query_mask: Array | None, key_mask: Array | None
    ) -> None:
        moments = measure_visible(query, key, query_mask, key_mask)
        known = [self.met[self.place]] if self.place in self.met else []
        self.met[self.place] = functools.reduce(merge_moments, [*known, moments])
