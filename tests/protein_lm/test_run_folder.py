import errno

import pytest

from fast_attention.protein_lm import run_folder
from fast_attention.protein_lm.output_files import OutputError
from fast_attention.protein_lm.run_folder import RunError, RunFolder, claim, settings

MODEL = "{}\n"
OLD = """
# Parameters for experiment:
experiment.max_train_steps = 5
experiment.train_files = \\
    ['a.fasta',
     'b.fasta']
"""


def test_settings_are_read_by_name():
    assert settings(OLD) == {
        "experiment.max_train_steps": "experiment.max_train_steps = 5",
        "experiment.train_files": "experiment.train_files = ['a.fasta','b.fasta']",
    }


def test_a_run_of_an_earlier_version_goes_on_unless_what_it_lacks_was_asked_for(tmp_path):
    folder = RunFolder(tmp_path)
    claim(folder, OLD, MODEL, asked=OLD)
    now = OLD + "experiment.crop = 'random'\n"
    claim(folder, now, MODEL, asked=OLD)
    with pytest.raises(RunError, match=r"\+experiment.crop = 'random'"):
        claim(folder, now, MODEL, asked=now)
    with pytest.raises(RunError, match="-experiment.max_train_steps = 5\n.*steps = 6"):
        claim(folder, now.replace("5", "6"), MODEL, asked=OLD)
    assert folder.config.read_text() == OLD


def test_the_description_of_the_model_is_that_of_the_settings(tmp_path):
    folder = RunFolder(tmp_path)
    for text in (MODEL, "[]\n"):
        claim(folder, OLD, text, asked=OLD)
        assert folder.model.read_text() == text


def test_an_export_is_not_trained(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RunError, match="exported model.*another --work_dir"):
        claim(RunFolder(tmp_path), OLD, MODEL, asked=OLD)
    assert not (tmp_path / "config.gin").exists()


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    def refuse(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(run_folder, "write_file", refuse)
    with pytest.raises(OutputError, match="cannot be written to: .*read-only"):
        claim(RunFolder(tmp_path), OLD, MODEL, asked=OLD)
