import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_attention.protein_lm.data.fasta import (
    FastaError,
    FastaRecord,
    read_fasta,
    write_fasta,
)
from fast_attention.protein_lm.data.vocabulary import Vocabulary

RECORDS = [
    FastaRecord("sp|P1|A_HUMAN", "A protein OS=Homo sapiens", "MKTAYIAKQR"),
    FastaRecord("two", "", "ACDEFGHIKLMNPQRSTVWYBOUXZ"),
]
TEXT = b">sp|P1|A_HUMAN A protein OS=Homo sapiens\nMKTAY\nIAKQR\n>two\nACDEFGHIKLMNPQRSTVWYBOUXZ\n"


def read(tmp_path, content, name="a.fasta", **options):
    path = tmp_path / name
    path.write_bytes(content)
    return list(read_fasta(path, **options))


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        TEXT.replace(b"\n", b"\r\n"),
        TEXT.replace(b"\n", b"\r"),
        TEXT.rstrip(b"\n"),
        b"\xef\xbb\xbf" + TEXT,
        b"\n\n" + TEXT.replace(b"\n>", b"\n\n>") + b"\n \n",
        TEXT.replace(b"MKTAY", b"mkTAY"),
        TEXT.replace(b"MKTAY\nIAKQR", b"MKTAY\n\nIAK QR\t"),
        TEXT.replace(b"IAKQR", b"IAKQR*"),
        TEXT.replace(b"IAKQR", b"IAKQR\n*"),
        TEXT.replace(b">sp", b"> sp").replace(b" A protein", b"\tA protein"),
        gzip.compress(TEXT),
        gzip.compress(TEXT[:50]) + gzip.compress(TEXT[50:]),
    ],
    ids=[
        "plain",
        "crlf",
        "cr",
        "no_last_newline",
        "bom",
        "blank_lines",
        "lower_case",
        "blanks",
        "stop",
        "stop_alone",
        "header_blanks",
        "gzip",
        "gzip_members",
    ],
)
@pytest.mark.parametrize("name", ["a.fasta", "a.fasta.gz"])
def test_every_way_of_writing_it_reads_the_same(tmp_path, content, name):
    assert read(tmp_path, content, name) == RECORDS


def test_reading_streams(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_bytes(TEXT + b">three\nM-K\n")
    records = read_fasta(path)
    assert [next(records), next(records)] == RECORDS
    with pytest.raises(FastaError, match="three"):
        next(records)


def test_strange_bytes_in_a_header_do_not_stop_the_reading(tmp_path):
    (record,) = read(tmp_path, b">a M\xfcller\nMK\n")
    assert (record.id, record.sequence) == ("a", "MK")


@pytest.mark.parametrize(
    ("sequence", "symbol", "line", "remedy"),
    [
        (b"MK\nM-K\n", "'-'", 3, "aligned_protein"),
        (b"MK\nM.K\n", "'.'", 3, "aligned_protein"),
        (b"M*K*\n", r"'\*'", 2, "stop"),
        (b"MK**\n", r"'\*'", 2, "stop"),
        (b"MK\n\nMJ\n", "'J'", 4, "on_error='replace'"),
        (b"mj\n", "'j'", 2, "on_error='replace'"),
        (b"MK1\n", "'1'", 2, "Remove"),
        (b";comment\nMK\n", "';'", 2, "Remove"),
        ("MKß\n".encode(), "'ß'", 2, "Remove"),
        (b"MK\n>\nMK>\n", "'>'", 4, "Remove"),
    ],
)
def test_unknown_symbols_are_named_with_file_line_record_and_remedy(
    tmp_path, sequence, symbol, line, remedy
):
    with pytest.raises(FastaError, match=rf"a\.fasta, line {line}: record .*{symbol}.*{remedy}"):
        read(tmp_path, b">one x\n" + sequence)


def test_replace_reads_unknown_letters_as_x_and_nothing_else(tmp_path):
    (record,) = read(tmp_path, b">a\nMJkj*\n", on_error="replace")
    assert record.sequence == "MXKX"
    with pytest.raises(FastaError, match="'-'"):
        read(tmp_path, b">a\nMJ-K\n", on_error="replace")


def test_the_alphabet_can_be_narrowed(tmp_path):
    with pytest.raises(FastaError, match="'X'.*none of the residues ACDE"):
        read(tmp_path, b">a\nAXC\n", alphabet=Vocabulary("EDCA"))
    with pytest.raises(ValueError, match="only ACDE"):
        read_fasta("a.fasta", alphabet=Vocabulary("ACDE"), on_error="replace")
    with pytest.raises(ValueError, match="'raise' or 'replace'"):
        read_fasta("a.fasta", on_error="ignore")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (gzip.compress(b""), "empty"),
        (b"\nMKT\n>a\nMK\n", "line 2: expected a header"),
        (b"id,sequence\n", "line 1: expected a header"),
        (b"\x1f\x8c", "line 1: expected a header"),
        (b">a\nMK\n>b\n>c\nMK\n", "line 3: record 'b' has no residues"),
        (b">a\nMK\n>b\n*\n", "line 3: record 'b' has no residues"),
        (b">a\nMK\n>b\n", "line 3: record 'b' has no residues"),
        (gzip.compress(TEXT)[:-9], "cut off or damaged"),
        (gzip.compress(TEXT)[:12], "cut off or damaged"),
        (gzip.compress(TEXT)[:2], "cut off or damaged"),
        (gzip.compress(TEXT)[:-6] + b"garble", "cut off or damaged"),
        (gzip.compress(TEXT) + b"garble", "cut off or damaged"),
        (gzip.compress(TEXT)[:12] + b"\xff" * 40, "cut off or damaged"),
    ],
    ids=[
        "nothing",
        "blank",
        "gzip_of_nothing",
        "residues_first",
        "table",
        "almost_gzip",
        "no_residues",
        "only_a_stop",
        "no_residues_at_the_end",
        "gzip_without_its_end",
        "gzip_of_a_few_bytes",
        "gzip_without_its_head",
        "gzip_checksum",
        "gzip_and_more",
        "gzip_garbled",
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    with pytest.raises(FastaError, match=rf"a\.fasta.*{message}"):
        read(tmp_path, content)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FastaError, match="missing.*no such file"):
        list(read_fasta(tmp_path / "missing"))
    with pytest.raises(FastaError, match="is a folder"):
        list(read_fasta(tmp_path))


WORD = st.text(st.characters(codec="ascii", min_codepoint=33, max_codepoint=126), max_size=8)
RECORD = st.builds(
    lambda name, words, sequence: FastaRecord(name, " ".join(words), sequence),
    WORD.filter(bool),
    st.lists(WORD.filter(bool), max_size=3),
    st.text("ACDEFGHIKLMNPQRSTVWYBOUXZ", min_size=1, max_size=50),
)


@pytest.mark.parametrize("name", ["a.fasta", "a.fasta.gz"])
@given(records=st.lists(RECORD, min_size=1, max_size=5), width=st.integers(1, 60))
def test_reading_inverts_writing(tmp_path_factory, name, records, width):
    path = tmp_path_factory.mktemp("fasta") / name
    write_fasta(path, records, width=width)
    assert list(read_fasta(path)) == records
    assert (path.read_bytes()[:2] == b"\x1f\x8b") == name.endswith(".gz")


def test_lines_are_wrapped(tmp_path):
    write_fasta(tmp_path / "a", [FastaRecord("a", "b c", "ACDEF")], width=2)
    assert (tmp_path / "a").read_bytes() == b">a b c\nAC\nDE\nF\n"


def test_equal_records_give_equal_compressed_bytes(tmp_path):
    for name in ("a.gz", "b.gz"):
        write_fasta(tmp_path / name, RECORDS)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


@pytest.mark.parametrize(
    "bad",
    [
        FastaRecord("a b", "", "MK"),
        FastaRecord("a", "b\nc", "MK"),
        FastaRecord("a", " b", "MK"),
        FastaRecord("", "b", "MK"),
        FastaRecord("a", "", ""),
        FastaRecord("a", "", "M K"),
        FastaRecord("a", "", "mk"),
        FastaRecord("a", "", "MK>"),
        FastaRecord("a", "", "MKÄ"),
    ],
)
def test_what_could_not_be_read_back_leaves_the_old_file_alone(tmp_path, bad):
    path = tmp_path / "a.fasta"
    write_fasta(path, RECORDS)
    with pytest.raises(ValueError, match="record"):
        write_fasta(path, [RECORDS[0], bad])
    assert list(read_fasta(path)) == RECORDS
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.fasta"]


def test_an_interrupted_writer_leaves_the_old_file_alone(tmp_path):
    def records():
        yield RECORDS[0]
        raise KeyboardInterrupt

    path = tmp_path / "a.fasta"
    write_fasta(path, RECORDS)
    with pytest.raises(KeyboardInterrupt):
        write_fasta(path, records())
    assert list(read_fasta(path)) == RECORDS
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.fasta"]


def test_width_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="width"):
        write_fasta(tmp_path / "a", RECORDS, width=0)
