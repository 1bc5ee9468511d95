"""Every kind of wrong input has one behaviour: understood, or an error with file, line, remedy."""

import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fast_attention.protein_lm import cli, loading
from fast_attention.protein_lm.data.fasta import read_proteins
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.files import text_source
from fast_attention.protein_lm.files.text_source import FastaError
from tests.protein_lm.malformed_inputs import CASES, GZIP, RECORDS, UNDERSTOOD, File, Record


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All cases as files; names that end in .gz say nothing of the content."""
    folder = tmp_path_factory.mktemp("cases")
    for index, (name, (content, _)) in enumerate(CASES.items()):
        path_of(folder, name).write_bytes(content)
        assert path_of(folder, name).suffix == (".fasta", ".gz")[index % 2]
    return folder


def path_of(folder: Path, name: str) -> Path:
    return folder / (name + (".fasta", ".fasta.gz")[list(CASES).index(name) % 2])


def count_headers(content: bytes) -> int:
    """The records of a file, as a reader counts them by eye."""
    if content.startswith(b"\x1f\x8b"):
        content = gzip.decompress(content)
    lines = re.split(rb"\r\n|\r|\n", content.removeprefix(b"\xef\xbb\xbf"))
    return sum(line.startswith(b">") for line in lines)


def read(path, **options) -> list[tuple[str, str]]:
    return [(record.id, record.sequence) for record in read_proteins(path, **options)]


def test_there_are_enough_cases():
    assert len(CASES) > 100


@pytest.mark.parametrize("name", CASES)
def test_each_kind_has_its_behaviour(folder, name):
    content, expected = CASES[name]
    path = path_of(folder, name)
    skipped = SkippedRecords()
    if isinstance(expected, list):
        assert read(path) == expected
        assert read(path, on_error="skip", skipped=skipped) == expected
        assert skipped.summary() == ""
        return
    told = re.escape(str(path)) + expected.regex
    with pytest.raises(FastaError, match=f"^{told}"):
        read(path)
    if isinstance(expected, File) or name == "only_bad":
        with pytest.raises(FastaError, match=told):
            read(path, on_error="skip", skipped=skipped)
        return
    kept = read(path, on_error="skip", skipped=skipped)
    assert len(kept) + 1 == count_headers(content) == skipped.total
    assert skipped.count == 1
    assert skipped.summary().startswith(f"1 of {len(kept) + 1} records was left out:\n  {path}")


@pytest.mark.parametrize("size", [4, 5, 7, 64])
def test_where_the_pieces_are_cut_does_not_matter(folder, monkeypatch, size):
    monkeypatch.setattr(text_source, "PIECE_BYTES", size)
    for name, (content, expected) in CASES.items():
        if len(content) > 10_000:
            continue
        if isinstance(expected, list):
            assert read(path_of(folder, name)) == expected, name
        elif isinstance(expected, Record):
            # A symbol of several bytes may be cut, its place not.
            place = expected.regex.partition(":")[0]
            with pytest.raises(FastaError, match=f"{place}: record"):
                read(path_of(folder, name))


TOKENS = st.lists(
    st.one_of(
        st.sampled_from([b">", b"\n>", b"\r", b"\n", b"\r\n", b" ", b"\t", b"*", b"-", b"\0"]),
        st.sampled_from([b"A", b"mk", b"J", b"1", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\v"]),
        st.binary(max_size=3),
    ),
    max_size=30,
).map(b"".join)
RECORD_TOKENS = TOKENS.map(lambda text: b">a\nMK\n" + text.replace(b"\0", b""))
DAMAGED_GZIP = st.tuples(st.integers(0, len(GZIP)), st.binary(max_size=3)).map(
    lambda place: GZIP[: place[0]] + place[1] + GZIP[place[0] + len(place[1]) :]
)


@settings(max_examples=300)
@given(content=st.one_of(TOKENS, RECORD_TOKENS, DAMAGED_GZIP, st.binary(max_size=40)))
@example(b">a\nMK\r\n>b\r>c\n-")
def test_whatever_a_file_holds_nothing_is_lost_and_nothing_else_is_raised(
    tmp_path_factory, content
):
    path = tmp_path_factory.getbasetemp() / "anything.fasta"
    path.write_bytes(content)
    skipped = SkippedRecords()
    try:
        kept = read(path, on_error="skip", skipped=skipped)
    except FastaError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        assert skipped.count == skipped.total or "All" not in str(error)
    else:
        if not content.startswith((b"\xff\xfe", b"\xfe\xff")):
            assert len(kept) + skipped.count == skipped.total == count_headers(content)
        assert kept
    # What is read before an error does not depend on what the reader does at it.
    seen = []
    try:
        seen.extend(read(path))
    except FastaError:
        pass
    else:
        assert seen == kept and not skipped.count


CONSOLE = {
    "understood": ["equal_ids", "utf_16", "gzip_members", "lower_case", "one_residue"],
    "record": ["gap", "genbank_digits", "unknown_letter", "no_residues", "missing_line_end"],
    "file": ["only_bad", "empty", "no_header", "table_with_commas", "fastq", "bzip2", "zeros"]
    + ["binary_noise", "utf_16_cut_off", "gzip_without_its_end", "nul_in_a_sequence"],
}


@pytest.fixture(scope="module")
def run(lm_run):
    """The tiny run, loaded once for all commands of this module."""
    loaded = loading.load_run(lm_run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_run", lambda folder, **options: loaded)
        yield lm_run


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("name", sum(CONSOLE.values(), []))
def test_the_command_tells_it_in_one_line(run, folder, tmp_path, capsys, name, on_error):
    content, expected = CASES[name]
    path, output, listing = path_of(folder, name), tmp_path / "out.json", tmp_path / "skipped.tsv"
    status = cli.main(
        ["evaluate", f"--run_dir={run}", f"--fasta={path}", f"--on_error={on_error}"]
        + [f"--output={output}", f"--skipped_list={listing}"]
    )
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    if isinstance(expected, list) or (on_error == "skip" and name in CONSOLE["record"]):
        assert status == 0
        left_out = 0 if isinstance(expected, list) else 1
        figures = json.loads(output.read_text())
        assert figures.get("left_out", 0) == left_out
        assert figures["proteins"] + left_out == count_headers(
            content.decode("utf-16").encode() if name == "utf_16" else content
        )
        assert ("left out" in told.err) == bool(left_out)
        lines = listing.read_text().splitlines()
        assert len(lines) == 1 + left_out and lines[0] == "path\tline\tid\treason"
        assert all(line.startswith(f"{path}\t") for line in lines[1:])
    else:
        assert status == 1
        message = told.err.splitlines()[-1]
        assert message.startswith("protein-lm evaluate: error: ")
        assert re.search(re.escape(str(path)) + expected.regex, message)
        assert told.out == ""
        assert list(tmp_path.iterdir()) == []


def test_understood_spellings_are_the_same_proteins(folder):
    paths = [path_of(folder, name) for name in UNDERSTOOD]
    assert read(paths) == RECORDS * len(paths)
