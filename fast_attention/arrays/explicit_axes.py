"""Calls on meshes whose axes are Explicit, the default of ``jax.make_mesh``.

There the type of an array states how it is sharded, and every operation must state the sharding of
its result. This package leaves that to the compiler: a call runs with these axes as Auto ones, and
its results are sharded as its first array is. For functions of modules see
:mod:`fast_attention.layers.explicit_axes`.

Shape letters: B batch, T queries.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

Function = TypeVar("Function", bound=Callable[..., Any])


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """Returns the mesh in the types of these arrays if it has Explicit axes, usually None."""
    first = _first_on_mesh(tree)
    return None if first is None else jax.typeof(first).sharding.mesh


def runs_on_auto_axes(function: Function) -> Function:
    """Decorates a function of arrays; see :func:`sharded_alike` for how its results lie.

    Arrays must be leaves of the arguments; everything else passes as it is.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        mesh = explicit_mesh((args, kwargs))
        if mesh is None:
            return function(*args, **kwargs)
        with auto_axes_of(mesh):
            on_auto = lay_on_auto_axes((args, kwargs))
            result = function(*on_auto[0], **on_auto[1])
        state = signature.bind(*args, **kwargs).arguments.get("state")
        return sharded_alike(result, mesh, (args, kwargs), state)

    return run  # pyright: ignore[reportReturnType]


def auto_axes_of(mesh: AbstractMesh) -> Any:
    """A context in which the Explicit axes of a mesh are Auto ones."""
    kinds = dict.fromkeys(mesh.explicit_axes, AxisType.Auto)
    return jax.sharding.use_abstract_mesh(mesh.update_axis_types(kinds))


def lay_on_auto_axes(tree: Any) -> Any:
    """Takes the shardings out of the types of all arrays, inside :func:`auto_axes_of`."""

    def lay(x: Any) -> Any:
        return jax.sharding.reshard(x, PartitionSpec()) if _is_on_mesh(x) else x

    return jax.tree.map(lay, tree)


def sharded_alike(result: Any, mesh: AbstractMesh, arguments: Any, state: Any = None) -> Any:
    """Shards results, outside of :func:`auto_axes_of`, as the first array of a call is.

    An array has the sharding of the leading axes that it has in common with that one, so of
    ``[B, T, ...]`` the rows and positions.

    Args:
      result: the result of the call.
      mesh: with Explicit axes.
      arguments: those of the call.
      state: a decoding state among them; the second result then lies as it does.
    """
    model = _first_on_mesh(arguments)
    places = () if model is None else jax.typeof(model).sharding.spec
    shape = () if model is None else model.shape

    def lay(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        common = 0
        while common < min(x.ndim, len(shape)) and x.shape[common] == shape[common]:
            common += 1
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*places[:common])))

    if state is None:
        return jax.tree.map(lay, result)
    out, after = result
    return jax.tree.map(lay, out), sharded_as_before(after, mesh, state)


def sharded_as_before(tree: Any, mesh: AbstractMesh, before: Any) -> Any:
    """Shards each array as the one in its place was; whole where that was not on the mesh."""

    def lay(x: Any, old: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        spec = jax.typeof(old).sharding.spec if _is_on_mesh(old) else PartitionSpec()
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree.map(lay, tree, before)


def _first_on_mesh(tree: Any) -> Any:
    return next((x for x in jax.tree.leaves(tree) if _is_on_mesh(x)), None)


def _is_on_mesh(x: Any) -> bool:
    return isinstance(x, jax.Array) and bool(jax.typeof(x).sharding.mesh.explicit_axes)
