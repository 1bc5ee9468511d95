"""Operations on square tiles: Hopper's own (Mosaic GPU), and plain ones to interpret a kernel with.

A kernel is written once, in terms of :class:`Tiles`. On the GPU matrix products are ``wgmma`` on
operands in shared memory and global memory is reached by TMA copies; interpreted, the same steps
are an ordinary product and an ordinary assignment, and all other arithmetic is the same code.

Tensor cores multiply bfloat16. A float32 operand is therefore kept as a sum of bfloat16 parts, the
large one first, and a product adds the products of parts down to the precision asked for: three
parts give about 24 bits, two give 16.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from fast_attention.arrays.types import Array

TILE = 64
"""Positions in a chunk and features in a tile: the rows of one ``wgmma``."""

BARRIERS = 24
"""More than the copies of any one fetch."""

GRID_NAMES = ("batch", "head")

Ref = Any
Operand = tuple[Ref, ...]
"""The bfloat16 parts of one matrix in shared memory."""

_LAYOUT = plgpu.Layout.WGMMA
_ROWS, _COLUMNS = _LAYOUT.reduce(1), _LAYOUT.reduce(0)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tile operations of one kernel.

    Attributes:
      interpret: use plain operations.
      barriers: of the copies, None when interpreted.
      indices: of the loops around what is being traced, the innermost last.
    """

    interpret: bool
    barriers: Ref | None = None
    indices: list[Array] = dataclasses.field(default_factory=list)

    def position(self) -> tuple[Array, Array]:
        """Returns the batch row and the head that this program serves."""
        if self.interpret:
            return pl.program_id(0), pl.program_id(1)
        batch, head = GRID_NAMES
        return jax.lax.axis_index(batch), jax.lax.axis_index(head)

    def fetch(self, *copies: tuple[Ref, Ref]) -> None:
        """Copies from global to shared memory, ``(source, destination)`` each, and waits."""
        if self.interpret:
            for source, destination in copies:
                destination[...] = source[...]
            return
        assert self.barriers is not None
        plgpu.commit_smem()  # What the destinations held has been read by every thread.
        for i, (source, destination) in enumerate(copies):
            plgpu.copy_gmem_to_smem(source, _matrix(destination), self.barriers.at[i])
        for i in range(len(copies)):
            plgpu.barrier_wait(self.barriers.at[i])

    def send(self, *copies: tuple[Ref, Ref]) -> None:
        """Copies from shared to global memory, ``(source, destination)`` each, and waits."""
        if self.interpret:
            for source, destination in copies:
                destination[...] = source[...]
            return
        plgpu.commit_smem()
        for source, destination in copies:
            plgpu.copy_smem_to_gmem(source, destination)
        plgpu.wait_smem_to_gmem(0)

    def send_operand(self, operand: Operand, destination: Ref) -> None:
        """Copies an operand of one part to global memory."""
        self.send((_matrix(operand[0]), destination))

    def matrix(self, ref: Ref) -> Array:
        """Loads ``[64, N]``."""
        return ref[...] if self.interpret else _load(ref, _LAYOUT)

    def rows(self, ref: Ref) -> Array:
        """Loads ``[64]``, one number for each row of a tile."""
        return ref[...] if self.interpret else _load(ref, _ROWS)

    def columns(self, ref: Ref) -> Array:
        """Loads ``[64]``, one number for each column of a tile."""
        return ref[...] if self.interpret else _load(ref, _COLUMNS)

    def full(self, value: float, width: int) -> Array:
        """Returns ``[64, width]`` of one value."""
        return self._cast(jnp.full((TILE, width), value, jnp.float32), _LAYOUT)

    def full_rows(self, value: float) -> Array:
        """Returns ``[64]``, one number for each row."""
        return self._cast(jnp.full((TILE,), value, jnp.float32), _ROWS)

    def full_columns(self, value: float) -> Array:
        """Returns ``[64]``, one number for each column."""
        return self._cast(jnp.full((TILE,), value, jnp.float32), _COLUMNS)

    def row_numbers(self) -> Array:
        """Returns 0 to 63, one for each row."""
        return self._cast(jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0), _ROWS)

    def column_numbers(self) -> Array:
        """Returns 0 to 63, one for each column."""
        return self._cast(jax.lax.broadcasted_iota(jnp.int32, (TILE,), 0), _COLUMNS)

    def positions(self, chunk: Array) -> tuple[Array, Array]:
        """Returns the row and the column of every entry of ``[64, 64]``, counted from chunk 0.

        Counted from the chunk's start they would be the same in all chunks: the compiler would make
        the masks they are used for before the loop and keep them in registers.
        """
        start = chunk * TILE
        rows = spread_rows(self.row_numbers() + start)
        return rows, spread_columns(self.column_numbers() + start)

    def store(self, operand: Operand, x: Array) -> None:
        """Writes a float32 matrix as a sum of bfloat16 parts."""
        for part in operand[:-1]:
            large = _round_to_bfloat16(x)
            _matrix(part)[...] = large.astype(jnp.bfloat16)
            x = x - large
        _matrix(operand[-1])[...] = x.astype(jnp.bfloat16)

    def load(self, operand: Operand) -> Array:
        """Returns the float32 matrix an operand stands for."""
        parts = [self.matrix(_matrix(part)).astype(jnp.float32) for part in operand]
        return functools.reduce(jnp.add, parts)

    def matmul(
        self,
        left: Operand,
        right: Operand,
        *,
        transpose_left: bool = False,
        transpose_right: bool = False,
        order: int | None = None,
        add: Array | None = None,
    ) -> Array:
        """Returns the product of two operands, float32.

        Args:
          left: ``[64, N]``, or ``[N, 64]`` if transposed.
          right: ``[N, W]``, or ``[W, N]`` if transposed.
          transpose_left: whether to transpose it.
          transpose_right: whether to transpose it.
          order: products of parts i and j with ``i + j < order`` are added; by default as many as
            the longer operand has parts.
          add: a matrix to add the product to.
        """
        order = order or max(len(left), len(right))
        pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < order]
        if self.interpret:
            a, b = _plain(left, transpose_left), _plain(right, transpose_right)
            products = [jnp.dot(a[i], b[j], precision=jax.lax.Precision.HIGHEST) for i, j in pairs]
            return functools.reduce(jnp.add, products if add is None else [add, *products])
        rows = left[0].shape[2 if transpose_left else 1]
        width = right[0].shape[1 if transpose_right else 2]
        slot = self._only_slot()

        def multiply(accumulator: Ref) -> None:
            for i, j in pairs:
                plgpu.wgmma(
                    accumulator,
                    _turned(left[i].at[slot], transpose_left),
                    _turned(right[j].at[slot], transpose_right),
                )
            plgpu.wgmma_wait(0)

        plgpu.commit_smem()  # Registers written to the operands are there for the tensor cores.
        if add is None:
            add = self.full(0.0, width) if rows == TILE else jnp.zeros((rows, width), jnp.float32)
        total: Any = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(add))
        return total

    def _only_slot(self) -> Array:
        """Returns 0, in a way that the compiler cannot see.

        Operands are in memory of one slot. If its number were known, the addresses of all operands
        of all products would be made before the loops and kept in registers, more than there are.
        """
        index = self.indices[-1] if self.indices else jnp.int32(0)
        return (index * (index + 1)) & 1

    def _cast(self, x: Array, layout: Any) -> Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)


def spread_rows(x: Array, width: int = TILE) -> Array:
    """Broadcasts one number a row, ``[64]``, to ``[64, width]``."""
    return jax.lax.broadcast_in_dim(x, (TILE, width), (0,))


def spread_columns(x: Array) -> Array:
    """Broadcasts one number a column, ``[N]``, to ``[64, N]``."""
    return jax.lax.broadcast_in_dim(x, (TILE, *x.shape), (1,))


def shared_matrix(interpret: bool, dtype: Any, width: int) -> Any:
    """Returns what to allocate for ``[64, width]`` in shared memory; bfloat16 is for operands."""
    if interpret:
        return plgpu.SMEM((TILE, width), dtype)
    # Rows of 128 bytes, swizzled: the layout of tensor cores, without bank conflicts.
    row = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(128))
    shape = (1, TILE, width) if dtype == jnp.bfloat16 else (TILE, width)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _matrix(ref: Ref) -> Ref:
    """Returns the matrix of an operand, which has one slot; see :meth:`Tiles._only_slot`."""
    return ref.at[0] if len(ref.shape) == 3 else ref


def split(x: Array, parts: int) -> Operand:
    """Returns bfloat16 arrays whose sum is ``x``, to 8 bits a part; outside kernels."""
    if x.dtype == jnp.bfloat16:
        return (x,)
    x = x.astype(jnp.float32)
    result = []
    for _ in range(parts):
        # A conversion there and back may be simplified away; this may not.
        large = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        result.append(large.astype(jnp.bfloat16))
        x = x - large
    return tuple(result)


def _load(ref: Ref, layout: Any) -> Array:
    return plgpu.layout_cast(ref[...], layout)


def _turned(ref: Ref, transpose: bool) -> Ref:
    return ref.transpose((1, 0)) if transpose else ref


def _plain(operand: Operand, transpose: bool) -> list[Array]:
    parts = [part[...].astype(jnp.float32) for part in operand]
    return [part.T for part in parts] if transpose else parts


def _round_to_bfloat16(x: Array) -> Array:
    """Rounds to 8 bits, in integers: see :func:`split` for why it is no conversion."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    bits = (bits + jnp.int32(0x8000)) & jnp.int32(-0x10000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
