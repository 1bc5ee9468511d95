import gzip

import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.data.corpus import load_corpus
from fast_attention.protein_lm.data.fasta import FastaError, FastaRecord, read_proteins
from fast_attention.protein_lm.data.skipped_records import SkippedRecords

PROTEINS = [FastaRecord("p1", "", "MKTAY"), FastaRecord("p2", "kinase, human", "ACD")]


def read(folder, name, text, **options):
    path = folder / name
    content = text.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return list(read_proteins(path, **options))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'p1,MKTAY\n"p2 kinase, human",acd*\n'),
        ("a.CSV.gz", 'p1,MKTAY\r\n\r\n"p2 kinase, human",ACD'),
        ("a.tsv", "id\tsequence\np1\tMKTAY\np2 kinase, human\tACD\n"),
        ("a.csv", '\ufeffSequence,note,ID\nMKTAY,x,p1\nACD,,"p2 kinase, human"\n'),
        ("a.csv", "p1;MKTAY\n\np2 kinase, human;ACD\n"),
        ("a.csv", "id\tsequence\np1\tMKTAY\np2 kinase, human\tACD\n"),
        ("a.csv", 'name,length,sequence\np1,5,MK TAY\n"p2 kinase, human",3,ACD\n'),
    ],
)
def test_tables_of_every_form_hold_the_same_proteins(name, text, tmp_path):
    assert read(tmp_path, name, text) == PROTEINS


def test_a_column_of_sequences_needs_no_ids(tmp_path):
    assert read(tmp_path, "a.csv", "sequence\nMK\n") == [FastaRecord("", "", "MK")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("id,sequence\n", "the table is empty"),
        ("a,b,c\n", r"line 1: expected the names of the columns.*got 3 cells"),
        ("id,sequence\np1,MKB1\n", r"line 2: record 'p1' has the symbol '1'"),
        ("id,sequence\np1,MK\np2,\n", r"line 3: record 'p2' has no residues"),
        ("id,sequence\np1,MK,x\n", r"line 2: record 'p1' has 3 cells"),
        ("id,sequence,sequence\n", "two columns have the same name"),
        ("id,sequence\np1,M\0K\n", "line 2: has a NUL byte"),
        ('id,sequence\n"p1,MK\n', "line 2: is not a valid table"),
        ('id,sequence,note\np1,MK,"a\np2,MK,b\n', "line 2: is not a valid table.*up to line 3"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(text, message, tmp_path):
    with pytest.raises(FastaError, match=message):
        read(tmp_path, "a.csv", text)


def test_bad_rows_are_left_out_and_listed(tmp_path):
    skipped = SkippedRecords()
    text = "id,sequence\np1,MKTAY\np2,M-K\np3\np4,ACD\n"
    found = read(tmp_path, "a.csv", text, on_error="skip", skipped=skipped)
    assert [record.id for record in found] == ["p1", "p4"]
    assert [(record.line, record.id) for record in skipped.records] == [(3, "p2"), (4, "p3")]


def test_a_long_line_is_refused_before_it_fills_the_memory(tmp_path):
    text = "p1," + "A" * 12_000_000
    with pytest.raises(FastaError, match="line that begins with 'p1,AAA.* is longer than 11,0"):
        read(tmp_path, "a.csv", text, max_residues=10)


def test_a_long_record_is_refused_by_its_id(tmp_path):
    with pytest.raises(FastaError, match="line 1: record 'p1' has more than 10 residues. Do so."):
        read(tmp_path, "a.csv", "p1," + "A" * 3_000_000, max_residues=10, too_long="Do so.")


def test_training_data_may_be_a_table(tmp_path):
    (tmp_path / "a.fasta").write_text("".join(f">{r.id}\n{r.sequence}\n" for r in PROTEINS))
    (tmp_path / "a.csv").write_text("".join(f"{r.id},{r.sequence}\n" for r in PROTEINS))
    domain = make_protein_domain()
    table, fasta = (load_corpus(tmp_path / f"a.{kind}", domain) for kind in ("csv", "fasta"))
    np.testing.assert_array_equal(table.tokens, fasta.tokens)
