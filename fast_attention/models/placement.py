"""Sharding of parameters, optimizer moments and averages over a mesh.

Along ``model``, layers are sharded as in tensor parallelism (Megatron-LM, arXiv:1909.08053): the
layers before and after attention over the heads; the first layer of a feed-forward part over its
outputs, the second over its inputs; embeddings and logits over the vocabulary. Along ``fsdp``, each
parameter is sharded over its largest remaining axis (ZeRO, arXiv:1910.02054). An axis that the
devices do not divide is replicated.

Shape letters: M features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fast_attention.mesh.meshes import FSDP, MODEL, axis_dividing

SMALLEST = 1024
"""Parameters with fewer entries are replicated."""

_MODEL_AXES: dict[tuple[str, ...], int] = {
    ("query", "kernel"): -1,
    ("key", "kernel"): -1,
    ("value", "kernel"): -1,
    ("out", "kernel"): -2,
    ("up", "kernel"): -1,
    ("down", "kernel"): -2,
    ("embed", "embedding"): -2,
    ("head", "kernel"): -1,
}
"""The axis sharded along ``model``, by the last two names of a parameter's path."""


def parameter_spec(path: Sequence[Any], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the spec of a parameter, or of its moment or average.

    Args:
      path: its names, outermost first; keys of ``jax.tree_util`` are accepted, too.
      shape: shape of the parameter; stacked layers have leading axes.
      mesh: from :func:`fast_attention.mesh.meshes.make_mesh`.

    Returns:
      A spec with as many entries as `shape`, or an empty one for replicated parameters: vectors
      (norms, biases) and matrices of fewer than :data:`SMALLEST` entries.
    """
    entries = 1
    for size in shape:
        entries *= size
    if len(shape) < 2 or entries < SMALLEST:
        return PartitionSpec()
    placed: list[str | None] = [None] * len(shape)
    names = [_name(part) for part in path]
    if names[-1:] == ["value"]:
        names.pop()  # The leaf of a variable in an nnx.State.
    axis = _MODEL_AXES.get(tuple(names[-2:]))
    if axis is not None:
        placed[axis] = axis_dividing(mesh, MODEL, shape[axis])
    free = [i for i in range(len(shape)) if placed[i] is None]
    for i in sorted(free, key=lambda i: -shape[i]):
        if axis_dividing(mesh, FSDP, shape[i]):
            placed[i] = FSDP
            break
    return PartitionSpec(*placed)


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """`parameter_spec` of every array of a tree, as shardings.

    Args:
      tree: parameters, gradients or the state of an optimiser, whose moments have the names of
        their parameters: arrays, or their shapes.
      mesh: from :func:`fast_attention.mesh.meshes.make_mesh`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, parameter_spec(path, x.shape, mesh)), tree
    )


def _name(part: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
