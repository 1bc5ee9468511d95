"""What the TPU kernels share: the static choices, matrix products, features, masks.

Inside the kernels positions lie in sublanes and features in lanes: features are ``[C, M]``, a state
is ``[V + 16, M]``. Its row V holds the sums of features, so that one product gives numerators and
denominators; rows of the operands below it are 0. Inputs and outputs have positions in lanes,
``[heads, D, T]``: this is how XLA lays out ``[B, T, H, D]`` for D below 128 on a TPU.

All logarithms are to base 2: the constant is folded into the weights.

Shape letters: B batch, T queries, S keys, H query heads, K key/value heads, G = H / K, D head
width, V value width, M features, C chunk, L block of chunks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array

LOG2_E = math.log2(math.e)

EXTRA = 16
"""Rows of a state below its values: a tile of bfloat16."""

LIMIT = 80.0
"""The most by which a log-feature of a key may exceed the scale it is read on.

A product of features that underflows loses at most ``2^(LIMIT - 126)`` of a denominator, which is
at least 1, and sums of ``2^LIMIT`` are far from overflow.
"""

DECAYING_LIMIT = 60.0
"""The same with decay, where denominators may be small; see :mod:`.decay`."""

MASKED = -3e30
"""Log-feature of a key that must not be seen; below the scale of an empty state."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The static choices of one call.

    Attributes:
      causal: position t sees keys 0..t.
      kind: "exp" for log-features, or the elementwise function of the features.
      epsilon: added to elementwise features.
      norm: factor on ``|k|^2``, subtracted from the log-features of keys; 0 for none.
      denominator_epsilon: denominators up to this size are inverted as ``den / epsilon^2``.
      low: products of bfloat16 operands, accumulated in float32; False for float32 operands.
      features: M before padding.
      head_dim: D, a multiple of 16.
      value_dim: V, a multiple of 16.
      queries: T.
      keys: S.
      groups: G.
      heads: key heads of one program.
      kv_heads: K.
      chunk: C.
      block: L, a multiple of C.
      interpret: run the kernels in the interpreter: False, True or ``pltpu.InterpretParams``.
      decay: keys decay, see :mod:`.decay`.
    """

    causal: bool
    kind: str
    epsilon: float
    norm: float
    denominator_epsilon: float
    low: bool
    features: int
    head_dim: int
    value_dim: int
    queries: int
    keys: int
    groups: int
    heads: int
    kv_heads: int
    chunk: int
    block: int
    interpret: Any = False
    decay: bool = False

    @property
    def limit(self) -> float:
        """Upper bound of a log-feature of a key, relative to its scale."""
        return DECAYING_LIMIT if self.decay else LIMIT

    @property
    def operand(self) -> Any:
        """The type of the operands of matrix products."""
        return jnp.bfloat16 if self.low else jnp.float32

    @property
    def padded_features(self) -> int:
        """M in whole lanes."""
        return -(-self.features // 128) * 128

    @property
    def exponential(self) -> bool:
        """Whether the map gives logarithms of features."""
        return self.kind == "exp"

    def chunks(self) -> list[slice]:
        """Returns the chunks of a block."""
        return [slice(i, i + self.chunk) for i in range(0, self.block, self.chunk)]


NN = (((1,), (0,)), ((), ()))
NT = (((1,), (1,)), ((), ()))
TN = (((0,), (0,)), ((), ()))


def product(program: Program, left: Array, right: Array, dimensions: Any = NN) -> Array:
    """Returns a product in float32, of operands rounded to :attr:`Program.operand`."""
    return jax.lax.dot_general(
        left.astype(program.operand),
        right.astype(program.operand),
        dimensions,
        precision=None if program.low else jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def both_parts(program: Program, x: Array, axis: int = 0) -> Array:
    """Returns two bfloat16 parts of ``x``, one after the other, or ``x`` for float32 operands.

    Together with :func:`twice` of the other operand the product is that of ``x`` to 16 bits. With
    64 rows, both parts together fill the matrix unit, which a product of 64 rows does not.
    """
    if not program.low:
        return x
    large = rounded(x)
    return jnp.concatenate([large, x - large], axis=axis).astype(jnp.bfloat16)


def rounded(x: Array) -> Array:
    """Rounds float32 numbers below 2^110 to 8 bits where they are, as bfloat16 has (Dekker).

    A conversion to bfloat16 and back would repack the numbers.
    """
    scaled = x * (2.0**16 + 1)
    return scaled - (scaled - x)


def twice(program: Program, x: Array, axis: int = 0) -> Array:
    """Returns what :func:`both_parts` is multiplied with."""
    return jnp.concatenate([x, x], axis=axis) if program.low else x


def transpose(x: Array) -> Array:
    """Returns ``[C, N]`` of ``[N, C]``, in float32: a row of fewer than 8 is repeated first."""
    if x.shape[0] < 8:
        return jnp.transpose(jnp.broadcast_to(x[:1], (8, x.shape[1])))[:, :1]
    return jnp.transpose(x)


def columns(program: Program, piece: slice, start: Array) -> Array:
    """Returns the positions of a chunk in the sequence, ``[1, C]``."""
    iota = jax.lax.broadcasted_iota(jnp.int32, (1, program.chunk), 1)
    return iota + (start + piece.start)


def seen_keys(program: Program, key_log: Array | None, position: Array) -> Array | None:
    """Returns which keys are visible and not beyond the end, ``[1, C]``; None for all."""
    seen = None
    if program.keys % program.block:
        seen = position < program.keys
    if key_log is not None:
        visible = key_log > 0.5 * MASKED
        seen = visible if seen is None else seen & visible
    return seen


def where(condition: Array | None, x: Array) -> Array:
    """Returns x where the condition holds, 0 elsewhere; x without a condition."""
    return x if condition is None else jnp.where(condition, x, jnp.zeros_like(x))


def pre_features(program: Program, x: Array, weights: Array) -> Array:
    """Returns ``weights x``, ``[C, M]``.

    Args:
      program: choices.
      x: ``[D, C]``.
      weights: ``[D, M]``, or both parts of it, ``[2 D, M]``.
    """
    return product(program, twice(program, x), weights, TN)


def key_constants(
    program: Program, key: Array, key_log: Array | None, seen: Array | None
) -> Array | None:
    """Returns what is added to all log-features of a key, ``[C, 1]``, or None for 0."""
    total = None
    if program.norm:
        x = key.astype(jnp.float32)
        total = -program.norm * jnp.sum(x * x, axis=0, keepdims=True)
    if key_log is not None:
        total = key_log if total is None else total + key_log
    if seen is not None:
        total = jnp.zeros(seen.shape, jnp.float32) if total is None else total
        total = jnp.where(seen, total, MASKED)
    return None if total is None else transpose(total)


def lane_mask(program: Program) -> Array | None:
    """Returns which lanes are features, ``[1, M]``; None for all."""
    if program.features == program.padded_features:
        return None
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, program.padded_features), 1)
    return lanes < program.features


def elementwise(program: Program, x: Array) -> Array:
    """Returns the features of an elementwise map."""
    if program.kind == "relu":
        y = jnp.maximum(x, 0)
    elif program.kind == "squared_relu":
        y = jnp.square(jnp.maximum(x, 0))
    elif program.kind == "elu+1":
        y = jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))
    else:
        raise NotImplementedError(f"The TPU kernels have no elementwise map {program.kind!r}.")
    return where(lane_mask(program), y + program.epsilon)


def through_features(program: Program, features: Array, x: Array | None, cotangent: Array) -> Array:
    """Returns the cotangent of what features are a function of.

    Args:
      program: choices.
      features: as used.
      x: what they are a function of; None for log-features.
      cotangent: of the features.
    """
    if program.exponential:
        # A feature that underflowed has no gradient, also where its cotangent overflowed.
        return jnp.where(features > 0, features * cotangent, 0)
    assert x is not None
    if program.kind == "relu":
        return where(x > 0, cotangent)
    if program.kind == "squared_relu":
        return cotangent * (2 * jnp.maximum(x, 0))
    return cotangent * jnp.where(x > 0, 1.0, jnp.exp(jnp.minimum(x, 0)))


def load_keys(
    program: Program,
    operands: Any,
    h: Any,
    piece: slice,
    start: Array,
    shift: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """Returns keys ``[D, C]``, values ``[V, C]`` and what is added to the keys' logs ``[C, 1]``.

    Args:
      program: choices.
      operands: refs of a block.
      h: the head.
      piece: the chunk, in the block.
      start: position of the block in the sequence.
      shift: added to the logs of keys, ``[1, C]``; None for 0.
    """
    key_log = None if operands.key_log is None else operands.key_log[h, :, piece]
    seen = seen_keys(program, key_log, columns(program, piece, start))
    # Whatever lies in padding, nan and inf included, must not reach a product.
    key = where(seen, operands.key[h, :, piece])
    value = where(seen, operands.value[h, :, piece])
    if shift is not None:
        key_log = shift if key_log is None else key_log + shift
    return key, value, key_constants(program, key, key_log, seen)


def query_features(
    program: Program, query: Array, weights: Array, scale: Array
) -> tuple[Array, Array | None]:
    """Returns features of a chunk of queries, ``[C, M]``, the largest of a row 1; and what of.

    Args:
      program: choices.
      query: ``[D, C]``.
      weights: as in :func:`pre_features`.
      scale: of the state they read, with the map's offset, ``[1, M]``.
    """
    x = pre_features(program, query, weights) + scale
    if not program.exponential:
        return elementwise(program, x), x
    return jnp.exp2(x - jnp.max(x, axis=1, keepdims=True)), None


def key_pre_features(
    program: Program, key: Array, weights: Array, scale: Array, constants: Array | None
) -> Array:
    """Returns log-features of keys on a scale, or what elementwise features are a function of.

    Args:
      program: choices.
      key: ``[D, C]``, 0 where it is not seen.
      weights: as in :func:`pre_features`.
      scale: taken out, without the map's offset, ``[1, M]``.
      constants: of :func:`key_constants`.
    """
    x = pre_features(program, key, weights) - scale
    return x if constants is None or not program.exponential else x + constants


def key_features(program: Program, x: Array, constants: Array | None) -> Array:
    """Returns features ``[C, M]`` of what :func:`key_pre_features` returned."""
    if program.exponential:
        return jnp.exp2(x)
    features = elementwise(program, x)
    return features if constants is None else where(constants > 0.5 * MASKED, features)


def with_ones(program: Program, value: Array) -> Array:
    """Returns ``[V + 16, C]``: values, a row of ones, rows of zeros."""
    width = value.shape[1]
    ones = jnp.ones((1, width), program.operand)
    zeros = jnp.zeros((EXTRA - 1, width), program.operand)
    return jnp.concatenate([value.astype(program.operand), ones, zeros], axis=0)


def seen_pairs(program: Program, key_axis: int = 0) -> Array:
    """Returns which key is seen by which query of a chunk, ``[C, C]``."""
    shape = (program.chunk, program.chunk)
    keys = jax.lax.broadcasted_iota(jnp.int32, shape, key_axis)
    return keys <= jax.lax.broadcasted_iota(jnp.int32, shape, 1 - key_axis)


def inverse(program: Program, denominator: Array) -> Array:
    """Returns ``1 / den`` as :func:`fast_attention.linear.types.safe_inverse` does."""
    seen = denominator != 0
    result = jnp.where(seen, 1 / jnp.where(seen, denominator, 1), 0)
    if not program.denominator_epsilon:
        return result
    small = jnp.abs(denominator) <= program.denominator_epsilon
    return jnp.where(small, denominator / program.denominator_epsilon**2, result)


def inverse_slope(program: Program, denominator: Array) -> Array:
    """Returns ``d log inverse / d den`` as in :mod:`fast_attention.linear.types`."""
    seen = denominator != 0
    slope = jnp.where(seen, -1 / jnp.where(seen, denominator, 1), 0)
    if not program.denominator_epsilon:
        return slope
    small = jnp.abs(denominator) <= program.denominator_epsilon
    return jnp.where(small, -slope, slope)


def any_over(program: Program, rows: Array) -> Array:
    """Returns whether any number exceeds :attr:`Program.limit`, a scalar."""
    return jnp.max(rows) > program.limit


def first_over(program: Program, rows: list[Array], at_least: Array) -> Array:
    """Returns the first position of a block whose number exceeds :attr:`Program.limit`, or L.

    Args:
      program: choices.
      rows: of each chunk, ``[C, 1]``.
      at_least: no position before it.
    """
    found = jnp.int32(program.block)
    for piece, row in zip(program.chunks(), rows, strict=True):
        at = jax.lax.broadcasted_iota(jnp.int32, row.shape, 0) + piece.start
        over = (row > program.limit) & (at >= at_least)
        found = jnp.minimum(found, jnp.min(jnp.where(over, at, program.block)))
    return found


def row_of(program: Program, blocks: list[Array], position: Array) -> Array:
    """Returns the row of one position of a block, ``[1, M]``."""
    total = None
    for piece, block in zip(program.chunks(), blocks, strict=True):
        at = jax.lax.broadcasted_iota(jnp.int32, (program.chunk, 1), 0) + piece.start
        here = jnp.sum(jnp.where(at == position, block, 0), axis=0, keepdims=True)
        total = here if total is None else total + here
    assert total is not None
    return total
