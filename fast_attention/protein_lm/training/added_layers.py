"""Layers added to a trained model, which begins with the predictions that it had without them.

An added layer is a copy of the last one, with zeros for what projects into the residual stream: the
output projection of attention and the second matrix of the feed-forward network. Both then add
nothing. Their gradients are not zero, so that training begins to use the layer at the first step.

References: Chen et al., "Net2Net", arXiv:1511.05641 (models that grow and keep their function);
Gong et al., "Efficient Training of BERT by Progressively Stacking", ICML 2019 (copied layers).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.models.config import TransformerConfig

_INTO_THE_STREAM = ("out", "down")
"""Names of what projects into the residual stream, in every sublayer."""


def count_added(before: TransformerConfig, now: TransformerConfig) -> int:
    """Returns how many layers a model has more than a trained one; 0 where none can be added.

    Args:
      before: of the trained model.
      now: of the model that begins with its parameters. With `norm_after` a layer normalises the
        residual stream, and no values of its parameters leave the stream as it is.
    """
    return 0 if now.norm_after else max(0, now.num_layers - before.num_layers)


def add_layers(arrays: Any, number: int, before: TransformerConfig) -> Any:
    """Returns nested parameters, or other arrays of the layers, with layers after the last one.

    Args:
      arrays: nested dict with the layers under ``["stack"]["blocks"]``, counted from 0; those
        without such arrays (exact attention has no projections) are absent. Where there are none
        (a model of a user's own class; no other arrays) it is returned as it is.
      number: of layers to add.
      before: of the model that has the arrays.
    """
    blocks = arrays.get("stack", {}).get("blocks")
    count = before.num_layers
    if not number or not blocks or count - 1 not in blocks:
        return arrays
    added = {count + i: _silent(blocks[count - 1]) for i in range(number)}
    return arrays | {"stack": arrays["stack"] | {"blocks": blocks | added}}


def _silent(layer: Any) -> Any:
    def copy(path: Any, x: Any) -> Any:
        names = {getattr(key, "key", None) for key in path}
        # Not the same buffer twice: training donates them.
        return jnp.zeros_like(x) if names & set(_INTO_THE_STREAM) else jnp.copy(x)

    return jax.tree.map_with_path(copy, layer)
