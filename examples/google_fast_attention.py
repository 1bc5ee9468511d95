"""The READMEs of Google's fast_attention, in JAX and in TensorFlow, statement by statement.

They hold no code and no shapes, but say what can be done; each function here does one of these
things, and returns a model and what to call it with. What they have wrong: of what they promise the
original keeps no mask, bias or dropout, all of which its attention functions take and ignore; and
the projection that is redrawn at each call depends on the queries.

Run all of it: ``python -m examples.google_fast_attention``
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from examples.running import Example, run
from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.layers import (
    AttentionConfig,
    FeedForwardConfig,
    HeadGroup,
    Stack,
    StackConfig,
    SublayerConfig,
)
from fast_attention.models.config import TransformerConfig
from fast_attention.models.transformer import Transformer
from fast_attention.protein_lm import gin_registry
from fast_attention.protein_lm.models import FlaxLM


def raw_softmax_attention(length: int = 1024, heads: int = 8, head_dim: int = 64) -> Example:
    """Standalone: an approximation of softmax attention itself, ``[1, 1024, 8, 64]``."""
    shape = (1, length, heads, head_dim)
    q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))
    attention_fn = make_fast_softmax_attention(qkv_dim=head_dim)
    return Example(None, lambda _: attention_fn(q, k, v))


def generalized_attention(length: int = 1024, features: int = 512, heads: int = 8) -> Example:
    """In the place of exact attention in Flax's NNX layer, by another kernel: ``[1, 1024, 512]``.

    The README names the layer of a Flax that is no more.
    """
    layer = nnx.MultiHeadAttention(
        num_heads=heads,
        in_features=features,
        attention_fn=make_fast_generalized_attention(
            qkv_dim=features // heads, kernel_fn=jax.nn.relu, kernel_epsilon=0.001
        ),
        decode=False,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (1, length, features))
    return Example(layer, lambda layer: layer(x))


def unidirectional_attention(length: int = 1024, features: int = 512, heads: int = 8) -> Example:
    """The causal variant in Flax's linen layer, with its own gradient: ``[1, 1024, 512]``.

    `lax_scan_unroll` unrolls the loop over chunks of tokens; 16 is the README's advice for a GPU,
    where the original has a loop over tokens.
    """
    layer = linen.MultiHeadDotProductAttention(
        num_heads=heads,
        attention_fn=make_fast_softmax_attention(
            qkv_dim=features // heads, unidirectional=True, lax_scan_unroll=16
        ),
    )
    x = jax.random.normal(jax.random.key(0), (1, length, features))
    return Example(layer.init(jax.random.key(1), x), lambda variables: layer.apply(variables, x))


def transformer(length: int = 2048, **sizes: Any) -> Example:
    """A Transformer built on either variant, here generalised ReLU: logits ``[1, 2048, 256]``."""
    options: dict[str, Any] = {"vocab_size": 256, "max_len": length} | sizes
    config = TransformerConfig(**options)
    model = Transformer(config, make_fast_generalized_attention(), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (1, length), 0, config.vocab_size)
    return Example(model, lambda model: model(tokens))


def protein_lm(
    binding: str = "@make_fast_softmax_attention()", length: int = 512, **sizes: Any
) -> Example:
    """A protein language model, its attention bound by gin: logits of every residue.

    The other variant is ``@make_fast_generalized_attention()``.
    """
    gin_registry.configure(bindings=[f"FlaxModel.attention_fn = {binding}"])
    lm = FlaxLM(**sizes)
    model = nnx.merge(lm.graphdef, lm.state.parameters, lm.state.variables)
    residues = jax.random.randint(jax.random.key(0), (1, length), 0, 20)
    return Example(model, lambda model: model(residues))


def reversible_layers(
    length: int = 4096, features: int = 512, depth: int = 6, heads: int = 8
) -> Example:
    """FAVOR in a Reformer, whose memory does not grow with its depth: ``[1, 4096, 512]``."""
    favor = make_fast_softmax_attention(redraw_features=False)
    attention = AttentionConfig((HeadGroup(heads, favor),), features // heads, causal=True)
    block = (SublayerConfig(attention), SublayerConfig(FeedForwardConfig(4 * features)))
    model = Stack(StackConfig(features, (block,) * depth, reversible=True), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, length, features))
    return Example(model, lambda model: model(x))


def favor_attention(length: int = 1024, heads: int = 8, head_dim: int = 64) -> Example:
    """TensorFlow's ``favor_attention`` with either kernel: two outputs ``[1, 1024, 8, 64]``.

    ``relu_kernel_transformation`` with a projection is the generalised attention below.
    """
    shape = (1, length, heads, head_dim)
    q, k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 3))
    softmax = make_fast_softmax_attention(qkv_dim=head_dim, redraw_features=False)
    relu = make_fast_generalized_attention(qkv_dim=head_dim, features_type="ortho")
    mask = jnp.ones((1, length), bool)  # Padding, which the original takes and ignores.
    return Example(None, lambda _: (softmax(q, k, v, key_mask=mask), relu(q, k, v, key_mask=mask)))


EXAMPLES = (
    raw_softmax_attention,
    generalized_attention,
    unidirectional_attention,
    transformer,
    protein_lm,
    reversible_layers,
    favor_attention,
)

if __name__ == "__main__":
    run(EXAMPLES)
