"""What the benchmark of decay compares."""

from __future__ import annotations

import jax.numpy as jnp

from benchmarks.decay import compile_pair
from benchmarks.programs import BACKWARD
from benchmarks.settings import Setting, make_inputs


def test_the_same_call_with_decay_has_another_output_and_the_gradient_of_the_decays():
    setting = Setting(length=40, heads=2, head_dim=8, features=16)
    before, after = (program.call() for program in compile_pair(make_inputs(setting), 0, BACKWARD))
    assert [x.shape for x in before] == [(1, 40, 2, 8)] * 4
    assert [x.shape for x in after[:4]] == [(1, 40, 2, 8)] * 4
    assert not jnp.allclose(before[0], after[0], atol=1e-2)
    d_decay = after[4]
    assert d_decay.shape == (1, 40, 2) and jnp.abs(d_decay).max() > 1e-3
