"""The README of linear-attention-transformer, example by example.

Each function takes the README's sizes by default, and returns a model and what to call it with.
What that README has wrong: the language model's output is as wide as its vocabulary, 20000, not
512. What it asks for and does not get from the original, but here: `ff_glu` and `ff_dropout` in
every feed-forward layer, an embedding narrower than the stream together with encodings, and image
attention with a stride or without padding.

Run all of it, with some GiB of memory: ``python -m examples.linear_attention_transformer``
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.running import Example, run
from fast_attention.layers import ImageLinearAttention
from fast_attention.models import (
    LinearAttentionTransformer,
    LinearAttentionTransformerLM,
    LinformerContextSettings,
    LinformerSettings,
)

TOKENS = 20000


def _tokens(seed: int, length: int, num_tokens: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (1, length), 0, num_tokens)


def language_model(length: int = 8192, num_tokens: int = TOKENS, **sizes: Any) -> Example:
    """Language model in training, with dropout: logits ``[1, 8192, 20000]``.

    The linear heads see whole blocks of 64 tokens in the past, the local ones what lies between.
    """
    options = {
        "dim": 512,
        "heads": 8,
        "depth": 1,
        "causal": True,
        "ff_dropout": 0.1,
        "attn_layer_dropout": 0.1,
        "attn_dropout": 0.1,
        "emb_dim": 128,
        "dim_head": 128,
        "blindspot_size": 64,
        "n_local_attn_heads": 4,
        "local_attn_window_size": 128,
        "reversible": True,
        "ff_chunks": 2,
        "ff_glu": True,
        "attend_axially": False,
        "shift_tokens": True,
    }
    model = LinearAttentionTransformerLM(
        num_tokens=num_tokens, max_seq_len=length, **(options | sizes), rngs=nnx.Rngs(0)
    )
    x = _tokens(0, length, num_tokens)
    return Example(model, lambda model: model(x, deterministic=False, rngs=nnx.Rngs(dropout=1)))


def transformer(length: int = 8192, dim: int = 512, **sizes: Any) -> Example:
    """The stack alone, of local and linear heads: ``[1, 8192, 512]``."""
    options = {"heads": 8, "depth": 1, "n_local_attn_heads": 4} | sizes
    model = LinearAttentionTransformer(dim=dim, max_seq_len=length, **options, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, length, dim))
    return Example(model, lambda model: model(x))


def encoder_decoder(length: int = 4096, num_tokens: int = TOKENS, **sizes: Any) -> Example:
    """Encoder and decoder, both reversible: logits ``[1, 4096, 20000]``."""
    shared = {
        "num_tokens": num_tokens,
        "dim": 512,
        "heads": 8,
        "depth": 6,
        "max_seq_len": length,
        "reversible": True,
        "n_local_attn_heads": 4,
    } | sizes
    models = nnx.Dict(
        enc=LinearAttentionTransformerLM(**shared, return_embeddings=True, rngs=nnx.Rngs(0)),
        dec=LinearAttentionTransformerLM(
            **shared, causal=True, receives_context=True, rngs=nnx.Rngs(1)
        ),
    )
    src, tgt = _tokens(0, length, num_tokens), _tokens(1, length, num_tokens)
    src_mask, tgt_mask = jnp.ones(src.shape, bool), jnp.ones(tgt.shape, bool)

    def call(models: Any) -> jax.Array:
        context = models["enc"](src, key_mask=src_mask)
        return models["dec"](tgt, context=context, key_mask=tgt_mask, context_mask=src_mask)

    return Example(models, call)


def linformer(
    length: int = 4096, projected: int = 256, num_tokens: int = TOKENS, **sizes: Any
) -> Example:
    """Linformer in place of linear attention, of a fixed length: logits ``[1, 4096, 20000]``."""
    options = {"dim": 512, "heads": 8, "depth": 6} | sizes
    model = LinearAttentionTransformerLM(
        num_tokens=num_tokens,
        max_seq_len=length,
        linformer_settings=LinformerSettings(k=projected),
        **options,
        rngs=nnx.Rngs(0),
    )
    x = _tokens(0, length, num_tokens)
    return Example(model, lambda model: model(x))


def linformer_context(
    length: int = 4096,
    context_length: int = 2048,
    projected: int = 256,
    num_tokens: int = TOKENS,
    **sizes: Any,
) -> Example:
    """Linformer for a context of fixed length: logits ``[1, 4096, 20000]``."""
    options = {"dim": 512, "heads": 8, "depth": 6} | sizes
    model = LinearAttentionTransformerLM(
        num_tokens=num_tokens,
        max_seq_len=length,
        causal=True,
        context_linformer_settings=LinformerContextSettings(seq_len=context_length, k=projected),
        receives_context=True,
        **options,
        rngs=nnx.Rngs(0),
    )
    x = _tokens(0, length, num_tokens)
    context = jax.random.normal(jax.random.key(1), (1, context_length, options["dim"]))
    return Example(model, lambda model: model(x, context=context))


def images(side: int = 256, channels: int = 32, key_dim: int = 64) -> Example:
    """Efficient attention among the pixels of an image: ``[1, 32, 256, 256]``."""
    attn = ImageLinearAttention(
        channels, num_heads=8, key_dim=key_dim, channel_first=True, rngs=nnx.Rngs(0)
    )
    image = jax.random.normal(jax.random.key(0), (1, channels, side, side))
    return Example(attn, lambda attn: attn(image))


EXAMPLES = (language_model, transformer, encoder_decoder, linformer, linformer_context, images)

if __name__ == "__main__":
    run(EXAMPLES)
