"""Attention functions for global arrays that are sharded over a mesh.

Each device computes attention for its own rows, heads and positions. If positions are sharded,
devices exchange only states or edges of windows.

Shape letters: B batch, T query length, S key length, H heads, K key/value heads, D head width,
V value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.darkformer import DarkformerParameters
from fast_attention.feature_maps.hedgehog import HedgehogParameters
from fast_attention.feature_maps.tuned import TunedParameters
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call
from fast_attention.mechanisms.checks import mismatch
from fast_attention.mechanisms.wrapped import WrappedAttention, as_attention_fn
from fast_attention.mesh.layout import AxisName, Layout
from fast_attention.mesh.meshes import MODEL, SEQUENCE, axis_dividing, rows_axes, with_auto_axes

_OWN_AXES = {
    **{name: 2 for name in ("rows", "query_norm", "key_norm", "stretch")},
    **{name: 2 for name in ("query_weight", "key_weight")},
    **{name: 1 for name in ("query_shift", "key_shift", "bias")},
    "log_stretch": 0,
    **{"matrix": 2, "log_scale": 0},
}
"""Number of axes of parameters by name, after those of batch and heads."""

_BY_NAME = (TunedParameters, HedgehogParameters, DarkformerParameters)


@dataclasses.dataclass(frozen=True, eq=False)
class MeshAttention(WrappedAttention):
    """An attention function for global arrays sharded over a mesh, from :func:`on_mesh`.

    It decodes, redraws and is calibrated like the function for one device.

    Attributes:
      attention_fn: the function for one device.
      mesh: a mesh with the axes of :func:`fast_attention.mesh.meshes.make_mesh`.
    """

    mesh: Mesh

    mechanism = "Attention on a mesh"

    def attend(self, call: Call) -> Any:
        """Attends, with the result of the function for one device.

        If the devices do not divide a length, it is padded; if they do not divide rows or heads,
        these are replicated.
        """
        divided, whole = self.mesh.shape[SEQUENCE] > 1, self.attention_fn.attend
        drops_weights = call.dropout is not None and self.takes.dropout == "weights"
        unlike = (
            ("bias", call.bias, "leave it out"),
            ("mask", call.mask, "pass key_mask or segment_ids"),
            ("dropout_rate", call.dropout if drops_weights else None, "use 0"),
        )
        asked = [(name, instead) for name, given, instead in unlike if given is not None]
        if asked and divided and not call.over_cache:
            name, instead = asked[0]
            raise mismatch(name, "left out if positions are sharded over a mesh", "one", instead)
        if asked or call.over_cache:
            # Left to the compiler, which divides rows and heads where it can.
            return whole(call)
        # Keys are dropped in whole arrays, so that every mesh drops the same ones.
        call = dataclasses.replace(call, value=call.drop_keys(), dropout=None)
        layout = self._layout(call)
        arrays: dict[str, Any] = {"query": call.query, "key": call.key, "value": call.value}
        specs: dict[str, Any] = dict.fromkeys(arrays, layout.spec(heads=True, width=True))
        length, key_mask = call.query.shape[-3], call.key_mask
        if call.key.shape[-3] % layout.shards and key_mask is None:
            key_mask = jnp.ones((*call.key.shape[:-2], 1), bool)
        decay = call.log_decay
        if decay is not None:
            decay = jnp.broadcast_to(decay, call.key.shape[:-1])
        of_keys = (("key_mask", key_mask), ("key_bias", call.key_bias), ("log_decay", decay))
        for name, x in of_keys:
            if x is not None:
                arrays[name] = x
                specs[name] = layout.spec(heads=x.shape[-1] > 1, width=x.shape[-1] == 1)
        for name, x in (("segment_ids", call.segment_ids), ("query_mask", call.query_mask)):
            if x is not None:
                arrays[name], specs[name] = x, layout.spec()
        ids = ("segment_ids",)
        arrays = {name: layout.fill(x, edge=name in ids) for name, x in arrays.items()}
        if call.projection is not None:
            arrays["projection"] = call.projection
            specs["projection"] = _projection_specs(call.projection, layout, call.key)
        if call.training_key is not None and self.redraws:
            arrays["training_key"], specs["training_key"] = call.training_key, PartitionSpec()
        function = self.attention_fn.along_axis(SEQUENCE) if divided else self.attention_fn
        nothing = dict.fromkeys(
            (
                *("key_mask", "key_bias", "segment_ids", "query_mask", "log_decay"),
                *("projection", "training_key"),
            )
        )
        plain = dataclasses.replace(call, **nothing, fits=None)

        def attend(arrays: dict[str, Any]) -> Array:
            return function.attend(dataclasses.replace(plain, **arrays))

        mapped = jax.shard_map(attend, mesh=self.mesh, in_specs=(specs,), out_specs=specs["query"])
        out: Any = mapped(arrays)
        return out[..., :length, :, :] if length % layout.shards else out

    def along_axis(self, axis: AxisName) -> AttentionFn:
        """The function for use inside ``jax.shard_map``."""
        return self.attention_fn.along_axis(axis)

    def _layout(self, call: Call) -> Layout:
        """The layout of queries, keys and values."""
        batch, given = call.query.shape[:-3], call.projection
        rows = (rows_axes(self.mesh, batch[0]), *(None for _ in batch[1:])) if batch else ()
        heads = axis_dividing(self.mesh, MODEL, call.key.shape[-2])
        known = given is None or isinstance(given, (*_BY_NAME, jax.Array))
        # Projections of the function's own that differ by head cannot be divided with the heads.
        own = None if given is not None else self.resolve_parameters(None, call.query.shape[-1])
        shared = own is None or isinstance(own, _BY_NAME) or own.ndim == 2
        return Layout(self.mesh, SEQUENCE, rows, heads if shared and known else None)


def on_mesh(attention_fn: Callable[..., Any], mesh: Mesh) -> AttentionFn:
    """Returns an attention function for global arrays sharded over a mesh, under ``jax.jit``.

    Outputs and gradients equal those of `attention_fn`. Rows are sharded over ``data`` and
    ``fsdp``, heads over ``model``, positions over ``sequence``. Functions that cannot be split
    are returned unchanged: the compiler then shards what it can.

    Args:
      attention_fn: any attention function; to shard along ``sequence``, one that has
        :meth:`~fast_attention.mechanisms.attention_fn.AttentionFn.along_axis`.
      mesh: from :func:`fast_attention.mesh.meshes.make_mesh`, or another one with its axes; its
        axes may be Explicit.

    Raises:
      ValueError: for a mesh with other axes, or a mesh that shards positions if the function does
        not support it.
    """
    function, mesh = as_attention_fn(attention_fn), with_auto_axes(mesh)
    if mesh.size == 1:
        return function
    if mesh.shape[SEQUENCE] > 1:
        function.along_axis(SEQUENCE)
        return MeshAttention(function, mesh)
    return MeshAttention(function, mesh) if function.divides else function


def _projection_specs(projection: Any, layout: Layout, key: Array) -> Any:
    """Specs of parameters: their batch and head axes are sharded like those of the keys."""
    sizes = (*key.shape[:-3], key.shape[-2])
    names = (*layout.batch, layout.heads)

    def spec(x: Array, own: int) -> PartitionSpec:
        leading = x.shape[: x.ndim - own]
        count = len(leading)
        places = zip(leading, sizes[len(sizes) - count :], names[len(names) - count :], strict=True)
        return PartitionSpec(*(name if size == whole else None for size, whole, name in places))

    if isinstance(projection, _BY_NAME):
        named = projection._asdict().items()
        specs: dict[str, Any] = {
            name: None if x is None else spec(x, _OWN_AXES[name]) for name, x in named
        }
        return type(projection)(**specs)
    if isinstance(projection, jax.Array):
        return spec(projection, 2)
    return PartitionSpec()
