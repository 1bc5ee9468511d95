"""What the GPU kernels share: their operands, one program's place in them, and the launch.

One program serves one batch row and one query head and walks over the chunks of 64 positions; for
each chunk it walks over tiles of 64 features, so that neither depends on the length nor on M.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
M features, all widths and lengths padded to multiples of 64; C = 64, N chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_gpu.tiles import (
    BARRIERS,
    GRID_NAMES,
    TILE,
    Operand,
    Ref,
    Tiles,
    shared_matrix,
    spread_rows,
)
from fast_attention.linear.state import EMPTY_LOG_SCALE, MASKED_LOG

SHARED_BYTES = 227 * 1024 - 4096
"""Shared memory of one program on Hopper, less what the compiler takes for itself."""

EXPONENT_ORDER = 3
"""Products of parts that make up a log-feature: float32, because it goes into an exponent."""


@dataclasses.dataclass(frozen=True)
class Division:
    """How numerators are divided by denominators.

    Attributes:
      epsilon: see :func:`fast_attention.linear.types.safe_inverse`.
      dtype: of the result, bfloat16 or float32.
    """

    epsilon: float
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static side of a kernel.

    Attributes:
      batch: B, each segment of a sequence a row.
      segments: of each sequence.
      heads: H.
      groups: H / K.
      queries: T.
      keys: S.
      head_dim: D.
      value_dim: V.
      features: M.
      real_features: M before padding; features from there on are masked.
      parts: bfloat16 parts of features, weights and values.
      division: how numerators are divided by denominators, None if they are not.
      bfloat16: whether queries, keys and values are in bfloat16.
      interpret: run on plain operations.
    """

    batch: int
    segments: int
    heads: int
    groups: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    features: int
    real_features: int
    parts: int
    division: Division | None
    bfloat16: bool
    interpret: bool

    @property
    def gradient_dtype(self) -> Any:
        """The type in which the last kernel to add to a gradient writes it."""
        return jnp.bfloat16 if self.bfloat16 else jnp.float32


class Operands(NamedTuple):
    """The arrays a kernel reads, as references inside it.

    Attributes:
      query: parts of ``[B, T, H, D]``.
      key: parts of ``[B, S, K, D]``.
      value: parts of ``[B, S, K, V]``.
      key_log: ``[B, K, S]``, added to all log-features of a key; ``MASKED_LOG`` for a masked one.
      weights: parts of the projection, ``[B / segments or 1, K or 1, M, D]``.
    """

    query: Any
    key: Any
    value: Any
    key_log: Any
    weights: Any


class Program:
    """One program's place in the arrays, and its shared memory by name."""

    def __init__(self, tiles: Tiles, sizes: Sizes, operands: Operands, shared: dict[str, Any]):
        """Finds out which batch row and head this program serves."""
        self.tiles, self.sizes, self.operands, self.shared = tiles, sizes, operands, shared
        self.batch, self.head = tiles.position()
        self.key_head = jax.lax.div(self.head, jnp.int32(sizes.groups))
        self.sequence = jax.lax.div(self.batch, jnp.int32(sizes.segments))
        self.segment = jax.lax.rem(self.batch, jnp.int32(sizes.segments))

    def queries(self, x: Operand, name: str, chunk: Array) -> list[tuple[Ref, Ref]]:
        """Returns the copies that bring a chunk of ``[B, T, H, ...]`` to shared memory."""
        return _chunk_copies(x, self.shared[name], self.batch, chunk, self.head)

    def keys(self, x: Operand, name: str, chunk: Array) -> list[tuple[Ref, Ref]]:
        """Returns the copies that bring a chunk of ``[B, S, K, ...]`` to shared memory."""
        return _chunk_copies(x, self.shared[name], self.batch, chunk, self.key_head)

    def key_log_copy(self, chunk: Array) -> tuple[Ref, Ref]:
        """Returns the copy of what is added to the logs of a chunk of keys."""
        source = self.operands.key_log.at[self.batch, self.key_head, piece(chunk)]
        return source, self.shared["key_log"]

    def fetch_weights(self, tile: Array) -> None:
        """Brings a tile of the projection to shared memory."""
        copies = []
        for source, destination in zip(self.operands.weights, self.shared["weights"], strict=True):
            batch = self.sequence if source.shape[0] > 1 else 0
            head = self.key_head if source.shape[1] > 1 else 0
            copies.append((source.at[batch, head, piece(tile)], destination))
        self.tiles.fetch(*copies)

    def query_logs(self, tile: Array) -> Array:
        """Returns log-features ``[C, 64]`` of the chunk's queries; needs the tile's weights."""
        return self._project(self.shared["query"], tile)

    def key_logs(self, tile: Array) -> Array:
        """Returns log-features ``[C, 64]`` of the chunk's keys; needs the tile's weights."""
        offset = self.tiles.rows(self.shared["key_log"])
        return self._project(self.shared["key"], tile) + spread_rows(offset)

    def _project(self, x: Operand, tile: Array) -> Array:
        logs = self.tiles.matmul(
            x, self.shared["weights"], transpose_right=True, order=EXPONENT_ORDER
        )
        real = self.sizes.real_features
        if real % TILE:
            logs = jnp.where(self.tiles.positions(tile)[1] < real, logs, MASKED_LOG)
        return logs

    def read_matrix(self, source: Ref) -> Array:
        """Loads a float32 ``[64, D]`` or ``[64, V]`` of global memory."""
        stage = self._stage(source.shape[-1])
        self.tiles.fetch((source, stage))
        return self.tiles.matrix(stage)

    def write_matrix(self, destination: Ref, x: Array) -> None:
        """Stores a float32 ``[64, D]`` or ``[64, V]`` to global memory."""
        stage = self._stage(x.shape[-1])
        stage[...] = x
        self.tiles.send((stage, destination))

    def write_rounded(self, destination: Ref, x: Array, stage: str) -> None:
        """Stores ``[64, D]`` or ``[64, V]`` in the type of the destination.

        Args:
          destination: in global memory, bfloat16 or float32.
          x: float32.
          stage: name of an operand as wide in shared memory, which is overwritten if the
            destination is bfloat16.
        """
        if destination.dtype != jnp.bfloat16:
            self.write_matrix(destination, x)
            return
        operand = self.shared[stage][:1]
        self.tiles.store(operand, x)
        self.tiles.send_operand(operand, destination)

    def _stage(self, width: int) -> Ref:
        return self.shared["stage" if width == self.sizes.value_dim else "head_stage"]

    def over_tiles(self, body: Callable[[Array, Any], Any], carry: Any = None) -> Any:
        """Runs ``body(tile, carry)`` over the tiles of features."""
        return loop(self.tiles, self.sizes.features // TILE, body, carry)


def loop(tiles: Tiles, count: int, body: Callable[[Array, Any], Any], carry: Any = None) -> Any:
    """Runs ``body(i, carry)`` for i from 0."""
    if count == 1:
        return body(jnp.int32(0), carry)

    def step(i: Array, carry: Any) -> Any:
        tiles.indices.append(i)
        try:
            return body(i, carry)
        finally:
            tiles.indices.pop()

    return jax.lax.fori_loop(0, count, step, carry)


def piece(index: Array) -> Any:
    """Returns the slice of a chunk of positions or a tile of features."""
    return pl.ds(index * TILE, TILE)


def visible_scale(log_scale: Array) -> Array:
    """Returns the scale of a state, 0 where it is empty."""
    return jnp.where(log_scale > 0.5 * EMPTY_LOG_SCALE, log_scale, 0.0)


def shared_memory(sizes: Sizes, names: dict[str, tuple[int, int] | int]) -> dict[str, Any]:
    """Returns what to allocate.

    Args:
      sizes: of the kernel.
      names: (parts, width) of an operand ``[64, width]``; the length of a float32 vector; or, for
        parts = 0, a float32 matrix ``[64, width]``.
    """
    shared: dict[str, Any] = {}
    for name, entry in names.items():
        if isinstance(entry, int):
            shared[name] = plgpu.SMEM((entry,), jnp.float32)
        elif entry[0] == 0:
            shared[name] = shared_matrix(sizes.interpret, jnp.float32, entry[1])
        else:
            parts, width = entry
            shared[name] = [shared_matrix(sizes.interpret, jnp.bfloat16, width)] * parts
    return shared


def shared_bytes(names: dict[str, tuple[int, int] | int]) -> int:
    """Returns the bytes of what :func:`shared_memory` allocates."""
    total = 0
    for entry in names.values():
        if isinstance(entry, int):
            total += 4 * entry
        else:
            total += TILE * entry[1] * (4 if entry[0] == 0 else 2 * entry[0])
    return total


def launch(
    body: Callable[[Tiles, Any, Any, dict[str, Any]], None],
    sizes: Sizes,
    inputs: Any,
    outputs: Any,
    names: dict[str, tuple[int, int] | int],
) -> Any:
    """Runs ``body(tiles, inputs, outputs, shared)`` for every batch row and head.

    Args:
      body: the kernel.
      sizes: its sizes.
      inputs: pytree of arrays; the kernel gets references.
      outputs: pytree of shapes and dtypes; the kernel gets references, which it may read.
      names: its shared memory, see :func:`shared_memory`.

    Returns:
      Arrays, in the structure of ``outputs``.
    """
    flat_inputs, input_tree = jax.tree.flatten(inputs)
    flat_outputs, output_tree = jax.tree.flatten(outputs)

    def kernel(*refs: Ref, barriers: Ref | None = None, **shared: Any) -> None:
        inside = input_tree.unflatten(refs[: len(flat_inputs)])
        outside = output_tree.unflatten(refs[len(flat_inputs) :])
        body(Tiles(sizes.interpret, barriers), inside, outside, shared)

    shared = shared_memory(sizes, names)
    grid = (sizes.batch, sizes.heads)
    if sizes.interpret:
        # The plain interpreter knows this form alone, which Mosaic GPU is about to drop.
        anywhere = pl.BlockSpec(memory_space=plgpu.GMEM)
        call = pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[anywhere] * len(flat_inputs),
            out_specs=[anywhere] * len(flat_outputs),
            out_shape=flat_outputs,
            scratch_shapes=shared,
            interpret=True,
        )
    else:
        shared["barriers"] = plgpu.Barrier(num_barriers=BARRIERS)
        call = plgpu.kernel(
            kernel,
            out_type=flat_outputs,
            scratch_types=shared,
            grid=grid,
            grid_names=GRID_NAMES,
            # Layouts of registers are those written down; inferring them takes minutes.
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        )
    return output_tree.unflatten(call(*flat_inputs))


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of a float32 array."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _chunk_copies(
    x: Operand, shared: Operand, batch: Array, chunk: Array, head: Array
) -> list[tuple[Ref, Ref]]:
    return [
        (source.at[batch, piece(chunk), head], destination)
        for source, destination in zip(x, shared, strict=True)
    ]
