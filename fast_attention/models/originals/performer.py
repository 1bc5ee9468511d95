"""performer-pytorch's models by its keyword names: Performer, PerformerLM, PerformerEncoderDecoder.

Defaults are those of version 1.1.4. Fixed here: padding is not attended to, features are stabilised
without using later tokens, and unknown keywords are errors. Nothing is added to features: the
original adds 1e-4, which moves attention towards the plain average, so logits with the same weights
differ by up to 2.5 %.

Reference: Choromanski et al. Rethinking Attention with Performers. arXiv:2009.14794.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fast_attention.layers.attention.config import AttentionConfig, HeadGroup
from fast_attention.layers.stack.stack import Stack, StackConfig
from fast_attention.layers.stack.sublayer import FeedForwardConfig, NormConfig, SublayerConfig
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.efficient.fn import make_efficient_attention
from fast_attention.mechanisms.favor.factories import (
    make_fast_generalized_attention,
    make_fast_softmax_attention,
)
from fast_attention.mechanisms.local.fn import make_local_attention
from fast_attention.models.config import LanguageModelConfig
from fast_attention.models.encoder_decoder import EncoderDecoder
from fast_attention.models.language_model import LanguageModel
from fast_attention.models.originals.keywords import (
    REQUIRED,
    complete,
    head_width,
    per_layer,
    split_prefixes,
)

# The epsilon of LayerNorm and the first gain of ReZero in the original.
_LAYER = NormConfig("layer", epsilon=1e-5)
_REZERO = NormConfig("rezero", gain=1e-3)

PERFORMER = {
    "dim": REQUIRED,
    "depth": REQUIRED,
    "heads": REQUIRED,
    "dim_head": None,
    "local_attn_heads": 0,
    "local_window_size": 256,
    "causal": False,
    "ff_mult": 4,
    "nb_features": None,
    "feature_redraw_interval": 1000,
    "reversible": False,
    "ff_chunks": 1,
    "generalized_attention": False,
    "kernel_fn": "relu",
    "use_scalenorm": False,
    "use_rezero": False,
    "ff_glu": False,
    "ff_dropout": 0.0,
    "attn_dropout": 0.0,
    "cross_attend": False,
    "no_projection": False,
    "auto_check_redraw": True,
    "qkv_bias": True,
    "attn_out_bias": True,
    "shift_tokens": False,
    "local_rotary_shift": True,
}
"""Keywords of `Performer` and their defaults; the last one is new here. pip installs
performer-pytorch with local-attention 1.11, whose bidirectional local heads rotate a query as if it
were one window later. So weights trained with older versions give other results (outputs differ by
2 to 5 %). Use ``local_rotary_shift=False`` for those weights: distances are then correct."""

PERFORMER_LM = {
    **PERFORMER,
    "num_tokens": REQUIRED,
    "max_seq_len": REQUIRED,
    "dim_head": 64,
    "qkv_bias": False,
    "attn_out_bias": False,
    "emb_dropout": 0.0,
    "tie_embed": False,
    "rotary_position_emb": True,
    "axial_position_emb": False,
    "axial_position_shape": None,
}
"""Keywords of `PerformerLM` and their defaults."""


def Performer(*, rngs: nnx.Rngs, dtype: Any = None, **keywords: Any) -> Stack:
    """A stack of FAVOR+ attention and feed-forward layers, without embeddings.

    Args:
      rngs: Source of parameters and projections.
      dtype: Dtype of the computation.
      **keywords: See `PERFORMER`. `dim_head` is by default dim / heads, `nb_features`
        D log D; `feature_redraw_interval` counts optimiser steps (`redraw_due`), and nothing is
        redrawn with ``auto_check_redraw=False``.

    Returns:
      The `Stack`; the context of ``cross_attend`` has its features.
    """
    return Stack(_stack(complete("Performer", keywords, PERFORMER)), dtype=dtype, rngs=rngs)


def PerformerLM(*, rngs: nnx.Rngs, dtype: Any = jnp.float32, **keywords: Any) -> LanguageModel:
    """A language model with a `Performer`.

    Args:
      rngs: Source of parameters and projections.
      dtype: Dtype of the computation.
      **keywords: See `PERFORMER_LM`. Rotary positions come with sinusoids added to the
        embeddings, as in the original; without them positions are axial or learned.

    Returns:
      The `LanguageModel`.
    """
    o = complete("PerformerLM", keywords, PERFORMER_LM)
    shape = o.axial_position_shape or (math.ceil(o.max_seq_len / 64), 64)
    axial = o.axial_position_emb and not o.rotary_position_emb
    positions = "concatenated" if o.rotary_position_emb else "axial" if axial else "random"
    config = LanguageModelConfig(
        o.num_tokens,
        _stack(o),
        max_len=o.max_seq_len,
        positions=positions,
        axial_shape=tuple(shape) if axial else (),
        dropout_rate=o.emb_dropout,
        final_norm=_LAYER,
        logits="tied" if o.tie_embed else "dense",
        dtype=dtype,
    )
    return LanguageModel(config, rngs=rngs)


def PerformerEncoderDecoder(
    *,
    dim: int,
    rngs: nnx.Rngs,
    ignore_index: int = 0,
    pad_value: int = 0,
    tie_token_embeds: bool = False,
    no_projection: bool = False,
    dtype: Any = jnp.float32,
    **keywords: Any,
) -> EncoderDecoder:
    """Two `PerformerLM`; the second attends to the encodings of the first.

    Args:
      dim: Width of both.
      rngs: Source of parameters and projections.
      ignore_index: Targets that are ignored.
      pad_value: Padding after the end of a generated sequence.
      tie_token_embeds: Both use the same token embedding.
      no_projection: Option of both.
      dtype: Dtype of the computation.
      **keywords: Those of `PERFORMER_LM`, with the prefix enc_ or dec_.

    Returns:
      The `EncoderDecoder`.
    """
    encoder, decoder = split_prefixes("PerformerEncoderDecoder", keywords)
    both: dict[str, Any] = {"dim": dim, "no_projection": no_projection, "dtype": dtype}
    return EncoderDecoder(
        PerformerLM(rngs=rngs, **both, **encoder),
        PerformerLM(rngs=rngs, **both, **{"causal": True, "cross_attend": True} | decoder),
        ignore_index=ignore_index,
        pad_value=pad_value,
        tie_embeddings=tie_token_embeds,
    )


def _stack(o: SimpleNamespace) -> StackConfig:
    head_dim = head_width(o.dim, o.heads, o.dim_head)
    local = per_layer("local_attn_heads", o.local_attn_heads, o.depth, o.heads)
    forward = 0 if o.causal else 1
    # One function for all layers, so that equal layers are known to be equal.
    fast = _attention_fn(o, head_dim, o.causal)
    near = make_local_attention(o.local_window_size, unidirectional=o.causal, look_forward=forward)
    offset = o.local_window_size if o.local_rotary_shift and not o.causal else 0
    rotary = "pairs" if getattr(o, "rotary_position_emb", False) else None
    own = {"use_bias": o.qkv_bias, "out_bias": o.attn_out_bias, "dropout_rate": o.attn_dropout}
    feed_forward = FeedForwardConfig(
        o.dim * o.ff_mult, "gelu_exact", o.ff_glu, o.ff_chunks, o.ff_dropout
    )
    shifts = ((0, 1) if o.causal else (-1, 0, 1)) if o.shift_tokens else None
    blocks = []
    for number in local:
        groups = [HeadGroup(o.heads - number, fast, rotary)] if number < o.heads else []
        if number:
            groups.append(HeadGroup(number, near, "halves", offset, dropout_rate=o.attn_dropout))
        attention = AttentionConfig(tuple(groups), head_dim, causal=o.causal, **own)
        blocks.append((SublayerConfig(attention, shifts), SublayerConfig(feed_forward, shifts)))
        if o.cross_attend:
            across = HeadGroup(o.heads, fast if not o.causal else _attention_fn(o, head_dim, False))
            cross = AttentionConfig((across,), head_dim, context="cross", **own)
            blocks.append((SublayerConfig(cross), SublayerConfig(feed_forward)))
    norm = _REZERO if o.use_rezero else _LAYER
    return StackConfig(
        o.dim,
        tuple(blocks),
        norm=NormConfig("scale", epsilon=1e-5) if o.use_scalenorm else norm,
        reversible=o.reversible,
        merge="sum",
        redraw_interval=o.feature_redraw_interval if o.auto_check_redraw else None,
    )


def _attention_fn(o: SimpleNamespace, head_dim: int, causal: bool) -> AttentionFn:
    if o.no_projection:
        return make_efficient_attention(unidirectional=causal)
    features = o.nb_features
    if features is None:
        features = max(1, int(head_dim * math.log(head_dim)))
    if not o.generalized_attention:
        return make_fast_softmax_attention(
            nb_features=features, redraw_features=False, unidirectional=causal
        )
    return make_fast_generalized_attention(
        nb_features=features,
        features_type="ortho",
        kernel_fn=o.kernel_fn,
        normalize_data=True,
        unidirectional=causal,
    )
