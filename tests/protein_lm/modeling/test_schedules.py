import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.protein_lm.modeling.schedules import create_learning_rate_scheduler

STEPS = np.array([0, 1, 5, 10, 11, 40, 109, 110, 160, 1000])


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ("constant", lambda s: 0.5 + 0 * s),
        ("linear_warmup", lambda s: np.minimum(1, s / 10)),
        ("rsqrt_decay", lambda s: 1 / np.sqrt(np.maximum(s, 10))),
        ("rsqrt_normalized_decay", lambda s: np.sqrt(10 / np.maximum(s, 10))),
        ("decay_every", lambda s: 0.25 ** (s // 40)),
        ("cosine_decay", lambda s: (1 + np.cos(np.pi * (np.maximum(0, s - 10) / 100 % 1))) / 2),
        (
            "constant * linear_warmup*rsqrt_decay",
            lambda s: 0.5 * np.minimum(s / 10, 1) / np.sqrt(np.maximum(s, 10)),
        ),
    ],
)
def test_learning_rate_is_the_product_of_its_factors(factors, expected):
    schedule = create_learning_rate_scheduler(
        factors,
        base_learning_rate=0.5,
        warmup_steps=10,
        decay_factor=0.25,
        steps_per_decay=40,
        steps_per_cycle=100,
    )
    rates = [float(schedule(int(step))) for step in STEPS]
    np.testing.assert_allclose(rates, expected(STEPS), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(STEPS)), rates, rtol=1e-5, atol=1e-7)


def test_no_warmup_starts_at_the_full_rate():
    schedule = create_learning_rate_scheduler("constant * linear_warmup", 0.1, warmup_steps=0)
    assert float(schedule(0)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": "constant * linear_warmpu"}, "linear_warmpu"),
        ({"factors": ""}, "unknown"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"steps_per_cycle": 0}, "steps_per_cycle"),
    ],
)
def test_a_bad_schedule_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_learning_rate_scheduler(**arguments)


COSINE = "constant * linear_warmup * cosine_decay"


@pytest.mark.parametrize("num_steps", [20, 850, 2000])
def test_an_open_cosine_falls_once_over_the_run(num_steps):
    schedule = create_learning_rate_scheduler(COSINE, 1.0, warmup_steps=10).over(num_steps)
    rates = np.array([schedule(step) for step in range(10, num_steps)])
    assert rates[0] == 1 and (np.diff(rates) < 0).all()
    assert rates[-1] < 0.03
    assert schedule.describe_length(num_steps) == ""


def test_an_open_cosine_is_that_of_the_same_length():
    for num_steps, steps_per_cycle in ((850, 790), (60, 1), (5, 1)):
        asked = create_learning_rate_scheduler(COSINE, 0.003, 60, steps_per_cycle=steps_per_cycle)
        assert create_learning_rate_scheduler(COSINE, 0.003, 60).over(num_steps) == asked


def test_a_cycle_that_was_asked_for_stays_and_its_length_is_told():
    schedule = create_learning_rate_scheduler(COSINE, 1.0, warmup_steps=10, steps_per_cycle=90)
    assert schedule.over(850) == schedule
    assert schedule.describe_length(100) == ""
    told = schedule.describe_length(850)
    assert "ends at step 100" in told and "850 steps" in told and "maximum again" in told
    assert "still 0.5" in schedule.describe_length(56)
    assert "warm-up" in schedule.describe_length(8)


def test_a_schedule_without_a_length_has_nothing_to_tell():
    for factors in ("constant", "constant * rsqrt_decay", "constant * decay_every"):
        schedule = create_learning_rate_scheduler(factors, 1.0, warmup_steps=5, steps_per_cycle=7)
        assert schedule.describe_length(1000) == ""
