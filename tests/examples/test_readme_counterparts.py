"""Every example of the originals' READMEs: small ones run with gradients, all have their shapes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples import google_fast_attention as google
from examples import linear_attention_transformer as lat
from examples import performer_pytorch as performer
from examples import reformer_pytorch as reformer
from examples import tensorflow_performer as tensorflow

V = 12
SMALL = {"num_tokens": V, "dim": 8, "depth": 1, "heads": 2}
STACK = {"dim": 8, "depth": 1}
HASH = {"bucket_size": 4, "n_hashes": 2, "ff_chunks": 2}
# One of the Reformers hashes and has two streams; all other models compile faster without.
ONE_STREAM = {"reversible": False, "ff_chunks": 1}
DENSE = {"use_full_attn": True, "reverse_thres": 99, "ff_chunks": 1}
LM = {"full_attn_thres": 8, "reverse_thres": 8, "n_local_attn_heads": 1, "pkm_layers": ()}
FLAT = {"emb_dim": 8, "num_heads": 2, "num_layers": 1, "qkv_dim": 8, "mlp_dim": 8}
RESIDUES = 29

# The shapes that the README documents, and small sizes with theirs.
CASES = {
    performer.language_model: (
        (1, 2048, 20000),
        {
            **SMALL,
            **ONE_STREAM,
            "length": 9,
            "local_attn_heads": 1,
            "local_window_size": 4,
            "dim_head": 4,
        },
        (1, 9, V),
    ),
    performer.plain_performer: (
        (1, 2048, 512),
        {"length": 7, "dim": 8, "heads": 2},
        (1, 7, 8),
    ),
    performer.encoder_decoder_loss: ((), {**SMALL, "length": 7, "dim_head": 4}, ()),
    performer.encoder_decoder_generation: (
        (1, 512),
        {**SMALL, "length": 7, "dim_head": 4, "new_tokens": 3},
        (1, 3),
    ),
    performer.self_attention: ((1, 1024, 512), {"length": 7, "dim": 8, "dim_head": 2}, (1, 7, 8)),
    performer.fast_attention: (
        (1, 512, 8, 64),
        {"length": 7, "heads": 2, "dim_head": 4},
        (1, 7, 2, 4),
    ),
    performer.fixed_projections: (
        (1, 2048, 512),
        {"length": 7, "dim": 8, "heads": 2},
        (1, 7, 8),
    ),
    reformer.language_model: (
        (1, 8192, 20000),
        {**SMALL, **HASH, "length": 11, "emb_dim": 6, "num_mem_kv": 3, **LM},
        (1, 11, V),
    ),
    reformer.reformer: (
        (1, 8192, 512),
        {**STACK, **HASH, "length": 19, "reverse_thres": 99},
        (1, 19, 8),
    ),
    reformer.self_attention: (
        (10, 1024, 128),
        {"batch": 2, "length": 19, "dim": 16, "bucket_size": 4},
        (2, 19, 16),
    ),
    reformer.attention: (
        [(10, 1024, 128), (10, 1024, 1024), (10, 16, 1024)],
        {"batch": 2, "length": 19, "dim": 4, "bucket_size": 4},
        [(2, 19, 4), (2, 19, 19), (2, 16, 19)],
    ),
    reformer.masking: (
        (1, 8192, 20000),
        {**DENSE, "length": 7, "context_length": 5, "dim": 16, "num_tokens": V},
        (1, 7, V),
    ),
    reformer.feed_forward: ((1, 8192, 20000), {**SMALL, **DENSE, "length": 7}, (1, 7, V)),
    reformer.encoder_decoder_loss: ((), {**SMALL, **DENSE, "length": 7}, ()),
    reformer.encoder_decoder_generation: (
        (1, 4096),
        {**SMALL, **DENSE, "length": 3},
        (1, 3),
    ),
    reformer.axial_positions: (
        (1, 8192, 20000),
        {**DENSE, "shape": (5, 4), "widths": (8, 8), "num_tokens": V, "depth": 1},
        (1, 20, V),
    ),
    reformer.translation: (
        (1, 4096, 20000),
        {**SMALL, **DENSE, "length": 11, "emb_dim": 6},
        (1, 11, V),
    ),
    reformer.captions: (
        (1, 4096, 20000),
        {**DENSE, "side": 3, "length": 7, "dim": 8, "depth": 1, "num_tokens": V},
        (1, 7, V),
    ),
    reformer.recorder: (
        [(1, 8, 8192, 8192), (1, 8, 8, 8192)] * 12,
        {**STACK, **HASH, "length": 19},
        [(1, 8, 19, 19), (1, 8, 2, 19)],
    ),
    reformer.odd_lengths: (
        (1, 7777, 20000),
        {
            **STACK,
            "num_tokens": V,
            "ff_chunks": 1,
            "reverse_thres": 99,
            "length": 17,
            "context_length": 5,
            "bucket_size": 3,
            "num_mem_kv": 3,
        },
        (1, 17, V),
    ),
    reformer.training: (
        (),
        {**SMALL, **DENSE, "lengths": (5, 11, 7), "max_length": 16},
        (),
    ),
    reformer.generation: (
        (1, 100),
        {**SMALL, **DENSE, "new_tokens": 3, "max_length": 16},
        (1, 3),
    ),
    lat.language_model: (
        (1, 8192, 20000),
        {
            **SMALL,
            **ONE_STREAM,
            "length": 11,
            "emb_dim": 6,
            "dim_head": 4,
            "blindspot_size": 2,
            "n_local_attn_heads": 1,
            "local_attn_window_size": 4,
        },
        (1, 11, V),
    ),
    lat.transformer: (
        (1, 8192, 512),
        {**STACK, "heads": 2, "length": 7, "n_local_attn_heads": 1, "local_attn_window_size": 4},
        (1, 7, 8),
    ),
    lat.encoder_decoder: (
        (1, 4096, 20000),
        {**SMALL, "length": 7, "dim_head": 4, "n_local_attn_heads": 1, "reversible": False},
        (1, 7, V),
    ),
    lat.linformer: (
        (1, 4096, 20000),
        {**SMALL, "length": 7, "dim_head": 4, "projected": 3},
        (1, 7, V),
    ),
    lat.linformer_context: (
        (1, 4096, 20000),
        {**SMALL, "length": 7, "dim_head": 4, "context_length": 5, "projected": 3},
        (1, 7, V),
    ),
    lat.images: ((1, 32, 256, 256), {"side": 3, "channels": 2, "key_dim": 2}, (1, 2, 3, 3)),
    tensorflow.cross_attention: (
        (1, 8, 16),
        {"batch": 2, "length": 3, "key_length": 5, "features": 6},
        (2, 3, 6),
    ),
    tensorflow.several_axes: (
        (1, 5, 3, 4, 16),
        {"batch": 2, "shape": (2, 3, 2), "features": 6},
        (2, 2, 3, 2, 6),
    ),
    google.raw_softmax_attention: (
        (1, 1024, 8, 64),
        {"length": 7, "heads": 2, "head_dim": 4},
        (1, 7, 2, 4),
    ),
    google.generalized_attention: (
        (1, 1024, 512),
        {"length": 7, "features": 8, "heads": 2},
        (1, 7, 8),
    ),
    google.unidirectional_attention: (
        (1, 1024, 512),
        {"length": 7, "features": 8, "heads": 2},
        (1, 7, 8),
    ),
    google.transformer: ((1, 2048, 256), {**FLAT, "length": 7, "vocab_size": V}, (1, 7, V)),
    google.protein_lm: ((1, 512, RESIDUES), {**FLAT, "length": 7}, (1, 7, RESIDUES)),
    google.reversible_layers: (
        (1, 4096, 512),
        {"length": 7, "features": 8, "depth": 1, "heads": 2},
        (1, 7, 8),
    ),
    google.favor_attention: (
        [(1, 1024, 8, 64)] * 2,
        {"length": 7, "heads": 2, "head_dim": 4},
        [(1, 7, 2, 4)] * 2,
    ),
}

cases = pytest.mark.parametrize(
    "make", CASES, ids=lambda make: f"{make.__module__.split('.')[-1]}.{make.__name__}"
)


def shapes(outputs):
    found = [x.shape for x in jax.tree.leaves(outputs)]
    return found if len(found) > 1 else found[0]


def split(model):
    if isinstance(model, nnx.Module):
        return nnx.split(model, nnx.Param, ...)
    return None, model, None


def unused(make, path):
    """Tokens have no gradient, weights none behind them, and of an encoder no logits are asked."""
    if make.__name__.endswith(("generation", "recorder")):
        return True
    encoder = make is performer.encoder_decoder_loss
    return encoder and jax.tree_util.keystr(path).startswith("['encoder']['head']")


def test_every_example_is_tested():
    modules = (performer, reformer, lat, tensorflow, google)
    assert set(CASES) == {make for module in modules for make in module.EXAMPLES}


@cases
def test_shapes_are_those_of_the_readme(make):
    # Their many layers are alike.
    fewer = {"depth": 1} if "encoder_decoder" in make.__name__ else {}

    def outputs():
        model, call = make(**fewer)
        return call(model)

    assert shapes(jax.eval_shape(outputs)) == CASES[make][0]


@cases
def test_gradients_reach_every_parameter(make):
    _, sizes, expected = CASES[make]
    model, call = make(**sizes)
    graphdef, parameters, rest = split(model)

    @jax.jit
    def outputs_and_gradients(parameters, rest):
        def loss(parameters):
            outputs = call(
                parameters if graphdef is None else nnx.merge(graphdef, parameters, rest)
            )
            floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
            # Outputs count differently, or a softmax or norm at the end would have no gradient.
            weights = [jnp.cos(jnp.arange(math.prod(x.shape))).reshape(x.shape) for x in floats]
            return sum((jnp.sum(w * x) for w, x in zip(weights, floats, strict=True)), 0.0), outputs

        return jax.grad(loss, has_aux=True)(parameters)

    gradients, outputs = outputs_and_gradients(parameters, rest)
    assert shapes(outputs) == expected
    for x in jax.tree.leaves(outputs):
        assert np.isfinite(x).all()
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient != 0) or unused(make, path), path
