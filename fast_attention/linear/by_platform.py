"""One function for kernels, another for everything else, chosen when a program is made.

JAX knows what a program is for only when it lowers it: a function may be traced on a CPU, and then
be compiled for the devices of a topology or exported. :func:`either` therefore puts one operation
into the program. Lowered for a TPU it becomes the kernels, which are not traced before; lowered for
anything else it becomes the other function, and nothing of the kernels remains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

_either = core.Primitive("linear_attention")
_either.multiple_results = True


def either(default: Callable[..., Any], tpu: Callable[..., Any], *operands: Any) -> Any:
    """Returns ``tpu(*operands)`` in programs for one TPU, ``default(*operands)`` in all others.

    A program that XLA partitions over several devices takes ``default``: XLA cannot partition a
    kernel. Derivatives, of any order, are those of ``default``.

    Args:
      default: from trees of arrays to a tree of arrays.
      tpu: the same, with results of the same shapes and types.
      *operands: trees of arrays.
    """
    leaves, tree = jax.tree.flatten(operands)

    def flat(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    jaxpr, shapes = jax.make_jaxpr(
        lambda *leaves: default(*jax.tree.unflatten(tree, leaves)), return_shape=True
    )(*leaves)
    results = _either.bind(*leaves, jaxpr=jaxpr, tpu=flat(tpu))
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _evaluate(*leaves: Any, jaxpr: Any, tpu: Any) -> Any:
    """Runs the operation outside jit, where it has to be compiled like any other."""
    return jax.jit(lambda *leaves: _either.bind(*leaves, jaxpr=jaxpr, tpu=tpu))(*leaves)


def _avals(*leaves: Any, jaxpr: Any, tpu: Any) -> Any:
    del leaves, tpu
    return jaxpr.out_avals


def _differentiate(primals: Any, tangents: Any, *, jaxpr: Any, tpu: Any) -> Any:
    del tpu
    tangents = tuple(ad.instantiate_zeros(x) for x in tangents)
    return jax.jvp(core.jaxpr_as_fun(jaxpr), tuple(primals), tangents)


def _batch(leaves: Any, axes: Any, *, jaxpr: Any, tpu: Any) -> Any:
    default, kernels = (jax.vmap(f, in_axes=tuple(axes)) for f in (core.jaxpr_as_fun(jaxpr), tpu))
    results = either(default, kernels, *leaves)
    return results, [0] * len(results)


def _lower(context: Any, *leaves: Any, jaxpr: Any, tpu: Any) -> Any:
    del tpu
    return mlir.lower_fun(core.jaxpr_as_fun(jaxpr), multiple_results=True)(context, *leaves)


def _lower_for_tpu(context: Any, *leaves: Any, jaxpr: Any, tpu: Any) -> Any:
    devices = getattr(context.module_context.axis_context, "num_devices", None)
    if devices != 1:
        return _lower(context, *leaves, jaxpr=jaxpr, tpu=tpu)
    return mlir.lower_fun(tpu, multiple_results=True)(context, *leaves)


_either.def_impl(_evaluate)
_either.def_abstract_eval(_avals)
ad.primitive_jvps[_either] = _differentiate
batching.primitive_batchers[_either] = _batch
mlir.register_lowering(_either, _lower)
mlir.register_lowering(_either, _lower_for_tpu, platform="tpu")
