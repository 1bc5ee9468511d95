"""Vectors of proteins are states of the model, whatever they were computed with."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.inference.embedding import embed_sequences
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES = {
    "emb_dim": 16,
    "num_heads": 2,
    "num_layers": 2,
    "qkv_dim": 16,
    "mlp_dim": 16,
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}
DOMAIN = make_protein_domain(length=24)
VOCAB = DOMAIN.vocab
RANDOM = np.random.default_rng(0)
PROTEINS = ["".join(RANDOM.choice(list("ACDEFGHIKLMNPQRSTVWYX"), n)) for n in (7, 1, 20, 3, 13, 8)]
EVERY = (0, 1, 2, "last")
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def make(model_class: Any = FlaxLM, **options: Any) -> Any:
    attention_fn = make_fast_softmax_attention(nb_features=8)
    options = {"attention_fn": attention_fn, "positions": "rotary"} | SIZES | options
    return model_class(DOMAIN, **options)


@pytest.fixture(scope="module")
def lm():
    return make()


@pytest.fixture(scope="module")
def bert():
    return make(FlaxBERT)


@pytest.fixture(scope="module", params=["lm", "bert"])
def case(request):
    """A model, its vectors of all residues and layers, and the full rows of states."""
    model = request.getfixturevalue(request.param)
    states = []
    module = nnx.merge(model.graphdef, model.state.parameters, model.state.variables)
    for protein in PROTEINS[:1]:
        ids = VOCAB.encode(protein)
        row = [VOCAB.bos, *ids] if request.param == "lm" else [*ids, VOCAB.eos]
        found = jax.jit(lambda tokens: module.hidden_states(tokens, EVERY))(jnp.array([row]))
        states.append(np.asarray(found)[:, 0])
    return model, model.embed(PROTEINS, layers=EVERY, pool=None), states


def test_a_residue_has_the_state_after_it_was_read(case):
    model, vectors, states = case
    own = slice(1, None) if isinstance(model, FlaxLM) else slice(None, -1)
    for protein, found in zip(PROTEINS, vectors, strict=True):
        assert found.shape == (4, len(protein), 16) and found.dtype == np.float32
    for found, row in zip(vectors, states, strict=False):
        np.testing.assert_allclose(found, row[:, own], **CLOSE)


def test_the_last_layer_is_what_encode_gives(case):
    model, vectors, _ = case
    module = nnx.merge(model.graphdef, model.state.parameters, model.state.variables)
    causal = isinstance(model, FlaxLM)
    ids = VOCAB.encode(PROTEINS[0])
    row = jnp.array([[VOCAB.bos, *ids] if causal else [*ids, VOCAB.eos]])
    encoded = jax.jit(module.encode)(row)[0]
    np.testing.assert_allclose(vectors[0][-1], encoded[1:] if causal else encoded[:-1], **CLOSE)


def test_pooling_is_over_residues_alone(case):
    model, vectors, _ = case
    for pool in ("mean",) if isinstance(model, FlaxLM) else ("max", "sum"):
        pooled = model.embed(PROTEINS, layers=EVERY, pool=pool)
        assert pooled.shape == (len(PROTEINS), 4, 16)
        expected = [getattr(np, pool)(found, axis=1) for found in vectors]
        np.testing.assert_allclose(pooled, expected, **CLOSE)


def test_begin_and_end(case):
    model, vectors, states = case
    end = model.embed(PROTEINS, layers=EVERY, pool="eos")
    np.testing.assert_allclose(end[0], states[0][:, -1], **CLOSE)
    if isinstance(model, FlaxLM):
        np.testing.assert_allclose(end[3], vectors[3][:, -1], **CLOSE)  # After its last residue.
        begin = model.embed(PROTEINS, layers=EVERY, pool="bos")
        np.testing.assert_allclose(begin, np.stack([states[0][:, 0]] * len(PROTEINS)), **CLOSE)
    else:
        with pytest.raises(ValueError, match="FlaxBERT reads no such token"):
            model.embed(PROTEINS, pool="bos")
        with pytest.raises(ValueError, match="cropped to max_length=5 residues has no end token"):
            model.embed(PROTEINS, pool="eos", max_length=5)


def test_neither_batches_nor_neighbours_nor_order_matter(case):
    model, vectors, _ = case
    one_by_one = [model.embed([protein], layers=EVERY, pool=None)[0] for protein in PROTEINS[:2]]
    options = {"layers": EVERY, "pool": None, "tokens_per_batch": 40}
    backwards = list(embed_sequences(model, iter(PROTEINS[::-1]), **options))[::-1]
    for others in (one_by_one, backwards):
        for one, other in zip(vectors, others, strict=False):
            np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize("case", ["bert"], indirect=True)
def test_layers_count_from_both_ends(case):
    model, vectors, _ = case
    found = model.embed(PROTEINS[:1], layers=[-1, -3, "last"], pool=None)[0]
    np.testing.assert_allclose(found, vectors[0][[2, 0, 3]], **CLOSE)
    single = model.embed(PROTEINS[:1], layers=1, pool=None)[0]
    np.testing.assert_allclose(single, vectors[0][1], **CLOSE)
    assert model.embed(PROTEINS[:2]).shape == (2, 16)


def test_the_future_never_shows(lm):
    one, two = lm.embed(["MKTAYIAK", "MKTAWWWW"], layers=EVERY, pool=None)
    np.testing.assert_array_equal(one[:, :4], two[:, :4])
    assert (one[1:, 4:] != two[1:, 4:]).any()


def test_half_precision_is_rounded_and_refused_where_it_overflows(lm):
    full, half = (lm.embed(PROTEINS, dtype=dtype) for dtype in ("float32", "float16"))
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, full, rtol=2**-10, atol=1e-6)
    large = make()
    parameters = jax.tree.map(lambda x: 1e6 * x, large.state.parameters)
    large.state = dataclasses.replace(large.state, parameters=parameters)
    with pytest.raises(FloatingPointError, match="take float32"):
        large.embed(PROTEINS[:1], layers=0, dtype="float16")


def test_learned_positions_are_a_limit_that_is_told():
    model = make(positions="learned", max_len=10, num_layers=1, attention_fn=None)
    assert model.embed(["ACDEFGHIKL"]).shape == (1, 16)
    with pytest.raises(ValueError, match="has 11 residues.*room for 10.*max_length=10"):
        model.embed(["ACDEFGHIKLM"])
    cropped = model.embed(["ACDEFGHIKLM"], max_length=10)
    np.testing.assert_allclose(cropped, model.embed(["ACDEFGHIKL"]), **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 3}, "layers 0 .* 2, or -3 .. -1"),
        ({"layers": ("first",)}, "a number or 'last', but got 'first'"),
        ({"layers": ()}, "at least one layer"),
        ({"pool": "median"}, "pool must be one of mean, max, sum, bos, eos"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16"),
        ({"max_length": 0}, "max_length must be a whole number from 1"),
        ({"tokens_per_batch": 0}, "tokens_per_batch must be at least 1"),
    ],
)
def test_bad_options_are_told(lm, options, message):
    with pytest.raises(ValueError, match=message):
        lm.embed(["MK"], **options)


def test_no_sequence_has_no_vector(lm):
    with pytest.raises(ValueError, match="no sequence"):
        lm.embed([])
