"""linear-attention-transformer's models by its keyword names.

Defaults are those of version 0.19.1. As in the original, ff_glu applies only to the feed-forward
layers after axial and context attention, and heads of axial attention have the width dim / heads.
Fixed or added here: any length without padding, ff_dropout reaches every feed-forward layer,
pkm_num_keys has an effect, keys of any size, rotary positions also with axial attention, and
unknown keywords are errors.

Reference: Shen et al. Efficient Attention. arXiv:1812.01243.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from fast_attention.layers.attention.config import AttentionConfig, HeadGroup
from fast_attention.layers.stack.stack import Stack, StackConfig
from fast_attention.layers.stack.sublayer import (
    FeedForwardConfig,
    LinformerConfig,
    MemoryConfig,
    NormConfig,
    SublayerConfig,
)
from fast_attention.mechanisms.efficient.fn import make_efficient_attention
from fast_attention.mechanisms.local.fn import make_local_attention
from fast_attention.mechanisms.strided.fn import make_strided_attention
from fast_attention.models.config import LanguageModelConfig
from fast_attention.models.language_model import LanguageModel
from fast_attention.models.originals.keywords import (
    REQUIRED,
    chosen_layers,
    complete,
    head_width,
    per_layer,
)

# The epsilon of LayerNorm in the original.
_LAYER = NormConfig("layer", epsilon=1e-5)


class LinformerSettings(NamedTuple):
    """Self-attention with keys and values projected to length k."""

    k: int


class LinformerContextSettings(NamedTuple):
    """Attention to a context of fixed length, projected to length k."""

    seq_len: int
    k: int


LINEAR_ATTENTION_TRANSFORMER = {
    "dim": REQUIRED,
    "depth": REQUIRED,
    "max_seq_len": REQUIRED,
    "heads": 8,
    "dim_head": None,
    "causal": False,
    "reversible": False,
    "ff_chunks": 1,
    "ff_glu": False,
    "ff_dropout": 0.0,
    "attn_layer_dropout": 0.0,
    "attn_dropout": 0.0,
    "blindspot_size": 1,
    "n_local_attn_heads": 0,
    "local_attn_window_size": 128,
    "receives_context": False,
    "attend_axially": False,
    "pkm_layers": (),
    "pkm_num_keys": 128,
    "pkm_norm": "layer",
    "linformer_settings": None,
    "context_linformer_settings": None,
    "shift_tokens": False,
}
"""Keywords of `LinearAttentionTransformer` and their defaults, without `bucket_size`, which had no
effect. `pkm_norm` is new here: "batch" is for weights of product-key-memory before 0.2.
`blindspot_size` applies to causal attention."""

LINEAR_ATTENTION_TRANSFORMER_LM = {
    **LINEAR_ATTENTION_TRANSFORMER,
    "num_tokens": REQUIRED,
    "dim_head": 64,
    "emb_dim": None,
    "return_embeddings": False,
    "use_axial_pos_emb": True,
    "use_rotary_emb": False,
}
"""Keywords of `LinearAttentionTransformerLM` and their defaults."""


def LinearAttentionTransformer(*, rngs: nnx.Rngs, dtype: Any = None, **keywords: Any) -> Stack:
    """A stack of efficient attention and feed-forward layers, without embeddings.

    Args:
      rngs: Source of the parameters.
      dtype: Dtype of the computation.
      **keywords: See `LINEAR_ATTENTION_TRANSFORMER`.

    Returns:
      The `Stack`.
    """
    name = "LinearAttentionTransformer"
    o = complete(name, keywords, LINEAR_ATTENTION_TRANSFORMER)
    return Stack(_stack(o, rotary=False), dtype=dtype, rngs=rngs)


def LinearAttentionTransformerLM(
    *, rngs: nnx.Rngs, dtype: Any = jnp.float32, **keywords: Any
) -> LanguageModel:
    """A language model with a `LinearAttentionTransformer`.

    Args:
      rngs: Source of the parameters.
      dtype: Dtype of the computation.
      **keywords: See `LINEAR_ATTENTION_TRANSFORMER_LM`. Rotary positions come with sinusoids added
        to the embeddings, as in the original.

    Returns:
      The `LanguageModel`.
    """
    name = "LinearAttentionTransformerLM"
    o = complete(name, keywords, LINEAR_ATTENTION_TRANSFORMER_LM)
    window = o.local_attn_window_size
    axial = o.use_axial_pos_emb and not o.use_rotary_emb
    positions = "concatenated" if o.use_rotary_emb else "axial" if axial else "random"
    config = LanguageModelConfig(
        o.num_tokens,
        _stack(o, rotary=o.use_rotary_emb),
        max_len=o.max_seq_len,
        emb_dim=o.emb_dim,
        positions=positions,
        axial_shape=(math.ceil(o.max_seq_len / window), window) if axial else (),
        final_norm=_LAYER,
        logits="none" if o.return_embeddings else "dense",
        dtype=dtype,
    )
    return LanguageModel(config, rngs=rngs)


def _stack(o: SimpleNamespace, rotary: bool) -> StackConfig:
    if o.causal and o.linformer_settings is not None:
        raise ValueError("linformer_settings mix all positions: causal=True has no Linformer.")
    if o.context_linformer_settings is not None and not o.receives_context:
        raise ValueError("context_linformer_settings need receives_context=True.")
    turned = "pairs" if rotary else None
    own = {"out_bias": True, "dropout_rate": o.attn_layer_dropout}
    head_dim = head_width(o.dim, o.heads, o.dim_head)
    far = make_efficient_attention(
        unidirectional=o.causal, blindspot_size=_blindspot_size(o), scale_queries=True
    )
    near = make_local_attention(
        o.local_attn_window_size, unidirectional=o.causal, look_forward=0 if o.causal else 1
    )
    feed_forward = FeedForwardConfig(o.dim * 4, "gelu_exact", False, o.ff_chunks, o.ff_dropout)
    gated = dataclasses.replace(feed_forward, glu=o.ff_glu)
    pkm = chosen_layers("pkm_layers", o.pkm_layers, o.depth)
    shifts = ((1, 0) if o.causal else (1, 0, -1)) if o.shift_tokens else None
    extra = _axial_block(o, own, turned) + _context_block(o, own, head_dim)
    blocks = []
    local = per_layer("n_local_attn_heads", o.n_local_attn_heads, o.depth, o.heads)
    for layer, number in enumerate(local, 1):
        groups = []
        if number:
            groups.append(HeadGroup(number, near, turned, dropout_rate=o.attn_dropout))
        if number < o.heads:
            groups.append(HeadGroup(o.heads - number, far, turned))
        attention = AttentionConfig(tuple(groups), head_dim, causal=o.causal, **own)
        if o.linformer_settings is not None:
            k = o.linformer_settings.k
            attention = LinformerConfig(
                o.heads, o.max_seq_len, k, head_dim, dropout_rate=o.attn_dropout
            )
        second = MemoryConfig(o.pkm_num_keys, norm=o.pkm_norm) if layer in pkm else feed_forward
        blocks.append((SublayerConfig(attention, shifts), SublayerConfig(second, shifts)))
        blocks += [(part, SublayerConfig(gated)) for part in extra]
    return StackConfig(o.dim, tuple(blocks), norm=_LAYER, reversible=o.reversible)


def _blindspot_size(o: SimpleNamespace) -> int:
    """The blindspot of causal attention; the original ignores it in bidirectional attention."""
    if o.causal or o.blindspot_size == 1:
        return o.blindspot_size
    warnings.warn(
        f"blindspot_size={o.blindspot_size} has no effect with causal=False, as in the original; "
        "leave it out, or pass causal=True.",
        stacklevel=5,
    )
    return 1


def _axial_block(o: SimpleNamespace, own: dict[str, Any], rotary: Any) -> list[SublayerConfig]:
    if not o.attend_axially:
        return []
    head_dim = head_width(o.dim, o.heads, None)
    across = make_efficient_attention(unidirectional=o.causal, scale_queries=True)
    strided = make_strided_attention(across, o.local_attn_window_size)
    group = HeadGroup(o.heads, strided, rotary)
    return [SublayerConfig(AttentionConfig((group,), head_dim, causal=o.causal, **own))]


def _context_block(o: SimpleNamespace, own: dict[str, Any], head_dim: int) -> list[SublayerConfig]:
    if not o.receives_context:
        return []
    if o.context_linformer_settings is None:
        group = HeadGroup(o.heads, make_efficient_attention(scale_queries=True))
        return [SublayerConfig(AttentionConfig((group,), head_dim, context="cross", **own))]
    length, k = o.context_linformer_settings
    linformer = LinformerConfig(
        o.heads, length, k, head_dim, cross=True, dropout_rate=o.attn_dropout
    )
    return [SublayerConfig(linformer)]
