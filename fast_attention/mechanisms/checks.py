"""One check of arguments for all attention functions, with one form of message.

Every message names the argument, what it must be, what was given, and what to do instead.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array


def mismatch(name: str, expected: str, given: object, instead: str = "") -> ValueError:
    """Returns the error for an argument that cannot be honoured, to be raised by the caller."""
    text = f"{name} must be {expected}, got {given}"
    return ValueError(f"{text}: {instead}." if instead else f"{text}.")


def check_choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    """Raises ValueError if a value is none of these."""
    if value not in choices:
        *others, last = (repr(choice) for choice in choices)
        raise mismatch(name, f"{', '.join(others)} or {last}", repr(value))


def check_flag(name: str, value: object) -> bool:
    """Returns a flag as a Python bool; None, numbers and traced values raise ValueError."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise mismatch(name, "True or False", repr(value))


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Returns a whole number as an int; flags, floats and smaller numbers raise ValueError."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if whole and value >= least:
        return int(value)
    kind = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
    raise mismatch(name, kind, repr(value))


def check_seed(value: Any) -> int:
    """Returns a seed of a random key as an int; anything but a whole number raises ValueError."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise mismatch("seed", "a whole number", repr(value))


def check_number(name: str, value: Any, least: float | None = None) -> float:
    """Returns a finite number as a float; others, and those below `least`, raise ValueError."""
    scalar = isinstance(value, np.ndarray | jax.Array) and value.ndim == 0
    number = isinstance(value, numbers.Real | np.number) or scalar
    if number and not isinstance(value, Tracer | bool | np.bool_):
        found = float(value)
        if math.isfinite(found) and (least is None or found >= least):
            return found
    kind = "a finite number" if least is None else f"a finite number of at least {least:g}"
    raise mismatch(name, kind, repr(value))


def check_rate(name: str, value: Any) -> float:
    """Returns a rate in [0, 1) as a Python float; anything else raises ValueError."""
    expected = "a number that is at least 0 and below 1"
    if isinstance(value, Tracer):
        raise mismatch(name, expected, value, "pass it as a static argument of jax.jit")
    scalar = isinstance(value, np.ndarray | jax.Array) and value.ndim == 0
    number = isinstance(value, numbers.Real | np.number) or scalar
    if not number or isinstance(value, bool | np.bool_) or not 0 <= float(value) < 1:
        raise mismatch(name, expected, repr(value))
    return float(value)


def float_arrays(query: Any, key: Any, value: Any, dtype: Any) -> tuple[Array, Array, Array]:
    """Brings queries, keys and values to one floating type.

    Args:
      query: anything that makes an array; whole numbers become floating ones.
      key: the same.
      value: the same.
      dtype: of the computation; None is the promoted type of all three.

    Returns:
      The three arrays.

    Raises:
      ValueError: for complex numbers, a type without fractions, or what is no array of numbers.
    """
    arrays = []
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x is None:
            raise mismatch(name, "an array", None)
        x = jnp.asarray(x)
        real = jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)
        if not real:
            raise mismatch(
                name, "an array of real numbers", f"dtype {x.dtype}", "cast it to a floating type"
            )
        arrays.append(x)
    if dtype is None:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(*arrays)
        if not jnp.issubdtype(dtype, jnp.floating):
            dtype = at_least_float32(dtype)
    elif not jnp.issubdtype(dtype, jnp.floating):
        raise mismatch(
            "dtype", "a floating type", repr(dtype), "leave it out to promote the inputs"
        )
    query, key, value = (x.astype(dtype) for x in arrays)
    return query, key, value


def check_operands(mechanism: str, query: Array, key: Array, value: Array, shared: bool) -> None:
    """Checks that queries, keys and values fit together.

    Args:
      mechanism: its name, for messages.
      query: ``[*B, T, H, D]``.
      key: ``[*B, S, K, D]``, or ``[*B, S, H, D]`` with `shared`.
      value: ``[*B, S, K, V]``.
      shared: queries and keys are the same vectors.

    Raises:
      ValueError: naming the three shapes.
    """
    shapes = f"query {query.shape}, key {key.shape} and value {value.shape}"

    def wrong(expected: str, instead: str = "") -> ValueError:
        return mismatch(f"Operands of {mechanism.lower()}", expected, shapes, instead)

    if min(query.ndim, key.ndim, value.ndim) < 3 or not query.ndim == key.ndim == value.ndim:
        raise wrong(
            "query [*batch, length, heads, width], key and value likewise with the same number of "
            "axes"
        )
    if not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise wrong("of equal batch axes")
    if query.shape[-1] != key.shape[-1] or not query.shape[-1]:
        raise wrong("queries and keys of the same width, at least 1")
    swapped = "length comes before heads; check that the two are not swapped"
    heads, value_heads = query.shape[-2], value.shape[-2]
    if key.shape[-3] != value.shape[-3]:
        raise wrong("keys and values of the same length")
    if key.shape[-2] != (heads if shared else value_heads):
        what = "as many key heads as query heads" if shared else "as many value heads as key heads"
        raise wrong(what, swapped)
    if not value_heads or not heads or heads % value_heads:
        raise wrong(
            "a number of query heads that is a multiple of that of key/value heads",
            swapped,
        )


def check_broadcast(name: str, shape: tuple[int, ...], full: tuple[int, ...]) -> None:
    """Raises ValueError unless an array of this shape broadcasts to `full`."""
    padded = (1,) * (len(full) - len(shape)) + tuple(shape)
    if len(shape) > len(full) or any(
        given not in (1, wanted) for given, wanted in zip(padded, full, strict=True)
    ):
        axes = "[*batch, heads, queries, keys] = " if name in ("mask", "bias") else ""
        raise mismatch(
            name,
            f"broadcastable to {axes}{full}",
            f"shape {tuple(shape)}",
            "a mask of padding [*batch, keys] is key_mask" if name == "mask" else "",
        )


def full_rank(name: str, x: Any, full: tuple[int, ...]) -> Array:
    """Brings an array that broadcasts to `full` to its rank; other axes of length 1 stay."""
    x = jnp.asarray(x)
    check_broadcast(name, x.shape, full)
    return x.reshape((1,) * (len(full) - x.ndim) + x.shape)


def fold_batch(name: str, x: Any, batch: Sequence[int], tail: tuple[int, ...]) -> Array:
    """Makes one batch axis, of length 1 if all rows share `x`; other axes of length 1 stay."""
    x = full_rank(name, x, (*batch, *tail))
    own = x.shape[len(batch) :]
    if math.prod(x.shape) == math.prod(own):
        return x.reshape(1, *own)
    return jnp.broadcast_to(x, (*batch, *own)).reshape(-1, *own)


def spread_over_positions(
    name: str, x: Any, shape: tuple[int, ...], attended: tuple[int, ...]
) -> Array:
    """Brings what belongs to positions, or to positions and heads, to its full shape.

    Args:
      name: of the argument, for messages.
      x: an array; its axes may be 1, those that are attended over excepted.
      shape: the full shape ``[*B, S]``, or ``[*B, S, K]``.
      attended: the axes that are attended over.

    Raises:
      ValueError: for another rank or other lengths.
    """
    x = jnp.asarray(x)
    fits = x.ndim == len(shape) and all(
        given == wanted or (given == 1 and axis not in attended)
        for axis, (given, wanted) in enumerate(zip(x.shape, shape, strict=True))
    )
    if not fits:
        raise mismatch(name, f"of shape {shape}, where batch axes may be 1", f"shape {x.shape}")
    return jnp.broadcast_to(x, shape)


def check_ids(name: str, x: Any) -> Array:
    """Returns ids as an array of whole numbers, or raises ValueError."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise mismatch(name, "whole numbers", f"dtype {x.dtype}")
    return x


def as_visible(name: str, x: Any) -> tuple[Array | np.ndarray, Array | None]:
    """Brings a mask to bool.

    Args:
      name: of the argument, for messages.
      x: bools or the numbers 0 and 1.

    Returns:
      The mask, in numpy where it is concrete (JAX would stage its operations inside jit), and for
      traced numbers whether each of them is 0 or 1, of the same shape; else None.

    Raises:
      ValueError: for concrete values that are neither 0 nor 1, such as an additive mask.
    """
    traced = isinstance(x, Tracer)
    given: Any = x if traced else np.asarray(x)
    if given.dtype == bool:
        return given, None
    number = jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)
    values = (given == 0) | (given == 1) if number else None
    if values is None or (not traced and not values.all()):
        raise mismatch(
            name,
            "booleans or the numbers 0 and 1 (1 = may see)",
            f"other values of dtype {given.dtype}",
            "an additive mask goes into bias",
        )
    return given.astype(bool), values if traced else None
