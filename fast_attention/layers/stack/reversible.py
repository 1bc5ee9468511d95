"""Reversible residual layers: the backward pass computes their inputs from their outputs.

Each layer adds to one stream a function of the other stream, so it can be inverted: the backward
pass subtracts the increment. No activations between layers are stored, and memory does not grow
with depth; the cost is one more evaluation of every function.

The functions are pure and take all inputs as arguments. So both forms below work for any layer:
`reversible_residual`, and `residual`, which is the same with ordinary differentiation.

Reference: Gomez et al. The reversible residual network. arXiv:1707.04585; Kitaev et al. Reformer.
arXiv:2001.04451, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.stack.recomputing import (
    Function,
    add_gradients,
    as_cotangent,
    in_one_piece,
    working_type,
)


def residual(
    functions: Sequence[Function],
    parameters: Sequence[Any],
    x1: Float[Array, "*shape"],
    x2: Float[Array, "*shape"],
    shared: Any = None,
    *,
    return_saved: bool = False,
) -> tuple[Any, ...]:
    """Applies the layers of `reversible_residual`, with ordinary differentiation."""
    _check(functions, parameters, x1, x2)
    working = working_type(x1)
    streams = x1.astype(working), x2.astype(working)
    streams, saved = _forward(functions, x1.dtype, parameters, streams, shared)
    return _results(streams, jax.lax.stop_gradient(saved), x1.dtype, return_saved)


def reversible_residual(
    functions: Sequence[Function],
    parameters: Sequence[Any],
    x1: Float[Array, "*shape"],
    x2: Float[Array, "*shape"],
    shared: Any = None,
    *,
    return_saved: bool = False,
) -> tuple[Any, ...]:
    """Applies residual layers to two streams, without storing their inputs.

    For functions f_0, g_0, f_1, g_1, ... the layers are ``x1 = x1 + f_0(x2)``,
    ``x2 = x2 + g_0(x1)``, ``x1 = x1 + f_1(x2)`` and so on. Values equal those of `residual`.
    Gradients are equal up to rounding of the subtraction that recovers the inputs: in float32,
    about 1e-7 of the streams per layer. Therefore 16-bit streams are kept in float32 between
    layers, in both forms; the functions get them in their own dtype. (With bfloat16 streams,
    gradients of a stack of 24 layers had errors of 12 %; with float32 streams 1.5 %, as with
    ordinary differentiation.)

    Args:
      functions: Each ``f(parameters, x, shared, saved) -> (increment, saved)``. In the forward pass
        `saved` is None; the pytree that it returns there is passed to it in the backward pass. It
        is for discrete choices, such as hash buckets, which the rounding of recovered inputs might
        change; no gradient flows through it. A function must not close over traced arrays, or draw
        random numbers from a stateful source: pass keys as parameters.
      parameters: One pytree per function. Leaves may be integers or random keys (without
        gradient), and may be shared between functions (their gradients are accumulated in the
        backward pass).
      x1: The first stream, of any shape.
      x2: The second stream, with the shape and type of the first.
      shared: A pytree that is passed to every function: a context, masks, positions. Its
        computation is differentiated once, with the sum of the gradients of all functions.
      return_saved: Also return the `saved` values of the functions, without gradient. Use it for
        additional results, such as running statistics or attention weights.

    Returns:
      The two streams after all layers, in the dtype of `x1`, and with `return_saved` a list of the
      `saved` values.

    Raises:
      ValueError: If functions and parameters, or the two streams, do not match.
    """
    _check(functions, parameters, x1, x2)
    leaves, tree = jax.tree.flatten(tuple(parameters))
    # Tied parameters are one leaf, for their gradients to be one array, whatever the depth.
    places = {id(leaf): i for i, leaf in reversed(list(enumerate(leaves)))}
    order = {place: i for i, place in enumerate(sorted(places.values()))}
    chosen = tuple(order[places[id(leaf)]] for leaf in leaves)
    unique = tuple(leaves[place] for place in sorted(places.values()))
    working = working_type(x1)
    program = _Program(tuple(functions), tree, chosen, x1.dtype)
    both = x1.astype(working), x2.astype(working)
    streams, saved = cast(Any, _reversible(program, unique, both, shared))
    return _results(streams, saved, x1.dtype, return_saved)


class _Program(NamedTuple):
    """What is known before any number is: `chosen` are the places of leaves among unique ones."""

    functions: tuple[Function, ...]
    tree: Any
    chosen: tuple[int, ...]
    dtype: Any

    def parameters(self, unique: Sequence[Any]) -> Sequence[Any]:
        return jax.tree.unflatten(self.tree, [unique[place] for place in self.chosen])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reversible(program: _Program, unique: Any, streams: Any, shared: Any) -> Any:
    parameters = program.parameters(unique)
    return _forward(program.functions, program.dtype, parameters, streams, shared)


def _reversible_forward(program: _Program, unique: Any, streams: Any, shared: Any) -> Any:
    parameters = program.parameters(unique)
    streams, saved = _forward(program.functions, program.dtype, parameters, streams, shared)
    return (streams, saved), (unique, streams, shared, saved)


def _reversible_backward(program: _Program, residuals: Any, cotangents: Any) -> Any:
    d_streams, _ = cotangents
    unique, streams, shared, saved = residuals
    streams, d_streams = list(streams), list(d_streams)
    places = program.parameters(range(len(unique)))
    d_unique: list[Any] = [None] * len(unique)
    shared, shared_tree = jax.tree.flatten(shared)
    d_shared: list[Any] = [None] * len(shared)
    for i in reversed(range(len(program.functions))):
        changed, seen = _roles(i)
        used = sorted(set(jax.tree.leaves(places[i])))
        own = jax.tree.map(used.index, places[i])
        streams[changed], d_streams[seen], totals, d_shared = in_one_piece(
            partial(_undo, _Layer(program.functions[i], program.dtype, own, shared_tree)),
            streams[changed],
            streams[seen],
            d_streams[changed],
            d_streams[seen],
            [unique[place] for place in used],
            [d_unique[place] for place in used],
            shared,
            d_shared,
            saved[i],
        )
        for place, total in zip(used, totals, strict=True):
            d_unique[place] = total
    return (
        tuple(map(as_cotangent, unique, d_unique)),
        tuple(d_streams),
        jax.tree.unflatten(shared_tree, map(as_cotangent, shared, d_shared)),
    )


class _Layer(NamedTuple):
    """What is known of one layer: `own` are the places of its leaves among its parameters."""

    function: Function
    dtype: Any
    own: Any
    shared_tree: Any


def _undo(
    layer: _Layer,
    changed: Array,
    seen: Array,
    d_changed: Array,
    d_seen: Array,
    parameters: list[Any],
    totals: list[Array | None],
    shared: list[Any],
    d_shared: list[Array | None],
    saved: Any,
) -> tuple[Array, Array, list[Array | None], list[Array | None]]:
    """Inverts one layer: returns the stream it changed, and its four gradient contributions."""

    def apply(own, seen, shared):
        shared = jax.tree.unflatten(layer.shared_tree, shared)
        return _apply(layer.function, layer.dtype, own, seen, shared, saved)

    mine = jax.tree.map(parameters.__getitem__, layer.own)
    increment, pullback, _ = jax.vjp(apply, mine, seen, shared, has_aux=True)
    d_own, d_x, d_known = pullback(d_changed)
    totals = list(totals)
    for place, gradient in zip(jax.tree.leaves(layer.own), jax.tree.leaves(d_own), strict=True):
        totals[place] = add_gradients(totals[place], gradient)
    return changed - increment, d_seen + d_x, totals, list(map(add_gradients, d_shared, d_known))


_reversible.defvjp(_reversible_forward, _reversible_backward)


def _forward(
    functions: Sequence[Function], dtype: Any, parameters: Sequence[Any], streams: Any, shared: Any
) -> tuple[Any, list[Any]]:
    """Returns the streams after all layers, and the `saved` value of each function."""
    streams, kept = list(streams), []
    for i, function in enumerate(functions):
        changed, seen = _roles(i)
        increment, saved = _apply(function, dtype, parameters[i], streams[seen], shared, None)
        streams[changed] = streams[changed] + increment
        kept.append(saved)
    return tuple(streams), kept


def _apply(
    function: Function, dtype: Any, parameters: Any, x: Array, shared: Any, saved: Any
) -> tuple[Array, Any]:
    increment, saved = function(parameters, x.astype(dtype), shared, saved)
    if increment.shape != x.shape:
        raise ValueError(
            f"A residual function got {x.shape} and returned an increment of "
            f"{increment.shape}: it must keep the shape of its stream."
        )
    return increment.astype(x.dtype), saved


def _results(streams: Any, saved: list[Any], dtype: Any, return_saved: bool) -> tuple[Any, ...]:
    y1, y2 = (y.astype(dtype) for y in streams)
    return (y1, y2, saved) if return_saved else (y1, y2)


def _roles(i: int) -> tuple[int, int]:
    """Returns which stream function i changes and which it sees."""
    return (0, 1) if i % 2 == 0 else (1, 0)


def _check(functions: Sequence[Function], parameters: Sequence[Any], x1: Array, x2: Array) -> None:
    if len(functions) != len(parameters):
        raise ValueError(
            f"Each function needs parameters: got {len(functions)} functions and "
            f"{len(parameters)} pytrees of parameters (give None where there are none)."
        )
    if x1.shape != x2.shape or x1.dtype != x2.dtype:
        raise ValueError(
            "The two streams must have the same shape and dtype, got "
            f"{x1.dtype}{list(x1.shape)} and {x2.dtype}{list(x2.shape)}."
        )
