"""Presets with options that together name every keyword of the originals, and how to run them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fast_attention import models
from tests.layers.definitions import filled

V, M = 7, 8
SMALL = {"dim": M, "depth": 2, "heads": 2, "dim_head": 4}
LM = {**SMALL, "num_tokens": V, "max_seq_len": 24}


class Case(NamedTuple):
    """One preset with some of its options, besides `SMALL` or `LM`.

    Attributes:
      preset: what is called.
      options: its keywords.
      truncates: masked padding leaves no trace (not so where the length itself counts: hashed
        attention has more buckets, Linformer mixes all positions).
      decodes: reads from a state.
      context: takes a second sequence.
      hashed: what comes later decides who meets whom, though nothing of it is read.
    """

    preset: Any
    options: dict[str, Any]
    truncates: bool = True
    decodes: bool = False
    context: bool = False
    hashed: bool = False

    @property
    def causal(self) -> bool:
        return bool(self.options.get("causal"))


MODELS = {
    "performer": Case(
        models.PerformerLM,
        {
            "causal": True,
            "local_attn_heads": (1, 2),
            "local_window_size": 3,
            "nb_features": 6,
            "feature_redraw_interval": None,
            "reversible": True,
            "ff_chunks": 2,
            "use_scalenorm": True,
            "ff_glu": True,
            "ff_dropout": 0.2,
            "attn_dropout": 0.2,
            "emb_dropout": 0.2,
            "tie_embed": True,
            "shift_tokens": True,
            "rotary_position_emb": True,
        },
        decodes=True,
    ),
    "performer_generalized_axial": Case(
        models.PerformerLM,
        {
            "generalized_attention": True,
            "kernel_fn": "relu",
            "use_rezero": True,
            "qkv_bias": True,
            "attn_out_bias": True,
            "auto_check_redraw": False,
            "ff_mult": 2,
            "cross_attend": True,
            "shift_tokens": True,
            "rotary_position_emb": False,
            "axial_position_emb": True,
            "axial_position_shape": (6, 4),
        },
        context=True,
    ),
    "performer_cross_attending_decoder": Case(
        models.PerformerLM,
        {
            "causal": True,
            "no_projection": True,
            "cross_attend": True,
            "rotary_position_emb": False,
        },
        decodes=True,
        context=True,
    ),
    "reformer_hashed": Case(
        models.ReformerLM,
        {
            "causal": True,
            "bucket_size": 4,
            "n_hashes": 2,
            "attn_chunks": 2,
            "weight_tie": True,
            "lsh_dropout": 0.2,
            "ff_dropout": 0.2,
            "post_attn_dropout": 0.2,
            "layer_dropout": 0.2,
            "num_mem_kv": 2,
            "one_value_head": True,
            "random_rotations_per_head": True,
            "lsh_allow_duplicate_attention": False,
            "lsh_attend_across_buckets": False,
        },
        truncates=False,
        context=True,
        hashed=True,
    ),
    "reformer_dense": Case(
        models.ReformerLM,
        {
            "causal": True,
            "bucket_size": 3,
            "use_full_attn": True,
            "n_local_attn_heads": 1,
            "num_mem_kv": 2,
            "pkm_layers": (2,),
            "pkm_num_keys": 3,
            "use_scale_norm": True,
            "emb_dim": 6,
            "weight_tie_embedding": True,
            "fixed_position_emb": True,
        },
        context=True,
    ),
    "reformer_twin": Case(
        models.ReformerLM,
        {
            "twin_attention": True,
            "full_attn_thres": 64,
            "bucket_size": 4,
            "reverse_thres": 64,
            "use_rezero": True,
            "emb_dim": 6,
            "return_embeddings": True,
            "axial_position_emb": True,
            "axial_position_shape": (6, 4),
            "axial_position_dims": (2, 4),
        },
        context=True,
    ),
    "reformer_absolute": Case(
        models.ReformerLM,
        {
            "use_full_attn": True,
            "absolute_position_emb": True,
            "ff_chunks": 3,
            "ff_activation": "relu",
            "ff_mult": 2,
            "ff_glu": True,
        },
        context=True,
    ),
    "linear": Case(
        models.LinearAttentionTransformerLM,
        {
            "causal": True,
            "reversible": True,
            "ff_chunks": 2,
            "ff_glu": True,
            "ff_dropout": 0.2,
            "attn_layer_dropout": 0.2,
            "attn_dropout": 0.2,
            "blindspot_size": 3,
            "n_local_attn_heads": (1, 2),
            "local_attn_window_size": 3,
            "shift_tokens": True,
            "pkm_layers": 2,
            "pkm_num_keys": 3,
            "use_rotary_emb": True,
        },
        decodes=True,
    ),
    "linear_folded_rotary": Case(
        models.LinearAttentionTransformerLM,
        {
            "causal": True,
            "attend_axially": True,
            "local_attn_window_size": 3,
            "use_rotary_emb": True,
            "receives_context": True,
            "emb_dim": 6,
            "return_embeddings": True,
        },
        decodes=True,
        context=True,
    ),
    "linear_both_sides": Case(
        models.LinearAttentionTransformerLM,
        {
            "n_local_attn_heads": 1,
            "attend_axially": True,
            "local_attn_window_size": 3,
            "shift_tokens": True,
            "use_axial_pos_emb": False,
        },
    ),
    "linformer": Case(
        models.LinearAttentionTransformerLM,
        {
            "max_seq_len": 13,
            "linformer_settings": models.LinformerSettings(3),
            "receives_context": True,
            "context_linformer_settings": models.LinformerContextSettings(5, 2),
            "local_attn_window_size": 3,
            "use_axial_pos_emb": True,
        },
        truncates=False,
        context=True,
    ),
}


def build(preset: Any, dtype: Any = jnp.float32, **options: Any) -> Any:
    """A preset filled with random numbers; running variances are positive."""
    model = filled(lambda: preset(**options, dtype=dtype, rngs=nnx.Rngs(0)))
    statistics = nnx.state(model, nnx.BatchStat)
    for _, variable in nnx.to_flat_state(statistics):
        variable[...] = jnp.abs(variable[...]) + 0.5
    nnx.update(model, statistics)
    return model


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def generate(model, prompt, **options):
    """`fast_attention.models.generate` with the fields of `Sampling` as keywords."""
    return models.generate(model, prompt, **with_sampling(options))


def with_sampling(options):
    names = [field.name for field in dataclasses.fields(models.Sampling)]
    chosen = {name: options[name] for name in names if name in options}
    rest = {name: x for name, x in options.items() if name not in chosen}
    return rest | {"sampling": models.Sampling(**chosen)}
