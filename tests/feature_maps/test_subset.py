"""Positions that stand for a sequence: which they are, and that padding changes none of them."""

import functools

import jax
import numpy as np
import pytest

from fast_attention.feature_maps.moments import measure
from fast_attention.feature_maps.subset import spread_out

MOST = 8


def numbered(length, heads=1):
    """Each vector is its own position, ``[1, N, K, 1, 1]``."""
    x = np.broadcast_to(np.arange(length, dtype=np.float32)[:, None], (length, heads))
    return x[None, ..., None, None]


@pytest.mark.parametrize("length", [9, 37, 1000, 3_000_000])
def test_one_position_of_every_stretch(length):
    picked, _ = spread_out(numbered(length), None, MOST)
    edges = np.arange(MOST + 1) * length // MOST
    places = picked[0, :, 0, 0, 0].astype(int)
    assert (places >= edges[:-1]).all() and (places < edges[1:]).all()


def test_a_period_is_met_at_all_its_phases():
    for period in (2, 4, 8, 64):
        picked, _ = spread_out(numbered(64 * 64), None, 512)
        phases = np.bincount(picked[0, :, 0, 0, 0].astype(int) % period, minlength=period)
        assert phases.min() > 0.5 * 512 / period


def test_masked_is_truncated():
    """Head by head; as many visible as are taken, more, fewer, none."""
    length, counts = 40, (8, 29, 5, 0)
    rng = np.random.default_rng(0)
    mask = np.zeros((1, length, 4), bool)
    for head, count in enumerate(counts):
        mask[0, rng.permutation(length)[:count], head] = True
    picked, taken = jax.jit(functools.partial(spread_out, most=MOST))(numbered(length, 4), mask)
    for head, count in enumerate(counts):
        places = np.flatnonzero(mask[0, :, head])
        expected = places
        if count > MOST:
            ranks, _ = spread_out(numbered(count), None, MOST)
            expected = places[ranks[0, :, 0, 0, 0].astype(int)]
        np.testing.assert_array_equal(
            picked[0, :, head, 0, 0][taken[0, :, head]], expected.astype(np.float32)
        )


def test_moments_of_a_subset():
    """As those of the rows alone, whatever lies in the padding; close to those of all."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 600, 2, 4)).astype(np.float32) + 3
    mask = np.ones((2, 600, 1), bool)
    mask[1, 100:150] = False
    wild = np.where(mask[..., None], x, np.nan)
    some = jax.jit(functools.partial(measure, most=256))
    found = some(wild, wild, query_mask=mask, key_mask=mask)
    for row in range(2):
        alone = x[row, mask[row, :, 0]]
        for own, other in zip(found.key, some(alone, alone).key, strict=True):
            np.testing.assert_allclose(own[row], other, rtol=1e-5, atol=1e-6)
    whole = jax.jit(measure)(x, x)
    np.testing.assert_allclose(found.key.mean[0], whole.key.mean[0], atol=0.15)
    np.testing.assert_allclose(found.key.covariance[0], whole.key.covariance[0], atol=0.3)
