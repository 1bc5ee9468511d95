"""One call of an attention function: its arguments, checked and in one layout.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from fast_attention.arrays.types import Array
from fast_attention.mechanisms.axes import fold_axes, unfold_axes
from fast_attention.mechanisms.checks import as_visible, check_ids, mismatch, spread_over_positions
from fast_attention.mechanisms.masks import (
    Sizes,
    key_bias_from_bias,
    key_mask_from_mask,
    pair_bias,
    pair_mask,
)


@dataclasses.dataclass(frozen=True)
class Takes:
    """What an attention function honours; the base class refuses the rest.

    Attributes:
      mask: "keys" for masks that factor into a key mask and causality, "pairs" for any.
      bias: the same for biases; None takes none.
      dropout: whether whole "keys" are dropped or single "weights".
      projection: whether a call may be given random features (or rotations).
      positions: whether it rotates by positions that a call is given.
      buckets: whether a call may be given buckets, and asked for these and for weights.
      other_keys: whether the number of keys may differ from that of queries; else T = S.
      cache: whether one query may attend to many keys (a KV-cache step).
      shared_qk: queries and keys are the same vectors, and keys may be given behind the queries.
      symbolic_lengths: whether lengths may be symbols of ``jax.export``, known only when the
        exported program runs.
      decay: whether it honours ``log_decay``, the decay of what came before a token.
      any_value_width: whether V may differ from D; Flax's own functions need them equal.
    """

    mask: Literal["keys", "pairs"] = "keys"
    bias: Literal["keys", "pairs"] | None = "keys"
    dropout: Literal["keys", "weights"] = "keys"
    projection: bool = False
    positions: bool = False
    buckets: bool = False
    other_keys: bool = True
    cache: bool = True
    shared_qk: bool = False
    symbolic_lengths: bool = False
    decay: bool = False
    any_value_width: bool = True


class Dropout(NamedTuple):
    """Dropout of a training call.

    Attributes:
      key: random key.
      rate: above 0 and below 1.
      broadcast: the batch and the heads share what is dropped.
    """

    key: Array
    rate: float
    broadcast: bool


@dataclasses.dataclass(frozen=True)
class Call:
    """What a mechanism is asked, attended axes folded into one.

    Attributes:
      query: ``[*B, T, H, D]`` in the type of the computation.
      key: ``[*B, S, K, D]``.
      value: ``[*B, S, K, V]``.
      causal: position t sees keys 0..t.
      steps: causality was asked for, and one query attends to a cache: the mask decides what it
        sees, and it stands at the last visible key.
      key_mask: bool ``[*B, S, K or 1]`` or None.
      key_bias: ``[*B, S, K or 1]`` or None; only for functions that take biases of keys.
      mask: bool, of the rank of ``[*B, H, T, S]`` to which it broadcasts, or None; only for
        functions that take masks of pairs.
      bias: likewise.
      segment_ids: ``[*B, T]`` or None.
      log_decay: ``[*B, T, K]`` or ``[K]`` or None; only for functions that take one.
      query_mask: bool ``[*B, T]`` or None: False is padding, whose outputs do not matter.
      dropout: None for none.
      training_key: the random key of a training call, from which projections may be redrawn.
      deterministic: no randomness.
      projection: what the call was given in place of the function's own.
      positions: ``[*B, T]`` or None.
      buckets: of an earlier call, or None.
      return_weights: also return the weights.
      return_buckets: also return the buckets.
      precision: of products.
      axes: the axes that were folded, or None.
      shape: of the query before.
      key_shape: of the key before.
      fits: bool ``[*B]`` (axes may be 1), the rows of the batch whose masks can be honoured, where
        only the compiled program can know; None for all.
    """

    query: Array
    key: Array
    value: Array
    causal: bool = False
    steps: bool = False
    key_mask: Array | None = None
    key_bias: Array | None = None
    mask: Array | None = None
    bias: Array | None = None
    segment_ids: Array | None = None
    log_decay: Array | None = None
    query_mask: Array | None = None
    dropout: Dropout | None = None
    training_key: Array | None = None
    deterministic: bool = True
    projection: Any = None
    positions: Array | None = None
    buckets: Array | None = None
    return_weights: bool = False
    return_buckets: bool = False
    precision: jax.lax.PrecisionLike = None
    axes: tuple[int, ...] | None = None
    shape: tuple[int, ...] = ()
    key_shape: tuple[int, ...] = ()
    fits: Array | None = None

    @property
    def sizes(self) -> Sizes:
        """The lengths of the axes of queries and keys."""
        query, key = self.query.shape, self.key.shape
        return Sizes(query[:-3], query[-3], key[-3], query[-2], key[-2])

    @property
    def over_cache(self) -> bool:
        """Whether one query attends to several keys; its place is at the last visible one."""
        return self.query.shape[-3] == 1 < self.key.shape[-3]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to attend to, or nothing that attends."""
        return 0 in (*self.query.shape[:-2], self.key.shape[-3], self.value.shape[-1])

    def empty_output(self) -> Array:
        """Returns zeros ``[*B, T, H, V]``: what queries get that see no key."""
        shape = (*self.query.shape[:-1], self.value.shape[-1])
        return jnp.zeros(shape, self.query.dtype)

    def with_key_mask(self, given: Any, *, per_head: bool = True) -> Call:
        """Adds a key mask, its axes before they are folded.

        Args:
          given: ``[*B, S]``, or ``[*B, S, K]`` if that is allowed, or None.
          per_head: whether it is.
        """
        if given is None:
            return self
        shape = self.key_shape[:-1]
        own = per_head and jnp.ndim(given) == len(shape)
        visible, fits = self._of_positions("key_mask", given, shape if own else shape[:-1])
        keys = fold_axes(visible, self.axes, trailing=int(own))
        return self._also(keys if own else keys[..., None], fits)

    def with_query_mask(self, given: Any) -> Call:
        """Adds a mask of queries ``[*B, T]``, its axes before they are folded.

        Queries that are padding become zeros: what they hold reaches no gradient.
        """
        if given is None:
            return self
        visible, fits = self._of_positions("query_mask", given, self.shape[:-2])
        folded = fold_axes(visible, self.axes, trailing=0)
        query = jnp.where(folded[..., None, None], self.query, 0)
        return dataclasses.replace(self._fitting(fits), query=query, query_mask=folded)

    def with_ids(self, segment_ids: Any, positions: Any) -> Call:
        """Adds whole numbers ``[*B, T]``, their axes before they are folded."""
        found = {}
        for name, given in (("segment_ids", segment_ids), ("positions", positions)):
            if given is not None:
                ids = check_ids(name, given)
                ids = spread_over_positions(name, ids, self.shape[:-2], self._attended)
                found[name] = fold_axes(ids, self.axes, trailing=0)
        return dataclasses.replace(self, **found)

    def with_decay(self, log_decay: Any) -> Call:
        """Adds the decay, ``[*B, T, K]`` with its axes before they are folded, or ``[K]``."""
        if log_decay is None:
            return self
        shape = self.key_shape[:-1]
        if jnp.shape(log_decay) not in (shape, shape[-1:]):
            raise mismatch(
                "log_decay",
                f"of shape {shape}, that of key without its width, or {shape[-1:]}",
                f"shape {jnp.shape(log_decay)}",
            )
        log_decay = jnp.asarray(log_decay)
        if log_decay.ndim > 1:
            log_decay = fold_axes(log_decay, self.axes, trailing=1)
        return dataclasses.replace(self, log_decay=log_decay)

    def with_mask(self, takes: Takes, mask: Any, bias: Any) -> Call:
        """Adds a mask and a bias that broadcast to ``[*B, H, T, S]``."""
        call = self
        if mask is not None and takes.mask == "keys":
            keys, fits = key_mask_from_mask(mask, self.sizes, causal=self.causal)
            call = call._also(keys, fits)
        elif mask is not None:
            visible, fits = pair_mask(mask, self.sizes)
            if visible.shape[-3:-1] == (1, 1):
                keys = jnp.broadcast_to(visible[..., 0, 0, :], self.key.shape[:-2])
                call = call._also(keys[..., None], fits)
            else:
                call = dataclasses.replace(call._fitting(fits), mask=visible)
        if bias is None:
            return call
        if takes.bias == "keys":
            return dataclasses.replace(call, key_bias=key_bias_from_bias(bias, self.sizes))
        return dataclasses.replace(call, bias=pair_bias(bias, self.sizes))

    def drop_keys(self) -> Array:
        """Returns the values ``[*B, S, K, V]`` with whole keys dropped, the others scaled up."""
        value = self.value
        if self.dropout is None:
            return value
        key, rate, broadcast = self.dropout
        leading = (1,) * (value.ndim - 3) if broadcast else value.shape[:-3]
        heads = 1 if broadcast else value.shape[-2]
        keep = jax.random.bernoulli(key, 1 - rate, (*leading, value.shape[-3], heads, 1))
        return jnp.where(keep, value / (1 - rate), 0).astype(value.dtype)

    def pairs(self) -> tuple[Array | None, Array | None]:
        """Returns the mask of pairs and the key mask ``[*B, S]``, for functions of pairs."""
        if self.key_mask is None or self.key_mask.shape[-1] == 1:
            return self.mask, None if self.key_mask is None else self.key_mask[..., 0]
        groups = self.query.shape[-2] // self.key_mask.shape[-1]
        keys = jnp.repeat(jnp.swapaxes(self.key_mask, -1, -2), groups, axis=-2)[..., None, :]
        return keys if self.mask is None else keys & self.mask, None

    def without_hidden(self) -> Call:
        """Puts zeros for keys and values that no query sees.

        Whatever was there, NaN and infinity included, reaches no output and no gradient.
        """
        shown = self.key_mask
        if self.mask is not None and self.mask.shape[-1] > 1:
            seen = self.mask.any(axis=(-2, -3))
            seen = jnp.broadcast_to(seen, self.key.shape[:-2])[..., None]
            shown = seen if shown is None else shown & seen
        changed: dict[str, Array] = {}
        if shown is not None:
            heads = {"key": self.key.shape[-2], "value": self.value.shape[-2]}
            for name, x in (("key", self.key), ("value", self.value)):
                own = shown if shown.shape[-1] in (1, heads[name]) else shown.any(-1, keepdims=True)
                changed[name] = jnp.where(own[..., None], x, 0)
        return dataclasses.replace(self, **changed) if changed else self

    def finish(self, out: Array) -> Array:
        """Puts attended axes back, and NaN in rows of the batch whose mask cannot be honoured."""
        if self.fits is not None:
            fits = self.fits.reshape(*self.fits.shape, 1, 1, 1)
            out = jnp.where(fits, out, jnp.nan).astype(out.dtype)
        return unfold_axes(out, self.axes, self.shape)

    @property
    def _attended(self) -> tuple[int, ...]:
        return self.axes or (len(self.shape) - 3,)

    def _of_positions(
        self, name: str, given: Any, shape: tuple[int, ...]
    ) -> tuple[Array, Array | None]:
        """A mask of positions in its full shape, and which rows ``[*B]`` hold 0 and 1 only."""
        visible, values = as_visible(name, given)
        visible = spread_over_positions(name, visible, shape, self._attended)
        if values is None:
            return visible, None
        values = spread_over_positions(name, values, shape, self._attended)
        values = fold_axes(values, self.axes, trailing=values.ndim - len(self.shape) + 2)
        return visible, values.all(axis=tuple(range(len(self.query.shape) - 3, values.ndim)))

    def _also(self, keys: Array, fits: Array | None) -> Call:
        key_mask = keys if self.key_mask is None else self.key_mask & keys
        return dataclasses.replace(self._fitting(fits), key_mask=key_mask)

    def _fitting(self, fits: Array | None) -> Call:
        if fits is None:
            return self
        rank = self.query.ndim - 3
        fits = fits.reshape((1,) * (rank - fits.ndim) + fits.shape)
        return dataclasses.replace(self, fits=fits if self.fits is None else self.fits & fits)


def check_lengths(call: Call, mechanism: str, takes: Takes, *, masked: bool = False) -> None:
    """Raises ValueError for numbers of queries and keys that the call does not allow.

    Args:
      call: The call.
      mechanism: Its name.
      takes: What it honours.
      masked: Whether a mask of queries and keys is given, as Flax does with a cache.
    """
    length, keys = call.query.shape[-3], call.key.shape[-3]
    if not takes.symbolic_lengths and any(export.is_symbolic_dim(n) for n in (length, keys)):
        raise mismatch(
            f"Lengths of {mechanism.lower()}",
            "known",
            f"the symbolic length {length} of queries and {keys} of keys",
            "export a program for each length, or use linear or exact attention",
        )
    if length == keys:
        return
    given = f"{length} queries and {keys} keys"
    if call.over_cache and not takes.shared_qk:
        if not takes.cache:
            raise mismatch(
                f"Lengths of {mechanism.lower()}",
                "equal",
                given,
                "decode with init_state, prefill and step",
            )
        if call.segment_ids is not None:
            raise mismatch(
                "segment_ids", "left out for one query over a cache", given, "mask the keys instead"
            )
        return
    if takes.shared_qk:
        if call.over_cache and masked:
            raise mismatch(
                f"Lengths of {mechanism.lower()} under a mask",
                "equal, because queries and keys are shared and a cache cannot be read",
                given,
                "use another attention function to decode, or key_mask for keys of memory",
            )
        if length > keys:
            raise mismatch(
                f"Lengths of {mechanism.lower()}", "at least as many keys as queries", given
            )
        return
    if not takes.other_keys:
        raise mismatch(
            f"Lengths of {mechanism.lower()}",
            "equal, it is self-attention",
            given,
            "use linear or exact attention to attend to another sequence",
        )
    if call.causal:
        raise mismatch(
            "Lengths of causal attention",
            "equal",
            given,
            "continue a sequence with prefill, or mask keys without causality",
        )
    if call.segment_ids is not None:
        raise mismatch(
            "segment_ids", "left out unless it is self-attention", given, "use a key_mask"
        )
