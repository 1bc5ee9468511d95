"""The Transformer: equal pre-norm blocks of attention and feed-forward."""

from __future__ import annotations

from collections.abc import Callable

from flax import nnx

from fast_attention.arrays.types import Array
from fast_attention.models.config import TransformerConfig
from fast_attention.models.language_model import LanguageModel


class Transformer(LanguageModel):
    """A `LanguageModel` with a flat `TransformerConfig` and any attention function."""

    def __init__(
        self,
        config: TransformerConfig,
        attention_fn: Callable[..., Array] | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters, and a projection for each layer that needs one.

        Args:
          config: Shape of the model.
          attention_fn: Attention function of every layer, called like
            ``nnx.dot_product_attention``; None is exact attention.
          rngs: Source of parameters and projections.
        """
        super().__init__(config.language_model(attention_fn), rngs=rngs)
        self.config = config
