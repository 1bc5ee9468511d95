import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_attention.mechanisms.axes import attended_axes, fold_axes, unfold_axes


@st.composite
def shapes_and_axes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=3, max_size=6)))
    leading = len(shape) - 2
    axes = draw(st.lists(st.integers(0, leading - 1), min_size=1, unique=True))
    negative = [a - len(shape) if draw(st.booleans()) else a for a in axes]
    return shape, tuple(sorted(axes)), tuple(negative)


@settings(max_examples=40, deadline=None)
@given(shapes_and_axes())
def test_fold_and_unfold_are_inverse_and_row_major(case):
    shape, axes, given_axes = case
    x = np.arange(np.prod(shape)).reshape(shape)
    attended = attended_axes(len(shape), given_axes)
    folded = np.asarray(fold_axes(jnp.asarray(x), attended, trailing=2))
    batch = tuple(a for a in range(len(shape) - 2) if a not in axes)
    expected = np.moveaxis(x, (*batch, *axes), range(len(shape) - 2))
    expected = expected.reshape(*(shape[a] for a in batch), -1, *shape[-2:])
    np.testing.assert_array_equal(folded, expected)
    np.testing.assert_array_equal(unfold_axes(jnp.asarray(folded), attended, shape), x)


def test_nothing_to_move():
    assert attended_axes(4, None) is None
    assert attended_axes(4, 1) is None
    assert attended_axes(4, -3) is None
    assert attended_axes(5, 1) == (1,)
    assert attended_axes(6, (-3, 1)) == (1, 3)


@pytest.mark.parametrize("axis", [(), (1, 1), (1, -4), 3, 4, -1, -2, -6, (0, 5)])
def test_refused(axis):
    with pytest.raises(ValueError, match="axis must name different axes"):
        attended_axes(5, axis)
