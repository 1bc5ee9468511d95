"""Weights of the originals find their places, or are named."""

import jax
import numpy as np
import pytest
from flax import nnx

from fast_attention.models import (
    LanguageModel,
    PerformerEncoderDecoder,
    PerformerLM,
    ReformerLM,
    Transformer,
    TransformerConfig,
    load_torch_state_dict,
)
from tests.models.cases import LM, M, V, build

SMALL = LM | {"depth": 1, "causal": True, "nb_features": 6, "rotary_position_emb": False}


def state_dict(depth=1, seed=0):
    """A performer-pytorch language model of `SMALL`, by its names and shapes."""
    random = np.random.default_rng(seed)
    shapes = {
        "token_emb.weight": (V, M),
        "pos_emb.emb.weight": (24, M),
        "norm.weight": (M,),
        "norm.bias": (M,),
        "to_out.weight": (V, M),
        "to_out.bias": (V,),
    }
    for block in range(depth):
        first, second = (f"performer.net.layers.{block}.{part}" for part in (0, 1))
        shapes |= {
            f"{first}.norm.weight": (M,),
            f"{first}.norm.bias": (M,),
            f"{first}.fn.fast_attention.projection_matrix": (6, 4),
            f"{first}.fn.to_q.weight": (8, M),
            f"{first}.fn.to_k.weight": (8, M),
            f"{first}.fn.to_v.weight": (8, M),
            f"{first}.fn.to_out.weight": (M, 8),
            f"{second}.norm.weight": (M,),
            f"{second}.norm.bias": (M,),
            f"{second}.fn.fn.w1.weight": (4 * M, M),
            f"{second}.fn.fn.w1.bias": (4 * M,),
            f"{second}.fn.fn.w2.weight": (M, 4 * M),
            f"{second}.fn.fn.w2.bias": (M,),
        }
    weights = {n: random.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    # What the original computes from nothing.
    return weights | {"performer.proj_updater.calls_since_last_redraw": np.zeros(())}


def test_every_weight_is_where_it_belongs():
    model, weights = build(PerformerLM, **SMALL), state_dict()
    load_torch_state_dict(model, weights)
    block = model.stack.blocks[0]
    first, second = "performer.net.layers.0.0", "performer.net.layers.0.1"
    for variable, name in (
        (model.embed.embedding, "token_emb.weight"),
        (model.positions.table, "pos_emb.emb.weight"),
        (model.norm.scale, "norm.weight"),
        (model.head.bias, "to_out.bias"),
        (block[0].norm.bias, f"{first}.norm.bias"),
        (block[0].inner.projections[0], f"{first}.fn.fast_attention.projection_matrix"),
        (block[1].inner.up.bias, f"{second}.fn.fn.w1.bias"),
    ):
        np.testing.assert_array_equal(variable[...], weights[name])
    for layer, name in (
        (model.head, "to_out"),
        (block[0].inner.project.query, f"{first}.fn.to_q"),
        (block[0].inner.project.key, f"{first}.fn.to_k"),
        (block[0].inner.project.value, f"{first}.fn.to_v"),
        (block[0].inner.out, f"{first}.fn.to_out"),
        (block[1].inner.down, f"{second}.fn.fn.w2"),
    ):
        np.testing.assert_array_equal(layer.kernel[...], weights[f"{name}.weight"].T)
    # Nothing else is left: another set of weights leaves no number as it was.
    before = jax.tree.leaves(nnx.state(model))
    load_torch_state_dict(model, state_dict(seed=1))
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert np.all(a != b)


NAME = "performer.net.layers.0.1.fn.fn.w1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"extra.weight": np.zeros(3)}, "left over: extra.weight"),
        (lambda w: w | {NAME.replace("w1", "w3"): w[NAME]}, r"left over: .*w3\.weight"),
        (lambda w: w | {NAME.replace("layers.0", "layers.1"): w[NAME]}, r"left over: .*layers\.1"),
        (lambda w: w | {NAME: w[NAME].T}, r"w1\.weight is \(32, 8\), the model has \(8, 32\)"),
        (lambda w: {n: x for n, x in w.items() if n != NAME}, r"missing: .*up\.kernel"),
        (
            lambda w: w | {NAME.replace("performer", "other"): w[NAME] + 1},
            "different values: .*w1.weight",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, message):
    model = build(PerformerLM, **SMALL)
    before = jax.tree.leaves(nnx.state(model))
    with pytest.raises(ValueError, match=message):
        load_torch_state_dict(model, change(state_dict()))
    for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_tensor_may_be_there_under_each_of_its_names_or_under_one():
    options = LM | {"weight_tie": True, "use_full_attn": True, "ff_chunks": 1}
    options |= {"absolute_position_emb": True, "bucket_size": 4}
    model = build(ReformerLM, **options)
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.normal(size=shape).astype(np.float32)

    tied = {
        "f.net.fn.toqk.weight": draw(8, M),
        "f.net.fn.tov.weight": draw(8, M),
        "f.net.fn.to_out.weight": draw(M, 8),
        "f.net.fn.to_out.bias": draw(M),
        "g.net.fn.fn.w1.weight": draw(4 * M, M),
        "g.net.fn.fn.w1.bias": draw(4 * M),
        "g.net.fn.fn.w2.weight": draw(M, 4 * M),
        "g.net.fn.fn.w2.bias": draw(M),
    }
    norms = {f"{part}.net.norm.{leaf}": None for part in ("f", "g") for leaf in ("weight", "bias")}
    weights = {
        "token_emb.weight": draw(V, M),
        "pos_emb.emb.weight": draw(24, M),
        "norm.weight": draw(M),
        "norm.bias": draw(M),
        "out.2.weight": draw(V, M),
    }
    weights["out.1.weight"], weights["out.1.bias"] = weights.pop("out.2.weight"), draw(V)
    for block in range(2):
        prefix = f"reformer.layers.blocks.{block}"
        weights |= {f"{prefix}.{name}": draw(M) for name in norms}
    for blocks in ((0,), (1,), (0, 1)):
        own = {f"reformer.layers.blocks.{b}.{name}": x for b in blocks for name, x in tied.items()}
        load_torch_state_dict(model, weights | own)
        shared = model.stack.blocks[1][0].inner
        assert shared is model.stack.blocks[0][0].inner
        kernel = shared.project.query.kernel[...]
        np.testing.assert_array_equal(kernel, tied["f.net.fn.toqk.weight"].T)


def test_an_encoder_and_decoder_are_told_apart_and_other_models_refused():
    shape = {"num_tokens": V, "max_seq_len": 24, "depth": 1, "heads": 2, "dim_head": 4}
    shape |= {"rotary_position_emb": False, "nb_features": 6}
    sides = {f"{side}_{k}": v for side in ("enc", "dec") for k, v in shape.items()}
    model = build(PerformerEncoderDecoder, dim=M, **sides)
    weights = {f"enc.{name}": x for name, x in state_dict(seed=0).items()}
    decoder = state_dict(depth=2, seed=1)  # The second block is the cross attention.
    weights |= {f"dec.net.{name}": x for name, x in decoder.items()}
    load_torch_state_dict(model, weights)
    for side, seed in ((model.encoder, 0), (model.decoder, 1)):
        expected = state_dict(seed=seed)["token_emb.weight"]
        np.testing.assert_array_equal(side.embed.embedding[...], expected)
    assert isinstance(model.encoder, LanguageModel)
    dense = nnx.eval_shape(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="Linear is not one of the presets"):
        load_torch_state_dict(dense, {"weight": np.zeros((2, 2))})
    config = TransformerConfig(V, 8, 2, None, 1, 8, 12, 8)
    other = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="left over: .*; missing: "):
        load_torch_state_dict(other, {"what.weight": np.zeros((2, 2))})
