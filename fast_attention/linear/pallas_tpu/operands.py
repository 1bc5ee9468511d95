"""The arrays of one call in the layout of the TPU kernels, and their blocks.

Letters are those of :mod:`.program`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from fast_attention.arrays.manual_axes import like_manual, vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.pallas_tpu.program import EXTRA, Program, inverse

# Bytes of vector memory that a kernel may take.
MEMORY = 100 * 2**20


class Operands(NamedTuple):
    """What the kernels read; P is 1, K or B K sets of weights.

    Attributes:
      query: ``[B H, D, T]``.
      key: ``[B K, D, S]``.
      value: ``[B K, V, S]``.
      query_weights: ``[P, D or 2 D, M]``, see :func:`.program.both_parts`.
      key_weights: the same.
      query_offset: added to what the weights give, ``[P, 1, M]``.
      key_offset: the same.
      key_log: added to all log-features of a key, ``[B K, 1, S]``; None for 0. A key where it is
        :data:`.program.MASKED` is not seen.
      scale: of the first keys, ``[B K, 1, M]``: some key seen by the first row attains it.
      kv: the state before, on that scale, ``[B K, V + 16, M]``; None if it is empty.
      decay: see :mod:`.decay`, ``[B K, R, S]``; None without decay.
    """

    query: Any
    key: Any
    value: Any
    query_weights: Any
    key_weights: Any
    query_offset: Any
    key_offset: Any
    key_log: Any
    scale: Any
    kv: Any
    decay: Any = None

    def of_queries(self, h: Any) -> tuple[Array, Array]:
        """Returns weights and offset of the queries of a key head, inside a kernel."""
        p = h if self.query_weights.shape[0] > 1 else 0
        return self.query_weights[p], self.query_offset[p]

    def of_keys(self, h: Any) -> tuple[Array, Array]:
        """Returns weights and offset of the keys of a head, inside a kernel."""
        p = h if self.key_weights.shape[0] > 1 else 0
        return self.key_weights[p], self.key_offset[p]


class Results(NamedTuple):
    """What a forward kernel returns; None where it is not asked for.

    Attributes:
      out: ``[B H, V, T]``.
      denominator: ``[B H, 1, T]``, float32.
      kv: the final state, ``[B K, V + 16, M]``.
      scale: its scale, ``[B K, 1, M]``.
      states: of causal calls, before each block, ``[B K, N, V + 16, M]``.
      before: of causal calls, scale before each block, ``[B K, N, 1, M]``.
      after: of causal calls, scale after each block, ``[B K, N, 1, M]``.
      again: of causal calls with decay, 1 for blocks computed in undecayed units, else 0, the same.
    """

    out: Any
    denominator: Any = None
    kv: Any = None
    scale: Any = None
    states: Any = None
    before: Any = None
    after: Any = None
    again: Any = None


Place = Callable[[Any], Any]
"""From the second index of the grid to the number of a block."""


def query_spec(program: Program, width: int, place: Place) -> pl.BlockSpec:
    """Returns the block of ``[B H, width, T]`` of the program at ``(i, j)`` of the grid."""
    heads = program.heads * program.groups
    return pl.BlockSpec((heads, width, program.block), lambda i, j: (i, 0, place(j)))


def key_spec(program: Program, width: int, place: Place) -> pl.BlockSpec:
    """Returns the block of ``[B K, width, S]``."""
    return pl.BlockSpec((program.heads, width, program.block), lambda i, j: (i, 0, place(j)))


def head_spec(program: Program, width: int) -> pl.BlockSpec:
    """Returns the block of ``[B K, width, M]``."""
    shape = (program.heads, width, program.padded_features)
    return pl.BlockSpec(shape, lambda i, j: (i, 0, 0))


def saved_spec(program: Program, width: int, place: Place) -> pl.BlockSpec:
    """Returns the block of ``[B K, N, width, M]``."""
    shape = (program.heads, 1, width, program.padded_features)
    return pl.BlockSpec(shape, lambda i, j: (i, place(j), 0, 0))


def operand_specs(
    program: Program, operands: Operands, query_place: Place, key_place: Place
) -> Operands:
    """Returns the blocks of all operands."""

    def weights(x: Array) -> pl.BlockSpec:
        if x.shape[0] == 1:
            return pl.BlockSpec(x.shape, lambda i, j: (0, 0, 0))
        period = x.shape[0] // program.heads
        return pl.BlockSpec((program.heads, *x.shape[1:]), lambda i, j: (i % period, 0, 0))

    return Operands(
        query=query_spec(program, program.head_dim, query_place),
        key=key_spec(program, program.head_dim, key_place),
        value=key_spec(program, program.value_dim, key_place),
        query_weights=weights(operands.query_weights),
        key_weights=weights(operands.key_weights),
        query_offset=weights(operands.query_offset),
        key_offset=weights(operands.key_offset),
        key_log=None if operands.key_log is None else key_spec(program, 1, key_place),
        scale=head_spec(program, 1),
        kv=None if operands.kv is None else head_spec(program, program.value_dim + EXTRA),
        decay=None
        if operands.decay is None
        else key_spec(program, operands.decay.shape[1], key_place),
    )


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """Returns what to allocate for float32 numbers."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def like(x: Array) -> jax.ShapeDtypeStruct:
    """Returns what to allocate for an array like another."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def state_scratch(program: Program) -> list[Any]:
    """Returns the memory of a program's states and their scales."""
    m = program.padded_features
    return [
        pltpu.VMEM((program.heads, program.value_dim + EXTRA, m), jnp.float32),
        pltpu.VMEM((program.heads, 1, m), jnp.float32),
    ]


def launch(
    program: Program,
    kernel: Callable,
    name: str,
    steps: int,
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
    scratch_shapes: Any,
) -> Callable:
    """Returns the kernel as a function of its arrays.

    Args:
      program: choices.
      kernel: gets the refs of operands, of results and of scratch, in trees as they are here.
      name: shown in profiles.
      steps: programs of the same heads, run one after the other.
      in_specs: blocks of the operands, a tuple of trees.
      out_specs: blocks of the results, a tree.
      out_shape: results, a tree.
      scratch_shapes: memory, a list.
    """
    inputs, outputs = jax.tree.structure(in_specs), jax.tree.structure(out_shape)

    def flat(*refs: Any) -> None:
        first, last = inputs.num_leaves, inputs.num_leaves + outputs.num_leaves
        kernel(
            *jax.tree.unflatten(inputs, refs[:first]),
            jax.tree.unflatten(outputs, refs[first:last]),
            *refs[last:],
        )

    def launched(*arguments: Any) -> Any:
        flat_arguments = vary_alike(jax.tree.leaves(arguments))
        results = pl.pallas_call(
            flat,
            grid=(arguments[0].key.shape[0] // program.heads, steps),
            in_specs=jax.tree.leaves(in_specs),
            out_specs=jax.tree.leaves(out_specs),
            out_shape=like_manual(jax.tree.leaves(out_shape), flat_arguments[0]),
            scratch_shapes=scratch_shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=MEMORY
            ),
            interpret=program.interpret,
            name=f"linear_attention_{name}",
        )(*flat_arguments)
        return jax.tree.unflatten(outputs, results)

    return launched


def start_state(operands: Operands, kv_ref: Any, scale_ref: Any) -> None:
    """Sets the states of a program to those before the first key."""
    scale_ref[...] = operands.scale[...]
    kv_ref[...] = jnp.zeros_like(kv_ref) if operands.kv is None else operands.kv[...]


def write_rows(
    program: Program,
    results: Results,
    place: Any,
    row: Array,
    chosen: tuple[Array, Array] | None,
) -> None:
    """Divides and writes the rows of a chunk.

    Args:
      program: choices.
      results: refs.
      place: key head, which of its query heads, and chunk.
      row: numerators and denominators, ``[V + 16, C]``.
      chosen: which outputs and which denominators, ``[1, C]``; None for all.
    """
    h, g, c = place
    head, piece = h * program.groups + g, program.chunks()[c]
    denominator = row[program.value_dim : program.value_dim + 1]
    out = row[: program.value_dim] * inverse(program, denominator)
    for i, (ref, new) in enumerate(((results.out, out), (results.denominator, denominator))):
        if ref is None:
            continue
        new = new.astype(ref.dtype)
        if chosen is not None:
            new = jnp.where(chosen[i], new, ref[head, :, piece])
        ref[head, :, piece] = new
