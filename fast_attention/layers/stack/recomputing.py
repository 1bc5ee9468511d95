"""Functions that are recomputed in the backward pass instead of storing their activations.

``jax.checkpoint`` uses barriers for this, which XLA on CPU removes before it merges equal
computations. Then the second evaluation is merged with the first, and everything is kept. The
functions here are recomputed on every platform.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array

Function = Callable[[Any, Array, Any, Any], tuple[Array, Any]]
"""``f(parameters, x, shared, saved) -> (out, saved)``, see `reversible.reversible_residual`."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def recomputed(function: Function, parameters: Any, x: Array, shared: Any) -> tuple[Array, Any]:
    """Returns ``function(parameters, x, shared, None)``; only its arguments are stored.

    Reference: Chen et al. Training deep nets with sublinear memory cost. arXiv:1604.06174.

    Args:
      function: Pure, without closing over traced arrays; the `saved` that it returns in the forward
        pass is passed to it in the backward pass, and has no gradient.
      parameters: A pytree; leaves may be integers or random keys, without gradient.
      x: An array.
      shared: A pytree, as `parameters`.
    """
    return function(parameters, x, shared, None)


def _forward(function: Function, parameters: Any, x: Array, shared: Any) -> Any:
    out, saved = function(parameters, x, shared, None)
    return (out, saved), ((parameters, x, shared), saved)


def _backward(function: Function, residuals: Any, cotangents: Any) -> Any:
    arguments, saved = residuals
    leaves, tree = jax.tree.flatten(arguments)

    def pull_back(leaves: list[Any], saved: Any, cotangent: Array) -> list[Array | None]:
        def again(*leaves: Any) -> tuple[Array, Any]:
            parameters, x, shared = jax.tree.unflatten(tree, leaves)
            return function(parameters, x, shared, saved)

        _, pull, _ = jax.vjp(again, *leaves, has_aux=True)
        return [add_gradients(None, gradient) for gradient in pull(cotangent)]

    gradients = in_one_piece(pull_back, leaves, saved, cotangents[0])
    return jax.tree.unflatten(tree, map(as_cotangent, leaves, gradients))


recomputed.defvjp(_forward, _backward)


def in_one_piece(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns ``function(*arguments)``, computed completely before any part is used.

    Otherwise XLA keeps results of the forward pass, and delays the gradients of parameters to the
    end, keeping all their inputs. A barrier prevents both, except on CPU, where barriers are
    removed before scheduling; there the function is in a branch of a condition that is always true,
    but not known to the compiler.
    """
    function = jax.jit(function)  # Traced once for the two uses below.
    shapes = jax.eval_shape(function, *arguments)

    def unreached(*_):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    always = jax.lax.platform_dependent(
        cpu=lambda: jax.lax.optimization_barrier(jnp.array(True)),
        default=lambda: jnp.array(True),
    )
    arguments = jax.lax.optimization_barrier(arguments)
    return jax.lax.optimization_barrier(jax.lax.cond(always, function, unreached, *arguments))


def add_gradients(total: Array | None, gradient: Array) -> Array | None:
    """Adds the gradients of one array; None is the gradient of an integer.

    Sums over many layers are not computed in 16 bits.
    """
    if gradient.dtype == jax.dtypes.float0:
        return None
    return gradient if total is None else total.astype(working_type(total)) + gradient


def as_cotangent(primal: Any, gradient: Array | None) -> Array | None:
    """A gradient as ``custom_vjp`` expects it, in the dtype of its array."""
    return None if gradient is None else gradient.astype(jnp.result_type(primal))


def working_type(x: Array) -> Any:
    """At least float32."""
    return at_least_float32(x.dtype)
