"""States of linear attention across the devices of a mesh axis, inside ``jax.shard_map``.

What passes between devices is states (V x M numbers a head and a few more), never anything as long
as the sequence, in the backward pass neither: that sends the gradients of the same states the other
way.

Shape letters: B batch, K key/value heads, V value width, M features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fast_attention.arrays.types import Array
from fast_attention.linear.state import LinearAttentionState, decayed, emptied, merge
from fast_attention.mesh.layout import AxisName, move_along


class Stretch(NamedTuple):
    """What one stretch of the sequence leaves behind.

    Attributes:
      state: the keys of its last segment.
      fresh: bool ``[B]``: a segment starts in it, so that nothing before it can be read behind it;
        None without segments.
      log_decay: ``[B, K]``: the sum of ``log_decay`` over its tokens; None without decay.
    """

    state: LinearAttentionState
    fresh: Array | None
    log_decay: Array | None = None


def joined(left: Stretch, right: Stretch) -> Stretch:
    """Returns what two stretches leave behind, one after the other; associative."""
    both = None
    if left.log_decay is not None and right.log_decay is not None:
        both = left.log_decay + right.log_decay
    if left.fresh is None or right.fresh is None:
        return Stretch(merge(left.state, right.state, right.log_decay), None, both)
    visible = emptied(left.state, right.fresh)
    state = merge(visible, right.state, right.log_decay)
    return Stretch(state, left.fresh | right.fresh, both)


def states_before(
    own: Stretch, initial: LinearAttentionState, axis_name: AxisName, *, reverse: bool = False
) -> LinearAttentionState:
    """Returns what the stretches of the devices before this one leave behind.

    The exclusive prefix is taken in ``1 + ceil(log2 n)`` rounds, in each of which a device receives
    one state: after the first it holds what the device before left behind, and each further round
    doubles the reach (Hillis and Steele, "Data parallel algorithms", 1986).

    Args:
      own: what the stretch of this device leaves behind.
      initial: what came before the first device.
      axis_name: the axis along which the sequence is sharded.
      reverse: it is read from the last device to the first.
    """
    count, place = lax.axis_size(axis_name), lax.axis_index(axis_name)
    if reverse:
        place = count - 1 - place

    def from_before(x: Any, distance: int) -> Any:
        """Receives from the device ``distance`` places before; zeros where there is none."""
        pairs = [(i, i + distance) for i in range(count - distance)]
        if reverse:
            pairs = [(count - 1 - source, count - 1 - target) for source, target in pairs]
        return jax.tree.map(lambda x: move_along(x, axis_name, pairs), x)

    def choose(condition: Array, x: Any, y: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)

    start = Stretch(
        state=initial,
        fresh=None if own.fresh is None else jnp.ones_like(own.fresh),
        log_decay=None if own.log_decay is None else jnp.zeros_like(own.log_decay),
    )
    before = choose(place == 0, start, from_before(own, 1))
    distance = 1
    while distance < count:
        further = joined(from_before(before, distance), before)
        before = choose(place >= distance, further, before)
        distance *= 2
    return before.state


def state_of_all(
    own: Stretch, initial: LinearAttentionState, axis_name: AxisName
) -> LinearAttentionState:
    """Returns what the whole sequence leaves behind, the same on every device.

    Args:
      own: what the stretch of this device leaves behind.
      initial: what came before the first device, the same on all.
      axis_name: the axis along which the sequence is sharded.
    """
    state, place = own.state, lax.axis_index(axis_name)
    if own.log_decay is not None:
        behind, whole = _decays_behind(own.log_decay, axis_name)
        state, initial = decayed(state, behind), decayed(initial, whole)
    if own.fresh is not None:
        last_fresh = lax.pmax(jnp.where(own.fresh, place, -1), axis_name)
        state = emptied(state, place < last_fresh)
        initial = emptied(initial, last_fresh >= 0)
    if state.log_scale is None:
        return merge(initial, jax.tree.map(lambda x: lax.psum(x, axis_name), state))
    # No gradient flows through a scale.
    own_scale = lax.stop_gradient(state.log_scale)
    scale = lax.pmax(own_scale, axis_name)
    factor = jnp.exp(own_scale - scale)
    kv, k_sum = lax.psum((state.kv * factor[..., None, :], state.k_sum * factor), axis_name)
    return merge(initial, LinearAttentionState(kv, k_sum, scale))


def _decays_behind(log_decay: Array, axis_name: AxisName) -> tuple[Array, Array]:
    """Sums ``[B, K]`` over the devices behind this one, and over all."""
    every = lax.all_gather(log_decay, axis_name)
    later = jnp.arange(every.shape[0]) > lax.axis_index(axis_name)
    behind = jnp.sum(jnp.where(later[:, None, None], every, 0), axis=0)
    return behind, lax.psum(log_decay, axis_name)
