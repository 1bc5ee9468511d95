"""Sorting holds for numbers of buckets and positions whose product is no int32."""

import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.mechanisms.lsh.hashed.sorting import sort_by_bucket


# 31 bits fit one number; with 32 and 33 the product of bucket and length is beyond 2^31.
@pytest.mark.parametrize("n_buckets", [7, 2**21, 2**22, 2**31 - 1])
def test_sorts_by_bucket_then_position(n_buckets):
    length = 1000
    random = np.random.default_rng(0)
    buckets = n_buckets - 1 - random.integers(0, 7, (2, 3, length))
    order = sort_by_bucket(jnp.asarray(buckets, jnp.int32), n_buckets)
    expected = np.argsort(buckets, axis=-1, kind="stable")
    np.testing.assert_array_equal(order.position, expected)
    np.testing.assert_array_equal(order.slot, np.argsort(expected, axis=-1))
    np.testing.assert_array_equal(order.bucket, np.take_along_axis(buckets, expected, -1))
