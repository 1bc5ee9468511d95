"""Attention functions around others: foreign functions, and wrappers that change a call."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call, Takes
from fast_attention.mechanisms.decoding import StateSizes
from fast_attention.mechanisms.masks import same_run


def _of_inner(name: str) -> Any:
    """A property that has the value of the inner function."""
    return property(operator.attrgetter(f"attention_fn.{name}"))


@dataclasses.dataclass(frozen=True, eq=False)
class WrappedAttention(AttentionFn):
    """An attention function that changes the calls of another one.

    Everything that the base class declares is that of the other; a subclass overrides what it
    changes and refuses what it cannot do.

    Attributes:
      attention_fn: the other.
    """

    attention_fn: AttentionFn

    unidirectional = _of_inner("unidirectional")
    calibration = _of_inner("calibration")
    moment_decay = _of_inner("moment_decay")
    redraws = _of_inner("redraws")
    check_masks = _of_inner("check_masks")
    forward_mode = _of_inner("forward_mode")
    takes = _of_inner("takes")
    can_decode = _of_inner("can_decode")
    tuned_map = _of_inner("tuned_map")

    def attend(self, call: Call) -> Any:
        """Attends as the inner function does."""
        return self.attention_fn.attend(call)

    def start(self, sizes: StateSizes) -> Any:
        """The state of the inner function."""
        return self.attention_fn.start(sizes)

    def read(self, state: Any, call: Call) -> tuple[Array, Any]:
        """Reads as the inner function does."""
        return self.attention_fn.read(state, call)

    def read_one(self, state: Any, call: Call) -> tuple[Array, Any]:
        """Reads as the inner function does."""
        return self.attention_fn.read_one(state, call)

    def keep_types(self, after: Any, before: Any) -> Any:
        """Keeps types as the inner function does."""
        return self.attention_fn.keep_types(after, before)

    def draw_projection(self, key: Array, head_dim: int) -> Any:
        """Draws what the inner function draws."""
        return self.attention_fn.draw_projection(key, head_dim)

    def redraw_projection(self, key: Array, projection: Any) -> Any:
        """Draws new rows as the inner function does."""
        return self.attention_fn.redraw_projection(key, projection)

    def resolve_parameters(self, projection: Any, head_dim: int, rng: Array | None = None) -> Any:
        """The parameters of the inner function."""
        return self.attention_fn.resolve_parameters(projection, head_dim, rng)

    def exact(self) -> AttentionFn | None:
        """What the inner function stands for."""
        return self.attention_fn.exact()


@dataclasses.dataclass(frozen=True, eq=False)
class ForeignAttention(AttentionFn):
    """A function with the signature of ``nnx.dot_product_attention``, from :func:`as_attention_fn`.

    What it has a parameter for it is given by name; of the other masks one ``mask`` is made.

    Attributes:
      function: the function.
    """

    function: Callable[..., Any]

    @property
    def takes(self) -> Takes:
        """Any mask and bias."""
        return Takes(
            mask="pairs",
            bias="pairs",
            dropout="weights",
            symbolic_lengths=True,
            any_value_width=False,
        )

    def attend(self, call: Call) -> Any:
        """Calls the function."""
        call = call.without_hidden()
        names = self._parameters()
        told: dict[str, Any] = {}
        mask, key_mask = call.pairs()
        if key_mask is not None:
            if "key_mask" in names:
                told["key_mask"] = key_mask
            else:
                mask = _both(mask, key_mask[..., None, None, :])
        if call.segment_ids is not None:
            if "segment_ids" in names:
                told["segment_ids"] = call.segment_ids
            else:
                mask = _both(mask, same_run(call.segment_ids))
        if call.causal:
            if "is_causal" in names:
                told["is_causal"] = True
            else:
                length, keys = call.query.shape[-3], call.key.shape[-3]
                past = jnp.arange(keys)[None] <= jnp.arange(length)[:, None]
                mask = _both(mask, past.reshape((1,) * (call.query.ndim - 2) + past.shape))
        told |= {"mask": mask, "bias": call.bias, "precision": call.precision}
        if call.dropout is not None:
            key, rate, broadcast = call.dropout
            told |= {"dropout_rng": key, "dropout_rate": rate, "broadcast_dropout": broadcast}
            told["deterministic"] = False
        told = {name: x for name, x in told.items() if x is not None}
        lacking = [name for name in told if name not in names]
        if lacking:
            raise ValueError(
                f"{self.function} got {', '.join(lacking)}, but has no such parameters: leave "
                "these out, or add the parameters to the function."
            )
        return self.function(call.query, call.key, call.value, **told)

    def _parameters(self) -> _AnyName | frozenset[str]:
        parameters = inspect.signature(self.function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return _AnyName()
        return frozenset(p.name for p in parameters)


class _AnyName:
    """The parameters of a function that takes any keyword."""

    def __contains__(self, name: str) -> bool:
        return True


def as_attention_fn(function: Callable[..., Any]) -> AttentionFn:
    """Returns an attention function: the one given, or one around a function like Flax's own.

    Args:
      function: an :class:`AttentionFn`, or any function with the signature of
        ``nnx.dot_product_attention``, of which it may lack what it is not asked for.

    Raises:
      TypeError: for what cannot be called.
    """
    if isinstance(function, AttentionFn):
        return function
    if not callable(function):
        raise TypeError(f"attention_fn must be a function, got {function!r}.")
    return ForeignAttention(function)


def _both(mask: Array | None, other: Array) -> Array:
    return other if mask is None else mask & other
