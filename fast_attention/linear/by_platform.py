"""One function of arrays, computed in a form of its own on each platform.

JAX knows what a program is for only when it lowers it: a function may be traced on a CPU, and then
be compiled for the devices of a topology or exported. :func:`by_platform` therefore puts one
operation into the program. It is traced once, in its default form, which is inlined where it is
lowered. Lowered for a platform that has a form of its own it becomes that form, which is not traced
before, and nothing of the default remains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""Platforms that may have forms of their own, as JAX names them where it lowers."""

KERNELS = " kernels"
"""After the name of a platform: its form where a program runs on a single device, or where each
device runs a program of its own: inside ``jax.shard_map`` with all axes of the mesh manual."""

_either = core.Primitive("linear_attention")
_either.multiple_results = True


def by_platform(
    default: Callable[..., Any], forms: Mapping[str, Callable[..., Any]], *operands: Any
) -> Any:
    """Returns ``default(*operands)``, in the form of the platform that the program is made for.

    Derivatives, of any order, are those of ``default``.

    Args:
      default: from trees of arrays to a tree of arrays.
      forms: the same for some of :data:`PLATFORMS`, with results of the same shapes and types.
        Those under ``"tpu" + KERNELS`` hold kernels, which XLA cannot partition: where it
        partitions a program over several devices, this takes the form under ``"tpu"``, or the
        default.
      *operands: trees of arrays.
    """
    if not forms:
        return default(*operands)
    leaves, tree = jax.tree.flatten(operands)

    def flat(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *leaves: jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

    jaxpr, shapes = jax.make_jaxpr(
        lambda *leaves: default(*jax.tree.unflatten(tree, leaves)), return_shape=True
    )(*leaves)
    flat_forms = tuple((name, flat(form)) for name, form in sorted(forms.items()))
    results = _either.bind(*leaves, jaxpr=jaxpr, forms=flat_forms)
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _evaluate(*leaves: Any, jaxpr: Any, forms: Any) -> Any:
    """Runs the operation outside jit, where it has to be compiled like any other."""
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        return core.jaxpr_as_fun(jaxpr)(*leaves)
    return jax.jit(lambda *leaves: _either.bind(*leaves, jaxpr=jaxpr, forms=forms))(*leaves)


def _avals(*leaves: Any, jaxpr: Any, forms: Any) -> Any:
    del leaves, forms
    return jaxpr.out_avals


def _differentiate(primals: Any, tangents: Any, *, jaxpr: Any, forms: Any) -> Any:
    del forms
    tangents = tuple(ad.instantiate_zeros(x) for x in tangents)
    return jax.jvp(core.jaxpr_as_fun(jaxpr), tuple(primals), tangents)


def _batch(leaves: Any, axes: Any, *, jaxpr: Any, forms: Any) -> Any:
    def mapped(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(function, in_axes=tuple(axes))

    default = mapped(core.jaxpr_as_fun(jaxpr))
    results = by_platform(default, {name: mapped(form) for name, form in forms}, *leaves)
    return results, [0] * len(results)


def _drop_unused(used: Any, *rest: Any) -> Any:
    """Drops unused results, as JAX does in all that it traces."""
    equation = rest[-1]  # Later versions of JAX pass more between the two.
    if not any(used):
        return [False] * len(equation.invars), None
    inputs_used = [True] * len(equation.invars)  # Another form may read what the default does not.
    if all(used):
        return inputs_used, equation

    def fewer(form: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *leaves: [x for x, kept in zip(form(*leaves), used, strict=True) if kept]

    closed, forms = equation.params["jaxpr"], equation.params["forms"]
    jaxpr, _ = pe.dce_jaxpr(closed.jaxpr, used, instantiate=True)
    params = {
        "jaxpr": core.ClosedJaxpr(jaxpr, closed.consts),
        "forms": tuple((name, fewer(form)) for name, form in forms),
    }
    outputs = [x for x, kept in zip(equation.outvars, used, strict=True) if kept]
    return inputs_used, equation.replace(outvars=outputs, params=params)


def _lower_default(context: Any, *leaves: Any, jaxpr: Any, forms: Any) -> Any:
    """Inlines the form that is traced already; ``mlir.lower_fun`` would trace it again."""
    del forms
    module = context.module_context
    if context.platforms is not None:  # Of one program for several platforms.
        module = module.replace(platforms=context.platforms)
    results, tokens = mlir.jaxpr_subcomp(
        module,
        jaxpr.jaxpr,
        context.name_stack,
        context.tokens_in,
        [mlir.ir_constant(x) for x in jaxpr.consts],
        *leaves,
        dim_var_values=context.dim_var_values,
        const_lowering=context.const_lowering,
        outer_traceback=context.traceback,
    )
    context.set_tokens_out(tokens)
    return results


def _runs_on_each_device(axes: Any) -> bool:
    """Whether nothing is left to partition; the condition under which JAX lowers TPU kernels."""
    if isinstance(axes, mlir.ShardingContext):
        return axes.num_devices == 1
    if isinstance(axes, mlir.SPMDAxisContext):
        # Those of a shard_map, and of others around it.
        manual = axes.manual_axes | set(axes.mesh.manual_axes)
        return manual == frozenset(axes.mesh.axis_names)
    return False


def _lower_for(platform: str) -> Callable[..., Any]:
    def lower(context: Any, *leaves: Any, jaxpr: Any, forms: Any) -> Any:
        named = dict(forms)
        form = named.get(platform)
        if _runs_on_each_device(context.module_context.axis_context):
            form = named.get(platform + KERNELS, form)
        if form is None:
            return _lower_default(context, *leaves, jaxpr=jaxpr, forms=forms)
        return mlir.lower_fun(form, multiple_results=True)(context, *leaves)

    return lower


_either.def_impl(_evaluate)
_either.def_abstract_eval(_avals)
ad.primitive_jvps[_either] = _differentiate
batching.primitive_batchers[_either] = _batch
pe.dce_rules[_either] = _drop_unused
mlir.register_lowering(_either, _lower_default)
for _platform in PLATFORMS:
    mlir.register_lowering(_either, _lower_for(_platform), platform=_platform)
