import errno

import pytest

from fast_attention.protein_lm import run_folder
from fast_attention.protein_lm.output_targets import OutputError
from fast_attention.protein_lm.run_folder import RunFolder, claim


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    def refuse(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(run_folder, "write_file", refuse)
    with pytest.raises(OutputError, match="cannot be written to: .*read-only"):
        claim(RunFolder(tmp_path), "", "{}\n")
