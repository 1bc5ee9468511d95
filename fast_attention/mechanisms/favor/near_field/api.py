"""``near_field_attention``: softmax weights near every position, features beyond, one division.

Shape letters: B batch, T length, H heads, K key/value heads, D head width, V value width, M
features, W window.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.bundles import bundle_of
from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.feature_maps.base import Parameters
from fast_attention.linear.checks import check_shapes, empty_output, is_empty, promote_floating
from fast_attention.linear.prepare import prepare
from fast_attention.linear.types import Inputs, Plan, finish, merge_parts
from fast_attention.mechanisms.favor.near_field import fused
from fast_attention.mechanisms.favor.near_field.decay import bias_of_far_keys
from fast_attention.mechanisms.favor.near_field.near_and_far import (
    check_options,
    far_plan,
    implementation_of,
    settled,
)
from fast_attention.mechanisms.favor.near_field.walk import Operands
from fast_attention.mechanisms.favor.near_field.window import Reach


def near_field_attention(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B T K D"],
    value: Float[Array, "*B T K V"],
    plan: Plan | None = None,
    *,
    parameters: Parameters,
    exact_window: int,
    key_mask: Bool[Array, "*#B T"] | Bool[Array, "*#B T #K"] | None = None,
    key_bias: Float[Array, "*#B T"] | Float[Array, "*#B T #K"] | None = None,
    segment_ids: Int[Array, "*#B T"] | None = None,
    log_decay: Float[Array, "*B T K"] | Float[Array, "*#B K"] | None = None,
    **options: Any,
) -> Float[Array, "*B T H V"]:
    r"""Self-attention, exact within a window and estimated beyond, in ``O(T (W D + M V))``.

    .. math::
        y_t = \frac{\sum_{s \in N_t} e^{q_t \cdot k_s / \sqrt{D}} v_s
                    + \sum_{s \notin N_t} \phi(q_t) \cdot \phi(k_s) \, v_s}
                   {\text{the same with } v_s = 1}

    The near field of position t is, position by position and not block by block,
    ``t - W + 1 <= s <= t`` if causal (W keys, its own among them, and ``s <= t`` beyond), else
    ``|t - s| <= W`` (2 W + 1 keys). Both sums carry a logarithm of their scale and are added at the
    larger one: nothing overflows, and no position after t changes a bit of a causal output. Where
    the window covers everything, this is softmax attention.

    Args:
      query: ``[*B, T, H, D]``.
      key: ``[*B, T, K, D]``; K divides H.
      value: ``[*B, T, K, V]``.
      plan: its feature map has positive features with ``phi(q) . phi(k)`` close to
        ``exp(q . k / sqrt(D))``; its implementation is None, "by_platform" or "chunked", or
        "reference", which has forward mode (``jax.jvp``). None takes its fields from `options`.
      parameters: of the feature map.
      exact_window: W, at least 1.
      key_mask: ``[*B, T]`` or ``[*B, T, K]``; a key where it is False contributes nothing. It keeps
        its place: the window is one of positions.
      key_bias: as ``key_mask``; multiplies the weights of a key, near and far, by ``exp(bias)``.
      segment_ids: ``[*B, T]``; positions see their own run of equal ids.
      log_decay: ``[*B, T, K]`` or ``[K]``, if causal: the weight of key s for row t, near or far,
        is multiplied by ``exp(log_decay_{s+1} + ... + log_decay_t)``, as in
        :func:`~fast_attention.linear_attention`.
      **options: fields of :class:`~fast_attention.Plan`.

    Returns:
      ``[*B, T, H, V]`` in the promoted type of the inputs; a row that sees no key is 0.

    Raises:
      ValueError: for shapes or options that do not fit together.

    References:
      arXiv:2009.14794 (features of the softmax kernel); Nguyen et al., "FMMformer",
      arXiv:2108.02347, also has a near and a far field, but adds two attentions that are
      normalised apart.
    """
    plan = bundle_of(Plan, "plan", plan, options)
    check_options(exact_window, plan)
    check_shapes(query, key, value, plan.causal, segment_ids)
    if query.shape[-3] != key.shape[-3]:
        raise ValueError(
            f"exact_window={exact_window} is a distance between positions of one sequence, but "
            f"there are {query.shape[-3]} queries and {key.shape[-3]} keys. Leave it out for "
            "attention to another sequence; to decode use init_state, prefill and step."
        )
    plan, inputs = prepare(
        plan,
        query,
        key,
        value,
        parameters=parameters,
        key_mask=key_mask,
        key_bias=key_bias,
        segment_ids=segment_ids,
        log_decay=log_decay,
    )
    if is_empty(query, key):
        return empty_output(*promote_floating(query, key, value)[::2])
    out = _attend(plan, exact_window, vary_alike(inputs))
    return out.reshape(*query.shape[:-3], *out.shape[1:])


# Compiled as one, as linear attention is.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend(plan: Plan, window: int, inputs: Inputs) -> Array:
    if plan.causal:
        return _fused(far_plan(plan, plan.output), Reach(window), inputs)
    # Keys up to a position, its own among them, and those behind it.
    half, distance = far_plan(plan), window + 1
    parts = _fused(half, Reach(distance), inputs)
    turned = ("query", "key", "value", "key_mask", "key_bias", "segment_ids")
    backwards = inputs._replace(**{name: _reversed(getattr(inputs, name)) for name in turned})
    after = _fused(half, Reach(distance, nearest=1), backwards)
    parts = merge_parts(settled(parts), settled(_reversed(after)))
    return finish(parts, plan.output, plan.epsilon).astype(inputs.query.dtype)


def _fused(plan: Plan, reach: Reach, inputs: Inputs) -> Any:
    length = inputs.query.shape[1]
    reach = reach._replace(distance=min(reach.distance, length))
    far_mask = None if inputs.key_mask is None else inputs.key_mask[:, : length - reach.distance]
    if inputs.segment_ids is not None:
        # A key enters the state with a query of its own segment, or never.
        ids = inputs.segment_ids
        same = (ids[:, reach.distance :] == ids[:, : length - reach.distance])[..., None]
        far_mask = same if far_mask is None else far_mask & same
    own_gradient = implementation_of(plan) != "reference"
    attend = fused.attend if own_gradient else fused.attend_plainly
    far_bias = bias_of_far_keys(inputs, reach.distance)
    attended: Any = attend(plan, reach, Operands(inputs, far_mask, far_bias))
    return attended[0]


def _reversed(tree: Any) -> Any:
    """Turns arrays ``[B, T, ...]`` round."""
    return jax.tree.map(lambda x: jnp.flip(x, 1), tree)
