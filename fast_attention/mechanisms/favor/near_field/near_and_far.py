"""What near and far keys have in common: the plan, and parts that can be merged.

Shape letters: B batch, T length, H heads, V value width, W window.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.linear.implementations import implementation_names
from fast_attention.linear.state import EMPTY_LOG_SCALE
from fast_attention.linear.types import Output, Parts, Plan

# The near field has one form for all platforms: "by_platform" is "chunked" here.
_IMPLEMENTATIONS = ("by_platform", "chunked", "reference")


def check_options(exact_window: object, plan: Plan) -> None:
    """Checks the options.

    Args:
      exact_window: W.
      plan: of the far keys.

    Raises:
      ValueError: for a window below 1, features that do not estimate softmax weights, or an
        implementation that has no near field.
    """
    if isinstance(exact_window, bool) or not isinstance(exact_window, int) or exact_window < 1:
        raise ValueError(
            "exact_window must be a whole number of at least 1 (the number of positions with "
            f"exact weights), got {exact_window!r}; leave it out for linear attention only."
        )
    if plan.feature_map.signed or plan.feature_map.log_kind != "feature":
        raise ValueError(
            f"exact_window cannot be combined with {type(plan.feature_map).__name__}; it needs "
            "positive features of the softmax kernel: use make_fast_softmax_attention with a "
            "positive estimator such as 'favor+'."
        )
    implementation_of(plan)


def implementation_of(plan: Plan) -> str:
    """Returns the first implementation of a plan that has a near field.

    Raises:
      ValueError: if none has.
    """
    for name in implementation_names(plan.implementation):
        if name in _IMPLEMENTATIONS:
            return name
    raise ValueError(
        f"exact_window is computed by one of the implementations {_IMPLEMENTATIONS}, got "
        f"implementation={plan.implementation!r}; leave out one of them."
    )


def far_plan(plan: Plan, output: Output = "parts") -> Plan:
    """The plan of one pass over the far keys, with complete features."""
    return dataclasses.replace(plan, complete=True, causal=True, output=output)


def parts_of_softmax(out: Array, logsumexp: Array) -> Parts:
    """Writes softmax attention ``[*B, H, V]`` as a sum of weighted values and of weights."""
    scale = jax.lax.stop_gradient(jnp.maximum(logsumexp, EMPTY_LOG_SCALE))
    # 1 with the derivative of the logarithm, or 0 where nothing is seen.
    total = jnp.exp(logsumexp - scale)
    return Parts(out.astype(total.dtype) * total[..., None], total, scale)


def settled(parts: Parts) -> Parts:
    """Lowers the scale where nothing is seen, so that it is no maximum of anything."""
    assert parts.log_scale is not None
    return parts._replace(
        log_scale=jnp.where(parts.denominator == 0, EMPTY_LOG_SCALE, parts.log_scale)
    )
