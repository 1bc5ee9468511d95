import csv
import gzip
import os
import time
import tracemalloc
from pathlib import Path

import pytest

from fast_attention.protein_lm import cli
from fast_attention.protein_lm.data.corpus import load_corpus
from fast_attention.protein_lm.data.domains import make_protein_domain
from fast_attention.protein_lm.data.fasta import (
    EXTENSIONS,
    fasta_paths,
    read_proteins,
)
from fast_attention.protein_lm.data.skipped_records import SkippedRecords, list_skipped
from fast_attention.protein_lm.data.table_rows import read_rows
from fast_attention.protein_lm.data.vocabulary import Vocabulary
from fast_attention.protein_lm.files.text_source import FastaError
from fast_attention.protein_lm.runs.data_record import describe_files


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    return write


def ids(*arguments, **options) -> list[str]:
    return [record.id for record in read_proteins(*arguments, **options)]


def test_a_folder_stands_for_its_fasta_files(write, tmp_path):
    names = [f"{letter}{end}" for letter, end in zip("edcba", EXTENSIONS, strict=True)]
    for name in [*names, "F.FASTA", "g.fa.gz"]:
        write(f"many/{name}", f">{name}\nMK\n".encode())
    for name in ("readme.txt", ".hidden.fasta", "inner.fasta/x.fasta", "fasta", "a.fasta.tmp"):
        write(f"many/{name}", b"not proteins")
    single = write("one.txt", b">one\nMK\n")
    expected = sorted([*names, "F.FASTA", "g.fa.gz"])
    assert ids(tmp_path / "many") == expected
    assert ids([single, str(tmp_path / "many")]) == ["one", *expected]
    assert fasta_paths(str(single)) == [single]


def test_what_no_file_can_be_read_from_is_named(write, tmp_path):
    write("empty/readme.txt", b"")
    with pytest.raises(FastaError, match=r"empty: the folder has no FASTA files.*\.fasta, \.fa"):
        ids(tmp_path / "empty")
    with pytest.raises(FastaError, match="absent: no such file"):
        ids(tmp_path / "absent")
    with pytest.raises(FastaError, match="- means standard input, which this option"):
        list(read_rows(Path("-")))
    with pytest.raises(FastaError, match="is not a valid file name"):
        ids("a\0b")
    with pytest.raises(FastaError, match="cannot be read"):
        ids(tmp_path / ("x" * 300))
    with pytest.raises(ValueError, match="empty list"):
        ids([])
    (tmp_path / "empty" / "gone.fasta").symlink_to(tmp_path / "absent")
    with pytest.raises(FastaError, match=r"gone\.fasta: no such file"):
        ids(tmp_path / "empty")


def test_a_wrong_file_among_good_ones_is_named_and_never_left_out(write, tmp_path):
    write("many/a.fasta", b">a\nMK\n")
    write("many/b.fasta", b"")
    for options in ({}, {"on_error": "skip", "skipped": SkippedRecords()}):
        with pytest.raises(FastaError, match=r"b\.fasta: the file is empty"):
            ids(tmp_path / "many", **options)


def test_pipes_are_read_once_and_refused_where_that_is_not_enough():
    def pipe() -> str:
        reader, writer = os.pipe()
        os.write(writer, gzip.compress(b">a\nMK\n"))
        os.close(writer)
        return f"/dev/fd/{reader}"

    assert ids(pipe()) == ["a"]
    assert len(load_corpus(pipe(), make_protein_domain())) == 1
    with pytest.raises(FastaError, match="pipe.*Write its content to a file"):
        describe_files(pipe())


def test_equal_ids_are_kept_unless_they_must_differ(write):
    first = write("a.fasta", b">a\nMK\n>b\nMK\n")
    second = write("b.fasta", b">c\nMK\n>a x\nMT\n>\nMT\n")
    assert ids([first, second]) == ["a", "b", "c", "a", ""]
    with pytest.raises(
        FastaError, match=r"b\.fasta, line 3: .*'a' has the id of.*a\.fasta, line 1"
    ):
        ids([first, second], unique_ids=True)
    skipped = SkippedRecords()
    assert ids([first, second], unique_ids=True, on_error="skip", skipped=skipped) == [*"abc"]
    assert [record.line for record in skipped.records] == [3, 5]
    assert skipped.records[1].reason == "has no id"


def test_a_record_that_is_left_out_does_not_take_an_id(write):
    path = write("a.fasta", b">a\nM-\n>a\nMT\n")
    assert ids(path, unique_ids=True, on_error="skip", skipped=SkippedRecords()) == ["a"]


def test_options_that_make_no_sense_are_refused(write):
    path = write("a.fasta", b">a\nMK\n")
    with pytest.raises(ValueError, match="'raise' or 'skip' or 'replace', but got 'ignore'"):
        read_proteins(path, on_error="ignore")
    with pytest.raises(ValueError, match="needs skipped="):
        read_proteins(path, on_error="skip")
    with pytest.raises(ValueError, match="only ACDE"):
        read_proteins(path, on_error="replace", alphabet=Vocabulary("ACDE"))


def test_letters_can_be_replaced_in_several_files(write):
    paths = [write("a.fasta", b">a\nMJK\n"), write("b.fasta", b">b\nmo\n")]
    records = read_proteins(paths, on_error="replace", alphabet=Vocabulary("MKX"))
    assert [record.sequence for record in records] == ["MXK", "MX"]


def test_when_all_are_left_out_that_is_an_error(write):
    paths = [write("a.fasta", b">a\nM-\n"), write("b.fasta", b">b\nM1\n>c\n")]
    skipped = SkippedRecords()
    with pytest.raises(FastaError, match=r"All records \(3\) were skipped.*a\.fasta, line 2:.*'-'"):
        ids(paths, on_error="skip", skipped=skipped)
    assert (skipped.count, skipped.total) == (3, 3)


def test_many_that_were_left_out_are_counted_and_all_listed_in_a_file(write, tmp_path):
    content = b"".join(b">r%d x\nM%s\n" % (i, b"1" if i % 2 else b"K") for i in range(500))
    path = write("tab\tname.fasta", content)
    listing = tmp_path / "skipped.tsv"
    with list_skipped(listing) as skipped:
        assert len(ids(path, on_error="skip", skipped=skipped)) == 250
        assert not listing.exists()
    assert len(skipped.records) == 10
    told = skipped.summary().splitlines()
    assert told[0] == "250 of 500 records were left out:" and told[-1] == "  and 240 more"
    assert len(told) == 12
    with listing.open(newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t"))
    assert rows[0] == ["path", "line", "id", "reason"] and len(rows) == 251
    assert rows[1][1:3] == ["4", "r1"] and rows[1][0] == str(path)
    everything = SkippedRecords(keep=None)
    ids(path, on_error="skip", skipped=everything)
    everything.save(tmp_path / "kept.tsv")
    assert (tmp_path / "kept.tsv").read_text() == listing.read_text()


def test_a_list_of_a_failed_reading_does_not_appear(write, tmp_path):
    path = write("a.fasta", b">a\nM-\n>b\nMK\n>c\nM\0\n")
    with pytest.raises(FastaError, match="NUL"), list_skipped(tmp_path / "list.tsv") as skipped:
        ids(path, on_error="skip", skipped=skipped)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.fasta"]


@pytest.mark.parametrize(
    ("begin", "letter", "message"),
    [
        (b">", b"A", "header of more than"),
        (b">a\n", b"A", "more than 1,000,000 residues"),
        (b">a\n", b" ", "no residues"),
        (b"", b"\n", "empty"),
        (b"", b"\r", "empty"),
        (b"", b"\0", "NUL"),
        (b"", b"A", "expected a header"),
    ],
    ids=["header", "residues", "blanks", "line_ends", "returns", "zeros", "no_header"],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_what_unpacks_to_very_much_is_refused_in_little_memory(
    write, begin, letter, message, on_error
):
    path = write("bomb.fasta", gzip.compress(begin + letter * 20_000_000, 1))
    tracemalloc.start()
    try:
        with pytest.raises(FastaError, match=message):
            ids(path, on_error=on_error, skipped=SkippedRecords(), max_residues=1_000_000)
        assert tracemalloc.get_traced_memory()[1] < 6_000_000
    finally:
        tracemalloc.stop()


def test_zeros_fail_at_once(write):
    path = write("zeros.fasta.gz", gzip.compress(bytes(10_000_000)) * 100)
    began = time.perf_counter()
    with pytest.raises(FastaError, match="line 1.*NUL"):
        ids(path)
    assert time.perf_counter() - began < 0.5


def test_records_after_one_that_is_too_long_are_read(write):
    path = write("a.fasta", b">a\nMK\n>b\n" + b"MKTAY\n" * 1000 + b">c\nMK\n")
    skipped = SkippedRecords()
    options = {"on_error": "skip", "skipped": skipped, "max_residues": 4999}
    assert ids(path, **options) == ["a", "c"]
    assert "more than 4,999 residues" in skipped.summary()
    assert ids(path, max_residues=5000) == [*"abc"]


def test_memory_does_not_grow_with_the_file(write):
    path = write("a.fasta.gz", gzip.compress(4000 * (b">a b c\n" + b"MKTAYIAKQR" * 8 + b"\n")) * 5)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_proteins(path)) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_training_lists_what_it_leaves_out(write, train_arguments, tmp_path, capsys):
    damaged = write("damaged/a.fasta", b">a\n" + b"MKTAY" * 12 + b"\n>bad one\nMK-\n")
    settings = ("experiment.max_train_steps = 1", "experiment.num_samples = 0")
    arguments = train_arguments(tmp_path / "run", *settings)
    arguments = [each for each in arguments if "fasta=" not in each]
    for flag in ("--fasta", "--valid_fasta"):
        arguments.append(f"{flag}={tmp_path / 'damaged'}")
    assert cli.main([*arguments, "--gin_bindings=experiment.on_error = 'raise'"]) == 1
    assert "record 'bad'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main([*arguments, "--on_error=skip"]) == 0
    assert capsys.readouterr().err.count("1 of 2 records was left out") == 3
    for name in ("train", "valid", "test"):
        row = (tmp_path / "run" / f"skipped_{name}.tsv").read_text().splitlines()[1]
        assert row.split("\t")[:3] == [str(damaged), "4", "bad"]
    assert '"left_out": 1' in (tmp_path / "run" / "result.json").read_text()
