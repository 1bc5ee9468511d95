"""Local attention as an ``attention_fn``: windows of softmax attention in Flax's layers.

Shape letters: B batch, T query length, S key length, H heads, K key/value heads, D head
width, V value width, W window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention import local_decoding
from fast_attention.array_types import Array, Bool, Float
from fast_attention.axes import attended_axes, fold_axes, unfold_axes
from fast_attention.call_arguments import refuse
from fast_attention.local_attention import local_attention
from fast_attention.local_decoding import LocalState
from fast_attention.local_window import Window, make_window
from fast_attention.mesh_layout import AxisName
from fast_attention.recipes import attention_factory
from fast_attention.sharded_local_attention import local_attention_of_shard

_ADVICE = {
    "module": "attention weights are not kept; use sow_weights=False",
    "input_positions": "apply rotary positions to queries and keys before",
    "projection": "it has no random features",
}
"""What to do in place of an option that there is not."""

_ADVICE_ALONG_AXIS = {
    "bias": "leave it out",
    "mask": "pass key_mask or segment_ids of the positions on the device",
    "dropout_rate": "use 0, or dropout elsewhere",
}
"""The same, for sequences that lie across devices."""


@dataclasses.dataclass(frozen=True)
class LocalAttention:
    """Local attention with Flax's contract, from :func:`make_local_attention`.

    Attributes:
      window_size: W.
      unidirectional: position t sees no key behind it, whatever a caller says of causality.
      look_backward: blocks in sight before a position's own.
      look_forward: blocks in sight behind it; None is 0 for a causal call, else 1.
      exact_window: the reach is counted from each position, not from its block.
      shared_qk: keys are normalised queries, and a position's own key is the last resort.
      sequence_axis: the mesh axis along which sequences lie where it is called inside
        ``jax.shard_map``, see :func:`fast_attention.sequence_parallel.along_mesh_axis`.
    """

    window_size: int
    unidirectional: bool = False
    look_backward: int = 1
    look_forward: int | None = None
    exact_window: bool = False
    shared_qk: bool = False
    sequence_axis: AxisName | None = None

    def __call__(
        self,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B S K D"],
        value: Float[Array, "*B S K V"],
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = True,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Any = None,
        *,
        axis: int | tuple[int, ...] | None = None,
        key_mask: Array | None = None,
        segment_ids: Array | None = None,
        projection: Array | None = None,
    ) -> Float[Array, "*B T H V"]:
        """Attends. A query that sees no key gives zeros.

        Args:
          query: ``[*B, T, H, D]``, any number of batch axes.
          key: ``[*B, S, K, D]`` with S = T, or with T = 1 a cache; K divides H, query head h reads
            key head ``h // (H / K)``.
          value: ``[*B, S, K, V]``.
          bias: added to the scores, broadcastable to ``[*B, H, T, S]``; its band is used.
          mask: bool or 0/1, broadcastable to ``[*B, H, T, S]``; True sees; its band is used.
          broadcast_dropout: the batch and the heads share the dropped weights.
          dropout_rng: key of the dropout of attention weights.
          dropout_rate: probability to drop a weight.
          deterministic: no dropout.
          dtype: to compute in, by default the promoted type of the inputs. The softmax is
            always in float32 (float64 for such inputs).
          precision: of the two products.
          module: must be None, weights are not kept.
          is_causal: position t sees no key behind it. For one query over many keys (a step with a
            cache) the mask decides: the query stands at the last key that it shows.
          force_fp32_for_softmax: has no effect: the softmax is in float32 in either case.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.
          input_positions: must be None, apply rotary positions before.
          axis: attend over this axis, or over several at once, flattened in row-major order;
            other axes before the heads are batch. None is the last axis before the heads. With
            several axes, T and S in masks are the products of their lengths.
          key_mask: ``[*B, S]`` bool (the shape of key without heads and width); a key where it
            is False is not seen.
          segment_ids: as ``key_mask``, integers: positions see their own run of equal ids.
          projection: must be None.

        Returns:
          ``[*B, T, H, V]`` in ``dtype``.

        Raises:
          ValueError: for shapes that do not fit, or an option that local attention does not
            have.
        """
        refuse(
            "Local attention",
            _ADVICE,
            module=module,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
            projection=projection,
        )
        dtype = jnp.result_type(query, key, value, float) if dtype is None else dtype
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        axes, unfolded = attended_axes(query.ndim, axis), query.shape
        query, key, value = (fold_axes(x, axes, trailing=2) for x in (query, key, value))
        if key_mask is not None:
            key_mask = fold_axes(key_mask, axes, trailing=0)
        if segment_ids is not None:
            segment_ids = fold_axes(segment_ids, axes, trailing=0)
        drop = dropout_rate > 0 and not deterministic
        if drop and dropout_rng is None:
            raise ValueError(
                f"dropout_rate={dropout_rate} needs a dropout_rng: pass one, or deterministic=True."
            )
        dropout: dict[str, Any] = {
            "dropout_key": dropout_rng if drop else None,
            "dropout_rate": dropout_rate if drop else 0.0,
            "broadcast_dropout": broadcast_dropout,
            "precision": precision,
        }
        window = self._window(self.unidirectional or is_causal)
        if query.shape[-3] == 1 < key.shape[-3]:
            if segment_ids is not None:
                raise ValueError(
                    "segment_ids cannot be used for one query over a cache: pass a mask of the "
                    "keys in its segment."
                )
            out = local_decoding.attend_from_one(
                window,
                query,
                key,
                value,
                bias,
                mask,
                key_mask,
                shared_qk=self.shared_qk,
                **dropout,
            )
        elif self.sequence_axis is not None:
            refuse(
                "Local attention along a mesh axis",
                _ADVICE_ALONG_AXIS,
                bias=bias,
                mask=mask,
                dropout_rate=dropout_rate if drop else None,
            )
            out = local_attention_of_shard(
                query,
                key,
                value,
                axis_name=self.sequence_axis,
                window_size=window.size,
                causal=window.causal,
                look_backward=window.look_backward,
                look_forward=window.look_forward,
                exact_window=window.exact,
                shared_qk=self.shared_qk,
                key_mask=key_mask,
                segment_ids=segment_ids,
                precision=precision,
            )
        else:
            out = local_attention(
                query,
                key,
                value,
                window_size=window.size,
                causal=window.causal,
                look_backward=window.look_backward,
                look_forward=window.look_forward,
                exact_window=window.exact,
                shared_qk=self.shared_qk,
                key_mask=key_mask,
                segment_ids=segment_ids,
                mask=mask,
                bias=bias,
                **dropout,
            )
        return unfold_axes(out, axes, unfolded)

    def draw_projection(self, key: Array, head_dim: int) -> None:
        """Draws nothing: local attention has no random features."""

    def init_state(
        self,
        batch_shape: Sequence[int],
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        max_length: int | None = None,
    ) -> LocalState:
        """Returns the state before the first token; its size does not depend on ``max_length``."""
        del max_length
        window = self._window(causal=True)
        return local_decoding.empty_state(window, batch_shape, num_kv_heads, head_dim, value_dim)

    def prefill(
        self,
        state: LocalState,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B T K D"],
        value: Float[Array, "*B T K V"],
        *,
        key_mask: Bool[Array, "*B T"] | None = None,
        projection: Array | None = None,
    ) -> tuple[Float[Array, "*B T H V"], LocalState]:
        """Reads T tokens causally, continuing ``state``; padding (False) takes no place."""
        refuse("Local attention", _ADVICE, projection=projection)
        return local_decoding.prefill(
            self._window(causal=True),
            state,
            query,
            key,
            value,
            key_mask=key_mask,
            shared_qk=self.shared_qk,
        )

    def step(
        self,
        state: LocalState,
        query: Float[Array, "*B H D"],
        key: Float[Array, "*B K D"],
        value: Float[Array, "*B K V"],
        *,
        projection: Array | None = None,
    ) -> tuple[Float[Array, "*B H V"], LocalState]:
        """Reads one token: constant time and memory, however many came before."""
        refuse("Local attention", _ADVICE, projection=projection)
        return local_decoding.step(
            self._window(causal=True), state, query, key, value, shared_qk=self.shared_qk
        )

    def _window(self, causal: bool) -> Window:
        return make_window(
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
    """Makes local attention, see :func:`fast_attention.local_attention.local_attention`.

    Args:
      window_size: W, positions in a block.
      unidirectional: always causal.
      look_backward: blocks in sight before a position's own.
      look_forward: blocks in sight behind it; None is 0 for a causal call, else 1.
      exact_window: the reach is counted from each position, not from its block.
      shared_qk: keys are normalised queries (Reformer).

    Returns:
      An ``attention_fn`` that also decodes, with a state of constant size.

    Raises:
      ValueError: for numbers out of range, or a causal window that looks forward.
    """
    make_window(window_size, unidirectional, look_backward, look_forward, exact_window)
    return LocalAttention(
        window_size, unidirectional, look_backward, look_forward, exact_window, shared_qk
    )
