import math

import pytest

from fast_attention.protein_lm.modeling.divergence import Guard

GUARD = Guard(lambda step: 0.1 * step, vocab_size=20)
UNIFORM = math.log(20)


def rows(*losses: float, norm: float = 1.0):
    return [
        {"loss": 8 * loss, "correct": 0.0, "denominator": 8.0, "gradient_norm": norm}
        for loss in losses
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_is_told_with_its_step(bad):
    sums = rows(2.0, 3.0, 4.0)
    GUARD.check_updates(sums, 12, 10)
    sums[1]["gradient_norm"] = bad
    with pytest.raises(FloatingPointError) as raised:
        GUARD.check_updates(sums, 12, 10)
    told = str(raised.value)
    for expected in (
        "step 11 (batch 10)",
        "Loss 3,",
        f"gradient norm {bad}",
        "learning rate 1;",
        "step 10 is kept",
        "--work_dir",
        "warm-up",
    ):
        assert expected in told
    with pytest.raises(FloatingPointError, match=r"2 of 3 .* no checkpoint yet"):
        GUARD.check_updates(rows(bad, 3.0, bad), 12, 0)


def test_a_loss_above_a_blind_guess_is_divergence_only_where_it_was_below():
    assert GUARD.check_loss(rows(5.0, 5.0), 2, 0, None) == 5.0
    assert GUARD.check_loss(rows(5.0, 5.0), 2, 0, UNIFORM + 0.1) == UNIFORM + 0.1
    assert GUARD.check_loss(rows(UNIFORM + 0.9), 2, 0, 2.5) == 2.5
    assert GUARD.check_loss(rows(2.0), 2, 0, 2.5) == 2.0
    with pytest.raises(FloatingPointError, match=r"step 1 .* the mean loss of 2 steps is 4.5"):
        GUARD.check_loss(rows(6.0, 3.0), 2, 0, 2.5)
    with pytest.raises(FloatingPointError, match="blind guess"):
        GUARD.check_loss(rows(10.1 * UNIFORM), 2, 0, None)


def test_a_hopeless_validation_is_divergence_and_an_overfitted_one_is_not():
    GUARD.check_validation(3 * UNIFORM, rows(1.0), 2, 0)
    for loss in (10.1 * UNIFORM, math.nan):
        with pytest.raises(FloatingPointError, match="the validation loss is"):
            GUARD.check_validation(loss, rows(1.0), 2, 0)
