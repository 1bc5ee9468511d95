"""Masks as Flax's helpers make them: the accepted forms are exact, every other one is refused."""

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.hosts.adapters import (
    BATCH,
    HEADS,
    HOSTS,
    LENGTH,
    SOFTMAX,
    assert_close,
    directions,
    in_turn,
    inputs,
    mechanisms,
    pair,
    traced_with,
)

pytestmark = pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
dtypes = pytest.mark.parametrize("dtype", [bool, jnp.float32], ids=["bool", "float"])

POSITIONS = jnp.arange(LENGTH)
VALID = {
    "right": POSITIONS[None, :] < jnp.array([[7], [LENGTH]]),
    "left": POSITIONS[None, :] >= jnp.array([[4], [0]]),
    "scattered": jax.random.bernoulli(jax.random.key(0), 0.6, (BATCH, LENGTH)).at[:, 0].set(True),
}
paddings = pytest.mark.parametrize("valid", VALID.values(), ids=VALID.keys())


def check_rows(host, mechanism, mask, rows, *, unidirectional):
    """A concrete mask is accepted; the result at `rows` [BATCH, LENGTH] is the definition's."""
    traced_with(host, mechanism, unidirectional=unidirectional, mask=mask)
    parameters, apply, define = pair(host, mechanism, unidirectional=unidirectional)
    out = apply(parameters, inputs(), mask=mask)
    assert np.all(np.isfinite(out))
    assert_close(out[rows], define(parameters, inputs(), mask=mask)[rows])


EVERYWHERE = np.ones((BATCH, LENGTH), bool)


@in_turn
@paddings
def test_hidden_keys(host, mechanism, unidirectional, valid):
    mask = valid[:, None, None, :]
    check_rows(host, mechanism, mask, EVERYWHERE, unidirectional=unidirectional)


def test_hidden_keys_as_numbers(host):
    mask = VALID["scattered"][:, None, None, :].astype(jnp.float32)
    check_rows(host, SOFTMAX, mask, EVERYWHERE, unidirectional=True)


@pytest.mark.parametrize("shape", [(LENGTH,), (1, HEADS, LENGTH, LENGTH)], ids=str)
def test_hidden_keys_in_every_broadcastable_shape(host, shape):
    mask = jnp.broadcast_to(VALID["right"][0], shape)
    check_rows(host, SOFTMAX, mask, EVERYWHERE, unidirectional=False)


def test_hidden_keys_that_differ_by_head(host):
    mask = jax.random.bernoulli(jax.random.key(4), 0.7, (BATCH, HEADS, 1, LENGTH))
    mask = mask.at[..., 0].set(True)
    check_rows(host, SOFTMAX, mask, EVERYWHERE, unidirectional=True)


@directions
@paddings
def test_padded_queries_and_keys(host, unidirectional, valid):
    # Rows of padding are unspecified: nobody reads them. Every other row is exact.
    mask = flax.linen.make_attention_mask(valid, valid)
    check_rows(host, SOFTMAX, mask, np.asarray(valid), unidirectional=unidirectional)


@dtypes
@paddings
def test_padded_queries_and_keys_with_a_causal_mask(host, dtype, valid):
    mask = flax.linen.combine_masks(
        flax.linen.make_attention_mask(valid, valid),
        flax.linen.make_causal_mask(valid),
        dtype=dtype,
    )
    check_rows(host, SOFTMAX, mask, np.asarray(valid), unidirectional=True)


@dtypes
@paddings
def test_hidden_keys_with_a_causal_mask(host, dtype, valid):
    causal = nnx.make_causal_mask(valid)
    mask = nnx.combine_masks(causal, valid[:, None, None, :], dtype=dtype)
    check_rows(host, SOFTMAX, mask, EVERYWHERE, unidirectional=True)


@mechanisms
def test_a_causal_mask_alone(host, mechanism):
    mask = nnx.make_causal_mask(jnp.ones((BATCH, LENGTH)))
    check_rows(host, mechanism, mask, EVERYWHERE, unidirectional=True)


@pytest.mark.parametrize("shape", [(), (1, HEADS)], ids=str)
def test_a_causal_mask_in_every_broadcastable_shape(host, shape):
    mask = jnp.broadcast_to(jnp.tri(LENGTH, dtype=bool), (*shape, LENGTH, LENGTH))
    check_rows(host, SOFTMAX, mask, EVERYWHERE, unidirectional=True)


@directions
def test_everything_visible(host, unidirectional):
    mask = jnp.ones((BATCH, 1, LENGTH, LENGTH))
    check_rows(host, SOFTMAX, mask, EVERYWHERE, unidirectional=unidirectional)


@in_turn
@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_equals_truncated(host, mechanism, unidirectional, side):
    kept = 7
    parameters, apply, _ = pair(host, mechanism, unidirectional=unidirectional)
    x = inputs()
    visible = slice(0, kept) if side == "right" else slice(LENGTH - kept, None)
    keep = np.zeros(LENGTH, bool)
    keep[visible] = True
    filled = jnp.where(keep[None, :, None], x, 1e3)
    mask = jnp.broadcast_to(keep, (BATCH, 1, 1, LENGTH))
    target = inputs(BATCH, kept, seed=2)

    def through_mask(x):
        return apply(parameters, x, mask=mask)[:, visible]

    def truncated(x):
        return apply(parameters, x[:, visible])

    def value_and_gradient(function, x):
        out, pull_back = jax.vjp(function, x)
        return out, *pull_back(2 * (out - target))

    out, gradient = value_and_gradient(through_mask, filled)
    expected, expected_gradient = value_and_gradient(truncated, x)
    assert_close(out, expected, tolerance=1e-5)
    assert_close(gradient, expected_gradient, tolerance=1e-4)
    assert np.all(gradient[:, ~keep] == 0)


@in_turn
def test_a_row_with_nothing_to_see_is_zero(host, mechanism, unidirectional):
    parameters, apply, _ = pair(host, mechanism, unidirectional=unidirectional)
    mask = jnp.broadcast_to(jnp.array([True, False])[:, None, None, None], (BATCH, 1, 1, LENGTH))
    x = inputs()
    out, pull_back = jax.vjp(lambda x: apply(parameters, x, mask=mask), x)
    np.testing.assert_array_equal(out[1], np.zeros_like(out[1]))
    assert_close(out[0], apply(parameters, x)[0], tolerance=1e-5)
    (gradient,) = pull_back(jnp.ones_like(out))
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[1] == 0)


SQUARE = (BATCH, 1, LENGTH, LENGTH)
CAUSAL = np.tri(LENGTH, dtype=bool)
REFUSED = {
    "random": jax.random.bernoulli(jax.random.key(0), 0.5, SQUARE),
    "random_unbatched": jax.random.bernoulli(jax.random.key(1), 0.5, (LENGTH, LENGTH)),
    "random_float": jax.random.bernoulli(jax.random.key(2), 0.5, SQUARE).astype(jnp.float32),
    "random_for_one_head": jnp.ones((BATCH, HEADS, LENGTH, LENGTH), bool)
    .at[:, 1]
    .set(jax.random.bernoulli(jax.random.key(3), 0.5, SQUARE)[:, 0]),
    "window": jnp.abs(POSITIONS[:, None] - POSITIONS[None, :]) <= 2,
    "causal_window": jnp.asarray(CAUSAL & ~np.tri(LENGTH, k=-3, dtype=bool)),
    "segments": (POSITIONS[:, None] < 5) == (POSITIONS[None, :] < 5),
    "strictly_causal": jnp.asarray(np.tri(LENGTH, k=-1, dtype=bool)),
    "anticausal": jnp.asarray(CAUSAL.T),
    "prefix": jnp.asarray(CAUSAL | (np.arange(LENGTH) < 4)[None, :]),
    "causal_with_a_hole": jnp.asarray(CAUSAL).at[8, 3].set(False),
}


@directions
@pytest.mark.parametrize("mask", REFUSED.values(), ids=REFUSED.keys())
def test_other_masks_are_refused_with_a_remedy(host, unidirectional, mask):
    with pytest.raises(ValueError, match=r"(?s)mask.*key_mask.*segment_ids.*exact attention"):
        traced_with(host, SOFTMAX, unidirectional=unidirectional, mask=mask)


@dtypes
@pytest.mark.parametrize("valid", [VALID["right"], EVERYWHERE], ids=["padded", "full"])
def test_causal_mask_for_a_bidirectional_function_is_refused(host, dtype, valid):
    mask = nnx.combine_masks(
        nnx.make_causal_mask(valid), nnx.make_attention_mask(valid, valid), dtype=dtype
    )
    with pytest.raises(ValueError, match="unidirectional=True|is_causal"):
        traced_with(host, SOFTMAX, mask=mask)


@pytest.mark.parametrize(
    "shape",
    [(BATCH, 1, LENGTH, LENGTH + 1), (BATCH + 1, 1, 1, LENGTH), (BATCH, HEADS + 1, 1, LENGTH)],
    ids=str,
)
def test_masks_of_a_wrong_shape_are_refused(host, shape):
    with pytest.raises(ValueError, match="mask"):
        traced_with(host, SOFTMAX, mask=jnp.ones(shape, bool))


def test_an_additive_mask_is_refused(host):
    mask = jnp.where(VALID["right"], 0.0, -1e9)[:, None, None, :]
    with pytest.raises(ValueError, match="mask"):
        traced_with(host, SOFTMAX, mask=mask)
