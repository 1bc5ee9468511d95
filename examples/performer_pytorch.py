"""The README of performer-pytorch, example by example.

Each function takes the README's sizes by default, and returns a model and what to call it with.
What that README has wrong and works here: ``Performer`` without `dim_head` is an error there;
`tie_embedding` and `tie_token_embed` are really `tie_embed` and `tie_token_embeds`, and the wrong
name of the second is ignored there, while here a wrong name is an error.

Run all of it, with some GiB of memory: ``python -m examples.performer_pytorch``
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.running import Example, run
from fast_attention import make_fast_softmax_attention
from fast_attention.layers import AttentionConfig, HeadGroup, MultiHeadAttention, redraw_every
from fast_attention.models import EncoderDecoder, Performer, PerformerEncoderDecoder, PerformerLM


def language_model(length: int = 2048, num_tokens: int = 20000, **sizes: Any) -> Example:
    """Performer language model in training, with dropout: logits ``[1, 2048, 20000]``."""
    options = {
        "dim": 512,
        "depth": 12,
        "heads": 8,
        "causal": False,
        "nb_features": 256,
        "feature_redraw_interval": 1000,
        "generalized_attention": False,
        "kernel_fn": "relu",
        "reversible": True,
        "ff_chunks": 10,
        "use_scalenorm": False,
        "use_rezero": False,
        "tie_embed": False,
        "ff_glu": True,
        "emb_dropout": 0.1,
        "ff_dropout": 0.1,
        "attn_dropout": 0.1,
        "local_attn_heads": 4,
        "local_window_size": 256,
    }
    model = PerformerLM(
        num_tokens=num_tokens, max_seq_len=length, **(options | sizes), rngs=nnx.Rngs(0)
    )
    x = jax.random.randint(jax.random.key(0), (1, length), 0, num_tokens)
    mask = jnp.ones(x.shape, bool)
    return Example(
        model, lambda model: model(x, key_mask=mask, deterministic=False, rngs=nnx.Rngs(dropout=1))
    )


def plain_performer(length: int = 2048, dim: int = 512, heads: int = 8) -> Example:
    """Plain Performer, for images or other modalities: ``[1, 2048, 512]``."""
    model = Performer(dim=dim, depth=1, heads=heads, causal=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, length, dim))
    return Example(model, lambda model: model(x))


def _encoder_decoder(length: int, num_tokens: int, dim: int, sizes: dict) -> EncoderDecoder:
    shared = {"num_tokens": num_tokens, "depth": 6, "heads": 8, "max_seq_len": length} | sizes
    both: dict[str, Any] = {f"{x}_{name}": shared[name] for x in ("enc", "dec") for name in shared}
    return PerformerEncoderDecoder(dim=dim, tie_token_embeds=True, **both, rngs=nnx.Rngs(0))


def encoder_decoder_loss(
    length: int = 4096, num_tokens: int = 20000, dim: int = 512, **sizes: Any
) -> Example:
    """Encoder and decoder in training: the loss, a scalar.

    Token 0 is padding and not predicted, so that the target needs no mask besides.
    """
    source = jax.random.randint(jax.random.key(0), (1, length), 0, num_tokens)
    target = jax.random.randint(jax.random.key(1), (1, length), 0, num_tokens)
    mask = jnp.ones(source.shape, bool)
    return Example(
        _encoder_decoder(length, num_tokens, dim, sizes),
        lambda model: model.loss(source, target, source_mask=mask)[0],
    )


def encoder_decoder_generation(
    length: int = 4096,
    new_tokens: int = 512,
    num_tokens: int = 20000,
    dim: int = 512,
    **sizes: Any,
) -> Example:
    """Encoder and decoder writing: tokens ``[1, 512]``.

    Behind the end token of a row, here 1, stands padding, where the original returns fewer tokens.
    """
    source = jax.random.randint(jax.random.key(0), (1, length), 0, num_tokens)
    start = jnp.zeros((1, 1), jnp.int32)
    return Example(
        _encoder_decoder(length, num_tokens, dim, sizes),
        lambda model: model.generate(
            source, start, key=jax.random.key(1), max_new_tokens=new_tokens, eos_token=1
        ),
    )


def self_attention(length: int = 1024, dim: int = 512, dim_head: int = 64) -> Example:
    """A layer of self-attention in linear time, in place of an exact one: ``[1, 1024, 512]``."""
    features = 266  # The original's int(D log D) for heads of width 64.
    favor = make_fast_softmax_attention(nb_features=features, redraw_features=False)
    config = AttentionConfig((HeadGroup(8, favor),), dim_head, causal=False, out_bias=True)
    attn = MultiHeadAttention(dim, config, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, length, dim))
    return Example(attn, lambda attn: attn(x))


def fast_attention(length: int = 512, heads: int = 8, dim_head: int = 64) -> Example:
    """Attention alone, where heads are split already: ``[1, 512, 8, 64]``.

    Heads come behind the length here, as everywhere in JAX; the original has them in front of it.
    """
    shape = (1, length, heads, dim_head)
    q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))
    attn_fn = make_fast_softmax_attention(
        qkv_dim=dim_head, nb_features=256, redraw_features=False, unidirectional=False
    )
    return Example(None, lambda _: attn_fn(q, k, v))


def fixed_projections(length: int = 2048, dim: int = 512, heads: int = 8) -> Example:
    """``fix_projection_matrices_``: after training a model gives the same at every call.

    Here nothing is redrawn but by `redraw_every`, which a training loop calls after each step; the
    interval None fixes the projections there too.
    """
    model = Performer(dim=dim, depth=1, heads=heads, causal=True, rngs=nnx.Rngs(0))
    for step in range(3):
        redraw_every(model, model.config.redraw_interval, step, nnx.Rngs(step))
    redraw_every(model, None, 3, nnx.Rngs(3))
    x = jax.random.normal(jax.random.key(0), (1, length, dim))
    return Example(model, lambda model: model(x))


EXAMPLES = (
    language_model,
    plain_performer,
    encoder_decoder_loss,
    encoder_decoder_generation,
    self_attention,
    fast_attention,
    fixed_projections,
)

if __name__ == "__main__":
    run(EXAMPLES)
