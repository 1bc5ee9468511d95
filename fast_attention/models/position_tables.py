"""The learned positions that a language model adds to its embeddings."""

from __future__ import annotations

from flax import nnx

from fast_attention.layers.positions import AxialPositions, LearnedPositions
from fast_attention.models.config import LanguageModelConfig


def make_positions(
    config: LanguageModelConfig, rngs: nnx.Rngs
) -> LearnedPositions | AxialPositions | None:
    """Makes the module of learned or axial positions; None if nothing is learned."""
    width = config.embedding_features
    if config.positions == "learned":
        return LearnedPositions(config.max_len, width)
    if config.positions == "random":
        return LearnedPositions(
            config.max_len, width, initializer=nnx.initializers.normal(1.0), rngs=rngs
        )
    if config.positions == "axial":
        return AxialPositions(
            config.axial_shape, width, axis_features=config.axial_features, rngs=rngs
        )
    return None
