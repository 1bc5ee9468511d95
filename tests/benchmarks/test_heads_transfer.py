"""Attention transfer on single heads."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import heads_transfer

DATA = np.random.default_rng(0).normal(size=(3, 32, 2, 4)).astype(np.float32)
TEXT = (DATA[0], DATA[1], DATA[2])


def transfer(estimator: str, steps: int) -> heads_transfer.Errors:
    return heads_transfer.transfer(estimator, TEXT, features=8, window=None, steps=steps, seed=0)


@pytest.mark.parametrize("estimator", ["hedgehog", "wderf_s"])
def test_training_reduces_the_error_on_its_own_text(estimator: str):
    trained, less = transfer(estimator, 40), transfer(estimator, 1)
    np.testing.assert_array_equal(trained.before, less.before)
    assert trained.before.shape == (2,)
    assert (trained.trained < less.trained).all()


def test_favor_has_nothing_to_train():
    errors = transfer("favor+", 2)
    np.testing.assert_array_equal(errors.before, errors.after)
    assert np.isfinite(errors.trained).all()
