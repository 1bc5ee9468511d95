"""The README of xl402/performer, the Performer layer of TensorFlow's Keras, example by example.

Each function takes the README's sizes by default, and returns a layer and what to call it with. A
layer is told how wide its inputs are, where Keras waits to see one.

Run all of it: ``python -m examples.tensorflow_performer``
"""

from __future__ import annotations

import jax
from flax import nnx

from examples.running import Example, run
from fast_attention.models.originals.tensorflow_performer import MultiHeadAttention


def cross_attention(
    batch: int = 1, length: int = 8, key_length: int = 4, features: int = 16
) -> Example:
    """Linear attention from one sequence to another: ``[B, 8, 16]``."""
    layer = MultiHeadAttention(
        num_heads=2,
        key_dim=2,
        attention_method="linear",
        supports=2,
        attention_axes=None,
        features=features,
        rngs=nnx.Rngs(0),
    )
    query = jax.random.normal(jax.random.key(0), (batch, length, features))
    key = jax.random.normal(jax.random.key(1), (batch, key_length, features))
    return Example(layer, lambda layer: layer(query, key))


def several_axes(
    batch: int = 1, shape: tuple[int, int, int] = (5, 3, 4), features: int = 16
) -> Example:
    """Self-attention over axes 2 and 3 of an input with five: ``[B, 5, 3, 4, 16]``."""
    layer = MultiHeadAttention(
        num_heads=2,
        key_dim=2,
        attention_method="linear",
        supports=10,
        attention_axes=(2, 3),
        features=features,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (batch, *shape, features))
    return Example(layer, lambda layer: layer(x, x))


EXAMPLES = (cross_attention, several_axes)

if __name__ == "__main__":
    run(EXAMPLES)
