"""A stopped command resumes from its parts; what is damaged or of other settings is not used."""

import errno
import json
import os

import numpy as np
import pytest

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files import npz_files
from fast_attention.protein_lm.files.output_targets import OutputError
from fast_attention.protein_lm.inference import partial_work
from fast_attention.protein_lm.modeling.encoding import Encoded

SETTINGS = {"pool": "mean", "layers": [0, 1]}
ITEMS = [Encoded(np.arange(3, dtype=np.int32), True)]
VALUES = np.arange(1000.0)


@pytest.fixture
def work(tmp_path):
    found = open_work(tmp_path / "v.npz", SETTINGS)
    partial_work.save_part(found, 0, digest(found), {"values": VALUES})
    return found


def open_work(output, settings):
    with partial_work.open_work(output, settings) as found:
        return found


def digest(work, name="a"):
    return partial_work.window_digest(work, [name], ITEMS)


def test_opening_creates_nothing(tmp_path):
    open_work(tmp_path / "v.npz", SETTINGS)
    assert not list(tmp_path.iterdir())


def test_a_part_is_read_back_and_removed(work, tmp_path):
    again = open_work(tmp_path / "v.npz", SETTINGS)
    assert partial_work.has_part(again, 0, digest(again))
    found = partial_work.read_part(again, 0, digest(again), ["values"])
    np.testing.assert_array_equal(found["values"], VALUES)
    assert not partial_work.has_part(again, 1, digest(again))
    partial_work.remove_parts(again)
    assert not list(tmp_path.iterdir())


def test_the_folder_of_the_parts_has_a_longer_name_than_the_output(tmp_path):
    output = tmp_path / ("x" * 247 + ".npz")
    with pytest.raises(OutputError, match=r"x\.npz cannot be written: the name is too long"):
        open_work(output, SETTINGS)
    assert not list(tmp_path.iterdir())


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: b"PK", cut, flip],
    ids=["empty", "begun", "cut", "flipped"],
)
def test_a_damaged_part_is_no_part(work, damage):
    path = partial_work.part_path(work, 0)
    path.write_bytes(damage(path.read_bytes()))
    assert not partial_work.has_part(work, 0, digest(work))
    with pytest.raises(RunError, match="000000.npz was changed.*give the command again"):
        partial_work.read_part(work, 0, digest(work), ["values"])


def test_parts_of_other_proteins_or_settings_are_not_used(work, tmp_path):
    assert not partial_work.has_part(work, 0, digest(work, "b"))
    manifest = work.folder / "manifest.json"
    with pytest.raises(RunError, match="pool: 'mean' there, 'max' asked for now.*delete"):
        open_work(tmp_path / "v.npz", SETTINGS | {"pool": "max"})
    for content in ("", "[1]", "{", json.dumps(SETTINGS)[:-3]):
        manifest.write_text(content)
        other = open_work(tmp_path / "v.npz", SETTINGS | {"pool": "max"})
        assert not partial_work.has_part(other, 0, digest(other))
        same = open_work(tmp_path / "v.npz", SETTINGS)
        assert partial_work.has_part(same, 0, digest(same))


def test_a_manifest_without_parts_does_not_block_other_settings(work, tmp_path):
    partial_work.part_path(work, 0).unlink()
    other = open_work(tmp_path / "v.npz", SETTINGS | {"pool": "max"})
    partial_work.save_part(other, 0, digest(other), {"values": VALUES})
    with pytest.raises(RunError, match="pool: 'max' there, 'mean' asked for now"):
        open_work(tmp_path / "v.npz", SETTINGS)


def test_files_of_others_are_never_removed(work, tmp_path):
    notes = work.folder / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(RunError, match="cannot be used.*notes.txt"):
        open_work(tmp_path / "v.npz", SETTINGS)
    partial_work.remove_parts(work)
    assert [path.name for path in work.folder.iterdir()] == ["notes.txt"]
    (tmp_path / "u.npz.partial").touch()
    with pytest.raises(RunError, match="is not a folder"):
        open_work(tmp_path / "u.npz", SETTINGS)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EACCES])
def test_a_part_that_cannot_be_read_now_is_not_thrown_away(work, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(npz_files.zipfile, "ZipFile", fail)
    with pytest.raises(RunError, match="000000.npz cannot be read now"):
        partial_work.has_part(work, 0, digest(work))


def test_ids_take_the_space_of_their_text():
    ids = ["i" * 900_000, "", "ä", *map(str, range(3000))]
    packed = partial_work.pack_ids(ids)
    assert sum(array.nbytes for array in packed.values()) < 1_000_000
    assert partial_work.unpack_ids(packed) == ids
