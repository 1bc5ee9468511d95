"""The READMEs of reformer-pytorch, the early (0.12) and the last (1.4), example by example.

Each function takes the README's sizes by default, and returns a model and what to call it with.
What differs: any length and bucket size will do, so that ``Autopadder`` has no counterpart; the
``keys`` of the original are a context. What those READMEs have wrong and works here:
`twin_attention` is an error in 1.4, as is `max_seq_len` of ``Reformer``; and dropout after
attention is lost in ``ReformerLM``. The positions that the last README gives ``Reformer`` belong to
``ReformerLM``; here they are added to the features of the image in plain sight.

Run all of it, with some GiB of memory: ``python -m examples.reformer_pytorch``
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.running import Example, run
from fast_attention import lsh_attention
from fast_attention.layers import AxialPositions
from fast_attention.models import (
    EncoderDecoder,
    LSHSelfAttention,
    Reformer,
    ReformerEncoderDecoder,
    ReformerLM,
    Sampling,
    generate,
    next_token_loss,
    record,
)

TOKENS = 20000


def _tokens(seed: int, length: int, num_tokens: int = TOKENS) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (1, length), 0, num_tokens)


def language_model(length: int = 8192, num_tokens: int = TOKENS, **sizes: Any) -> Example:
    """Reformer language model in training, with dropout: logits ``[1, 8192, 20000]``."""
    options = {
        "dim": 1024,
        "depth": 12,
        "heads": 8,
        "lsh_dropout": 0.1,
        "ff_dropout": 0.1,
        "post_attn_dropout": 0.1,
        "layer_dropout": 0.1,
        "causal": True,
        "bucket_size": 64,
        "n_hashes": 4,
        "emb_dim": 128,
        "ff_chunks": 200,
        "attn_chunks": 8,
        "num_mem_kv": 128,
        "twin_attention": False,
        "full_attn_thres": 1024,
        "reverse_thres": 1024,
        "use_scale_norm": False,
        "use_rezero": False,
        "one_value_head": False,
        "weight_tie": False,
        "weight_tie_embedding": False,
        "n_local_attn_heads": 2,
        "pkm_layers": (4, 7),
        "pkm_num_keys": 128,
        "use_full_attn": False,
    }
    model = ReformerLM(
        num_tokens=num_tokens, max_seq_len=length, **(options | sizes), rngs=nnx.Rngs(0)
    )
    x = _tokens(0, length, num_tokens)
    return Example(model, lambda model: model(x, deterministic=False, rngs=nnx.Rngs(dropout=1)))


def reformer(length: int = 8192, dim: int = 512, depth: int = 12, **sizes: Any) -> Example:
    """Just a stack of reversible LSH attention, in training: ``[1, 8192, 512]``."""
    model = Reformer(
        dim=dim, depth=depth, heads=8, lsh_dropout=0.1, causal=True, **sizes, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (1, length, dim))
    return Example(model, lambda model: model(x, deterministic=False, rngs=nnx.Rngs(dropout=1)))


def self_attention(
    batch: int = 10, length: int = 1024, dim: int = 128, bucket_size: int = 64
) -> Example:
    """Self-attention with LSH: ``[10, 1024, 128]``. Queries and keys are one projection."""
    attn = LSHSelfAttention(
        dim=dim, heads=8, bucket_size=bucket_size, n_hashes=8, causal=False, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (batch, length, dim))
    return Example(attn, lambda attn: attn(x))


def attention(
    batch: int = 10, length: int = 1024, dim: int = 128, bucket_size: int = 64
) -> Example:
    """LSH attention alone: output ``[10, 1024, 128]``, weights and buckets of each round.

    Heads have an axis of their own, here of one head: ``[10, 1024, 1, 128]``. The original numbers
    the buckets of all rounds on; here each round starts from 0 and has a row of its own.
    """
    qk, v = jax.random.normal(jax.random.key(0), (2, batch, length, 1, dim))

    def call(_: None) -> tuple[jax.Array, jax.Array, jax.Array]:
        out, weights, buckets = lsh_attention(
            qk,
            v,
            jax.random.key(1),
            bucket_size=bucket_size,
            n_hashes=16,
            causal=True,
            return_weights=True,
        )
        assert weights is not None and buckets is not None
        return out[:, :, 0], weights[:, 0], buckets[:, 0]

    return Example(None, call)


def masking(
    length: int = 8192,
    context_length: int = 512,
    dim: int = 1024,
    num_tokens: int = TOKENS,
    **sizes: Any,
) -> Example:
    """Masks of the sequence and of its context; logits ``[1, 8192, 20000]``."""
    options = {"depth": 1, "ff_chunks": 8} | sizes
    model = ReformerLM(
        num_tokens=num_tokens,
        dim=dim,
        max_seq_len=length,
        causal=True,
        **options,
        rngs=nnx.Rngs(0),
    )
    c = jax.random.normal(jax.random.key(0), (1, context_length, dim))
    x = _tokens(1, length, num_tokens)
    i_mask, c_mask = jnp.ones((1, length), bool), jnp.ones((1, context_length), bool)
    return Example(model, lambda model: model(x, context=c, key_mask=i_mask, context_mask=c_mask))


def feed_forward(length: int = 8192, num_tokens: int = TOKENS, **sizes: Any) -> Example:
    """Another activation, gated, and a wider feed-forward layer: logits ``[1, 8192, 20000]``."""
    options = {
        "dim": 512,
        "depth": 6,
        "ff_chunks": 8,
        "ff_dropout": 0.1,
        "ff_mult": 6,
        "ff_activation": "leaky_relu",
        "ff_glu": True,
    } | sizes
    model = ReformerLM(num_tokens=num_tokens, max_seq_len=length, **options, rngs=nnx.Rngs(0))
    x = _tokens(0, length, num_tokens)
    return Example(model, lambda model: model(x, deterministic=False, rngs=nnx.Rngs(dropout=1)))


def axial_positions(
    shape: tuple[int, int] = (128, 64),
    widths: tuple[int, int] = (512, 512),
    num_tokens: int = TOKENS,
    depth: int = 12,
    **sizes: Any,
) -> Example:
    """Axial positions, the two vectors of a position concatenated: logits ``[1, 8192, 20000]``."""
    length = shape[0] * shape[1]
    options = {"ff_chunks": 8, "attn_chunks": 2} | sizes
    model = ReformerLM(
        num_tokens=num_tokens,
        dim=sum(widths),
        depth=depth,
        max_seq_len=length,
        causal=True,
        axial_position_emb=True,
        axial_position_shape=shape,
        axial_position_dims=widths,
        **options,
        rngs=nnx.Rngs(0),
    )
    x = _tokens(0, length, num_tokens)
    return Example(model, lambda model: model(x))


def translation(length: int = 4096, num_tokens: int = TOKENS, **sizes: Any) -> Example:
    """Sequence to sequence: the encodings are keys of the decoder; logits ``[1, 4096, 20000]``."""
    shared = {
        "num_tokens": num_tokens,
        "emb_dim": 128,
        "dim": 1024,
        "depth": 12,
        "heads": 8,
        "max_seq_len": length,
        "fixed_position_emb": True,
    } | sizes
    models = nnx.Dict(
        encoder=ReformerLM(**shared, return_embeddings=True, rngs=nnx.Rngs(0)),
        decoder=ReformerLM(**shared, causal=True, rngs=nnx.Rngs(1)),
    )
    x, yi = _tokens(0, length, num_tokens), _tokens(1, length, num_tokens)

    def call(models: Any) -> jax.Array:
        return models["decoder"](yi, context=models["encoder"](x))

    return Example(models, call)


def captions(
    side: int = 64,
    length: int = 4096,
    dim: int = 512,
    depth: int = 6,
    num_tokens: int = TOKENS,
    **sizes: Any,
) -> Example:
    """Captions of an image: the pixels of its feature map are keys; logits ``[1, 4096, 20000]``.

    The map ``[64, 64, 512]`` stands for that of a ResNet-50 at a picture of 512 x 512 pixels.
    """
    models = nnx.Dict(
        positions=AxialPositions(
            (side, side), dim, axis_features=(dim // 2, dim - dim // 2), rngs=nnx.Rngs(0)
        ),
        encoder=Reformer(dim=dim, depth=depth, heads=8, **sizes, rngs=nnx.Rngs(1)),
        decoder=ReformerLM(
            num_tokens=num_tokens,
            dim=dim,
            depth=depth,
            heads=8,
            max_seq_len=length,
            causal=True,
            **sizes,
            rngs=nnx.Rngs(2),
        ),
    )
    image = jax.random.normal(jax.random.key(0), (1, side, side, dim))
    yi = _tokens(1, length, num_tokens)

    def call(models: Any) -> jax.Array:
        pixels = image.reshape(1, side * side, dim)
        places = jnp.arange(side * side)[None]
        keys = models["encoder"](pixels + models["positions"](places))
        return models["decoder"](yi, context=keys)

    return Example(models, call)


def _encoder_decoder(length: int, dim: int, num_tokens: int, sizes: dict) -> EncoderDecoder:
    shared = {"num_tokens": num_tokens, "depth": 6, "max_seq_len": length} | sizes
    both: dict[str, Any] = {f"{x}_{name}": shared[name] for x in ("enc", "dec") for name in shared}
    return ReformerEncoderDecoder(dim=dim, **both, rngs=nnx.Rngs(0))


def encoder_decoder_loss(
    length: int = 4096, dim: int = 512, num_tokens: int = TOKENS, **sizes: Any
) -> Example:
    """``ReformerEncDec`` in training: the loss, a scalar."""
    source, target = _tokens(0, length, num_tokens), _tokens(1, length, num_tokens)
    mask = jnp.ones(source.shape, bool)
    return Example(
        _encoder_decoder(length, dim, num_tokens, sizes),
        lambda model: model.loss(source, target, source_mask=mask)[0],
    )


def encoder_decoder_generation(
    length: int = 4096, dim: int = 512, num_tokens: int = TOKENS, **sizes: Any
) -> Example:
    """``ReformerEncDec`` writing: tokens ``[1, 4096]``, with padding behind the end token 1."""
    source, start = _tokens(0, length, num_tokens), jnp.zeros((1, 1), jnp.int32)
    return Example(
        _encoder_decoder(length, dim, num_tokens, sizes),
        lambda model: model.generate(
            source, start, key=jax.random.key(1), max_new_tokens=length, eos_token=1
        ),
    )


def recorder(length: int = 8192, dim: int = 512, depth: int = 12, **sizes: Any) -> Example:
    """``Recorder``: weights ``[B, H, T, T]`` and buckets ``[B, H, R, T]`` of every layer.

    The model is not wrapped and stays as it is. The weights are quadratic in the length: 2 GiB for
    each layer at the README's.
    """
    model = Reformer(dim=dim, depth=depth, heads=8, causal=True, **sizes, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, length, dim))
    return Example(model, lambda model: [(r.weights, r.buckets) for r in record(model, x)])


def odd_lengths(
    length: int = 7777,
    context_length: int = 137,
    dim: int = 1024,
    depth: int = 12,
    num_tokens: int = TOKENS,
    **sizes: Any,
) -> Example:
    """``Autopadder``: odd lengths, buckets, memories as they are: logits ``[1, 7777, 20000]``."""
    options = {"bucket_size": 63, "num_mem_kv": 77, "lsh_dropout": 0.1} | sizes
    model = ReformerLM(
        num_tokens=num_tokens,
        dim=dim,
        depth=depth,
        max_seq_len=length,
        heads=8,
        causal=True,
        **options,
        rngs=nnx.Rngs(0),
    )
    keys = jax.random.normal(jax.random.key(0), (1, context_length, dim))
    x = _tokens(1, length, num_tokens)
    return Example(
        model,
        lambda model: model(x, context=keys, deterministic=False, rngs=nnx.Rngs(dropout=2)),
    )


def _writer(max_length: int, num_tokens: int, sizes: dict[str, Any]) -> Any:
    options = {"dim": 1024, "depth": 12, "lsh_dropout": 0.1, "full_attn_thres": 1024} | sizes
    return ReformerLM(
        num_tokens=num_tokens, max_seq_len=max_length, causal=True, **options, rngs=nnx.Rngs(0)
    )


def training(
    lengths: tuple[int, ...] = (120, 253, 846),
    max_length: int = 4096,
    num_tokens: int = TOKENS,
    **sizes: Any,
) -> Example:
    """``TrainingWrapper`` in training, on sequences of several lengths: the loss, a scalar.

    Token 0 is padding, which is neither seen nor predicted; the original predicts it by default.
    """
    longest = max(lengths)
    rows = [
        jnp.pad(jax.random.randint(jax.random.key(row), (n,), 1, num_tokens), (0, longest - n))
        for row, n in enumerate(lengths)
    ]
    tokens = jnp.stack(rows)
    return Example(
        _writer(max_length, num_tokens, sizes),
        lambda model: next_token_loss(
            model,
            tokens,
            ignore_index=0,
            key_mask=tokens != 0,
            deterministic=False,
            rngs=nnx.Rngs(dropout=1),
        )[0],
    )


def generation(
    new_tokens: int = 100, max_length: int = 4096, num_tokens: int = TOKENS, **sizes: Any
) -> Example:
    """``TrainingWrapper.generate``: tokens ``[1, 100]``, drawn among the likeliest tenth."""
    start = jnp.zeros((1, 1), jnp.int32)
    return Example(
        _writer(max_length, num_tokens, sizes),
        lambda model: generate(
            model,
            start,
            key=jax.random.key(1),
            max_new_tokens=new_tokens,
            sampling=Sampling(top_k=max(1, num_tokens // 10)),
            eos_token=1,
        ),
    )


EXAMPLES = (
    language_model,
    reformer,
    self_attention,
    attention,
    masking,
    axial_positions,
    translation,
    captions,
    encoder_decoder_loss,
    encoder_decoder_generation,
    feed_forward,
    recorder,
    odd_lengths,
    training,
    generation,
)

if __name__ == "__main__":
    run(EXAMPLES)
