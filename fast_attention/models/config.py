"""Configuration of language models."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, get_args

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.layers.attention.config import AttentionConfig, Decay, HeadGroup
from fast_attention.layers.dropout import check_rate
from fast_attention.layers.feed_forward import Activation, activation_of
from fast_attention.layers.stack.stack import StackConfig
from fast_attention.layers.stack.sublayer import FeedForwardConfig, NormConfig, SublayerConfig
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.softmax_attention import make_softmax_attention

POSITIONS = ("learned", "sinusoidal", "rotary", "none")
ADDED_POSITIONS = ("learned", "random", "sinusoidal", "concatenated", "axial", "none")
LOGITS = ("dense", "tied", "scaled", "normalized", "none")


@dataclasses.dataclass(frozen=True)
class LogitTransform:
    """A dense layer, an activation and a norm before the logits, as in BERT and ESM-2.

    Attributes:
      activation: As for `fast_attention.layers.FeedForward`.
      epsilon: Epsilon of the layer norm.
    """

    activation: Activation = "gelu_exact"
    epsilon: float = 1e-5


@dataclasses.dataclass(frozen=True)
class TokenDropout:
    """Embeddings of masked tokens are zero, and the others scaled up, as in ESM-2.

    Attributes:
      mask_token: Id of the mask token.
      rate: Average share of masked tokens in training.
    """

    mask_token: int
    rate: float = 0.15 * 0.8


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Shape of a `LanguageModel`.

    Attributes:
      vocab_size: Tokens, V.
      stack: The layers.
      max_len: Maximum length with learned positions; others have no limit.
      emb_dim: Width of the embeddings, by default that of the stack; dense layers convert between
        them.
      positions: Added to the embeddings: "learned" (initialized as sinusoids), "random" (learned,
        initialized as normal), "sinusoidal", "concatenated" (sines, then cosines), "axial" or
        "none". Rotary positions are an option of the heads (`HeadGroup`).
      axial_shape: Positions along each axis for "axial"; the first axis is the slowest.
      axial_features: Widths of the axes' vectors for concatenation; None adds them.
      dropout_rate: Dropout rate of the embeddings.
      final_norm: Whether there is a norm after the stack.
      norm_before_projection: The final norm comes before the dense layer back to `emb_dim`.
      logits: "dense": a separate layer; products with the token embeddings: "tied", "scaled" by 1 /
        sqrt(width), or "normalized" to unit vectors; "none": the model ends with the norm.
      dtype: Dtype of the computation; parameters, logits and decoding states are float32.
      embed_norm: Norm of the embeddings including positions; None for no norm.
      token_dropout: See `TokenDropout`; None for no token dropout.
      transform: See `LogitTransform`; tied logits then have a bias. None for no transform.
    """

    vocab_size: int
    stack: StackConfig
    max_len: int
    emb_dim: int | None = None
    positions: str = "none"
    axial_shape: tuple[int, ...] = ()
    axial_features: tuple[int, ...] | None = None
    dropout_rate: float = 0.0
    final_norm: NormConfig = NormConfig()
    norm_before_projection: bool = False
    logits: str = "dense"
    dtype: Any = jnp.float32
    embed_norm: NormConfig | None = None
    token_dropout: TokenDropout | None = None
    transform: LogitTransform | None = None

    def __post_init__(self):
        """Checks every field.

        Raises:
          ValueError: For invalid values; the message says what is valid.
        """
        for name in ("vocab_size", "max_len", "embedding_features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.positions not in ADDED_POSITIONS:
            raise ValueError(f"positions must be one of {ADDED_POSITIONS}, got {self.positions!r}.")
        if (self.positions == "axial") != bool(self.axial_shape):
            raise ValueError(
                "axial_shape is needed for axial positions, and only for these: got positions="
                f"{self.positions!r}, axial_shape={self.axial_shape}."
            )
        if self.axial_shape and math.prod(self.axial_shape) < self.max_len:
            raise ValueError(
                f"axial_shape={self.axial_shape} has {math.prod(self.axial_shape)} places, fewer "
                f"than max_len={self.max_len}."
            )
        if self.logits not in LOGITS:
            raise ValueError(f"logits must be one of {LOGITS}, got {self.logits!r}.")
        if self.transform is not None and self.logits not in ("dense", "tied"):
            raise ValueError(
                f"transform comes before 'dense' or 'tied' logits, got logits={self.logits!r}."
            )
        check_rate(self.dropout_rate)

    @property
    def embedding_features(self) -> int:
        """Width of the embeddings, also if `emb_dim` is None."""
        return self.stack.features if self.emb_dim is None else self.emb_dim


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape of a Transformer; the defaults are those of Google's protein_lm.

    Attributes:
      vocab_size: Tokens.
      emb_dim: Width of the residual stream.
      num_heads: Query heads.
      num_kv_heads: Key/value heads, a divisor of `num_heads`; None means `num_heads`.
      num_layers: Blocks.
      qkv_dim: Width of all query heads together.
      mlp_dim: Width inside the feed-forward layers.
      max_len: Maximum length with learned positions; others have no limit.
      causal: Position t sees positions 0..t, with every attention function.
      dropout_rate: Dropout rate of embeddings, of the increments of layers, and in feed-forward
        layers.
      attention_dropout_rate: Dropout rate of attention weights.
      positions: 'learned' (initialized as sinusoids), 'sinusoidal', 'rotary' or 'none'.
      tie_embeddings: Logits are products with the token embeddings, divided by sqrt(emb_dim).
      shift_tokens: Half of the input channels of every attention and feed-forward part come from
        the previous position; causal models only.
      activation: A key of `fast_attention.layers.ACTIVATIONS`, or an elementwise function.
      dtype: Dtype of the computation; parameters, logits and decoding states are float32.
      qk_norm: Queries and keys of a head have one norm, learned as a temperature, see
        `fast_attention.layers.UnitQueryKey`.
      decay: Decay of the weights of earlier tokens: 'fixed', 'learned' or computed from the 'token'
        (`fast_attention.layers.HeadDecay`); causal linear attention only.
      remat: Store only the stream before each attention and feed-forward part, and recompute the
        rest in the backward pass: less memory, about a third more time.
      redraw_interval: Training steps between two redraws of random features; None keeps them.
      recalibrate_interval: Training steps between two fits of tuned features to the running
        averages of queries and keys, for attention functions with ``moment_decay``.
      attention_bias: Whether the dense layers of attention have biases.
      norm_after: Each norm follows the sum of the stream and the increment (post-norm), as in BERT;
        there is then no final norm.
      norm_epsilon: Epsilon of all layer norms.
      embed_norm: Normalise the embeddings including positions.
      rotary_base: Ratio of the longest to the shortest wavelength of rotary positions.
      token_dropout: Id of the mask token: its embeddings are zero and the others are scaled up, as
        in ESM-2 (`TokenDropout`); None for no token dropout.
      logits_transform: A dense layer, the activation and a norm before the logits, as in BERT and
        ESM-2; tied logits are then not scaled, and have a bias.
      exact_layers: Layers, counted from 1, that use exact attention instead of the given function.
    """

    vocab_size: int
    emb_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int | None = None
    num_layers: int = 6
    qkv_dim: int = 512
    mlp_dim: int = 2048
    max_len: int = 2048
    causal: bool = True
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    positions: str = "learned"
    tie_embeddings: bool = False
    shift_tokens: bool = False
    activation: Activation = "gelu"
    dtype: Any = jnp.float32
    qk_norm: bool = False
    decay: Decay | None = None
    remat: bool = False
    redraw_interval: int | None = None
    recalibrate_interval: int | None = None
    attention_bias: bool = False
    norm_after: bool = False
    norm_epsilon: float = 1e-6
    embed_norm: bool = False
    rotary_base: float = 10000.0
    token_dropout: int | None = None
    logits_transform: bool = False
    exact_layers: tuple[int, ...] = ()

    def __post_init__(self):
        """Checks every field.

        Raises:
          ValueError: For invalid values; the message says what is valid.
        """
        # JSON and gin have lists.
        object.__setattr__(self, "exact_layers", tuple(sorted(set(self.exact_layers))))
        if not all(number in range(1, self.num_layers + 1) for number in self.exact_layers):
            raise ValueError(
                f"exact_layers are numbers of layers, 1 to {self.num_layers}, got "
                f"{list(self.exact_layers)}."
            )
        for name in (
            "vocab_size",
            "emb_dim",
            "num_heads",
            "num_layers",
            "qkv_dim",
            "mlp_dim",
            "max_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_rate(self.dropout_rate)
        check_rate(self.attention_dropout_rate, "attention_dropout_rate")
        if self.qkv_dim % self.num_heads:
            raise ValueError(
                f"qkv_dim={self.qkv_dim} is the width of all heads together: it must be a "
                f"multiple of num_heads={self.num_heads}."
            )
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}."
            )
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {self.positions!r}.")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"Rotary positions need heads of even width, but qkv_dim={self.qkv_dim} / "
                f"num_heads={self.num_heads} = {self.head_dim}."
            )
        activation_of(self.activation)
        if not 0 < self.norm_epsilon < math.inf:
            raise ValueError(f"norm_epsilon must be above 0, got {self.norm_epsilon}.")
        if self.token_dropout is not None and not 0 <= self.token_dropout < self.vocab_size:
            raise ValueError(
                f"token_dropout is the id of the mask token: it must be below vocab_size="
                f"{self.vocab_size}, got {self.token_dropout}."
            )
        if self.decay not in (None, *get_args(Decay)):
            raise ValueError(f"decay must be one of {get_args(Decay)} or None, got {self.decay!r}.")
        flags = ("attention_bias", "norm_after", "embed_norm", "logits_transform")
        for name in ("qk_norm", "remat", *flags):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating point type, got {self.dtype!r}.")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.qkv_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, also if `num_kv_heads` is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def language_model(
        self, attention_fn: Callable[..., Array] | None = None
    ) -> LanguageModelConfig:
        """The model of this shape with an attention function; None is exact attention."""
        exact = make_softmax_attention()
        chosen = exact if attention_fn is None else as_attention_fn(attention_fn)
        feed_forward = FeedForwardConfig(
            self.mlp_dim, activation=self.activation, dropout_rate=self.dropout_rate
        )
        norm = NormConfig("layer", self.norm_epsilon)
        mask_token = self.token_dropout
        shifts = (0, 1) if self.shift_tokens else None
        behind = SublayerConfig(feed_forward, shifts)
        blocks = tuple(
            (
                SublayerConfig(
                    self._attention(exact, None)
                    if number in self.exact_layers
                    else self._attention(chosen, self.decay),
                    shifts,
                ),
                behind,
            )
            for number in range(1, self.num_layers + 1)
        )
        return LanguageModelConfig(
            self.vocab_size,
            StackConfig(
                self.emb_dim,
                blocks,
                norm=dataclasses.replace(norm, after=self.norm_after),
                remat=self.remat,
                redraw_interval=self.redraw_interval,
                recalibrate_interval=self.recalibrate_interval,
            ),
            max_len=self.max_len,
            positions="none" if self.positions == "rotary" else self.positions,
            dropout_rate=self.dropout_rate,
            final_norm=NormConfig("none") if self.norm_after else norm,
            logits=self._logits,
            dtype=self.dtype,
            embed_norm=norm if self.embed_norm else None,
            token_dropout=None if mask_token is None else TokenDropout(mask_token),
            transform=self._transform,
        )

    def _attention(self, attention_fn: AttentionFn, decay: Any) -> AttentionConfig:
        """A layer with an attention function."""
        group = HeadGroup(
            self.num_heads,
            attention_fn,
            rotary="halves" if self.positions == "rotary" else None,
            rotary_base=self.rotary_base,
            dropout_rate=self.attention_dropout_rate,
        )
        return AttentionConfig(
            (group,),
            self.head_dim,
            num_kv_heads=self.kv_heads,
            causal=self.causal,
            use_bias=self.attention_bias,
            out_bias=self.attention_bias,
            qk_norm="unit" if self.qk_norm else None,
            decay=decay,
            dropout_rate=self.dropout_rate,
        )

    @property
    def _logits(self) -> str:
        if not self.tie_embeddings:
            return "dense"
        return "tied" if self.logits_transform else "scaled"

    @property
    def _transform(self) -> LogitTransform | None:
        if not self.logits_transform:
            return None
        return LogitTransform(self.activation, self.norm_epsilon)
