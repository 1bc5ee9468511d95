"""Attention functions for whole arrays that lie on a mesh.

Inside, each device attends for its own rows, heads and positions; with positions divided, devices
exchange what their attention needs and nothing else (see :mod:`fast_attention.sequence_parallel`).

Shape letters: B batch, T query length, S key length, H heads, K key/value heads, D head width,
V value width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.call_arguments import drop_keys, promote, refuse
from fast_attention.fast_attention_fn import FastAttention
from fast_attention.feature_maps.tuned import TunedParameters
from fast_attention.local_attention_fn import LocalAttention
from fast_attention.mesh_layout import Layout
from fast_attention.meshes import MODEL, SEQUENCE, axis_dividing, rows_axes
from fast_attention.sequence_parallel import along_mesh_axis

_ADVICE = {
    "bias": "leave it out",
    "mask": "pass key_mask or segment_ids",
    "module": "attention weights are not kept; use sow_weights=False",
    "qk_attn_weights_einsum": "there is no weight matrix",
    "attn_weights_value_einsum": "there is no weight matrix",
    "input_positions": "rotate queries and keys before",
    "axis": "attend over the last axis before the heads",
    "dropout_rate": "use 0, or dropout elsewhere",
}
"""What to do in place of an option that there is not where positions are divided."""

_OWN_AXES = {
    **{name: 2 for name in ("rows", "query_norm", "key_norm", "stretch")},
    **{name: 2 for name in ("query_weight", "key_weight")},
    **{name: 1 for name in ("query_shift", "key_shift", "bias")},
    "log_stretch": 0,
}
"""Axes of `TunedParameters` behind those of batch and heads."""


@dataclasses.dataclass(frozen=True)
class MeshAttention:
    """An attention function for whole arrays that lie on a mesh, from :func:`on_mesh`.

    What it does not have itself, such as ``init_state`` and ``step``, is that of `attention_fn`.

    Attributes:
      attention_fn: the function for one device.
      mesh: with the axes of :func:`fast_attention.meshes.make_mesh`.
    """

    attention_fn: Any
    mesh: Mesh

    def __getattr__(self, name: str) -> Any:
        """Decoding and calibration are those of the function."""
        if name.startswith("__") or name in ("attention_fn", "mesh"):
            raise AttributeError(name)
        return getattr(self.attention_fn, name)

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
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Array | None = None,
        *,
        axis: int | tuple[int, ...] | None = None,
        key_mask: Bool[Array, "*B S"] | Bool[Array, "*B S K"] | None = None,
        segment_ids: Int[Array, "*B T"] | None = None,
        projection: TunedParameters | Float[Array, ...] | None = None,
    ) -> Float[Array, "*B T H V"]:
        """Attends, with the result of the function for one device.

        Rows, heads and positions that the devices do not divide are no error: a length is filled
        up, and every device has all rows, or heads.

        Args:
          query: ``[*B, T, H, D]``.
          key: ``[*B, S, K, D]``.
          value: ``[*B, S, K, V]``.
          bias: as for the function, and so are those without an explanation here; None where
            positions are divided.
          mask: None where positions are divided.
          broadcast_dropout: see there.
          dropout_rng: the same keys are dropped on any mesh.
          dropout_rate: see there.
          deterministic: see there.
          dtype: see there.
          precision: see there.
          module: must be None.
          is_causal: see there.
          force_fp32_for_softmax: has no effect, exponents are float32 at least.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.
          input_positions: must be None.
          axis: None, or the last axis before the heads, where positions are divided.
          key_mask: see there.
          segment_ids: see there.
          projection: see there; heads may have their own.

        Returns:
          ``[*B, T, H, V]``.

        Raises:
          ValueError: for what cannot be honoured where positions are divided.
        """
        del force_fp32_for_softmax  # Always so.
        others: dict[str, Any] = {
            "bias": bias,
            "mask": mask,
            "module": module,
            "qk_attn_weights_einsum": qk_attn_weights_einsum,
            "attn_weights_value_einsum": attn_weights_value_einsum,
            "input_positions": input_positions,
            "axis": None if axis in (query.ndim - 3, -3) else axis,
        }
        dropped = dropout_rate > 0 and not deterministic
        local = isinstance(self.attention_fn, LocalAttention)
        if dropped and local:
            others["dropout_rate"] = dropout_rate
        asked = any(x is not None for x in others.values())
        divided, cached = self.mesh.shape[SEQUENCE] > 1, query.shape[-3] == 1 < key.shape[-3]
        if asked and divided and not cached:
            refuse("Attention with positions divided over a mesh", _ADVICE, **others)
        if asked or cached:
            # Left to the compiler, which divides rows and heads where it can.
            options: dict[str, Any] = {"dropout_rate": dropout_rate} | others | {"axis": axis}
            whole: Any = self.attention_fn
            return whole(
                query,
                key,
                value,
                broadcast_dropout=broadcast_dropout,
                dropout_rng=dropout_rng,
                deterministic=deterministic,
                dtype=dtype,
                precision=precision,
                is_causal=is_causal,
                key_mask=key_mask,
                segment_ids=segment_ids,
                projection=projection,
                **options,
            )
        query, key, value = promote(query, key, value, dtype)
        if dropped:
            # Of whole arrays, so that every mesh drops the same keys.
            value = drop_keys(value, dropout_rng, dropout_rate, broadcast_dropout)
        layout = self._layout(query, key, projection)
        rows = key.shape[:-2]
        arrays: dict[str, Any] = {"query": query, "key": key, "value": value}
        specs: dict[str, Any] = dict.fromkeys(arrays, layout.spec(heads=True, width=True))
        if key.shape[-3] % layout.shards and key_mask is None:
            key_mask = jnp.ones(rows, bool)
        if key_mask is not None:
            per_head = key_mask.ndim == key.ndim - 1
            arrays["key_mask"] = jnp.broadcast_to(key_mask, key.shape[:-1] if per_head else rows)
            specs["key_mask"] = layout.spec(heads=per_head)
        arrays = {name: layout.fill(x) for name, x in arrays.items()}
        if segment_ids is not None:
            ids = jnp.broadcast_to(segment_ids, query.shape[:-2])
            arrays["segment_ids"] = layout.fill(ids, edge=True)
            specs["segment_ids"] = layout.spec()
        if projection is not None:
            arrays["projection"] = projection
            specs["projection"] = _projection_specs(projection, layout, key)
        if dropout_rng is not None and getattr(self.attention_fn, "redraw_features", False):
            arrays["dropout_rng"], specs["dropout_rng"] = dropout_rng, PartitionSpec()
        function: Any = self.attention_fn
        if divided or local:
            function = along_mesh_axis(function, SEQUENCE)

        def attend(arrays: dict[str, Any]) -> Array:
            return function(
                **arrays, deterministic=deterministic, precision=precision, is_causal=is_causal
            )

        mapped = jax.shard_map(attend, mesh=self.mesh, in_specs=(specs,), out_specs=specs["query"])
        out: Any = mapped(arrays)
        return out[..., : query.shape[-3], :, :] if query.shape[-3] % layout.shards else out

    def _layout(self, query: Array, key: Array, projection: Any) -> Layout:
        """Where queries, keys and values lie."""
        batch = query.shape[:-3]
        rows = (rows_axes(self.mesh, batch[0]), *(None for _ in batch[1:])) if batch else ()
        heads = axis_dividing(self.mesh, MODEL, key.shape[-2])
        own = getattr(self.attention_fn, "projection_matrix", None)
        shared = own is None or own.ndim == 2
        known = projection is None or isinstance(projection, TunedParameters | jax.Array)
        return Layout(self.mesh, SEQUENCE, rows, heads if shared and known else None)


def on_mesh(attention_fn: Any, mesh: Mesh) -> Any:
    """Returns an attention function for whole arrays, under ``jax.jit``, that lie on a mesh.

    Outputs and gradients are those of `attention_fn`. Rows are divided over ``data`` and ``fsdp``,
    heads over ``model``, positions over ``sequence``. Functions that cannot be taken apart are
    returned as they are: the compiler divides what it can.

    Args:
      attention_fn: any attention function; along ``sequence`` one of those that
        :func:`~fast_attention.sequence_parallel.along_mesh_axis` takes.
      mesh: from :func:`fast_attention.meshes.make_mesh`.

    Raises:
      ValueError: for a function that cannot attend across devices, if the mesh divides positions.
    """
    if mesh.size == 1:
        return attention_fn
    if mesh.shape[SEQUENCE] > 1:
        along_mesh_axis(attention_fn, SEQUENCE)
        return MeshAttention(attention_fn, mesh)
    plain = (
        isinstance(attention_fn, FastAttention)
        and attention_fn.exact_window is None
        and attention_fn.calibration != "call"
    )
    if plain or isinstance(attention_fn, LocalAttention):
        return MeshAttention(attention_fn, mesh)
    return attention_fn


def _projection_specs(projection: Any, layout: Layout, key: Array) -> Any:
    """How parameters lie: axes of theirs for batch and heads as those of the keys."""
    sizes = (*key.shape[:-3], key.shape[-2])
    names = (*layout.batch, layout.heads)

    def spec(x: Array, own: int) -> PartitionSpec:
        leading = x.shape[: x.ndim - own]
        count = len(leading)
        places = zip(leading, sizes[len(sizes) - count :], names[len(names) - count :], strict=True)
        return PartitionSpec(*(name if size == whole else None for size, whole, name in places))

    if isinstance(projection, TunedParameters):
        named = projection._asdict().items()
        specs: dict[str, Any] = {name: spec(x, _OWN_AXES[name]) for name, x in named}
        return TunedParameters(**specs)
    if isinstance(projection, jax.Array):
        return spec(projection, 2)
    return PartitionSpec()
