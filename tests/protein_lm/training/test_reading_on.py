"""A trained model reads proteins without end, stretch by stretch."""

import pytest

from examples import long_context


def test_stretches_are_the_whole(lm_run, capsys):
    sizes = ["--length=60", "--stretch=32", "--check=20"]
    bits, apart = long_context.main([f"--run={lm_run}", *sizes])
    assert 2 < bits < 8
    assert apart < 1e-4
    assert "32 to 60:" in capsys.readouterr().out


def test_positions_may_end(lm_run):
    with pytest.raises(SystemExit, match="has positions for 65 tokens, not 70"):
        long_context.main([f"--run={lm_run}", "--length=70"])
