"""One task each: a check, a comparison of times and memory, a training."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.programs import MEASURES, Program, compile_jax
from benchmarks.protein_training import measure, model
from benchmarks.settings import Setting, make_inputs
from benchmarks.timing import Clock, Effort, interleave, median, spread
from fast_attention.feature_maps import PositiveFeatures
from fast_attention.linear import Plan, linear_attention

PARTS = ("out", "query", "key", "value", "projection")


def check(setting: Setting, implementation: str, causal: bool) -> dict[str, Any]:
    """Compares values and gradients with those of XLA in float32 at the highest precision.

    Returns:
      Of the output and of each gradient the largest difference, relative to the largest value; or
      why the implementation refuses the call.
    """
    inputs = make_inputs(setting)
    arguments = (*inputs.qkv, inputs.projection)

    def run(name: str, precision: str | None, *arguments: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, projection: Any) -> Any:
            return _attend(setting, name, None, causal, precision)(q, k, v, projection)

        out, pull_back = jax.vjp(attend, *arguments)
        return out, *pull_back(inputs.cotangent.astype(out.dtype))

    exact = jax.tree.map(lambda x: x.astype(jnp.float32), arguments)
    expected = jax.jit(lambda *x: run("chunked", "highest", *x))(*exact)
    try:
        found = jax.jit(lambda *x: run(implementation, None, *x))(*arguments)
    except NotImplementedError as error:
        return {"refused": str(error)}
    errors = {}
    for name, x, y in zip(PARTS, found, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        errors[name] = float(np.abs(x - y).max() / np.abs(y).max())
    return {"relative_errors": errors}


def compare(
    programs: Sequence[tuple[str, int | None]],
    exact: Sequence[str],
    setting: Setting,
    causal: bool,
    *,
    repeats: int,
) -> dict[str, Any]:
    """Returns times and memory of several programs that take turns, forward and with gradients.

    Args:
      programs: implementations of linear attention, each with a chunk or None for its own.
      exact: implementations of exact attention.
      setting: the shape.
      causal: causal or bidirectional.
      repeats: samples of each.
    """
    inputs = make_inputs(setting)
    functions = {}
    for name, chunk in programs:
        attend = _attend(setting, name, chunk, causal, None)
        functions[name if chunk is None else f"{name} {chunk}"] = lambda q, k, v, attend=attend: (
            attend(q, k, v, inputs.projection)
        )
    for name in exact:
        functions[f"exact {name}"] = _exact(name, causal)
    found: dict[str, Any] = {}
    for kind in MEASURES:
        compiled: dict[str, Program] = {}
        results: dict[str, Any] = {}
        for name, function in functions.items():
            try:
                program = compile_jax(function, inputs.qkv, inputs, kind)
                program.wait(program.call())
                compiled[name] = program
            except Exception as error:
                # Of one that is refused, or does not fit the device, that is the result.
                results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        samples = interleave(compiled, Clock(wall=True), Effort(repeats, seconds=5.0))
        for name, program in compiled.items():
            results[name] = {
                "milliseconds": _scaled(median(samples[name]), 1e3),
                "spread": _scaled(spread(samples[name]), 1.0),
                "arrays": _scaled(program.memory, 1 / setting.tensor_bytes),
            }
        found[kind] = results
    return found


def train(rows: int, length: int, layers: int, width: int) -> dict[str, float]:
    """Returns residues per second of training, of the demo's model and with exact attention."""
    models = {name: model(name, length, layers, width) for name in ("Performer", "exact")}
    return measure(models, rows, length, 3, time.perf_counter)


def _attend(
    setting: Setting, name: str, chunk: int | None, causal: bool, precision: str | None
) -> Callable[..., Any]:
    plan = Plan(
        PositiveFeatures(setting.features),
        causal=causal,
        chunk_size=chunk,
        implementation=name,
        precision=precision,
    )

    def attend(q: Any, k: Any, v: Any, projection: Any) -> Any:
        return linear_attention(q, k, v, plan, parameters=projection)

    return attend


def _exact(name: str, causal: bool) -> Callable[..., Any]:
    implementation: Any = name

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, implementation=implementation
        )

    return attend


def _scaled(x: float | None, factor: float) -> float | None:
    return None if x is None else float(f"{x * factor:.4g}")
