"""Local attention as an ``attention_fn``: windows of softmax attention in Flax's layers.

Shape letters: B batch, T query length, S key length, H heads, K key/value heads, D head
width, V value width, W window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call, Takes
from fast_attention.mechanisms.checks import mismatch
from fast_attention.mechanisms.decoding import StateSizes
from fast_attention.mechanisms.local import decoding
from fast_attention.mechanisms.local.op import local_attention
from fast_attention.mechanisms.local.sharded import local_attention_of_shard
from fast_attention.mechanisms.local.window import LocalWindow
from fast_attention.mechanisms.ring import Ring, empty_ring
from fast_attention.mesh.layout import AxisName
from fast_attention.recipes import attention_factory


@dataclasses.dataclass(frozen=True, eq=False)
class LocalAttention(AttentionFn):
    """Local attention with the signature of Flax, from :func:`make_local_attention`.

    Attributes:
      window_size: W.
      unidirectional: position t sees no later key, whatever the caller's ``is_causal`` is.
      look_backward: number of visible blocks before a position's own block.
      look_forward: number of visible blocks after it; None is 0 for a causal call, else 1.
      exact_window: the window is counted from each position, not from its block.
      shared_qk: keys are normalised queries; a position's own key is used only if no other is seen.
      sequence_axis: the mesh axis along which sequences are sharded, for calls inside
        ``jax.shard_map``, see :meth:`along_axis`.
    """

    window_size: int
    unidirectional: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    exact_window: bool = False
    shared_qk: bool = False
    sequence_axis: AxisName | None = None

    mechanism = "Local attention"
    forward_mode = "use nnx.dot_product_attention with a mask, which supports it"

    @property
    def takes(self) -> Takes:
        """Any mask and bias (the band is used); self-attention only."""
        return Takes(mask="pairs", bias="pairs", dropout="weights", other_keys=False)

    @property
    def divides(self) -> bool:
        """Rows and heads are independent."""
        return True

    def attend(self, call: Call) -> Float[Array, "*B T H V"]:
        """Attends within windows; a single query is at the last visible key."""
        call = call.without_hidden()
        mask, key_mask = call.pairs()
        window = self._window(call.causal or call.steps)
        operands = call.query, call.key, call.value
        if call.over_cache:
            return decoding.attend_from_one(
                window,
                *operands,
                call.bias,
                mask,
                key_mask,
                shared_qk=self.shared_qk,
                dropout=call.dropout,
                precision=call.precision,
            )
        options: dict[str, Any] = {
            "shared_qk": self.shared_qk,
            "key_mask": key_mask,
            "segment_ids": call.segment_ids,
            "precision": call.precision,
        }
        if self.sequence_axis is None:
            return local_attention(
                *operands, window, mask=mask, bias=call.bias, dropout=call.dropout, **options
            )
        for name, given, instead in (
            ("bias", call.bias, "leave it out"),
            ("mask", mask, "pass key_mask or segment_ids of the positions on the device"),
            ("dropout_rate", call.dropout, "use 0, or dropout elsewhere"),
        ):
            if given is not None:
                raise mismatch(name, "left out along a mesh axis", "one", instead)
        return local_attention_of_shard(*operands, window, axis_name=self.sequence_axis, **options)

    def along_axis(self, axis: AxisName) -> AttentionFn:
        """The function for a shard of the sequence on each device."""
        return dataclasses.replace(self, sequence_axis=axis)

    def start(self, sizes: StateSizes) -> Ring:
        """The state before the first token; its size does not depend on ``max_length``."""
        slots = decoding.slots_of(self._window(causal=True))
        widths = sizes.num_kv_heads, sizes.head_dim, sizes.value_dim
        return empty_ring(sizes.batch_shape, slots, widths, sizes.dtype)

    def read(self, state: Ring, call: Call) -> tuple[Float[Array, "*B T H V"], Ring]:
        """Reads T tokens; padding is skipped."""
        call = call.without_hidden()
        return decoding.prefill(
            self._window(causal=True),
            state,
            call.query,
            call.key,
            call.value,
            key_mask=None if call.key_mask is None else call.key_mask[..., 0],
            shared_qk=self.shared_qk,
            precision=call.precision,
        )

    def read_one(self, state: Ring, call: Call) -> tuple[Float[Array, "*B 1 H V"], Ring]:
        """Reads one token, in constant time and memory."""
        out, state = decoding.step(
            self._window(causal=True),
            state,
            *(jnp.squeeze(x, -3) for x in (call.query, call.key, call.value)),
            shared_qk=self.shared_qk,
            precision=call.precision,
        )
        return jnp.expand_dims(out, -3), state

    def _window(self, causal: bool) -> LocalWindow:
        return LocalWindow(
            self.window_size, causal, self.look_backward, self.look_forward, self.exact_window
        )


@attention_factory
def make_local_attention(
    window_size: int,
    unidirectional: bool = False,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_window: bool = False,
    shared_qk: bool = False,
) -> LocalAttention:
    """Makes local attention, see :func:`fast_attention.local_attention`.

    Args:
      window_size: W, positions in a block.
      unidirectional: always causal.
      look_backward: number of visible blocks before a position's own block.
      look_forward: number of visible blocks after it; None is 0 for a causal call, else 1.
      exact_window: the window is counted from each position, not from its block.
      shared_qk: keys are normalised queries (Reformer).

    Returns:
      An ``attention_fn`` that also decodes, with a state of constant size.

    Raises:
      ValueError: for numbers out of range, or a causal window that looks forward.
    """
    window = LocalWindow(window_size, unidirectional, look_backward, look_forward, exact_window)
    return LocalAttention(
        window.window_size,
        unidirectional,
        window.look_backward,
        None if look_forward is None else window.look_forward,
        exact_window,
        shared_qk,
    )
