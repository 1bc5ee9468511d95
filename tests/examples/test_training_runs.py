"""The examples that train: a few steps of small models."""

import numpy as np
import pytest

from examples import char_lm, copy_task

COPY = ["--length=8", "--window=8", "--symbols=2", "--dim=16", "--features=8", "--batch=8"]
CHARACTERS = [
    "--length=16",
    "--batch=4",
    "--dim=16",
    "--depth=1",
    "--sample=3",
    "--learning_rate=0.02",
]


def test_the_copy_task_learns(capsys):
    steps = ["--window_steps=30", "--steps=20", "--learning_rate=0.01"]
    losses, accuracy = copy_task.main([*COPY, *steps])
    assert len(losses) == 50
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert 0 <= accuracy <= 1
    assert "step 50: windows of 8" in capsys.readouterr().out


def test_windows_lie_anywhere_within_the_length():
    rng = np.random.default_rng(0)
    symbols, positions = copy_task.draw(rng, 200, 3, 5, 4)
    assert symbols.shape == positions.shape == (200, 3)
    assert set(np.unique(symbols)) == {2, 3, 4, 5}
    assert set(map(tuple, positions.tolist())) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}


@pytest.mark.parametrize("model", ["reformer", "linear"])
def test_models_of_characters_learn(model, tmp_path, capsys):
    (tmp_path / "text").write_text("abc" * 200)
    flags = [f"--file={tmp_path / 'text'}", "--steps=20", "--learning_rate=0.02"]
    losses = char_lm.main([f"--model={model}", *flags, *CHARACTERS])
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1: ") and lines[-1].startswith("continued: ")


def test_held_out_bytes_are_counted_once():
    model = char_lm.build("linear", dim=16, depth=1, length=8, seed=0)
    text = np.arange(20, dtype=np.int32)
    whole = char_lm.bits_per_byte(model, text[:18], 8)
    halves = [char_lm.bits_per_byte(model, text[start : start + 9], 8) for start in (0, 9)]
    np.testing.assert_allclose(whole, np.mean(halves), rtol=1e-5)
    assert np.isfinite(char_lm.bits_per_byte(model, text, 8))


def test_a_text_that_is_too_short_is_refused(tmp_path):
    (tmp_path / "text").write_text("abc")
    with pytest.raises(ValueError, match="take a longer file"):
        char_lm.main([f"--file={tmp_path / 'text'}", *CHARACTERS])
