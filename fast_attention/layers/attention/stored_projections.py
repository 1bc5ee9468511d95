"""Variables of layers for attention functions: random projections, parameters, moments.

Shape letters: B batch, T length, S keys, H heads, K key/value heads, D head width, R rows drawn.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.darkformer import DarkformerParameters
from fast_attention.feature_maps.hedgehog import HedgehogParameters
from fast_attention.feature_maps.learned import ROWS
from fast_attention.feature_maps.moments import (
    Moments,
    Spread,
    measure_visible,
    no_moments,
    running_average,
)
from fast_attention.feature_maps.trained import TrainedParameters
from fast_attention.feature_maps.tuned import TunedParameters, fold
from fast_attention.layers.attention.attention_call import Visible
from fast_attention.layers.attention.config import AttentionConfig
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.favor.calibration import retune, tuned_map

_LEARNED = (TrainedParameters, HedgehogParameters, DarkformerParameters)
"""Types of parameters that are trained, except for the rows; each has a unique field name."""


class Projection(nnx.Variable):
    """Random arrays of a group of heads that are not trained, such as ``[.., M, D]``."""


class TrainedTuning(nnx.Param):
    """Trained parameters of random features of a group of heads."""


class RunningMoments(nnx.BatchStat):
    """A running average of means or covariances of queries or keys in training."""


def as_held(drawn: Any, kv_heads: int) -> Any:
    """Makes variables from the arrays that an attention function drew.

    Args:
      drawn: an array, parameters of tuned features, or None.
      kv_heads: K; each key head has its own tuned parameters.

    Returns:
      A `Projection`, an ``nnx.Dict`` of them by the names of `TunedParameters`, one of a
      `Projection` and of `TrainedTuning` by the names of learned parameters, or None.
    """
    if drawn is None:
        return None
    if isinstance(drawn, _LEARNED):
        made: dict[str, Any] = {
            name: Projection(x[None])
            if name == ROWS
            else TrainedTuning(jnp.broadcast_to(x, (kv_heads, *x.shape)))
            for name, x in drawn._asdict().items()
            if x is not None
        }
        return nnx.Dict(made)
    if not isinstance(drawn, TunedParameters):
        return Projection(drawn)
    heads = jax.tree.map(lambda x: jnp.broadcast_to(x, (kv_heads, *x.shape)), drawn.tuning)
    parameters = fold(drawn.rows[None], heads)
    return nnx.Dict({name: Projection(x) for name, x in parameters._asdict().items()})


def held_projection(held: Any) -> Any:
    """Returns the stored arrays in the form that attention functions take."""
    if not isinstance(held, nnx.Dict):
        return held[...]
    for kind in _LEARNED:
        if set(held) <= set(kind._fields):
            arrays: dict[str, Any] = dict.fromkeys(kind._fields)
            return kind(**arrays | {name: held[name][...] for name in held})
    return TunedParameters(**{name: held[name][...] for name in TunedParameters._fields})


def hold(held: nnx.Dict, parameters: Any) -> None:
    """Replaces the stored parameters."""
    for name, x in parameters._asdict().items():
        if x is not None:
            held[name][...] = x


def redraw(attention_fn: AttentionFn, held: Any, moments: Any, key: Array, head_dim: int) -> None:
    """Redraws the arrays, one draw for each of stacked layers.

    Args:
      attention_fn: The function that drew them.
      held: As from `as_held`.
      moments: Running moments for recalibration; None keeps calibrated parameters.
      key: Random key.
      head_dim: D.
    """
    if isinstance(held, nnx.Dict):
        hold(held, attention_fn.redraw_projection(key, held_projection(held)))
        if moments is not None:
            recalibrate_held(attention_fn, held, moments)
        return
    draw = functools.partial(attention_fn.draw_projection, head_dim=head_dim)
    single = jax.eval_shape(draw, jax.random.key(0)).ndim
    stack = held.shape[: held.ndim - single]
    for _ in stack:
        draw = jax.vmap(draw)
    held[...] = draw(jax.random.split(key, stack) if stack else key)


def no_running_moments(config: AttentionConfig) -> list[nnx.Dict | None]:
    """Empty running moments for each group that needs them."""
    made: list[nnx.Dict | None] = []
    for group, heads in zip(config.groups, config.kv_heads_of_groups, strict=True):
        if group.attention_fn.moment_decay is None:
            made.append(None)
            continue
        parts = {
            f"{side}_{name}": RunningMoments(x)
            for side, spread in no_moments(heads, config.head_dim)._asdict().items()
            for name, x in spread._asdict().items()
        }
        made.append(nnx.Dict(parts))
    return made


def observe(
    attention_fn: AttentionFn, held: nnx.Dict, query: Array, key: Array, visible: Visible
) -> None:
    """Updates running moments with the queries and keys of a call.

    Args:
      attention_fn: A function with ``moment_decay``.
      held: As from `no_running_moments`.
      query: ``[B, T, H, D]``.
      key: ``[B, S, K, D]``.
      visible: Masks of padding.
    """
    new = measure_visible(query, key, visible.query_mask, visible.key_mask)
    assert attention_fn.moment_decay is not None
    averaged = running_average(running_moments(held), new, attention_fn.moment_decay)
    for side, spread in averaged._asdict().items():
        for name, x in spread._asdict().items():
            held[f"{side}_{name}"][...] = x


def running_moments(held: nnx.Dict) -> Moments:
    """Returns the stored moments."""
    sides = (
        Spread(*(held[f"{side}_{name}"][...] for name in Spread._fields))
        for side in Moments._fields
    )
    return Moments(*sides)


def recalibrate_held(attention_fn: AttentionFn, held: nnx.Dict, moments: nnx.Dict) -> None:
    """Computes parameters from running moments; heads without data keep theirs."""
    averages, before = running_moments(moments), held_projection(held)
    after = retune(tuned_map(attention_fn), before, averages)
    seen = jnp.minimum(averages.query.weight, averages.key.weight) > 0

    def choose(old: Array, new: Array) -> Array:
        return jnp.where(seen.reshape(seen.shape + (1,) * (old.ndim - seen.ndim)), new, old)

    # The rows, which heads share, are the same in both.
    chosen = jax.tree.map(choose, before._replace(rows=None), after._replace(rows=None))
    hold(held, chosen._replace(rows=after.rows))
