from pathlib import Path

import pytest

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.runs.run_settings import compare_settings, settings

FOLDER = Path("runs/a")
OLD = """
# Parameters for experiment:
experiment.crop = 'start'
experiment.epochs = None
experiment.max_train_steps = 5
experiment.train_files = \\
    ['a.fasta',
     'b.fasta']
"""


def test_settings_are_read_by_name():
    assert settings(OLD) == {
        "experiment.crop": "experiment.crop = 'start'",
        "experiment.epochs": "experiment.epochs = None",
        "experiment.max_train_steps": "experiment.max_train_steps = 5",
        "experiment.train_files": "experiment.train_files = ['a.fasta','b.fasta']",
    }


def test_a_default_that_the_run_does_not_know_is_ignored_unless_it_was_asked_for():
    now = OLD + "experiment.data_seed = 0\n"
    assert not compare_settings(FOLDER, OLD, now, OLD)
    with pytest.raises(RunError, match=r"\+experiment.data_seed = 0"):
        compare_settings(FOLDER, OLD, now, now)


def test_what_determines_the_steps_must_stay():
    now = OLD.replace("'start'", "'random'")
    with pytest.raises(RunError, match=r"-experiment.crop = 'start'; \+experiment.crop = 'ran"):
        compare_settings(FOLDER, OLD, now, now)


def test_names_of_files_and_devices_may_change():
    now = OLD.replace("'b.fasta'", "'/elsewhere/b.fasta'") + "make_mesh.fsdp = 2\n"
    assert not compare_settings(FOLDER, OLD, now, now)


def test_a_run_becomes_longer_and_never_shorter():
    now = OLD.replace("steps = 5", "steps = 6")
    assert compare_settings(FOLDER, OLD, now, now)
    with pytest.raises(RunError, match=r"steps = 6; .*steps = 5\..*more steps, not fewer"):
        compare_settings(FOLDER, now, OLD, OLD)
    two, three, endless = (OLD.replace("None", str(epochs)) for epochs in (2, 3, None))
    assert compare_settings(FOLDER, two, three, three)
    assert compare_settings(FOLDER, two, endless, endless)
    with pytest.raises(RunError, match="not fewer"):
        compare_settings(FOLDER, endless, two, two)


def test_the_run_it_began_from_may_have_moved(tmp_path, capsys):
    (tmp_path / "new").mkdir()
    before, now = (
        f"{OLD}experiment.initial_run = {str(tmp_path / name)!r}\n" for name in ("old", "new")
    )
    assert not compare_settings(FOLDER, before, now, now)
    assert "old', which does not exist any more; " in capsys.readouterr().err
    # What is still there is another run.
    (tmp_path / "old").mkdir()
    with pytest.raises(RunError, match=r"-experiment.initial_run = .*old"):
        compare_settings(FOLDER, before, now, now)
    with pytest.raises(RunError, match=r"\+experiment.initial_run"):
        compare_settings(FOLDER, OLD, now, now)


@pytest.mark.parametrize("value", ["'x'", "{}", "(" * 5000, "2 +", "1j"])
def test_a_length_that_is_no_number_differs(value):
    before = OLD.replace("steps = 5", f"steps = {value}")
    with pytest.raises(RunError, match="other settings"):
        compare_settings(FOLDER, before, OLD, OLD)
