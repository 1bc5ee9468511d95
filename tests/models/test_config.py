"""A configuration is checked when it is made, and says what was given."""

import dataclasses

import jax.numpy as jnp
import pytest

from fast_attention.models import TransformerConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"num_layers": -1}, "num_layers must be at least 1, got -1"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"max_len": 0}, "max_len must be at least 1, got 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1.0"),
        ({"attention_dropout_rate": float("nan")}, r"attention_dropout_rate .* got nan"),
        ({"qkv_dim": 20}, "qkv_dim=20 .* multiple of num_heads=8"),
        ({"num_kv_heads": 3}, "num_heads=8 must be a multiple of num_kv_heads=3"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"positions": "alibi"}, "'sinusoidal', 'rotary', 'none'.* got 'alibi'"),
        ({"positions": "rotary", "qkv_dim": 24}, "qkv_dim=24 / num_heads=8 = 3"),
        ({"activation": "swoosh"}, "'gelu'.*got 'swoosh'"),
        ({"remat": "full"}, "remat must be True or False, got 'full'"),
        ({"dtype": jnp.int32}, "floating point type, got .*int32"),
    ],
)
def test_what_makes_no_model_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**({"vocab_size": 5} | options))


def test_limits_are_within_what_is_allowed():
    config = TransformerConfig(
        vocab_size=1,
        emb_dim=1,
        num_heads=3,
        num_kv_heads=1,
        num_layers=1,
        qkv_dim=9,
        mlp_dim=1,
        max_len=1,
        dropout_rate=0.0,
        attention_dropout_rate=0.999,
        positions="none",
        dtype=jnp.float16,
    )
    assert (config.head_dim, config.kv_heads) == (3, 1)
    assert dataclasses.replace(config, num_kv_heads=None).kv_heads == 3


def test_a_configuration_never_changes_and_a_replaced_one_is_checked():
    config = TransformerConfig(vocab_size=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, "emb_dim", 8)  # noqa: B010
    with pytest.raises(ValueError, match="num_heads=7"):
        dataclasses.replace(config, num_heads=7)
    same = TransformerConfig(vocab_size=5)
    assert config == same and hash(config) == hash(same)
