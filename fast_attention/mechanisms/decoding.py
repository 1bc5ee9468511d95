"""Token by token: what attention functions that decode share.

Shape letters: B batch, T new tokens, H heads, K key/value heads, D head width, V value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.forward_mode import naming_forward_mode
from fast_attention.arrays.types import Array
from fast_attention.linear.state import typed_like
from fast_attention.mechanisms.binding import bind, refuse_untaken
from fast_attention.mechanisms.call import Call, Takes
from fast_attention.mechanisms.checks import check_count, mismatch


class StateSizes(NamedTuple):
    """What a decoding state is made for.

    Attributes:
      batch_shape: ``*B``.
      num_kv_heads: K.
      head_dim: D.
      value_dim: V.
      max_length: tokens to make room for, or None.
      dtype: of the arrays, float32 or float64.
      decays: whether calls will have ``log_decay``.
    """

    batch_shape: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    value_dim: int
    max_length: int | None
    dtype: Any
    decays: bool = False


class Decoder:
    """The part of an attention function that decodes; one that does not leaves it alone."""

    mechanism: ClassVar[str]
    forward_mode: ClassVar[str]

    @property
    def takes(self) -> Takes:
        """Which arguments of a call are honoured."""
        return Takes()

    @property
    def can_decode(self) -> bool:
        """Whether there are :meth:`init_state`, :meth:`prefill` and :meth:`step`."""
        return type(self).read is not Decoder.read

    def init_state(
        self,
        batch_shape: Sequence[int],
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        max_length: int | None = None,
        *,
        dtype: Any = None,
        decays: bool = False,
    ) -> Any:
        """Returns the decoding state before the first token.

        All its arrays begin with the batch axes, so that ``jax.tree.map(lambda x: x[rows], state)``
        chooses rows, as a beam search does.

        Args:
          batch_shape: ``*B``.
          num_kv_heads: K.
          head_dim: D.
          value_dim: V.
          max_length: tokens to make room for; only caches of all keys need it.
          dtype: of its arrays, float32 or float64. A state keeps it, whatever it reads. None is
            float64 under ``jax_enable_x64``, else float32.
          decays: whether :meth:`prefill` and :meth:`step` will be called with ``log_decay``. A near
            field (``exact_window``) then remembers how its keys have decayed; the state of linear
            attention is the same.

        Raises:
          TypeError: if the function cannot decode.
          ValueError: for sizes out of range.
        """
        self.check_decodes()
        batch = tuple(check_count("batch_shape", n, least=0) for n in batch_shape)
        sizes = (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("value_dim", value_dim))
        heads, width, value_width = (check_count(name, number) for name, number in sizes)
        if max_length is not None:
            max_length = check_count("max_length", max_length)
        dtype = jnp.zeros(()).dtype if dtype is None else dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise mismatch("dtype", "a floating type", repr(dtype))
        if decays and not self.takes.decay:
            raise mismatch("decays", f"False for {self.mechanism.lower()}", decays)
        made_for = StateSizes(
            batch, heads, width, value_width, max_length, jnp.dtype(dtype), bool(decays)
        )
        return self.start(made_for)

    @runs_on_auto_axes
    def prefill(
        self,
        state: Any,
        query: Array,
        key: Array,
        value: Array,
        *,
        key_mask: Array | None = None,
        log_decay: Array | None = None,
        projection: Any = None,
        dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
    ) -> tuple[Array, Any]:
        """Reads T tokens causally after those in ``state``.

        Args:
          state: what came before, from :meth:`init_state`, :meth:`prefill` or :meth:`step`.
          query: ``[*B, T, H, D]``.
          key: ``[*B, T, K, D]``.
          value: ``[*B, T, K, V]``.
          key_mask: ``[*B, T]``; False is padding on either side of a shorter prompt, and is never
            seen.
          log_decay: ``[*B, T, K]`` or ``[K]``, as in a call.
          projection: as in a call.
          dtype: as in a call.
          precision: as in a call.

        Returns:
          ``[*B, T, H, V]``, unspecified at padding, and the state after the tokens.

        Raises:
          TypeError: if the function cannot decode.
          ValueError: for anything that cannot be honoured.
        """
        self.check_decodes()
        call = bind(
            self.mechanism,
            self.takes,
            query,
            key,
            value,
            dtype=dtype,
            precision=precision,
            axis=None,
            causal=True,
            projection=projection,
        )
        length, keys = call.query.shape[-3], call.key.shape[-3]
        if length != keys:
            raise mismatch("Lengths of a prompt", "equal", f"{length} queries and {keys} keys")
        call = call.with_key_mask(key_mask, per_head=False).with_query_mask(key_mask)
        call = call.with_decay(log_decay)
        refuse_untaken(self.mechanism, self.takes, call)
        if call.is_empty:
            return call.finish(call.empty_output()), state
        with naming_forward_mode(self.mechanism, self.forward_mode):
            out, after = self.read(state, call)
        return call.finish(out), self.keep_types(after, state)

    @runs_on_auto_axes
    def step(
        self,
        state: Any,
        query: Array,
        key: Array,
        value: Array,
        *,
        log_decay: Array | None = None,
        projection: Any = None,
        dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
    ) -> tuple[Array, Any]:
        """Reads one token: ``[*B, H, D]``, ``[*B, K, D]`` and ``[*B, K, V]`` to ``[*B, H, V]``.

        The arguments are those of :meth:`prefill`, without the axis of length.
        """
        self.check_decodes()
        for name, x in (("query", query), ("key", key), ("value", value)):
            if jnp.ndim(x) < 2:
                raise mismatch(name, "[*batch, heads, width]", f"shape {jnp.shape(x)}")
        call = bind(
            self.mechanism,
            self.takes,
            *(jnp.expand_dims(x, -3) for x in (query, key, value)),
            dtype=dtype,
            precision=precision,
            axis=None,
            causal=True,
            projection=projection,
        )
        if log_decay is not None:
            # That of one token, [*B, K], gets an axis of length.
            each = jnp.ndim(log_decay) > 1
            call = call.with_decay(jnp.expand_dims(log_decay, -2) if each else log_decay)
        refuse_untaken(self.mechanism, self.takes, call)
        if call.is_empty:
            return jnp.squeeze(call.empty_output(), -3), state
        with naming_forward_mode(self.mechanism, self.forward_mode):
            out, after = self.read_one(state, call)
        return jnp.squeeze(out, -3), self.keep_types(after, state)

    def start(self, sizes: StateSizes) -> Any:
        """Returns the state before the first token, of sizes that were checked."""
        raise NotImplementedError

    def read(self, state: Any, call: Call) -> tuple[Array, Any]:
        """Reads the tokens of a call that was checked and is not empty; see :meth:`prefill`."""
        raise NotImplementedError

    def read_one(self, state: Any, call: Call) -> tuple[Array, Any]:
        """The same for T = 1; see :meth:`step`."""
        return self.read(state, call)

    def keep_types(self, after: Any, before: Any) -> Any:
        """Casts a state to the types of the one before, so that it can be the carry of a scan."""
        return typed_like(after, before)

    def check_decodes(self) -> None:
        """Raises TypeError if the function cannot decode."""
        if not self.can_decode:
            raise TypeError(
                f"{self.mechanism} cannot decode token by token: it has no init_state, prefill and "
                "step. Use exact or local attention (make_softmax_attention, "
                "make_local_attention), or one of the make_fast_* factories."
            )
