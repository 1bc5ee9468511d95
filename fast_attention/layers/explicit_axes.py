"""Calls of modules on meshes whose axes are Explicit."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
from flax import nnx

from fast_attention.arrays.explicit_axes import (
    Function,
    auto_axes_of,
    explicit_mesh,
    lay_on_auto_axes,
    sharded_alike,
    sharded_as_before,
)


def modules_run_on_auto_axes(function: Function) -> Function:
    """Decorates a method or function of arrays and modules (also random streams, optimisers).

    Results are sharded as in :func:`fast_attention.arrays.explicit_axes.sharded_alike`; module
    state that a call changes keeps its sharding.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_module)
        modules = [x for x in leaves if _is_module(x)]
        others = [None if _is_module(x) else x for x in leaves]
        mesh = explicit_mesh((others, modules))
        if mesh is None:
            return function(*args, **kwargs)
        graphdef, variables = nnx.split(modules)
        with auto_axes_of(mesh):
            laid, on_auto = lay_on_auto_axes((variables, others))
            copies = nnx.merge(graphdef, laid, copy=True)
            remaining = iter(copies)
            pairs = zip(leaves, on_auto, strict=True)
            on_auto = [next(remaining) if _is_module(x) else y for x, y in pairs]
            positional, named = jax.tree.unflatten(tree, on_auto)
            result = function(*positional, **named)
        _update(modules, mesh, variables, laid, nnx.state(copies))
        state = signature.bind(*args, **kwargs).arguments.get("state")
        return sharded_alike(result, mesh, others, state)

    return run  # pyright: ignore[reportReturnType]


def _update(modules: list[Any], mesh: Any, old: nnx.State, laid: nnx.State, new: nnx.State) -> None:
    """Writes only what a call has changed: a trace cannot write to outer modules."""
    given, were = dict(nnx.to_flat_state(laid)), dict(nnx.to_flat_state(old))
    changed = {
        path: value
        for path, value in nnx.to_flat_state(new)
        if jax.tree.leaves(value)[0] is not jax.tree.leaves(given[path])[0]
    }
    if changed:
        before = {path: were[path] for path in changed}
        laid = sharded_as_before(changed, mesh, before)
        nnx.update(modules, nnx.from_flat_state(laid))


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Pytree)
