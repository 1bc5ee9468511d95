"""A long text in stretches is the text in one call."""

from examples import long_context


def test_stretches_are_the_whole(capsys):
    sizes = ["--length=70", "--stretch=32", "--check=16", "--window=16", "--steps=2"]
    model = ["--dim=16", "--depth=1", "--features=8"]
    bits, apart = long_context.main([*sizes, *model])
    assert 0 < bits < 10
    assert apart < 1e-4
    assert "to 70:" in capsys.readouterr().out
