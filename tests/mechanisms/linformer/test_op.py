"""Linformer against its definition, and what it cannot do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention import linformer_attention
from tests.layers.definitions import compiled

B, T, L, R, H, K, D, V = 2, 5, 7, 3, 4, 2, 6, 4


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ARRAYS = (
    draw(0, B, T, H, D),
    draw(1, B, L, K, D),
    draw(2, B, L, K, V),
    draw(3, L, R),
    draw(4, L, R),
)


def definition(query, key, value, key_projection, value_projection):
    out = np.zeros((B, T, H, V))
    for b, t, h in np.ndindex(B, T, H):
        keys = key_projection.T @ key[b, :, h // 2]
        weights = np.exp(keys @ query[b, t, h] / np.sqrt(D))
        out[b, t, h] = weights / weights.sum() @ (value_projection.T @ value[b, :, h // 2])
    return out


def test_equals_the_definition_with_its_gradients():
    np.testing.assert_allclose(
        compiled(linformer_attention)(*ARRAYS),
        definition(*(x.astype(np.float64) for x in ARRAYS)),
        rtol=1e-5,
        atol=1e-5,
    )

    def loss(*arrays):
        return jnp.sum(linformer_attention(*arrays) ** 2)

    gradients = compiled(jax.grad(loss, argnums=tuple(range(5))))(*ARRAYS)
    for i, gradient in enumerate(gradients):
        direction = draw(9, *ARRAYS[i].shape)
        ends = []
        for sign in (1, -1):
            moved = [x.astype(np.float64) for x in ARRAYS]
            moved[i] = moved[i] + sign * 1e-5 * direction
            ends.append(np.sum(definition(*moved) ** 2))
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-3, atol=1e-3)


def test_fewer_keys_use_the_first_rows_of_the_projections():
    query, key, value, *projections = ARRAYS
    short = linformer_attention(query, key[:, :4], value[:, :4], *projections)
    cut = linformer_attention(query, key[:, :4], value[:, :4], *(x[:4] for x in projections))
    np.testing.assert_array_equal(short, cut)


def test_low_precision_is_summed_in_float32():
    out = linformer_attention(*(jnp.asarray(x, jnp.bfloat16) for x in ARRAYS))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), linformer_attention(*ARRAYS), atol=0.15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": ARRAYS[1][:, :6]}, "at most 7 keys, and as many values"),
        ({"key_projection": ARRAYS[3][:6], "value_projection": ARRAYS[4][:6]}, "at most 6 keys"),
        ({"value_projection": ARRAYS[4][:, :2]}, r"got \(7, 3\) and \(7, 2\)"),
        ({"key_mask": np.ones((B, L), bool)}, "keys cannot be masked"),
        ({"causal": True}, "cannot be causal"),
    ],
)
def test_limits_are_errors(change, message):
    names = ("query", "key", "value", "key_projection", "value_projection")
    with pytest.raises(ValueError, match=message):
        linformer_attention(**(dict(zip(names, ARRAYS, strict=True)) | change))
