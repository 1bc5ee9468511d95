"""Outputs of linear attention, written and differentiated chunk by chunk.

Shape letters: B batch, T queries, H heads, K key/value heads, G = H / K, V value width, C chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.arrays.manual_axes import vary_alike
from fast_attention.arrays.types import Array
from fast_attention.linear.chunked.slices import (
    compute_dtype,
    load_rows,
    store,
    unload_rows,
)
from fast_attention.linear.types import (
    Inputs,
    Parts,
    Plan,
    finish,
    inverse_slope,
    safe_inverse,
)


def empty_output(plan: Plan, inputs: Inputs) -> Any:
    """Returns the buffer that :func:`write_output` fills."""
    shape = (*inputs.query.shape[:3], inputs.value.shape[-1])
    dtype = compute_dtype(inputs)
    if plan.output != "parts":
        out = jnp.zeros(shape, jnp.result_type(inputs.query, inputs.key, inputs.value))
        return vary_alike(out, inputs.query)
    row = jnp.zeros(shape[:3], dtype)
    scale = None if plan.feature_map.log_kind == "none" else row
    return vary_alike(Parts(jnp.zeros(shape, dtype), row, scale), inputs.query)


def write_output(plan: Plan, out: Any, parts: Parts, start: Array | int, chunks: int = 1) -> Any:
    """Finishes the rows of a chunk (or some), ``[B, K, G * C, ...]``; writes them at ``start``."""
    size = parts.denominator.shape[-1]
    if plan.output != "parts":
        chunk = finish(parts, plan.output, plan.epsilon)
        groups = out.shape[2] // chunk.shape[1]
        return store(out, unload_rows(chunk, size // groups, chunks), start)
    groups = out.numerator.shape[2] // parts.numerator.shape[1]

    def write(buffer: Array, rows: Array) -> Array:
        return store(buffer, unload_rows(rows, size // groups, chunks), start)

    return jax.tree.map(write, out, parts)


def parts_gradient(
    plan: Plan,
    inputs: Inputs,
    denominator: Array,
    log_scale: Array | None,
    out: Any,
    d_out: Any,
    start: Array | int,
    size: int,
    chunks: int = 1,
) -> tuple[Array, Array]:
    """Returns the cotangents of numerators and denominators of a chunk (or some)."""
    load = functools.partial(
        load_rows, inputs, start=start, size=size, dtype=compute_dtype(inputs), chunks=chunks
    )
    if plan.output == "parts":
        return load(d_out.numerator), load(d_out.denominator)
    d_rows = load(d_out)
    if plan.output == "sum":
        if log_scale is not None:
            d_rows = d_rows * jnp.exp(log_scale)[..., None]
        return d_rows, jnp.zeros_like(denominator)
    inverse = safe_inverse(denominator, plan.epsilon)
    slope = inverse_slope(denominator, plan.epsilon)
    return d_rows * inverse[..., None], jnp.einsum("bkrv,bkrv->bkr", d_rows, load(out)) * slope
