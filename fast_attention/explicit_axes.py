"""Calls on meshes whose axes are Explicit, the default of ``jax.make_mesh``.

There the type of an array says how it is sharded, and every operation must state the sharding of
its result. Attention leaves that to the compiler: a call runs with these axes as Auto ones, and its
results are sharded as its operands are.

Shape letters: B batch, T queries, H heads, D head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Function = TypeVar("Function", bound=Callable[..., Any])


def explicit_axes(x: Any) -> tuple[str, ...]:
    """Returns the names of the Explicit mesh axes in the type of an array, usually none."""
    if not isinstance(x, jax.Array):
        return ()
    mesh = jax.typeof(x).sharding.mesh
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind == AxisType.Explicit)


def runs_on_auto_axes(function: Function) -> Function:
    """Decorates a function of ``query``, ``key``, ``value``, and perhaps a ``state``.

    Outputs are sharded as the axes ``*B, T, H`` of the queries are, a new state as the old one. The
    arrays must be leaves of the arguments; whatever else there is passes as it is.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        axes = tuple(dict.fromkeys(name for x in leaves for name in explicit_axes(x)))
        if not axes:
            return function(*args, **kwargs)
        where = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

        def of_arrays(*arrays: jax.Array) -> Any:
            for i, x in zip(where, arrays, strict=True):
                leaves[i] = x
            args, kwargs = jax.tree.unflatten(tree, leaves)
            return function(*args, **kwargs)

        sharding = _of_results(signature.bind(*args, **kwargs).arguments)
        attend = jax.sharding.auto_axes(of_arrays, axes=axes, out_sharding=sharding)
        return attend(*(leaves[i] for i in where))

    return run  # pyright: ignore[reportReturnType]


def _of_results(arguments: dict[str, Any]) -> Any:
    """The shardings of an output and, where there was a state, of the new one."""
    operands = [arguments[name] for name in ("query", "key", "value")]
    model = next((x for x in operands if explicit_axes(x)), None)
    if model is None:
        raise ValueError(
            "Arrays of this call lie on a mesh with Explicit axes, but query, key and value do "
            "not: put these on the mesh, with jax.device_put or jax.sharding.reshard."
        )
    mesh, spec = jax.typeof(model).sharding.mesh, jax.typeof(model).sharding.spec
    # A result may hold more than the output; its batch axes come first in all of them.
    whole = model is operands[0] and not any(
        arguments.get(name) for name in ("return_weights", "return_buckets", "return_state")
    )
    state = arguments.get("state")
    axes = model.ndim - 1 if whole else model.ndim - (3 if "state" not in arguments else 2)
    out = NamedSharding(mesh, PartitionSpec(*spec[:axes]))
    if state is None:
        return out

    def of_state(x: Any) -> NamedSharding:
        sharding = jax.typeof(x).sharding
        return NamedSharding(mesh, sharding.spec if explicit_axes(x) else PartitionSpec())

    return out, jax.tree.map(of_state, state)
