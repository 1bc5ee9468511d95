"""Configuration of multi-head attention layers: groups of heads, and the source of keys."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.dropout import check_rate
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.checks import check_choice
from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.softmax_attention import make_softmax_attention

Rotary = Literal["halves", "pairs"]
Context = Literal["cross", "append"]
QueryKeyNorm = Literal["unit", "rms"]
Decay = Literal["fixed", "learned", "token"]


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer with the same attention function.

    Attributes:
      num_heads: Number of heads.
      attention_fn: The attention function, by default exact attention; a function like
        ``nnx.dot_product_attention`` is wrapped in an `AttentionFn`.
      rotary: Rotate queries and keys by their positions: pairs of channels i and i + D/2
        ("halves"), or 2i and 2i + 1 ("pairs"); None for no rotation.
      query_offset: Added to the positions of queries (not of keys) for the rotation.
      dropout_rate: Dropout rate of attention weights, passed to `attention_fn`.
      extra_keys: Whether the group sees memory and appended context, or only the sequence.
      rotary_base: Ratio of the longest to the shortest wavelength of the rotation.
    """

    num_heads: int
    attention_fn: AttentionFn = make_softmax_attention()
    rotary: Rotary | None = None
    query_offset: int = 0
    dropout_rate: float = 0.0
    extra_keys: bool = True
    rotary_base: float = 10000.0

    def __post_init__(self):
        """Checks every field.

        Raises:
          ValueError: If a value is out of range.
        """
        object.__setattr__(self, "attention_fn", as_attention_fn(self.attention_fn))
        if self.num_heads < 1:
            raise ValueError(f"A group needs at least one head, got num_heads={self.num_heads}.")
        check_choice("rotary", self.rotary, ("halves", "pairs", None))
        if self.rotary_base <= 1:
            raise ValueError(f"rotary_base must be above 1, got {self.rotary_base}.")
        if self.query_offset and self.rotary is None:
            raise ValueError(
                f"query_offset={self.query_offset} needs rotary positions: give rotary, too."
            )
        check_rate(self.dropout_rate)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Shape of a `MultiHeadAttention`.

    Attributes:
      groups: The heads in order; "4 local and 4 linear heads" is
        ``(HeadGroup(4, make_local_attention(128)), HeadGroup(4, make_fast_softmax_attention()))``.
      head_dim: D.
      num_kv_heads: K, by default H; query head h reads key head ``h // (H / K)``.
      causal: Position t sees positions 0..t, with every attention function.
      use_bias: Whether the dense layers of queries, keys and values have biases.
      out_bias: Whether the output layer has a bias.
      qk_norm: Normalise queries and keys of every head before attention (and before a rotation,
        which keeps norms): "unit" to one norm per key head, learned as the temperature of
        attention, which bounds the error of random features (`UnitQueryKey`); "rms" to a root mean
        square of one, times a learned gain per channel (arXiv:2302.05442, with RMSNorm); None for
        no normalisation.
      decay: Decay of the weights of earlier tokens, by a factor for each key head that is "fixed",
        "learned", or computed from the "token" (`HeadDecay`); None for no decay. Causal attention
        only, in the groups whose function supports it (linear attention, with ``exact_window`` or
        not); there must be at least one. Other groups are unchanged.
      shared_qk: Use the queries as keys (Reformer, arXiv:2001.04451): one projection for both. The
        attention functions must normalise keys themselves.
      one_value_head: One value head for all.
      memory: Number of learned vectors that every position sees in addition to the sequence.
      context: "cross": keys and values come from a second sequence; "append": that sequence is
        appended to the first one, and is also visible in causal attention.
      context_features: Width of that sequence, by default that of the stream.
      dropout_rate: Dropout rate of the output.
    """

    groups: tuple[HeadGroup, ...]
    head_dim: int
    num_kv_heads: int | None = None
    causal: bool = False
    use_bias: bool = False
    out_bias: bool = False
    qk_norm: QueryKeyNorm | None = None
    decay: Decay | None = None
    shared_qk: bool = False
    one_value_head: bool = False
    memory: int = 0
    context: Context | None = None
    context_features: int | None = None
    dropout_rate: float = 0.0

    def __post_init__(self):
        """Checks every field.

        Raises:
          TypeError: If the groups are not a tuple.
          ValueError: For invalid values; the message says what is valid.
        """
        groups = self.groups
        if not isinstance(groups, tuple):
            raise TypeError(f"groups must be a tuple of HeadGroup, got {groups!r}.")
        if not groups:
            raise ValueError("groups is empty: attention needs at least one HeadGroup.")
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {self.head_dim}.")
        check_rate(self.dropout_rate)
        if self.memory < 0:
            raise ValueError(f"memory must be 0 or more, got {self.memory}.")
        heads, kv_heads = self.num_heads, self.kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"num_heads={heads} must be a multiple of num_kv_heads={self.num_kv_heads}."
            )
        if any(group.num_heads * kv_heads % heads for group in groups):
            raise ValueError(
                f"Every group of heads must be a multiple of the {heads // kv_heads} query heads "
                f"that share a key head, got groups of {[g.num_heads for g in groups]} heads."
            )
        if any(group.rotary for group in groups) and self.head_dim % 2:
            raise ValueError(f"Rotary positions need heads of even width, got {self.head_dim}.")
        check_choice("context", self.context, ("cross", "append", None))
        check_choice("qk_norm", self.qk_norm, ("unit", "rms", None))
        check_choice("decay", self.decay, ("fixed", "learned", "token", None))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.context == "cross" and (self.causal or self.shared_qk or self.memory):
            raise ValueError(
                "causal, shared_qk and memory are for self-attention, not for cross attention."
            )
        if self.context == "cross" and any(group.rotary for group in self.groups):
            raise ValueError(
                "rotary cannot be used with context='cross': positions of two "
                "sequences are not comparable."
            )
        if self.shared_qk and self.kv_heads != self.num_heads:
            raise ValueError(
                "shared_qk has as many key heads as query heads: leave num_kv_heads out."
            )
        if self.context == "append" and not self.shared_qk:
            raise ValueError(
                "context='append' needs shared_qk=True; otherwise use context='cross'."
            )
        if self.decay is not None:
            self._check_decay()

    def _check_decay(self) -> None:
        decaying = [g.attention_fn for g in self.groups if g.attention_fn.takes.decay]
        if not decaying:
            raise ValueError(
                f"decay={self.decay!r} needs linear attention (make_fast_softmax_attention, "
                "make_fast_generalized_attention) in at least one group of heads: leave decay "
                "out, or give such a function to a HeadGroup."
            )
        if self.context is not None or self.memory:
            raise ValueError("decay cannot be used with context or memory: leave these out.")
        if not self.causal and not all(function.unidirectional for function in decaying):
            raise ValueError(
                f"decay={self.decay!r} needs causal attention: pass causal=True, or decay=None."
            )

    @property
    def num_heads(self) -> int:
        """H, heads of all groups."""
        return sum(group.num_heads for group in self.groups)

    @property
    def kv_heads(self) -> int:
        """K, also if `num_kv_heads` is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def kv_heads_of_groups(self) -> list[int]:
        """Key heads of each group."""
        return [group.num_heads * self.kv_heads // self.num_heads for group in self.groups]

    def split_queries(self, x: Float[Array, "*B H D"]) -> list[Array]:
        """Splits query heads into those of each group."""
        heads = [group.num_heads for group in self.groups]
        return jnp.split(x, np.cumsum(heads)[:-1], axis=-2)

    def split_keys(self, x: Array, axis: int = -2) -> list[Array]:
        """Splits an axis of key heads into those of each group."""
        return jnp.split(x, np.cumsum(self.kv_heads_of_groups)[:-1], axis=axis)
