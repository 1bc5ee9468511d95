"""Buckets are nearest directions, in opposite pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.mechanisms.lsh.hashed import draw_rotations, hash_vectors, hashing, n_buckets


@pytest.mark.parametrize("products", [3, 10**6])
def test_a_bucket_is_the_nearest_direction(products, monkeypatch):
    monkeypatch.setattr(hashing, "_CPU_PRODUCTS", products)
    x = jax.random.normal(jax.random.key(0), (3, 17, 5))
    rotations = draw_rotations(jax.random.key(1), 5, 8, n_rounds=4, rows=3)
    scores = np.einsum("nsd,ndrj->nrsj", x, rotations)
    expected = np.concatenate([scores, -scores], axis=-1).argmax(-1)
    np.testing.assert_array_equal(hash_vectors(x, rotations, n_hashes=4), expected)
    np.testing.assert_array_equal(hash_vectors(5 * x, rotations, n_hashes=4), expected)
    opposite = hash_vectors(-x, rotations, n_hashes=4)
    np.testing.assert_array_equal(opposite, (expected + 4) % 8)
    assert not hash_vectors(0 * x, rotations, n_hashes=4).any()


def test_one_rotation_gives_the_best_buckets_the_best_last():
    x = jax.random.normal(jax.random.key(0), (2, 9, 5))
    rotations = draw_rotations(jax.random.key(1), 5, 6, n_rounds=1)
    scores = np.einsum("nsd,dj->nsj", x, rotations[0, :, 0])
    expected = np.concatenate([scores, -scores], axis=-1).argsort(-1)
    for rounds, kept in ((3, 3), (9, 6)):
        found = hash_vectors(x, rotations, n_hashes=rounds, rehash_each_round=False)
        np.testing.assert_array_equal(found, np.moveaxis(expected[..., -kept:], -1, 1))


def test_buckets_are_even_in_number():
    assert [n_buckets(length, 4) for length in (1, 8, 9, 16, 17)] == [2, 2, 4, 4, 6]
    with pytest.raises(ValueError, match="even"):
        draw_rotations(jax.random.key(0), 4, 5, n_rounds=1)
    assert draw_rotations(jax.random.key(0), 4, 6, n_rounds=2).dtype == jnp.float32
