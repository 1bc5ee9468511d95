"""Multi-head attention: groups of heads, each with its own attention function.

Shape letters: B batch, T length, S keys (T and what memory and context add), H heads, K key/value
heads, D head width, M features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.layers.attention.attention_call import (
    Visible,
    call_attention,
    call_with_choice,
    causal_by_mask,
)
from fast_attention.layers.attention.config import AttentionConfig, HeadGroup
from fast_attention.layers.attention.decay import decays_of_groups, head_decay
from fast_attention.layers.attention.head_groups import (
    attend_after_memory,
    check_causal_memory,
    read_keys,
    rotated,
)
from fast_attention.layers.attention.query_key_value import QueryKeyValue
from fast_attention.layers.attention.stored_projections import (
    as_held,
    held_projection,
    no_running_moments,
    observe,
    redraw,
)
from fast_attention.layers.dropout import check_rngs, dropout_options
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.inputs import Inputs
from fast_attention.layers.linear import xavier_linear
from fast_attention.layers.sublayer_part import SublayerPart

NO_INPUTS = Inputs()


class AttentionState(NamedTuple):
    """The decoding state of attention.

    Attributes:
      groups: The state of each group of heads.
      context: Keys and values ``[B, S, K, D]`` and mask of a second sequence, or None.
    """

    groups: tuple[Any, ...]
    context: tuple[Array, Array, Array | None] | None = None


class MultiHeadAttention(nnx.Module, SublayerPart):
    """Self- or cross-attention with groups of heads, see `AttentionConfig`.

    Attributes:
      config: Its shape.
      project: `QueryKeyValue`, the dense layers of queries, keys and values.
      out: The dense layer of the output.
      decay: `HeadDecay`, or None.
      projections: The `Projection` of each group (several by name, if calibrated), or None if a
        function draws none. They are checkpointed with the model but are not parameters; only
        `redraw`, `calibrate` and `recalibrate` change them.
      moments: `RunningMoments` of groups whose function has a ``moment_decay``, updated by training
        calls.
    """

    def __init__(
        self, features: int, config: AttentionConfig, *, dtype: Any = None, rngs: nnx.Rngs
    ):
        """Draws Xavier-uniform kernels and the projections of the groups.

        Args:
          features: M, of inputs and outputs.
          config: Shape of the layer.
          dtype: Dtype of the computation; None is that of inputs and parameters.
          rngs: Source of the parameters and projections.
        """
        self.config = config
        self.project = QueryKeyValue(features, config, dtype=dtype, rngs=rngs)
        self.decay = head_decay(features, config)
        width = config.num_heads * config.head_dim
        self.out = xavier_linear(width, features, use_bias=config.out_bias, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout_rate)
        drawn = [
            group.attention_fn.draw_projection(rngs.params(), config.head_dim)
            for group in config.groups
        ]
        self.projections = nnx.List(map(as_held, drawn, config.kv_heads_of_groups))
        self.moments = nnx.List(no_running_moments(config))

    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
        context: Float[Array, "B C N"] | None = None,
        context_mask: Bool[Array, "B C"] | None = None,
        mask: Bool[Array, "B T T"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T M"]:
        """Attends among the positions of each row, or from them to those of the context.

        Args:
          x: ``[B, T, M]``.
          positions: ``[B, T]`` for rotary positions, by default 0, 1, ...
          segment_ids: ``[B, T]``; positions see their own run of equal ids.
          key_mask: ``[B, T]``; positions where it is False are not seen.
          context: ``[B, C, N]``, a second sequence, if the layer has one.
          context_mask: ``[B, C]``; context positions where it is False are not seen.
          mask: ``[B, T, T]``; position t sees s where it is True, for attention that supports such
            masks (exact, LSH); others raise an error.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          ``[B, T, M]``.

        Raises:
          ValueError: If dropout is requested without `rngs`, or a context is missing or unexpected.
        """
        inputs = Inputs(positions, segment_ids, key_mask, context, context_mask, mask)
        return self.add(x, inputs, deterministic=deterministic, rngs=rngs)[0]

    @modules_run_on_auto_axes
    def add(
        self,
        x: Float[Array, "B T M"],
        inputs: Inputs,
        *,
        choices: Sequence[Any] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[Float[Array, "B T M"], tuple[Any, ...]]:
        """A call that also returns, or reuses, the choices of the groups (hash buckets).

        Args:
          x: ``[B, T, M]``.
          inputs: The other arguments of a call.
          choices: Choices returned by an earlier call, to be used again.
          deterministic: No dropout.
          rngs: Source of dropout.

        Returns:
          ``[B, T, M]``, and the choice of each group, None if there is none.
        """
        self._check(inputs.context, deterministic, rngs)
        length, positions = x.shape[1], inputs.positions
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length)[None], x.shape[:2])
        query, key, value = self.project(x, inputs.context)
        if self.config.context == "cross":
            own = jnp.ones(x.shape[:2], bool) if inputs.key_mask is None else inputs.key_mask
            visible = Visible(key_mask=inputs.context_mask, query_mask=own)
        else:
            key_mask = self.project.key_mask(inputs, key.shape[:2], length)
            visible = Visible(
                self.config.causal,
                key_mask,
                inputs.segment_ids,
                positions,
                inputs.mask,
                inputs.key_mask,
            )
        out, chosen, decays = [], [], decays_of_groups(self.decay, self.config, x)
        for index, (group, q, k, v) in enumerate(self._split(query, key, value)):
            seen, choice = visible, None
            if not group.extra_keys:
                k, v = k[:, :length], v[:, :length]
                seen = seen._replace(key_mask=inputs.key_mask)
            # Memory is read first, into the state that the tokens continue, where there is one.
            after_memory = self._has_causal_memory(group)
            if after_memory and not group.attention_fn.can_decode:
                after_memory, seen = False, causal_by_mask(seen, length)
            q, k = rotated(group, q, k, positions)
            moments = self.moments[index]
            if not deterministic and moments is not None:
                observe(group.attention_fn, moments, q, k, seen)
            options = self._own(index) | decays[index]
            options |= dropout_options(group.dropout_rate, deterministic, rngs)
            if after_memory:
                check_causal_memory(seen, options)
                attended = attend_after_memory(group.attention_fn, q, k, v, seen.key_mask, options)
            else:
                before = None if choices is None else choices[index]
                attended, choice = call_with_choice(
                    group.attention_fn, q, k, v, seen, before, **options
                )
            out.append(attended)
            chosen.append(choice)
        merged = self._merge(out)
        return self.dropout(merged, deterministic=deterministic, rngs=rngs), tuple(chosen)

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one of its own sequence."""
        config = self.config
        if config.context == "cross" or config.causal:
            return True
        return all(group.attention_fn.unidirectional for group in config.groups)

    @property
    def reads_context(self) -> bool:
        """Whether the layer reads a second sequence."""
        return self.config.context is not None

    @property
    def can_decode(self) -> bool:
        """Whether the layer has a state: it is causal, and every group can decode."""
        config = self.config
        if config.context == "cross":
            return True
        appended = config.shared_qk and (config.memory or config.context is not None)
        steps = all(group.attention_fn.can_decode for group in config.groups)
        return self.causal and steps and not appended

    @modules_run_on_auto_axes
    def init_state(
        self, batch_size: int, max_length: int, inputs: Inputs = NO_INPUTS
    ) -> AttentionState:
        """Makes the state before the first token.

        Args:
          batch_size: B.
          max_length: Maximum number of tokens; recurrent states do not depend on it.
          inputs: The context, with cross attention.

        Returns:
          The state; B is the first axis of its arrays.

        Raises:
          TypeError: If the layer cannot decode.
          ValueError: If the layer is not causal, or lacks its context.
        """
        config = self.config
        if config.context == "cross":
            self._check(inputs.context, True, None)
            key, value = self.project.keys_values(inputs.context)
            return AttentionState((), (key, value, inputs.context_mask))
        self._check_decoder()
        states = []
        for group, heads in zip(config.groups, config.kv_heads_of_groups, strict=True):
            room = max_length + (config.memory if group.extra_keys else 0)
            sizes = (batch_size,), heads, config.head_dim, config.head_dim
            decays = config.decay is not None and group.attention_fn.takes.decay
            states.append(group.attention_fn.init_state(*sizes, max_length=room, decays=decays))
        if config.memory:
            key, value = self.project.memory_keys_values(batch_size)
            parts = config.groups, config.split_keys(key), config.split_keys(value)
            for index, (group, k, v) in enumerate(zip(*parts, strict=True)):
                if group.extra_keys:
                    read = group.attention_fn, group.num_heads, states[index], k, v
                    states[index] = read_keys(*read, self._own(index))
        return AttentionState(tuple(states))

    @modules_run_on_auto_axes
    def prefill(
        self, state: AttentionState, x: Float[Array, "B T M"], inputs: Inputs = NO_INPUTS
    ) -> tuple[Float[Array, "B T M"], AttentionState]:
        """Attends causally to T new tokens and all earlier ones.

        Args:
          state: The state of earlier tokens.
          x: ``[B, T, M]``.
          inputs: Positions (needed for rotary positions), and a key mask: False is padding, on
            either side.

        Returns:
          ``[B, T, M]`` and the next state.
        """
        return self._continue(False, state, x, inputs, {"key_mask": inputs.key_mask})

    @modules_run_on_auto_axes
    def step(
        self, state: AttentionState, x: Float[Array, "B M"], inputs: Inputs = NO_INPUTS
    ) -> tuple[Float[Array, "B M"], AttentionState]:
        """Attends from one new token per row to itself and all earlier ones.

        Args:
          state: The state of earlier tokens.
          x: ``[B, M]``.
          inputs: Positions ``[B]``, needed for rotary positions.

        Returns:
          ``[B, M]`` and the next state.
        """
        if state.context is None:
            return self._continue(True, state, x, inputs, {})
        out, state = self.prefill(state, x[:, None])
        return out[:, 0], state

    def redraw(self, rngs: nnx.Rngs) -> None:
        """Redraws the projections of the groups, separately for each of stacked layers.

        Calibrated parameters are kept, or recomputed from the running moments if there are any.
        """
        own = zip(self.config.groups, self.projections, self.moments, strict=True)
        for group, held, moments in own:
            if held is not None:
                redraw(group.attention_fn, held, moments, rngs.params(), self.config.head_dim)

    def _continue(
        self, one: bool, state: AttentionState, x: Array, inputs: Inputs, options: dict[str, Any]
    ) -> tuple[Array, AttentionState]:
        if state.context is not None:
            return self._read_context(state.context, x), state
        query, key, value = self.project(x, memory=False)
        out, states, decays = [], [], decays_of_groups(self.decay, self.config, x)
        for index, (group, q, k, v) in enumerate(self._split(query, key, value)):
            q, k = rotated(group, q, k, inputs.positions)
            read = group.attention_fn.step if one else group.attention_fn.prefill
            own = self._own(index) | decays[index]
            attended, new = read(state.groups[index], q, k, v, **options, **own)
            out.append(attended)
            states.append(new)
        return self._merge(out), AttentionState(tuple(states))

    def _read_context(self, context: tuple[Array, Array, Array | None], x: Array) -> Array:
        key, value, mask = context
        seen = Visible(key_mask=mask, query_mask=jnp.ones(x.shape[:2], bool))
        split = self._split(self.project.queries(x), key, value)
        return self._merge(
            [
                call_attention(group.attention_fn, q, k, v, seen, **self._own(i))
                for i, (group, q, k, v) in enumerate(split)
            ]
        )

    def _has_causal_memory(self, group: HeadGroup) -> bool:
        config = self.config
        return bool(config.memory and config.causal and not config.shared_qk and group.extra_keys)

    def _split(
        self, query: Array, key: Array, value: Array
    ) -> Iterator[tuple[HeadGroup, Array, Array, Array]]:
        config = self.config
        parts = config.split_queries(query), config.split_keys(key), config.split_keys(value)
        return zip(config.groups, *parts, strict=True)

    def _own(self, index: int) -> dict[str, Any]:
        held = self.projections[index]
        return {} if held is None else {"projection": held_projection(held)}

    def _merge(self, parts: Sequence[Array]) -> Array:
        joined = jnp.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]
        return self.out(jax.lax.collapse(joined, -2))

    def _check(self, context: Array | None, deterministic: bool, rngs: nnx.Rngs | None) -> None:
        if self.config.context is None and context is not None:
            raise ValueError(
                "A context was given to self-attention: build the layer with context='cross', or "
                "'append' for shared queries and keys."
            )
        if self.config.context == "cross" and context is None:
            raise ValueError("Cross attention needs context=, the sequence to attend to.")
        rate = max(group.dropout_rate for group in self.config.groups)
        check_rngs(rate, deterministic, rngs)

    def _check_decoder(self) -> None:
        for group in self.config.groups:
            function = group.attention_fn
            if not self.config.causal and not function.unidirectional:
                raise ValueError(
                    "Only causal attention decodes token by token: build the layer with "
                    "causal=True."
                )
            function.check_decodes()
        if not self.can_decode:
            raise TypeError("Shared queries and keys with memory or a context cannot decode.")
