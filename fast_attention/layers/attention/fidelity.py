"""Errors of the attention in a model against exact softmax attention, for each head.

Every layer is measured on its queries, keys and values in a call of the model: its output is
compared with that of exact attention on the same keys, and so is uniform attention, which ignores
queries and keys. Errors do not accumulate over layers, because each layer is compared on the same
inputs.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, R rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array
from fast_attention.diagnostics.errors import MOST_ROWS, attention_matrix
from fast_attention.feature_maps.moments import Moments
from fast_attention.layers.attention.attention_call import causal_by_mask
from fast_attention.layers.attention.observing import AttentionCall, Path, observed_copy
from fast_attention.mechanisms.favor.calibration import retune, tuned_map
from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.softmax_attention import make_softmax_attention

MATRIX_LENGTH = 2048
"""Maximum length of a sequence for comparing attention matrices, in selected rows."""

_STATIC = {"static": True}
"""Of the fields of a pytree that are not arrays."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FidelitySums:
    """Sums over positions for `summarize_fidelity`; sums of several calls can be added.

    Attributes:
      path: Where the layer is in the model.
      group: Which of its groups of heads.
      attention_fn: What is judged.
      causal: Whether position t sees keys 0..t.
      positions: Queries that count.
      error: ``[H]``, sum of ``|out - exact|^2``.
      uniform_error: ``[H]``, sum of ``|uniform - exact|^2``.
      size: ``[H]``, sum of ``|exact|^2``.
      rows: Number of queries whose weights were compared.
      matrix_error: ``[H]``, sum of squared differences of weights.
      matrix_size: ``[H]``, sum of squared exact weights.
      effective_keys: ``[H]``, sum of ``exp(entropy)`` of exact weights.
      visible_keys: Sum of the numbers of visible keys of these rows.
      query_squares: ``[H]``, sum of ``|q|^2``.
      keys: Keys that count.
      key_squares: ``[H]``, sum of ``|k|^2``, of the key head that each head reads.
    """

    path: Path = dataclasses.field(metadata=_STATIC)
    group: int = dataclasses.field(metadata=_STATIC)
    attention_fn: Callable[..., Any] = dataclasses.field(metadata=_STATIC)
    causal: bool = dataclasses.field(metadata=_STATIC)
    positions: Any
    error: Any
    uniform_error: Any
    size: Any
    rows: Any
    matrix_error: Any
    matrix_size: Any
    effective_keys: Any
    visible_keys: Any
    query_squares: Any
    keys: Any
    key_squares: Any


@dataclasses.dataclass(frozen=True)
class LayerFidelity:
    """Errors of a group of heads of a layer against exact attention; arrays are ``[H]``.

    Errors are over all positions of all sequences, ``sqrt(sum |a - b|^2 / sum |b|^2)``, so
    sequences are weighted by their length.

    Attributes:
      layer: Number of the layer from 1, in the order of calls.
      first_head: First head of the group in its layer, from 1.
      path: Where the layer is in the model.
      group: Which of its groups of heads.
      attention_fn: What is judged.
      causal: Whether position t sees keys 0..t.
      positions: Number of counted queries.
      output: Error of the heads' outputs, before they are mixed.
      uniform: The same for uniform weights on all visible keys.
      matrix: Error of the weights, at the selected rows; NaN if there were none.
      effective_keys: Mean ``exp(entropy)`` of the rows of exact attention.
      visible_keys: Mean number of visible keys of these rows.
      query_norm: Root mean square of ``|q|``, as passed to the function.
      key_norm: That of ``|k|``.
    """

    layer: int
    first_head: int
    path: Path
    group: int
    attention_fn: Callable[..., Any]
    causal: bool
    positions: int
    output: np.ndarray
    uniform: np.ndarray
    matrix: np.ndarray
    effective_keys: np.ndarray
    visible_keys: float
    query_norm: np.ndarray
    key_norm: np.ndarray


def measure_fidelity(model: nnx.Module, *args: Any, **kwargs: Any) -> list[LayerFidelity]:
    """Calls a model once and compares each of its attention layers with exact attention.

    Args:
      model: As for `fidelity_sums`; its other arguments may be given, too.
      *args: Arguments of the call, such as tokens.
      **kwargs: Arguments of the call, such as ``key_mask``; without it padding would count.

    Returns:
      One entry per attention layer and group of heads, in the order of the calls.
    """
    return summarize_fidelity(fidelity_sums(model, *args, **kwargs))


def fidelity_sums(
    model: nnx.Module,
    *args: Any,
    attention_fn: Callable[..., Any] | None = None,
    parameters: Mapping[str, Any] | None = None,
    matrix_length: int = MATRIX_LENGTH,
    **kwargs: Any,
) -> list[FidelitySums]:
    """Computes the sums for `summarize_fidelity` in one call of a model; works under jit.

    The exact reference is softmax attention with the logits ``q . k / sqrt(D)``, for layers with
    any kernel; for hashed attention, it is the same without hashing (`LSHAttention` with
    ``use_full_attn``). A local layer is compared with attention to all keys. Padding counts neither
    as queries nor as keys.

    Args:
      model: Any module with `MultiHeadAttention` or `MultiAxisAttention` layers inside; it is not
        changed.
      *args: Arguments of the call, such as tokens.
      attention_fn: Function to measure instead of the layers' own functions; the model still uses
        its own. None measures these.
      parameters: With `attention_fn`, the projection of each layer by `AttentionCall.name`, see
        `parameters_from_moments`; by default the function's own.
      matrix_length: Weights are not compared for more keys than this (their cost is quadratic); 0
        never compares them.
      **kwargs: Arguments of the call.

    Returns:
      Sums for each call of a group of heads, in the order of calls.

    Raises:
      ValueError: If the model has no attention layers, or one that `attention_fn` cannot replace.
    """
    kept: list[FidelitySums] = []

    def judge(call: AttentionCall) -> None:
        judged = call
        if attention_fn is not None:
            if call.function.takes.shared_qk:
                raise ValueError(
                    f"The layer {call.name} shares the projection of queries and keys, so other "
                    "attention functions cannot replace its own: leave out attention_fn to "
                    "measure its own."
                )
            own = None if parameters is None else parameters[call.name]
            options = {} if own is None else {"projection": own}
            judged = call._replace(function=as_attention_fn(attention_fn), options=options)
        kept.append(_sums(judged, matrix_length))

    observed_copy(model, judge)(*args, **kwargs)
    if not kept:
        raise ValueError(
            f"{type(model).__name__} has no attention layers to measure (MultiHeadAttention or "
            "MultiAxisAttention)."
        )
    return kept


def parameters_from_moments(
    attention_fn: Any, moments: Mapping[str, Moments], key: Array
) -> dict[str, Any]:
    """Draws a projection for each layer, calibrated if the function has stored parameters.

    Args:
      attention_fn: Function to use instead of the layers' own functions.
      moments: Moments of each layer from `query_key_moments`, on other samples than those for the
        measurement.
      key: Random key.

    Returns:
      ``parameters`` for `fidelity_sums`.
    """
    attention_fn = as_attention_fn(attention_fn)
    found: dict[str, Any] = {}
    for number, (name, own) in enumerate(moments.items()):
        width = own.query.mean.shape[-1]
        drawn = attention_fn.draw_projection(jax.random.fold_in(key, number), width)
        if attention_fn.calibration == "stored":
            drawn = retune(tuned_map(attention_fn), drawn, own)
        found[name] = drawn
    return found


def add_sums(left: Sequence[FidelitySums], right: Sequence[FidelitySums]) -> list[FidelitySums]:
    """Adds the sums of two calls of one model, in float64 on the host."""
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) + b, list(left), list(right))


def summarize_fidelity(sums: Sequence[FidelitySums]) -> list[LayerFidelity]:
    """Computes errors from the sums of one or several calls."""
    found: list[LayerFidelity] = []
    layer = first = 0
    for entry in sums:
        if entry.group == 0:
            layer, first = layer + 1, 1
        part: FidelitySums = jax.tree.map(lambda x: np.asarray(x, np.float64), entry)
        rows = float(part.rows)
        per_row = 1 / rows if rows else np.nan
        found.append(
            LayerFidelity(
                layer=layer,
                first_head=first,
                path=entry.path,
                group=entry.group,
                attention_fn=entry.attention_fn,
                causal=entry.causal,
                positions=int(part.positions),
                output=_root(part.error, part.size),
                uniform=_root(part.uniform_error, part.size),
                matrix=_root(part.matrix_error, part.matrix_size) if rows else part.size * np.nan,
                effective_keys=part.effective_keys * per_row,
                visible_keys=float(part.visible_keys) * per_row,
                query_norm=np.sqrt(part.query_squares / max(1, float(part.positions))),
                key_norm=np.sqrt(part.key_squares / max(1, float(part.keys))),
            )
        )
        first += len(found[-1].output)
    return found


def exact_call(call: AttentionCall) -> AttentionCall:
    """Returns the same call of exact attention, in at least float32."""
    query, key, value = (
        x.astype(at_least_float32(x.dtype)) for x in (call.query, call.key, call.value)
    )
    call = call._replace(query=query, key=key, value=value)
    exact = call.function.exact()
    if exact is not None:
        return call._replace(function=exact)
    visible = call.visible._replace(causal=_is_causal(call))
    if visible.causal and key.shape[1] > query.shape[1]:
        # Keys behind the sequence are seen by all.
        visible = causal_by_mask(visible, query.shape[1])
    return call._replace(function=make_softmax_attention(), visible=visible, options={}, memory=0)


def chosen_rows(mask: Array) -> tuple[Array, Array]:
    """Selects evenly spaced positions among those where a mask ``[B, T]`` is True.

    Returns:
      Positions ``[B, R]``, R at most 128, and which of these count: a row with fewer than R
      positions has each of them once.
    """
    length = mask.shape[1]
    count = mask.sum(axis=1, keepdims=True)
    number = min(length, MOST_ROWS)
    place = jnp.arange(number)[None]
    spread = place * jnp.maximum(count - 1, 0) // max(1, number - 1)
    rank = jnp.where(count > number, spread, jnp.minimum(place, length - 1))
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(order, rank, axis=1), place < count


def _is_causal(call: AttentionCall) -> bool:
    return call.visible.causal or call.function.unidirectional


def _sums(call: AttentionCall, matrix_length: int) -> FidelitySums:
    exact = exact_call(call)
    query, key = exact.query, exact.key
    counted = call.visible.query_mask
    counted = jnp.ones(query.shape[:2], bool) if counted is None else counted.astype(bool)
    visible = call.visible.key_mask
    visible = jnp.ones(key.shape[:2], bool) if visible is None else visible.astype(bool)

    def squares(x: Array, mask: Array) -> Array:
        """Sums ``[B, N, H, D]`` where `mask` ``[B, N]``."""
        x = x.astype(query.dtype)
        return jnp.sum(jnp.where(mask[..., None, None], x, 0) ** 2, axis=(0, 1, 3))

    target = exact.attend()
    equal = exact.attend(query=jnp.zeros_like(query), key=jnp.zeros_like(key))
    found = call.attend().astype(target.dtype)
    heads, kv_heads = query.shape[2], key.shape[2]
    none = jnp.zeros(heads, query.dtype)
    looked = {
        "rows": jnp.zeros((), query.dtype),
        "matrix_error": none,
        "matrix_size": none,
        "effective_keys": none,
        "visible_keys": jnp.zeros((), query.dtype),
    }
    if key.shape[1] <= matrix_length:
        looked = _looked_at(call, exact, counted)
    return FidelitySums(
        path=call.path,
        group=call.group,
        attention_fn=call.function,
        causal=_is_causal(call),
        positions=counted.sum().astype(query.dtype),
        error=squares(found - target, counted),
        uniform_error=squares(equal - target, counted),
        size=squares(target, counted),
        query_squares=squares(query, counted),
        keys=visible.sum().astype(query.dtype),
        key_squares=jnp.repeat(squares(key, visible), heads // kv_heads),
        **looked,
    )


def _looked_at(call: AttentionCall, exact: AttentionCall, counted: Array) -> dict[str, Array]:
    """Sums over selected rows of attention matrices."""
    rows, own = chosen_rows(counted)

    def matrix(of: AttentionCall, query: Array, key: Array) -> Array:
        def attend(query: Array, key: Array, value: Array) -> Array:
            return of.attend(query=query, key=key, value=value)

        width = None if of.function.takes.any_value_width else query.shape[-1]
        weights = attention_matrix(attend, query, key, rows, value_width=width)
        return jnp.where(own[:, None, :, None], weights, 0)

    def effective(weights: Array) -> Array:
        safe = jnp.where(weights > 0, weights, 1)
        keys = jnp.exp(-jnp.sum(weights * jnp.log(safe), axis=-1))
        return jnp.sum(jnp.where(own[:, None], keys, 0), axis=(0, 2))

    target = matrix(exact, exact.query, exact.key)
    found = matrix(call, call.query, call.key)
    # Equal weights are the same in all heads: one shows how many keys there are.
    one = jnp.zeros_like(exact.query[:, :, :1]), jnp.zeros_like(exact.key[:, :, :1])
    equal = matrix(exact, *one)
    return {
        "rows": own.sum().astype(target.dtype),
        "matrix_error": jnp.sum((found - target) ** 2, axis=(0, 2, 3)),
        "matrix_size": jnp.sum(target**2, axis=(0, 2, 3)),
        "effective_keys": effective(target),
        "visible_keys": effective(equal)[0],
    }


def _root(error: np.ndarray, size: np.ndarray) -> np.ndarray:
    return np.sqrt(error / np.where(size == 0, 1, size))
