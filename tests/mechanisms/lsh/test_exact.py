"""Laws of exact attention with shared queries and keys."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import shared_qk_attention
from fast_attention.mechanisms import shared_qk
from fast_attention.mechanisms.rotary import rotate
from tests.mechanisms.lsh.definition import attend


def inputs(length=11, heads=2, value_heads=1):
    random = np.random.default_rng(0)
    qk = random.standard_normal((2, length, heads, 6), np.float32)
    return jnp.asarray(qk), jnp.asarray(
        random.standard_normal((2, length, value_heads, 3), np.float32)
    )


def summed(function):
    def loss(*arrays):
        out = function(*arrays)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))


def test_equals_the_definition_and_padding_gets_no_gradient():
    qk, value = inputs()
    queries = 8
    place = np.arange(11)
    seen = np.random.default_rng(1).random((2, 11)) < 0.8
    seen[:, 0] = True
    causal = (place[:, None] >= place) | (place >= queries)

    def expected(qk, value):
        rows = [
            [
                attend(
                    qk[b, :, h], value[b, :, 0], 1.0 * np.outer(seen[b], seen[b]), visible=causal
                )
                for h in range(2)
            ]
            for b in range(2)
        ]
        out = jnp.moveaxis(jnp.stack([jnp.stack(row) for row in rows]), 1, 2)
        return jnp.where(seen[:, :, None, None], out, 0)[:, :queries]

    call = functools.partial(
        shared_qk_attention, causal=True, query_length=queries, key_mask=jnp.asarray(seen)
    )
    gradients, out = summed(call)(qk, value)
    with jax.enable_x64(True):
        exact = expected(*(jnp.asarray(x, jnp.float64) for x in (qk, value)))
    np.testing.assert_allclose(out, np.nan_to_num(np.asarray(exact)), rtol=1e-5, atol=1e-6)
    for gradient in gradients:
        assert not jnp.where(seen[:, :, None, None], 0, gradient).any()


def test_rotation_is_a_product_with_unit_numbers():
    x, positions = inputs()[0], jnp.arange(11)[None]
    turned = rotate(x, jnp.broadcast_to(positions, (2, 11)), interleaved=True)
    pairs = np.asarray(x[..., 0::2] + 1j * x[..., 1::2])
    angles = np.arange(11)[:, None, None] * 10000.0 ** (-np.arange(0, 6, 2) / 6)
    expected = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(turned[..., 0::2] + 1j * turned[..., 1::2], expected, atol=1e-5)
    with pytest.raises(ValueError, match="even"):
        rotate(x[..., :5], jnp.zeros((2, 11), int), interleaved=True)


def test_unit_keys_have_no_gradient_at_zero():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]])
    np.testing.assert_allclose(shared_qk.unit_keys(x), [[0.6, 0.8], [0, 0], [0, 0]])
    gradient = jax.grad(lambda x: shared_qk.unit_keys(x)[:, 0].sum())(x)
    np.testing.assert_allclose(gradient, [[0.128, -0.096], [0, 0], [0, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_length": 12}, "query_length=12"),
        ({"positions": jnp.zeros((2, 11), int)}, "rotary=True"),
        ({"mask": jnp.ones((3, 1, 11, 11), bool)}, "broadcastable"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        shared_qk_attention(*inputs(), **options)
