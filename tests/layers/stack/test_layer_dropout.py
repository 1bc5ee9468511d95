"""Layers are left out at the rate, but never all of them."""

import jax
import numpy as np
import pytest

from fast_attention.layers import draw_layer_mask


def test_layers_are_left_out_at_the_rate_but_never_all():
    keys = jax.random.split(jax.random.key(0), 4000)
    masks = np.asarray(jax.vmap(lambda key: draw_layer_mask(key, 0.5, 3))(keys))
    assert masks.dtype == bool and masks.any(axis=1).all()
    # The first is kept by itself in half of the cases, and for want of others in an eighth.
    np.testing.assert_allclose(masks.mean(axis=0), [0.625, 0.5, 0.5], atol=0.04)
    assert draw_layer_mask(keys[0], 0.0, 3).all()


def test_a_rate_is_less_than_one():
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        draw_layer_mask(jax.random.key(0), 1, 3)
