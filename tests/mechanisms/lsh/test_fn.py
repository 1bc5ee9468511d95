"""Reformer's attention behind the signature of Flax's ``dot_product_attention``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_lsh_attention, shared_qk_attention
from fast_attention.mechanisms.lsh.hashed import lsh_attention

HASHED = make_lsh_attention(bucket_size=4, n_hashes=2, rotary=True)


def inputs(length=24):
    random = np.random.default_rng(0)
    qk = jnp.asarray(random.standard_normal((2, length, 2, 6), np.float32))
    return qk, jnp.asarray(random.standard_normal((2, length, 1, 3), np.float32))


def test_hashes_long_inputs_and_takes_its_rotations_from_the_projection():
    qk, value = inputs()
    key = jax.random.key(7)
    projection = HASHED.draw_projection(key, 6)
    assert projection.dtype == jnp.uint32
    found = HASHED(
        qk[:, :20], qk, value, is_causal=True, projection=projection, return_buckets=True
    )
    hashing: Any = {"bucket_size": 4, "n_hashes": 2, "rotary": True}
    expected = lsh_attention(qk, value, key, causal=True, query_length=20, **hashing)
    np.testing.assert_array_equal(found.out, expected)
    again = HASHED(qk[:, :20], qk, value, is_causal=True, buckets=found.buckets)
    np.testing.assert_array_equal(again, expected)
    assert jnp.abs(HASHED(qk[:, :20], qk, value, is_causal=True) - expected).max() > 1e-3


def test_short_inputs_are_attended_exactly_and_padding_masks_are_key_masks():
    qk, value = inputs()
    seen = jnp.arange(24)[None] < jnp.array([[24], [9]])
    expected = shared_qk_attention(qk, value, key_mask=seen)
    function = make_lsh_attention(bucket_size=4, full_attn_thres=24)
    assert hash(function) == hash(make_lsh_attention(bucket_size=4, full_attn_thres=24))
    out = function(qk, qk, value, mask=seen[:, None, None, :])
    np.testing.assert_array_equal(out, expected)
    out = make_lsh_attention(use_full_attn=True)(qk, qk, value, key_mask=seen, return_buckets=True)
    np.testing.assert_array_equal(out.out, expected)
    assert out.buckets is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": 0}, "bias must be None for hashed attention"),
        ({"segment_ids": jnp.zeros((2, 9), int)}, "segment_ids must be of shape"),
        ({"module": 0}, "sow_weights=False"),
        ({"key": jnp.ones((2, 9, 2, 6))}, "keys and values of the same length"),
        ({"query": jnp.ones((2, 25, 2, 6))}, "at least as many keys as queries"),
        ({"value": jnp.ones((2, 9, 2, 6))}, "keys and values of the same length"),
    ],
)
def test_what_it_cannot_do_is_refused(options, message):
    qk, value = inputs()
    with pytest.raises(ValueError, match=message):
        HASHED(**{"query": qk, "key": qk, "value": value, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"n_hashes": 0},
        {"drop_for_hash_rate": 1.0},
        {"rehash_each_round": False, "allow_duplicate_attention": False},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make_lsh_attention(**options)


def test_one_query_over_a_cache_is_refused():
    """The query would be read as the first of the keys; keys of memory have no mask of pairs."""
    attend = make_lsh_attention(4, 2)
    query, cache = jnp.ones((1, 1, 2, 4)), jnp.ones((1, 8, 2, 4))
    with pytest.raises(ValueError, match="a cache cannot be read"):
        attend(query, cache, cache, mask=jnp.ones((1, 1, 1, 8), bool))
    module = nnx.MultiHeadAttention(
        2, 8, attention_fn=attend, decode=True, keep_rngs=False, rngs=nnx.Rngs(0)
    )
    module.init_cache((1, 8, 8))
    with pytest.raises(ValueError, match="a cache cannot be read"):
        module(jnp.ones((1, 1, 8)))
    assert attend(query, cache, cache).shape == query.shape
