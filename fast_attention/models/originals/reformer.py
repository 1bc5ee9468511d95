"""reformer-pytorch's models by its keyword names: Reformer, ReformerLM, ReformerEncoderDecoder.

Defaults are those of version 1.4.4. Fixed or added here: any length without padding, rotary
positions also in dense attention, dropout after attention also in the language model, deterministic
hashing in evaluation, local heads also apply a mask of pairs (the original ignores it), and unknown
keywords are errors.

Reference: Kitaev et al. Reformer: the efficient Transformer. arXiv:2001.04451.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from flax import nnx

from fast_attention.layers.attention.config import AttentionConfig, HeadGroup
from fast_attention.layers.attention.multi_head import MultiHeadAttention
from fast_attention.layers.stack.stack import Stack, StackConfig
from fast_attention.layers.stack.sublayer import (
    FeedForwardConfig,
    MemoryConfig,
    NormConfig,
    SublayerConfig,
)
from fast_attention.mechanisms.local.fn import make_local_attention
from fast_attention.mechanisms.lsh.fn import make_lsh_attention
from fast_attention.models.config import LanguageModelConfig
from fast_attention.models.encoder_decoder import EncoderDecoder
from fast_attention.models.language_model import LanguageModel
from fast_attention.models.originals.keywords import (
    REQUIRED,
    chosen_layers,
    complete,
    head_width,
    split_prefixes,
)

# The epsilon of LayerNorm in the original.
_LAYER = NormConfig("layer", epsilon=1e-5)

REFORMER = {
    "dim": REQUIRED,
    "depth": REQUIRED,
    "heads": 8,
    "dim_head": None,
    "max_seq_len": None,
    "bucket_size": 64,
    "n_hashes": 8,
    "ff_chunks": 100,
    "attn_chunks": None,
    "causal": False,
    "weight_tie": False,
    "lsh_dropout": 0.0,
    "ff_dropout": 0.0,
    "ff_activation": None,
    "ff_mult": 4,
    "ff_glu": False,
    "post_attn_dropout": 0.0,
    "layer_dropout": 0.0,
    "lsh_attend_across_buckets": True,
    "lsh_allow_duplicate_attention": True,
    "random_rotations_per_head": False,
    "twin_attention": False,
    "use_scale_norm": False,
    "use_rezero": False,
    "use_full_attn": False,
    "full_attn_thres": 0,
    "reverse_thres": 0,
    "num_mem_kv": 0,
    "one_value_head": False,
    "n_local_attn_heads": 0,
    "pkm_layers": (),
    "pkm_num_keys": 128,
    "pkm_norm": "layer",
    "hash_masked": False,
}
"""Keywords of `Reformer` and their defaults. `twin_attention` is from versions before 1.
`hash_masked` is new here: if True, padding is sorted by its hash, as in the original, so its values
change the borders of chunks; if False, padding comes after all buckets."""

REFORMER_LM = {
    **REFORMER,
    "num_tokens": REQUIRED,
    "max_seq_len": REQUIRED,
    "dim_head": 64,
    "n_hashes": 4,
    "emb_dim": None,
    "return_embeddings": False,
    "weight_tie_embedding": False,
    "fixed_position_emb": False,
    "absolute_position_emb": False,
    "axial_position_emb": False,
    "axial_position_shape": None,
    "axial_position_dims": None,
}
"""Keywords of `ReformerLM` and their defaults. `axial_position_dims` is new here: the widths of
axial vectors that are concatenated instead of added."""


LSH_SELF_ATTENTION = {
    "dim": REQUIRED,
    "heads": 8,
    "dim_head": None,
    "bucket_size": 64,
    "n_hashes": 8,
    "causal": False,
    "attn_chunks": 1,
    "random_rotations_per_head": False,
    "attend_across_buckets": True,
    "allow_duplicate_attention": True,
    "rehash_each_round": True,
    "drop_for_hash_rate": 0.0,
    "num_mem_kv": 0,
    "one_value_head": False,
    "use_full_attn": False,
    "full_attn_thres": None,
    "post_attn_dropout": 0.0,
    "dropout": 0.0,
    "n_local_attn_heads": 0,
    "rotary": False,
    "hash_masked": False,
}
"""Keywords of `LSHSelfAttention` and their defaults; the last two are new here. Use `record` for
weights and buckets instead of ``return_attn``."""


def LSHSelfAttention(*, rngs: nnx.Rngs, dtype: Any = None, **keywords: Any) -> MultiHeadAttention:
    """Only the attention layer of a `Reformer`.

    Args:
      rngs: Source of parameters and hash rotations.
      dtype: Dtype of the computation.
      **keywords: See `LSH_SELF_ATTENTION`. Up to `full_attn_thres` keys, by default `bucket_size`,
        attention is exact.

    Returns:
      The `MultiHeadAttention`. The original's ``keys`` are its context.
    """
    o = complete("LSHSelfAttention", keywords, LSH_SELF_ATTENTION)
    return MultiHeadAttention(o.dim, _attention(o, o.rotary), dtype=dtype, rngs=rngs)


def Reformer(*, rngs: nnx.Rngs, dtype: Any = None, **keywords: Any) -> Stack:
    """A reversible stack of LSH attention and feed-forward layers, without embeddings.

    Args:
      rngs: Source of parameters and hash rotations.
      dtype: Dtype of the computation.
      **keywords: See `REFORMER`. `dim_head` is by default dim / heads. `max_seq_len` (from the
        original's README) has no effect: inputs may have any length.

    Returns:
      The `Stack`. The originals' ``keys`` are its context, and ``input_mask`` its key mask.
    """
    return Stack(_stack(complete("Reformer", keywords, REFORMER), False), dtype=dtype, rngs=rngs)


def ReformerLM(*, rngs: nnx.Rngs, dtype: Any = jnp.float32, **keywords: Any) -> LanguageModel:
    """A language model with a `Reformer`.

    Args:
      rngs: Source of parameters and hash rotations.
      dtype: Dtype of the computation.
      **keywords: See `REFORMER_LM`. Positions are axial, absolute (learned), fixed (sinusoids)
        or, by default, rotary.

    Returns:
      The `LanguageModel`.
    """
    o = complete("ReformerLM", keywords, REFORMER_LM)
    axial, dims = o.axial_position_emb, o.axial_position_dims
    size = max(1, o.bucket_size)  # What is wrong with it is said below.
    shape = o.axial_position_shape or (math.ceil(o.max_seq_len / size), size)
    positions = "axial" if axial else "random" if o.absolute_position_emb else "none"
    positions = "concatenated" if positions == "none" and o.fixed_position_emb else positions
    logits = "normalized" if o.weight_tie_embedding else "dense"
    config = LanguageModelConfig(
        o.num_tokens,
        _stack(o, rotary=positions == "none"),
        max_len=o.max_seq_len,
        emb_dim=o.emb_dim,
        positions=positions,
        axial_shape=tuple(shape) if axial else (),
        axial_features=tuple(dims) if axial and dims else None,
        final_norm=_LAYER,
        norm_before_projection=True,
        logits="none" if o.return_embeddings else logits,
        dtype=dtype,
    )
    return LanguageModel(config, rngs=rngs)


def ReformerEncoderDecoder(
    *,
    dim: int,
    rngs: nnx.Rngs,
    ignore_index: int = 0,
    pad_value: int = 0,
    dtype: Any = jnp.float32,
    **keywords: Any,
) -> EncoderDecoder:
    """Two `ReformerLM`; the second uses the encodings of the first as additional keys.

    Args:
      dim: Width of both.
      rngs: Source of parameters and rotations.
      ignore_index: Targets that are ignored.
      pad_value: Padding after the end of a generated sequence.
      dtype: Dtype of the computation.
      **keywords: Those of `REFORMER_LM`, with the prefix enc_ or dec_. The decoder's buckets are by
        default twice as large as the encoder's.

    Returns:
      The `EncoderDecoder`.
    """
    encoder, decoder = split_prefixes("ReformerEncoderDecoder", keywords)
    size = 2 * encoder.get("bucket_size", REFORMER_LM["bucket_size"])
    both: dict[str, Any] = {"dim": dim, "dtype": dtype}
    return EncoderDecoder(
        ReformerLM(rngs=rngs, **both, **{"return_embeddings": True} | encoder),
        ReformerLM(rngs=rngs, **both, **{"causal": True, "bucket_size": size} | decoder),
        ignore_index=ignore_index,
        pad_value=pad_value,
    )


def _stack(o: SimpleNamespace, rotary: bool) -> StackConfig:
    named = {
        "dropout": o.lsh_dropout,
        "attend_across_buckets": o.lsh_attend_across_buckets,
        "allow_duplicate_attention": o.lsh_allow_duplicate_attention,
        "rehash_each_round": True,
        "drop_for_hash_rate": 0.0,
    }
    attention = _attention(SimpleNamespace(**(vars(o) | named)), rotary)
    feed_forward = FeedForwardConfig(
        o.dim * o.ff_mult, o.ff_activation or "gelu_exact", o.ff_glu, o.ff_chunks, o.ff_dropout
    )
    second = attention if o.twin_attention else feed_forward
    memory = MemoryConfig(o.pkm_num_keys, norm=o.pkm_norm)
    pkm = chosen_layers("pkm_layers", o.pkm_layers, o.depth)
    norm = NormConfig("rezero") if o.use_rezero else _LAYER
    return StackConfig(
        o.dim,
        tuple(
            (SublayerConfig(attention), SublayerConfig(memory if layer in pkm else second))
            for layer in range(1, o.depth + 1)
        ),
        norm=NormConfig("scale", epsilon=1e-5) if o.use_scale_norm and not o.use_rezero else norm,
        reversible=True,
        reverse_threshold=o.reverse_thres,
        tie_blocks=o.weight_tie,
        layer_dropout_rate=o.layer_dropout,
    )


def _attention(o: SimpleNamespace, rotary: bool) -> AttentionConfig:
    head_dim = head_width(o.dim, o.heads, o.dim_head)
    return AttentionConfig(
        _groups(o, rotary),
        head_dim,
        causal=o.causal,
        out_bias=True,
        shared_qk=True,
        one_value_head=o.one_value_head,
        memory=o.num_mem_kv,
        context="append",
        dropout_rate=o.post_attn_dropout,
    )


def _groups(o: SimpleNamespace, rotary: bool) -> tuple[HeadGroup, ...]:
    number = o.n_local_attn_heads
    if not 0 <= number < o.heads:
        raise ValueError(f"n_local_attn_heads={number} must be less than heads={o.heads}.")
    hashed = make_lsh_attention(
        o.bucket_size,
        o.n_hashes,
        unidirectional=o.causal,
        allow_duplicate_attention=o.allow_duplicate_attention,
        count_across_rounds=False,
        attend_across_buckets=o.attend_across_buckets,
        rehash_each_round=o.rehash_each_round,
        drop_for_hash_rate=o.drop_for_hash_rate,
        random_rotations_per_head=o.random_rotations_per_head,
        full_attn_thres=o.full_attn_thres,
        use_full_attn=o.use_full_attn,
        attn_chunks=1 if o.attn_chunks is None else o.attn_chunks,
        rotary=rotary,
        hash_masked=o.hash_masked,
    )
    far = HeadGroup(o.heads - number, hashed, dropout_rate=o.dropout)
    if not number:
        return (far,)
    near = make_local_attention(
        2 * o.bucket_size,
        unidirectional=o.causal,
        look_forward=0 if o.causal else 1,
        shared_qk=True,
    )
    return HeadGroup(number, near, dropout_rate=o.dropout, extra_keys=False), far
