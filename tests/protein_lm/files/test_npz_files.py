"""A damaged file is named with what to do; a failure of the machine is told apart from damage."""

import errno
import os
import zipfile

import numpy as np
import pytest

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files import npz_files
from fast_attention.protein_lm.files.npz_files import read_npz

ARRAYS = {"kernel": np.arange(1000.0), "names": np.array(["a", "bc"])}


@pytest.fixture
def path(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", allow_pickle=False, **ARRAYS)
    return tmp_path / "a.npz"


def header_of(shape: tuple[int, ...]) -> bytes:
    """The beginning of an array of a shape, and no numbers."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_arrays_are_read(path):
    found = read_npz(path, "fetch it", limit=2**20)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"PK",
        lambda content: content[: len(content) // 2],
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
        lambda content: b"\0" * len(content),
    ],
    ids=["empty", "begun", "cut", "flipped", "zeros"],
)
def test_damage_is_told_with_the_remedy(path, damage):
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"a\.npz is damaged \(.+\): fetch it"):
        read_npz(path, "fetch it", limit=2**20)


@pytest.mark.parametrize("shape", [(10**12,), (10**6, 10**9)])
def test_an_array_that_claims_to_be_huge_is_not_allocated(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header_of(shape))
    with pytest.raises(RunError, match="is damaged.*'x.npy' does not have its declared size"):
        read_npz(tmp_path / "a.npz", "fetch it", limit=2**20)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(RunError, match=r"b\.npz is missing: fetch it"):
        read_npz(tmp_path / "b.npz", "fetch it", limit=2**20)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), *(OSError(n, os.strerror(n)) for n in (errno.EIO, errno.ESTALE))],
    ids=["memory", "input_output", "stale"],
)
def test_a_failure_of_the_machine_is_not_damage(path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(npz_files.np, "load", fail)
    with pytest.raises(RunError, match=r"a\.npz cannot be read now: (out of memory|a read error)"):
        read_npz(path, "fetch it", limit=2**20)
