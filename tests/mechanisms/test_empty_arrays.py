"""The functions of arrays take empty batches and sequences: empty results, or zeros."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import (
    LocalWindow,
    efficient_attention,
    linformer_attention,
    local_attention,
    make_lsh_attention,
    make_softmax_attention,
    shared_qk_attention,
    strided_attention,
)
from fast_attention.feature_maps import PositiveFeatures
from fast_attention.linear import empty_state, prefill
from fast_attention.mechanisms.favor.near_field import near_field_attention
from fast_attention.mechanisms.lsh.hashed import lsh_attention
from tests.linear import cases

H, K, D, V = 2, 1, 4, 3
MAP = PositiveFeatures(6)
FEATURES = {
    "feature_map": MAP,
    "parameters": np.random.default_rng(0).normal(size=(6, D)).astype(np.float32),
}


HASHED: Any = {"key": jax.random.key(0), "bucket_size": 2, "n_hashes": 2}


def shared(function, **options):
    return lambda query, key, value: function(query, value, **options)


SELF = {
    "linear": functools.partial(cases.attend, **FEATURES, causal=True),
    "quadratic": functools.partial(cases.attend, **FEATURES, implementation="quadratic"),
    "near field": functools.partial(
        cases.with_plan(near_field_attention), **FEATURES, exact_window=2, causal=True
    ),
    "efficient": functools.partial(efficient_attention, causal=True),
    "blindspot": functools.partial(efficient_attention, causal=True, blindspot_size=2),
    "local": functools.partial(local_attention, window=LocalWindow(2)),
    "lsh": lambda query, key, value: lsh_attention(query, value, **HASHED),
    "exact, shared": shared(shared_qk_attention),
    "strided": functools.partial(strided_attention, make_softmax_attention(), stride=2),
}
CROSS = {
    "linear": functools.partial(cases.attend, **FEATURES),
    "efficient": efficient_attention,
    "exact": make_softmax_attention(),
    "linformer": functools.partial(
        linformer_attention, key_projection=jnp.ones((5, 2)), value_projection=jnp.ones((5, 2))
    ),
}


def check(function, rows, queries, keys):
    shapes = (rows, queries, H, D), (rows, keys, K, D), (rows, keys, K, V)

    def loss(*arrays):
        out = function(*arrays)
        return jnp.sum(out), out

    arrays = [jnp.ones(shape) for shape in shapes]
    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    assert out.shape == (rows, queries, H, V)
    assert not out.any()
    for gradient, array in zip(gradients, arrays, strict=True):
        assert gradient.shape == array.shape
        assert not gradient.any()


@pytest.mark.parametrize(("rows", "length"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("name", SELF)
def test_self_attention(name, rows, length):
    check(SELF[name], rows, length, length)


@pytest.mark.parametrize(("rows", "queries", "keys"), [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
@pytest.mark.parametrize("name", CROSS)
def test_attention_to_another_sequence(name, rows, queries, keys):
    check(CROSS[name], rows, queries, keys)


@pytest.mark.parametrize(("rows", "length"), [(0, 3), (2, 0)])
def test_masks_biases_and_segments_are_empty_too(rows, length):
    every = jnp.ones((rows, length))
    options = {
        "key_mask": every > 0,
        "key_bias": every,
        "segment_ids": every.astype(jnp.int32),
        "parameters": jnp.ones((rows * K, 6, D)) if rows == 0 else FEATURES["parameters"],
    }
    for causal in (True, False):
        function = functools.partial(cases.attend, **FEATURES | options, causal=causal)
        check(function, rows, length, length)


def test_no_token_leaves_a_state_as_it_is():
    rng = np.random.default_rng(1)
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, 3, n, w)), jnp.float32) for n, w in ((H, D), (K, D), (K, V))
    )
    state = empty_state(MAP, FEATURES["parameters"], (2,), K, D, V)
    out, state = cases.with_plan(prefill)(state, query, key, value, **FEATURES)
    empty = [x[:, :0] for x in (query, key, value)]
    _, after = cases.with_plan(prefill)(state, *empty, **FEATURES)
    for one, other in zip(after, state, strict=True):
        np.testing.assert_array_equal(one, other)
    # A query that has no key of its own reads the state.
    last = cases.attend(query[:, -1:], *empty[1:], **FEATURES, initial_state=state)
    np.testing.assert_allclose(last, out[:, -1:], atol=1e-5)


@pytest.mark.parametrize(("rows", "length"), [(0, 3), (2, 0)])
def test_weights_and_buckets_of_hashed_attention(rows, length):
    qk, value = jnp.ones((rows, length, H, D)), jnp.ones((rows, length, K, V))
    options: Any = {"return_weights": True, "return_buckets": True}
    found = lsh_attention(qk, value, **HASHED, return_weights=True)
    assert found.weights is not None and found.buckets is not None
    assert found.weights.shape == (rows, H, length, length)
    assert found.buckets.shape == (rows, H, 2, length)
    found = make_lsh_attention(2, 2)(qk, qk, value, **options)
    assert found.weights.shape == (rows, H, length, length)
