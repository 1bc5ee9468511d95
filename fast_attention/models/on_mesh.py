"""Models with activations sharded over a mesh."""

from __future__ import annotations

import dataclasses

from flax import nnx
from jax.sharding import Mesh

from fast_attention.layers.attention.multi_head import MultiHeadAttention
from fast_attention.layers.linear import Linear
from fast_attention.mechanisms.on_mesh.fn import on_mesh
from fast_attention.mesh.meshes import SEQUENCE, with_auto_axes
from fast_attention.models.language_model import LanguageModel


def lay_on_mesh(model: nnx.Module, mesh: Mesh) -> None:
    """Prepares a model for global batches sharded over a mesh, under ``jax.jit``.

    Attention is that of :func:`fast_attention.mechanisms.on_mesh.fn.on_mesh`, and activations are
    sharded like batches, see :func:`fast_attention.mesh.meshes.batch_spec`. Parameters do not
    change; values and gradients are the same up to the order of sums.

    Args:
      model: A model with `MultiHeadAttention` layers; changed in place, except for its arrays.
      mesh: From :func:`fast_attention.mesh.meshes.make_mesh`, or another one with its axes.

    Raises:
      ValueError: If the mesh has other axes, or shards positions and an attention function does not
        support it.
    """
    mesh = with_auto_axes(mesh)
    if mesh.size == 1:
        return
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MultiHeadAttention):
            groups = tuple(
                dataclasses.replace(group, attention_fn=on_mesh(group.attention_fn, mesh))
                for group in module.config.groups
            )
            module.config = dataclasses.replace(module.config, groups=groups)
        elif isinstance(module, Linear):
            # Rows and positions that both lie across devices cannot be one axis.
            module.flat = mesh.shape[SEQUENCE] == 1
        elif isinstance(module, LanguageModel):
            module.mesh = mesh
