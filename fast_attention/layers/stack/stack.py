"""A stack of residual layers: one stream, or two reversible streams.

Shape letters: B batch, T length, M features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.types import Array, Bool, Float
from fast_attention.layers.attention.multi_head import NO_INPUTS
from fast_attention.layers.dropout import check_rate, check_rngs
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.inputs import Inputs
from fast_attention.layers.stack.layer_dropout import draw_layer_mask
from fast_attention.layers.stack.recomputing import recomputed
from fast_attention.layers.stack.reversible import reversible_residual
from fast_attention.layers.stack.sublayer import NormConfig, Sublayer, SublayerConfig, build_inner
from fast_attention.layers.sublayer_part import SublayerPart
from fast_attention.mechanisms.checks import check_choice


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Shape of a `Stack`.

    Attributes:
      features: M.
      blocks: The sublayers of each block, usually attention and feed-forward.
      norm: Norm of the stream before each sublayer.
      reversible: Two streams, each block of two sublayers f and g computing ``x1 + f(x2)`` and
        ``x2 + g(x1)``: the backward pass recomputes the streams, memory does not grow with depth
        (arXiv:1707.04585).
      reverse_threshold: Up to this length, ordinary differentiation is used for the two streams.
      merge: How the two streams are combined at the end, "mean" or "sum".
      tie_blocks: Blocks share their sublayers, but not norms and gains.
      remat: Store only the stream before each sublayer, and recompute the rest.
      layer_dropout_rate: Dropout rate of whole blocks in training; at least one block is kept.
      redraw_interval: Optimiser steps between two redraws of random features, for
        `redraw_due`; None keeps them.
      recalibrate_interval: Optimiser steps between two fits of tuned features to the running
        averages of queries and keys (attention functions with ``moment_decay``), for `redraw_due`.
    """

    features: int
    blocks: tuple[tuple[SublayerConfig, ...], ...]
    norm: NormConfig = NormConfig()
    reversible: bool = False
    reverse_threshold: int = 0
    merge: Literal["mean", "sum"] = "mean"
    tie_blocks: bool = False
    remat: bool = False
    layer_dropout_rate: float = 0.0
    redraw_interval: int | None = None
    recalibrate_interval: int | None = None

    def __post_init__(self):
        """Checks every field.

        Raises:
          ValueError: For invalid values.
        """
        if self.features < 1 or not self.blocks:
            raise ValueError(
                f"A stack needs features and blocks, got {self.features} and {len(self.blocks)}."
            )
        if self.reversible and any(len(block) != 2 for block in self.blocks):
            raise ValueError(
                "A reversible stack needs two sublayers in every block, got "
                f"{[len(block) for block in self.blocks]}."
            )
        if self.reversible and self.norm.after:
            raise ValueError(
                "Norms after the sum are not reversible: use reversible with after=False."
            )
        check_choice("merge", self.merge, ("mean", "sum"))
        check_rate(self.layer_dropout_rate, "layer_dropout_rate")
        for name in ("redraw_interval", "recalibrate_interval"):
            interval = getattr(self, name)
            if interval is not None and interval < 1:
                raise ValueError(f"{name} must be at least 1, or None for never, got {interval}.")


class Stack(nnx.Module):
    """Blocks of sublayers around a residual stream.

    Attributes:
      config: Its shape.
      blocks: The `Sublayer` modules of each block.
    """

    def __init__(self, config: StackConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        """Draws the parameters.

        Args:
          config: Shape of the stack.
          dtype: Dtype of the computation; None is that of inputs and parameters.
          rngs: Source of parameters and projections.
        """
        self.config = config
        shared: dict[SublayerConfig, SublayerPart] = {}

        def build(block: Sequence[SublayerConfig], rngs: nnx.Rngs) -> nnx.List[Any]:
            if config.tie_blocks:
                for sublayer in block:
                    if sublayer not in shared:
                        shared[sublayer] = build_inner(
                            config.features, sublayer, dtype=dtype, rngs=rngs
                        )
            return nnx.List(
                [
                    Sublayer(
                        config.features,
                        sublayer,
                        config.norm,
                        inner=shared.get(sublayer),
                        dtype=dtype,
                        rngs=rngs,
                    )
                    for sublayer in block
                ]
            )

        first, number = config.blocks[0], len(config.blocks)
        alike = number > 1 and all(block == first for block in config.blocks)
        if alike and not config.tie_blocks:
            self.blocks = _build_alike(lambda rngs: build(first, rngs), number, rngs)
        else:
            self.blocks = nnx.List([build(block, rngs) for block in config.blocks])

    @modules_run_on_auto_axes
    def __call__(
        self,
        x: Float[Array, "B T M"],
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
        context: Float[Array, "B S N"] | None = None,
        context_mask: Bool[Array, "B S"] | None = None,
        mask: Bool[Array, "B T T"] | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T M"]:
        """Applies all blocks.

        Args:
          x: ``[B, T, M]``.
          positions: ``[B, T]`` for rotary positions, by default 0, 1, ...
          segment_ids: ``[B, T]``; positions see their own run of equal ids.
          key_mask: ``[B, T]``; positions where it is False (padding) are not seen.
          context: ``[B, S, N]``, a second sequence, for blocks that have one.
          context_mask: ``[B, S]``; context positions where it is False are not seen.
          mask: ``[B, T, T]``; position t sees s where it is True, for attention that supports such
            masks (exact, LSH); others raise an error.
          deterministic: No dropout.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          ``[B, T, M]``.

        Raises:
          ValueError: If a context is missing, or dropout is requested without `rngs`.
        """
        inputs = Inputs(positions, segment_ids, key_mask, context, context_mask, mask)
        self._check(inputs)
        keep = self._layer_mask(deterministic, rngs)
        two_streams = self.config.reversible and x.shape[1] > self.config.reverse_threshold
        if two_streams or self.config.remat:
            return self._recomputed(x, inputs, deterministic, rngs, keep, two_streams)

        def add(block: int, part: int, x: Array) -> Array:
            sublayer = self.blocks[block][part]
            out, _ = sublayer(x, inputs, deterministic=deterministic, rngs=rngs)
            return out if keep is None else jnp.where(keep[block], out, 0)

        return self._flow(x, add)

    @modules_run_on_auto_axes
    def hidden_states(
        self, x: Float[Array, "B T M"], inputs: Inputs = NO_INPUTS
    ) -> list[Float[Array, "B T M"]]:
        """Computes the stream before the first block and after every block, without dropout.

        For two streams, it is their mean or sum, as at the end of the stack; ordinary
        differentiation is used.

        Args:
          x: ``[B, T, M]``.
          inputs: The other arguments of a call.

        Returns:
          ``[B, T, M]`` for each of 0 (`x` itself), 1, ..., ``len(blocks)`` blocks.
        """
        self._check(inputs)

        def add(block: int, part: int, x: Array) -> Array:
            return self.blocks[block][part](x, inputs, deterministic=True, rngs=None)[0]

        return [x, *map(self._merge, self._streams(x, add))]

    @property
    def can_decode(self) -> bool:
        """Whether the stack can read token by token."""
        return all(sublayer.can_decode for block in self.blocks for sublayer in block)

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one."""
        return all(sublayer.causal for block in self.blocks for sublayer in block)

    @modules_run_on_auto_axes
    def init_state(self, batch_size: int, max_length: int, inputs: Inputs = NO_INPUTS) -> Any:
        """Makes the state before the first token, see `MultiHeadAttention.init_state`."""
        return tuple(
            tuple(sublayer.init_state(batch_size, max_length, inputs) for sublayer in block)
            for block in self.blocks
        )

    @modules_run_on_auto_axes
    def prefill(
        self, state: Any, x: Float[Array, "B T M"], inputs: Inputs = NO_INPUTS
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Applies all blocks to T new tokens per row, see `MultiHeadAttention.prefill`."""
        return self._continue("prefill", state, x, inputs)

    @modules_run_on_auto_axes
    def step(
        self, state: Any, x: Float[Array, "B M"], inputs: Inputs = NO_INPUTS
    ) -> tuple[Float[Array, "B M"], Any]:
        """Applies all blocks to one new token per row, see `MultiHeadAttention.step`."""
        return self._continue("step", state, x, inputs)

    def _continue(self, method: str, state: Any, x: Array, inputs: Inputs) -> tuple[Array, Any]:
        states = [list(block) for block in state]

        def add(block: int, part: int, x: Array) -> Array:
            read = getattr(self.blocks[block][part], method)
            out, states[block][part] = read(states[block][part], x, inputs)
            return out

        out = self._flow(x, add)
        return out, tuple(tuple(block) for block in states)

    def _flow(self, x: Array, add: Callable[[int, int, Array], Array]) -> Array:
        """Passes one or two streams through all sublayers."""
        streams: tuple[Array, ...] = (x,)
        for streams in self._streams(x, add):  # noqa: B007 - what was before need not be kept.
            pass
        return self._merge(streams)

    def _streams(
        self, x: Array, add: Callable[[int, int, Array], Array]
    ) -> Iterator[tuple[Array, ...]]:
        """Yields the one stream or the two after every block."""
        x1 = x2 = x
        for block, sublayers in enumerate(self.blocks):
            if self.config.reversible:
                x1 = x1 + add(block, 0, x2)
                x2 = x2 + add(block, 1, x1)
                yield x1, x2
            else:
                for part in range(len(sublayers)):
                    x = sublayers[part].leave(x + add(block, part, x))
                yield (x,)

    def _merge(self, streams: tuple[Array, ...]) -> Array:
        if len(streams) == 1:
            return streams[0]
        x1, x2 = streams
        return x1 + x2 if self.config.merge == "sum" else (x1 + x2) / 2

    def _recomputed(
        self,
        x: Array,
        inputs: Inputs,
        deterministic: bool,
        rngs: nnx.Rngs | None,
        keep: Array | None,
        two_streams: bool,
    ) -> Array:
        """Applies pure functions of the sublayers, so that the backward pass can repeat them."""
        sublayers = [sublayer for block in self.blocks for sublayer in block]
        blocks = [index for index, block in enumerate(self.blocks) for _ in block]
        functions, parameters = [], []
        for sublayer, block in zip(sublayers, blocks, strict=True):
            graphdef, state = nnx.split(sublayer)
            key = None if deterministic or rngs is None else rngs.dropout()
            functions.append(_PureSublayer(graphdef, deterministic))
            parameters.append((state, key, None if keep is None else keep[block]))
        if two_streams:
            y1, y2, saved = reversible_residual(
                functions, parameters, x, x, inputs, return_saved=True
            )
            x = self._merge((y1, y2))
        else:
            saved = []
            for function, own, sublayer in zip(functions, parameters, sublayers, strict=True):
                increment, kept = cast(Any, recomputed(function, own, x, inputs))
                x = sublayer.leave(x + increment)
                saved.append(kept)
        if not deterministic:
            for sublayer, (_, statistics) in zip(sublayers, saved, strict=True):
                nnx.update(sublayer, statistics)
        return x

    def _layer_mask(self, deterministic: bool, rngs: nnx.Rngs | None) -> Array | None:
        rate = self.config.layer_dropout_rate
        check_rngs(rate, deterministic, rngs, "layer_dropout_rate")
        if deterministic or not rate or rngs is None:
            return None
        return draw_layer_mask(rngs.dropout(), rate, len(self.blocks))

    def _check(self, inputs: Inputs) -> None:
        takes = any(
            getattr(sublayer.inner, "context", None) is not None
            or getattr(sublayer.inner, "cross", False)
            for block in self.config.blocks
            for sublayer in block
        )
        if inputs.context is not None and not takes:
            raise ValueError(
                "A context was given, but no block attends to one: build some with "
                "AttentionConfig(context='cross')."
            )


@dataclasses.dataclass(frozen=True)
class _PureSublayer:
    """A sublayer as a function of its parameters, for `reversible_residual`."""

    graphdef: Any
    deterministic: bool

    def __call__(
        self, parameters: Any, x: Array, inputs: Inputs, saved: Any
    ) -> tuple[Array, tuple[Any, Any]]:
        state, key, keep = parameters
        sublayer = nnx.merge(self.graphdef, state)
        rngs = None if key is None else nnx.Rngs(dropout=key)
        choices = None if saved is None else saved[0]
        out, choices = sublayer(
            x, inputs, deterministic=self.deterministic, rngs=rngs, choices=choices
        )
        out = out if keep is None else jnp.where(keep, out, 0)
        return out, (choices, nnx.state(sublayer, nnx.BatchStat))


def _build_alike(build: Callable[[nnx.Rngs], Any], number: int, rngs: nnx.Rngs) -> nnx.List[Any]:
    """Builds modules that differ only in their random numbers.

    Each kind of parameter is drawn for all of them at once, so compilation takes as long as for
    one.
    """
    stacked = nnx.split_rngs(splits=number)(nnx.vmap(build))(rngs)
    graphdef, state = nnx.split(stacked)

    def take(index: int) -> Any:
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[index], state))

    return nnx.List([take(index) for index in range(number)])
