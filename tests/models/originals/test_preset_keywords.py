"""Keywords of the presets: their names, ranges and errors."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.models import (
    LinearAttentionTransformer,
    LinearAttentionTransformerLM,
    LinformerContextSettings,
    LinformerSettings,
    Performer,
    PerformerEncoderDecoder,
    PerformerLM,
    Reformer,
    ReformerEncoderDecoder,
    ReformerLM,
)
from fast_attention.models.originals import linear_attention_transformer as lat
from fast_attention.models.originals import performer, reformer
from tests.models.cases import LM, M, V, build, tokens

B, T = 2, 13
TOKENS = tokens(B, T)
ALL = np.ones((B, T), bool)
KEYWORDS = {
    Performer: performer.PERFORMER,
    PerformerLM: performer.PERFORMER_LM,
    Reformer: reformer.REFORMER,
    ReformerLM: reformer.REFORMER_LM,
    LinearAttentionTransformer: lat.LINEAR_ATTENTION_TRANSFORMER,
    LinearAttentionTransformerLM: lat.LINEAR_ATTENTION_TRANSFORMER_LM,
}


def options_of(preset) -> dict:
    given = {name: 4 for name, default in KEYWORDS[preset].items() if default is reformer.REQUIRED}
    return given | {"dim": M, "heads": 2, "dim_head": 4, "depth": 2}


@pytest.mark.parametrize("preset", KEYWORDS)
def test_an_unknown_or_missing_keyword_is_an_error_that_helps(preset):
    options = options_of(preset)
    nnx.eval_shape(lambda: preset(rngs=nnx.Rngs(0), **options))
    with pytest.raises(TypeError, match=r"has no keyword 'dpeth', did you mean 'depth'\?"):
        preset(rngs=nnx.Rngs(0), **options, dpeth=3)
    with pytest.raises(TypeError, match="has no keyword 'xyzzy'; there are .*'causal'"):
        preset(rngs=nnx.Rngs(0), **options, xyzzy=3)
    with pytest.raises(TypeError, match=f"{preset.__name__} needs .*depth"):
        preset(rngs=nnx.Rngs(0), dim=M)


@pytest.mark.parametrize("preset", [PerformerEncoderDecoder, ReformerEncoderDecoder])
def test_keywords_of_pairs_have_a_prefix(preset):
    own = {"num_tokens": V, "max_seq_len": 8, "depth": 1, "heads": 2, "dim_head": 4}
    own = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in own.items()}
    with pytest.raises(TypeError, match="'tie_token_embed'.*begin with enc_"):
        preset(dim=M, rngs=nnx.Rngs(0), **own, tie_token_embed=True)
    with pytest.raises(TypeError, match="'enc_dim'.*share dim"):
        preset(dim=M, rngs=nnx.Rngs(0), **own, enc_dim=3)
    with pytest.raises(TypeError, match="no keyword 'caussal', did you mean 'causal'"):
        preset(dim=M, rngs=nnx.Rngs(0), **own, enc_caussal=True)
    with pytest.raises(ValueError, match="decoder.*causal"):
        preset(dim=M, rngs=nnx.Rngs(0), **own, dec_causal=False)


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        (PerformerLM, {"heads": 3, "dim_head": None}, "dim=8 must be a multiple of heads=3"),
        (PerformerLM, {"dim_head": 0}, "dim_head must be at least 1, got 0"),
        (PerformerLM, {"heads": 0}, "heads must be at least 1, got 0"),
        (PerformerLM, {"depth": 0}, "features and blocks"),
        (PerformerLM, {"local_attn_heads": 3}, "0 to 2 .* got 3"),
        (PerformerLM, {"local_attn_heads": (1, 1, 1)}, r"one number or 2 \(depth\)"),
        (PerformerLM, {"local_attn_heads": 1, "local_window_size": 0}, "window"),
        (PerformerLM, {"ff_dropout": 1.5}, "1.5"),
        (PerformerLM, {"attn_dropout": 1.5}, "1.5"),
        (PerformerLM, {"emb_dropout": -0.1}, "-0.1"),
        (PerformerLM, {"nb_features": -1}, "-1"),
        (PerformerLM, {"nb_features": 0}, "nb_features"),
        (PerformerLM, {"ff_chunks": 0}, "got 0"),
        (PerformerLM, {"dim_head": 3}, "even width, got 3"),
        (PerformerLM, {"feature_redraw_interval": 0}, "interval.* got 0"),
        (
            PerformerLM,
            {"rotary_position_emb": False, "axial_position_emb": True}
            | {"axial_position_shape": (1, 3)},
            r"\(1, 3\).*max_len=4",
        ),
        (ReformerLM, {"heads": 3, "dim_head": None}, "dim=8 must be a multiple of heads=3"),
        (ReformerLM, {"dim_head": 0}, "dim_head must be at least 1, got 0"),
        (ReformerLM, {"bucket_size": 0}, "bucket_size must be a positive whole number, got 0"),
        (ReformerLM, {"n_hashes": 0}, "n_hashes must be a positive whole number, got 0"),
        (ReformerLM, {"attn_chunks": 0}, "attn_chunks must be a positive whole number, got 0"),
        (ReformerLM, {"n_local_attn_heads": 2}, "must be less than heads=2"),
        (ReformerLM, {"ff_activation": "geluu"}, "activation must be one of"),
        (ReformerLM, {"pkm_layers": (3,)}, r"pkm_layers .* 1 to 2 .* got \(3,\)"),
        (ReformerLM, {"pkm_layers": 0}, "pkm_layers .* got 0"),
        (ReformerLM, {"layer_dropout": 1.0}, "layer_dropout_rate"),
        (ReformerLM, {"num_mem_kv": -1}, "memory must be 0 or more, got -1"),
        (ReformerLM, {"emb_dim": 0}, "embedding_features must be at least 1, got 0"),
        (
            ReformerLM,
            {"axial_position_emb": True, "axial_position_dims": (2, 2)}
            | {"axial_position_shape": (2, 2)},
            "add up to features=8",
        ),
        (LinearAttentionTransformerLM, {"n_local_attn_heads": (1,)}, "got"),
        (LinearAttentionTransformerLM, {"blindspot_size": 0, "causal": True}, "blindspot"),
        (LinearAttentionTransformerLM, {"pkm_layers": (1, 5)}, r"got \(1, 5\)"),
        (LinearAttentionTransformerLM, {"pkm_layers": 1, "pkm_num_keys": 0}, "num_keys"),
        (
            LinearAttentionTransformerLM,
            {"causal": True, "linformer_settings": LinformerSettings(2)},
            "no Linformer",
        ),
        (
            LinearAttentionTransformerLM,
            {"context_linformer_settings": LinformerContextSettings(4, 2)},
            "receives_context",
        ),
        (LinearAttentionTransformerLM, {"dim_head": 0}, "dim_head must be at least 1, got 0"),
    ],
)
def test_values_that_make_no_model_are_errors_that_name_them(preset, options, message):
    options = options_of(preset) | options
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: preset(rngs=nnx.Rngs(0), **options))


def test_a_blind_spot_of_bidirectional_attention_is_ignored_and_said():
    options = options_of(LinearAttentionTransformer) | {"causal": False, "max_seq_len": 8}
    make = lambda **more: LinearAttentionTransformer(rngs=nnx.Rngs(0), **options | more)  # noqa: E731
    with pytest.warns(UserWarning, match="blindspot_size=4 has no effect with causal=False"):
        blind = nnx.eval_shape(lambda: make(blindspot_size=4))
    assert blind.config == nnx.eval_shape(make).config


def test_padding_given_as_a_mask_of_pairs_is_an_error_that_names_key_mask():
    model = build(PerformerLM, **LM)
    with pytest.raises(ValueError, match=r"mask must be .*padding .* key_mask"):
        nnx.eval_shape(lambda: model(TOKENS, mask=jnp.asarray(ALL)))


def test_the_length_that_a_readme_gives_changes_nothing():
    make = lambda **more: Reformer(dim=8, depth=1, heads=2, rngs=nnx.Rngs(0), **more)  # noqa: E731
    assert nnx.eval_shape(lambda: make(max_seq_len=64)).config == nnx.eval_shape(make).config
