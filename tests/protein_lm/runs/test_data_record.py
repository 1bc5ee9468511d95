import pytest

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.text_source import FastaError
from fast_attention.protein_lm.runs.data_record import (
    describe_files,
    differences,
    read_record,
    write_record,
)
from fast_attention.protein_lm.runs.run_folder import RunFolder


@pytest.fixture
def files(tmp_path):
    for name, content in (("a", ">a\nMK\n"), ("b", ">b\nMKT\n"), ("c", ">a\nMR\n")):
        (tmp_path / f"{name}.fasta").write_text(content)
    return {name: str(tmp_path / f"{name}.fasta") for name in "abc"}


def record(train, valid=None):
    return {
        "train": describe_files(train),
        "valid": describe_files(valid),
        "test": describe_files(None),
    }


def test_records_differ_where_content_order_or_weights_do(files, tmp_path):
    a, b, c = files.values()
    before = record([a, b], c)
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "moved" / "x.fasta").write_text(">a\nMK\n") and tmp_path / "moved"
    assert differences(before, record([str(moved), b], c)) == []
    assert "6 bytes" in differences(before, record([b, a], c))[0]
    # As long as the first, but another one.
    assert "SHA-256" in differences(before, record([c, b], c))[0]
    assert differences(before, record([a], c)) == ["train: 2 files then, 1 file now"]
    assert differences(before, record([a, b])) == ["valid: 1 file then, 0 files now"]
    weighted = record({a: 1.0, b: 2.0}, c)
    assert "had weight None then" in differences(before, weighted)[0]
    assert "had weight 2.0 then" in differences(weighted, record({a: 1.0, b: 3.0}, c))[0]


def test_a_record_is_read_back_with_the_one_before(files, tmp_path):
    folder = RunFolder(tmp_path)
    assert read_record(folder) is None
    first = record(files["a"])
    write_record(folder, first, step=0, before=None)
    write_record(folder, record(files["b"]), step=7, before=read_record(folder))
    found = read_record(folder)
    assert found is not None and found["from_step"] == 7
    assert differences(found["before"], first) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"train": [1], "valid": [], "test": []}'])
def test_a_damaged_record_is_named(tmp_path, text):
    folder = RunFolder(tmp_path)
    folder.data.write_text(text)
    with pytest.raises(RunError, match="data.json is damaged"):
        read_record(folder)


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FastaError, match="absent.fasta"):
        describe_files(str(tmp_path / "absent.fasta"))
