"""ESM-2 and ESM-1b (``model_type: esm``): description and names of arrays.

Pre-norm, biases everywhere, exact GELU, rotary (ESM-2) or learned positions (ESM-1b), logits from
the token embeddings behind a dense layer and a norm. With token dropout embeddings of masked tokens
are zero and the others scaled (`fast_attention.layers.masked_tokens`).

Reference: Lin et al. Evolutionary-scale prediction of atomic-level protein structure with a
language model. Science 379 (2023).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fast_attention.models.config import TransformerConfig
from fast_attention.models.originals.checkpoint_arrays import StoredArray
from fast_attention.models.originals.description import Description
from fast_attention.models.originals.places import NOT_NEEDED, Place, dense, norm, of_block

OWN = ("esm.embeddings.", "esm.encoder.", "lm_head.")
"""How the names of arrays begin that must have a place."""

_PARTS = {
    "attention.LayerNorm": (norm, "0.norm"),
    "attention.self.query": (dense, "0.inner.project.query"),
    "attention.self.key": (dense, "0.inner.project.key"),
    "attention.self.value": (dense, "0.inner.project.value"),
    "attention.output.dense": (dense, "0.inner.out"),
    "LayerNorm": (norm, "1.norm"),
    "intermediate.dense": (dense, "1.inner.up"),
    "output.dense": (dense, "1.inner.down"),
}


def config_of(described: Description, dtype: Any) -> TransformerConfig:
    """The shape of a described model.

    Raises:
      ValueError: At a field that is missing, out of range or not supported.
    """
    positions = described.one_of("position_embedding_type", ("rotary", "absolute"), "absolute")
    described.one_of("is_folding_model", (False,), False)
    rotary = positions == "rotary"
    # The table of ESM-1b begins with rows for padding, up to its id.
    unused = 0 if rotary else described.size("pad_token_id", least=0) + 1
    dropout = described.flag("token_dropout", False)
    return TransformerConfig(
        **described.encoder(),
        max_len=described.size("max_position_embeddings", 1026) - unused,
        positions="rotary" if rotary else "learned",
        activation="gelu_exact",
        dtype=dtype,
        embed_norm=described.flag("emb_layer_norm_before", False),
        rotary_base=described.positive("rope_theta", 10000.0),
        token_dropout=described.size("mask_token_id", least=0) if dropout else None,
    )


def place(config: TransformerConfig, name: str) -> Place | None:
    """Where an array belongs; None if nowhere."""
    if name.endswith((".inv_freq", ".position_ids")):
        return NOT_NEEDED
    if name.startswith("esm.encoder.layer."):
        rest = name.removeprefix("esm.encoder.layer.")
        return of_block(rest, config.num_layers, _PARTS)
    if name == "esm.embeddings.position_embeddings.weight" and config.positions == "rotary":
        return NOT_NEEDED
    if name == "lm_head.decoder.weight" and config.tie_embeddings:
        return NOT_NEEDED
    bias = "transform.bias" if config.tie_embeddings else "head.bias"
    module, _, leaf = name.rpartition(".")
    layers: dict[str, tuple[Callable[[str, str], Place], str]] = {
        "esm.embeddings.layer_norm": (norm, "embed_norm"),
        "esm.encoder.emb_layer_norm_after": (norm, "norm"),
        "lm_head.dense": (dense, "transform.dense"),
        "lm_head.layer_norm": (norm, "transform.norm"),
    }
    if module in layers and leaf in ("weight", "bias"):
        kind, target = layers[module]
        return kind(target, leaf)
    return {
        "esm.embeddings.word_embeddings.weight": Place("embed.embedding"),
        "esm.embeddings.position_embeddings.weight": Place(
            "positions.table", lambda x: x[len(x) - config.max_len :]
        ),
        "lm_head.bias": Place(bias),
        "lm_head.decoder.bias": NOT_NEEDED,
        "lm_head.decoder.weight": dense("head", "weight"),
    }.get(name)


_FAIR_ESM_PARTS = {
    "self_attn_layer_norm": "attention.LayerNorm",
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "final_layer_norm": "LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_FAIR_ESM_NAMES = {
    "embed_tokens.weight": "esm.embeddings.word_embeddings.weight",
    "emb_layer_norm_after": "esm.encoder.emb_layer_norm_after",
    "lm_head.weight": "lm_head.decoder.weight",
}


def from_fair_esm(
    path: Path, value: Any, arrays: Mapping[str, StoredArray]
) -> tuple[dict[str, Any], dict[str, StoredArray]]:
    """The description and arrays of fair-esm's file of an ESM-2 model, as Hugging Face names them.

    Raises:
      ValueError: If the file is of another model.
    """
    options = value.get("cfg") if isinstance(value, dict) else None
    options = options.get("model") if isinstance(options, dict) else options
    told = vars(options) if hasattr(options, "__dict__") else options
    if not isinstance(told, dict) or "encoder_layers" not in told:
        raise ValueError(
            f"{path} is not fair-esm's file of an ESM-2 model: it has no options cfg.model with "
            "encoder_layers. Give a folder with config.json instead."
        )
    named = {_from_fair_esm(name): array for name, array in arrays.items()}
    up = named.get("esm.encoder.layer.0.intermediate.dense.weight")
    table = named.get("esm.embeddings.word_embeddings.weight")
    if up is None or table is None or not up.shape or not table.shape:
        raise ValueError(f"{path} has no arrays of an ESM-2 model")
    fields = {
        "model_type": "esm",
        "vocab_size": table.shape[0],
        "hidden_size": told.get("encoder_embed_dim"),
        "num_hidden_layers": told.get("encoder_layers"),
        "num_attention_heads": told.get("encoder_attention_heads"),
        "intermediate_size": up.shape[0],
        "layer_norm_eps": 1e-5,
        "position_embedding_type": "rotary",
        "token_dropout": told.get("token_dropout"),
        "mask_token_id": 32,
        "pad_token_id": 1,
    }
    return fields, named


def _from_fair_esm(name: str) -> str:
    name = re.sub(r"^(encoder\.)?(sentence_encoder\.)?", "", name)
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if found and found[2] in _FAIR_ESM_PARTS:
        return f"esm.encoder.layer.{found[1]}.{_FAIR_ESM_PARTS[found[2]]}.{found[3]}"
    if re.fullmatch(r"layers\.\d+\.self_attn\.rot_emb\.inv_freq", name):
        return "esm.inv_freq"
    module, _, leaf = name.rpartition(".")
    if module in _FAIR_ESM_NAMES:
        return f"{_FAIR_ESM_NAMES[module]}.{leaf}"
    return _FAIR_ESM_NAMES.get(name, name)
