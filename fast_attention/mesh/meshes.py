"""Meshes of devices with four named axes, and layouts of batches and activations.

``data`` and ``fsdp`` shard the rows of a batch, ``sequence`` their length, ``model`` the heads and
the widths of layers. ``fsdp`` also shards parameters, see `fast_attention.models.placement`.

Shape letters: B batch, T length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fast_attention.arrays.types import Array

DATA, FSDP, SEQUENCE, MODEL = AXES = ("data", "fsdp", "sequence", "model")
"""The axes; devices that are neighbours along the last axes are closest to each other."""

ROWS = (DATA, FSDP)
"""The axes along which rows of a batch are sharded."""


class MeshError(ValueError):
    """The available devices do not form the requested mesh."""


def make_mesh(
    data: int | None = None,
    fsdp: int = 1,
    model: int = 1,
    sequence: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Makes a mesh of all devices.

    Args:
      data: number of devices that share the rows of a batch and replicate the parameters; None
        infers it from the other axes.
      fsdp: number of devices that share the rows and also the parameters; each parameter is
        gathered when it is used.
      model: number of devices that share heads, the widths of feed-forward layers and the
        vocabulary (tensor parallelism).
      sequence: number of devices that share the positions of a row; the attention functions must
        have ``along_axis`` (linear and local attention).
      devices: None uses all.

    Returns:
      A mesh with the axes :data:`AXES`.

    Raises:
      MeshError: if a size is not a positive integer, or their product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    others = {FSDP: fsdp, SEQUENCE: sequence, MODEL: model}
    asked = others if data is None else {DATA: data} | others
    for name, size in asked.items():
        if size < 1:
            raise MeshError(f"the mesh axis {name!r} must have at least 1 device, got {size}")
    product = math.prod(asked.values())
    told = " x ".join(f"{name} {size}" for name, size in asked.items())
    if count % product:
        raise MeshError(
            f"a mesh of {told} = {product} devices does not divide the {count} available devices: "
            f"choose sizes whose product divides {count}"
        )
    if data is not None and count != product:
        raise MeshError(
            f"a mesh of {told} has {product} devices, but {count} are available: leave out data, "
            f"or set it to {data * count // product}"
        )
    sizes = (count // math.prod(others.values()), *others.values())
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=kinds, devices=devices)


def with_auto_axes(mesh: Mesh) -> Mesh:
    """Returns the same mesh with Auto axes, for this package's own programs.

    Raises:
      MeshError: if an axis of :data:`AXES` is missing.
    """
    missing = [name for name in AXES if name not in mesh.shape]
    if missing:
        raise MeshError(
            f"the mesh must have the axes {', '.join(AXES)}, got {', '.join(mesh.axis_names)}: "
            "make it with fast_attention.make_mesh, where an axis of 1 device has no effect"
        )
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def row_shards(mesh: Mesh) -> int:
    """Number of devices that share the rows of a batch."""
    return math.prod(mesh.shape[name] for name in ROWS)


def rows_axes(mesh: Mesh, rows: int) -> tuple[str, ...] | None:
    """The axes along which this number of rows can be sharded: the most devices that divide it.

    None if no axis divides it: every device then has all rows.
    """
    choices = [ROWS, *((name,) for name in sorted(ROWS, key=lambda name: -mesh.shape[name]))]
    for names in choices:
        size = math.prod(mesh.shape[name] for name in names)
        if size > 1 and rows % size == 0:
            return names
    return None


def axis_dividing(mesh: Mesh, name: str, size: int) -> str | None:
    """The axis, if it has several devices and these divide `size`; otherwise None."""
    return name if mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None


def batch_spec(mesh: Mesh, shape: Sequence[int]) -> PartitionSpec:
    """Spec of ``[B, T, ...]``: rows over ``data`` and ``fsdp``, length over ``sequence``.

    An axis that the devices do not divide is replicated. ``[B]`` has rows only.
    """
    if not shape:
        return PartitionSpec()
    length = (axis_dividing(mesh, SEQUENCE, shape[1]),) if len(shape) > 1 else ()
    return PartitionSpec(rows_axes(mesh, shape[0]), *length)


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """`batch_spec` of every array of a batch, as shardings."""
    return jax.tree.map(lambda x: NamedSharding(mesh, batch_spec(mesh, x.shape)), batch)


def lay_activations(x: Array, mesh: Mesh | None) -> Array:
    """Constrains ``[B, T, M]`` or ``[B, M]`` to the sharding of a batch; None has no effect."""
    if mesh is None:
        return x
    spec = batch_spec(mesh, x.shape[:-1])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def lay_whole_rows(table: Array, mesh: Mesh) -> Array:
    """Constrains the rows of a ``[V, M]`` table to be gathered before they are looked up.

    Along ``model`` the vocabulary stays sharded, if the devices divide it.
    """
    spec = PartitionSpec(axis_dividing(mesh, MODEL, table.shape[0]))
    return jax.lax.with_sharding_constraint(table, NamedSharding(mesh, spec))
