"""Positions against their formulas, and the laws of rotation and of the learned table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.layers import AxialPositions, LearnedPositions, rotate, sinusoids
from tests.layers import definitions
from tests.layers.definitions import array, compiled, draw

# Packed rows: positions start again, and far ones have large angles.
POSITIONS = np.array([[0, 1, 2, 0, 1], [7, 300, 0, 2, 1]])


@pytest.mark.parametrize("features", [1, 6, 7])
def test_sinusoids_equal_the_definition(features):
    out = jax.jit(sinusoids, static_argnums=1)(POSITIONS, features)
    assert out.shape == (*POSITIONS.shape, features) and out.dtype == jnp.float32
    expected = definitions.sinusoids(POSITIONS.ravel(), features)
    np.testing.assert_allclose(out, expected.reshape(out.shape), atol=2e-6)


@pytest.mark.parametrize("features", [1, 6, 7])
def test_sinusoids_can_be_told_apart_from_cosines(features):
    order = [*range(0, features, 2), *range(1, features, 2)]
    out = sinusoids(jnp.asarray(POSITIONS), features, concatenated=True)
    np.testing.assert_array_equal(out, sinusoids(jnp.asarray(POSITIONS), features)[..., order])


@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_rotation_equals_complex_multiplication(base):
    x = draw(2, 5, 3, 6)
    out = compiled(rotate)(x, POSITIONS, base)
    expected = [definitions.rotate(*row, base) for row in zip(x, POSITIONS, strict=True)]
    np.testing.assert_allclose(out, expected, atol=6e-6)


def test_interleaved_pairs_are_turned_as_halves_are():
    x = draw(2, 5, 3, 6)
    out = compiled(lambda x: rotate(x, POSITIONS, interleaved=True))(x)
    order = [0, 2, 4, 1, 3, 5]
    np.testing.assert_allclose(out[..., order], rotate(x[..., order], POSITIONS), atol=1e-6)


def test_rotated_products_depend_on_distances_alone():
    query, key = draw(2, 1, 4, 1, 8)

    @compiled
    def products(start):
        positions = jnp.arange(4)[None] + start
        turned = [rotate(x, positions)[0, :, 0] for x in (query, key)]
        return turned[0] @ turned[1].T

    np.testing.assert_allclose(products(37), products(0), atol=5e-6)
    assert np.max(np.abs(products(0) - query[0, :, 0] @ key[0, :, 0].T)) > 0.5


def test_one_token_a_row_is_rotated_by_its_own_position():
    x = draw(3, 2, 4)
    positions = jnp.array([0, 4, 9])
    out = compiled(rotate)(x, positions)
    np.testing.assert_allclose(out, definitions.rotate(x, positions), atol=1e-6)
    np.testing.assert_array_equal(out[0], x[0])


def test_rotation_keeps_the_dtype():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    assert jax.eval_shape(rotate, x, jnp.ones((1, 2), int)).dtype == jnp.bfloat16


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_in_bfloat16_rounds_once(interleaved):
    x = jax.random.normal(jax.random.key(0), (64, 2, 16)).astype(jnp.bfloat16)
    positions = jnp.arange(64) * 7
    found = rotate(x, positions, interleaved=interleaved)
    wide = rotate(x.astype(jnp.float32), positions, interleaved=interleaved)
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


def test_an_odd_width_cannot_be_rotated():
    with pytest.raises(ValueError, match="D must be even, got 5"):
        rotate(jnp.ones((1, 2, 1, 5)), jnp.zeros((1, 2), int))


def test_learned_positions_are_sinusoids_at_first_and_parameters_after():
    layer = LearnedPositions(5, 6)
    places = jnp.array([[4, 0, 2, 2]])
    expected = definitions.sinusoids([4, 0, 2, 2], 6)
    np.testing.assert_allclose(layer(places)[0], expected, atol=1e-6)

    @compiled
    @nnx.grad
    def gradient(layer):
        return jnp.sum(layer(places))

    counts = np.array([1.0, 0, 2, 0, 1])[:, None]
    np.testing.assert_array_equal(gradient(layer).table[...], np.tile(counts, 6))


@pytest.mark.parametrize(
    ("places", "message"), [([[0, 5]], "Positions 0 to 5.*max_len=5"), ([[-1, 2]], "Positions -1")]
)
def test_positions_outside_the_table_are_an_error_or_nan_but_never_another_row(places, message):
    layer, places = LearnedPositions(5, 3), jnp.array(places)
    with pytest.raises(ValueError, match=message):
        layer(places)
    out = np.asarray(compiled(layer)(places))
    outside = (np.asarray(places) < 0) | (np.asarray(places) >= 5)
    assert np.isnan(out[outside]).all() and np.isfinite(out[~outside]).all()


def test_no_positions_are_no_error():
    assert LearnedPositions(5, 3)(jnp.zeros((2, 0), int)).shape == (2, 0, 3)


def test_learned_positions_can_be_drawn():
    normal = nnx.initializers.normal(1.0)
    table = array(LearnedPositions(50, 40, initializer=normal, rngs=nnx.Rngs(0)).table)
    assert table.shape == (50, 40) and abs(table.std() - 1) < 0.05 and abs(table.mean()) < 0.1
    with pytest.raises(ValueError, match="got None"):
        LearnedPositions(5, 3, initializer=normal)


@pytest.mark.parametrize("axis_features", [None, (3, 1, 2)])
def test_axial_positions_are_rows_of_a_table_per_axis(axis_features):
    shape = (2, 3, 2)
    layer = AxialPositions(shape, 6, axis_features=axis_features, rngs=nnx.Rngs(0))
    places = jnp.array([[0, 11, 7], [3, 3, 10]])
    out = compiled(layer)(places)
    for t, found in zip(places.ravel(), out.reshape(-1, 6), strict=True):
        rows = [array(x)[i] for x, i in zip(layer.tables, np.unravel_index(t, shape), strict=True)]
        expected = sum(rows) if axis_features is None else np.concatenate(rows)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("axis_features", [None, (1, 2)])
def test_positions_outside_the_grid_are_an_error_or_nan(axis_features):
    layer = AxialPositions((2, 3), 3, axis_features=axis_features, rngs=nnx.Rngs(0))
    places = jnp.array([-1, 0, 5, 6])
    with pytest.raises(
        ValueError, match=r"Positions -1 to 6 .* the 6 positions of the grid \(2, 3\)"
    ):
        layer(places)
    out = np.asarray(compiled(layer)(places))
    assert np.isnan(out[[0, 3]]).all() and np.isfinite(out[[1, 2]]).all()


def test_tables_must_fit_the_grid():
    with pytest.raises(ValueError, match=r"one width per axis of \(2, 3\).*got \(1, 3\)"):
        AxialPositions((2, 3), 3, axis_features=(1, 3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"must be a grid .* got \(\)"):
        AxialPositions((), 3, rngs=nnx.Rngs(0))
