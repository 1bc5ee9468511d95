"""BERT (``model_type: bert``): description and names of arrays; ProtBERT and AntiBERTy are such.

Post-norm, biases everywhere, learned positions, a norm over the embeddings, logits from the token
embeddings behind a dense layer and a norm. Token types are those of a single sequence: the vector
of type 0 is added to every position.

Reference: Devlin et al. BERT: pre-training of deep bidirectional Transformers for language
understanding. arXiv:1810.04805.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fast_attention.models.config import TransformerConfig
from fast_attention.models.originals.description import Description
from fast_attention.models.originals.places import NOT_NEEDED, Place, dense, norm, of_block

OWN = ("bert.embeddings.", "bert.encoder.", "cls.predictions.")
"""How the names of arrays begin that must have a place."""

_ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_PARTS = {
    "attention.self.query": (dense, "0.inner.project.query"),
    "attention.self.key": (dense, "0.inner.project.key"),
    "attention.self.value": (dense, "0.inner.project.value"),
    "attention.output.dense": (dense, "0.inner.out"),
    "attention.output.LayerNorm": (norm, "0.norm"),
    "intermediate.dense": (dense, "1.inner.up"),
    "output.dense": (dense, "1.inner.down"),
    "output.LayerNorm": (norm, "1.norm"),
}


def config_of(described: Description, dtype: Any) -> TransformerConfig:
    """The shape of a described model.

    Raises:
      ValueError: At a field that is missing, out of range or not supported.
    """
    described.one_of("position_embedding_type", ("absolute",), "absolute")
    return TransformerConfig(
        **described.encoder(),
        max_len=described.size("max_position_embeddings", 512),
        positions="learned",
        activation=_ACTIVATIONS[described.one_of("hidden_act", _ACTIVATIONS, "gelu")],
        dtype=dtype,
        norm_after=True,
        embed_norm=True,
    )


def place(config: TransformerConfig, name: str) -> Place | None:
    """Where an array belongs; None if nowhere."""
    if name == "bert.embeddings.position_ids":
        return NOT_NEEDED
    if name.startswith("bert.encoder.layer."):
        rest = name.removeprefix("bert.encoder.layer.")
        return of_block(rest, config.num_layers, _PARTS)
    tied = config.tie_embeddings
    module, _, leaf = name.rpartition(".")
    layers: dict[str, tuple[Callable[[str, str], Place], str]] = {
        "bert.embeddings.LayerNorm": (norm, "embed_norm"),
        "cls.predictions.transform.dense": (dense, "transform.dense"),
        "cls.predictions.transform.LayerNorm": (norm, "transform.norm"),
    }
    if module in layers and leaf in ("weight", "bias", "gamma", "beta"):
        kind, target = layers[module]
        return kind(target, leaf)
    return {
        "bert.embeddings.word_embeddings.weight": Place("embed.embedding"),
        "bert.embeddings.position_embeddings.weight": Place("positions.table"),
        "bert.embeddings.token_type_embeddings.weight": Place(
            "positions.table", lambda x: np.broadcast_to(x[:1], (config.max_len, *x.shape[1:]))
        ),
        "cls.predictions.bias": Place("transform.bias" if tied else "head.bias"),
        "cls.predictions.decoder.bias": NOT_NEEDED,
        "cls.predictions.decoder.weight": NOT_NEEDED if tied else dense("head", "weight"),
    }.get(name)
