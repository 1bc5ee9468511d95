"""Failures of memory, disk and network are told apart from damaged files."""

import errno
import os

import jax
import pytest

from fast_attention.protein_lm.files.text_source import FastaError, read_pieces
from fast_attention.protein_lm.machine_failures import machine_failure, memory_remedy


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "file")


TENSORSTORE = 'UNAVAILABLE: Error reading "a/b": Failed to read file [OS error {}: {}] [x=1]'


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (os_error(errno.ENOMEM), "out of memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes"), "out of memory"),
        (ValueError("std::bad_alloc"), "out of memory"),
        (os_error(errno.ENOSPC), "disk is full"),
        (os_error(errno.EDQUOT), "quota"),
        (os_error(errno.EIO), "read error"),
        (os_error(errno.ESTALE), "read error"),
        (os_error(errno.EINTR), "read error"),
        (os_error(errno.ETIMEDOUT), "read error"),
        (os_error(errno.EMFILE), "too many open files"),
        (os_error(errno.EACCES), "permission"),
        (ValueError(TENSORSTORE.format(5, "EIO Input/output error")), "read error"),
        (ValueError(TENSORSTORE.format(116, "ESTALE")), "read error"),
        (OSError("Unable to read (errno = 5, message = 'x')"), "read error"),
        (RuntimeError("write failed: No space left on device"), "disk is full"),
        (caused_by(ValueError("cannot parse"), os_error(errno.EIO)), "read error"),
        (caused_by(ValueError("cannot parse"), MemoryError()), "out of memory"),
    ],
)
def test_a_failure_of_the_machine_is_recognised(error, reason):
    assert reason in (machine_failure(error) or "")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("cannot parse"),
        KeyError("weights"),
        EOFError("cut off"),
        os_error(errno.ENOENT),
        ValueError(TENSORSTORE.format(2, "ENOENT No such file or directory")),
        ValueError("DATA_LOSS: checksum mismatch"),
    ],
)
def test_a_damaged_or_missing_file_is_none(error):
    assert machine_failure(error) is None


def test_the_remedy_names_options_that_the_command_has():
    assert memory_remedy(["output", "batch_size"]) == "take a smaller --batch_size"
    both = memory_remedy(["tokens_per_batch", "max_length"])
    assert "--tokens_per_batch" in both and "--max_length" in both
    assert "--" not in memory_remedy(["output"])


def test_a_read_error_of_a_fasta_file_is_not_blamed_on_the_file(monkeypatch, tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text(">a\nMKT\n")

    def fail(*_):
        raise os_error(errno.EIO)

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(FastaError, match=r"a\.fasta: .*read error of the disk.*try again"):
        list(read_pieces(path))
