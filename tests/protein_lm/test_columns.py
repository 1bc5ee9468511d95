import gzip

import pytest

from fast_attention.protein_lm.data import table_rows
from fast_attention.protein_lm.data.table_rows import read_columns
from fast_attention.protein_lm.errors import RunError


@pytest.mark.parametrize(
    "content",
    [
        b"id,sequence,y\na,MK,1\nb,AA,2\n",
        b"\xef\xbb\xbfid\tsequence\ty\r\na\tMK\t1\r\n\r\nb\tAA\t2",
        gzip.compress(b'id,"sequence",y\n"a",MK, 1\nb,AA,2\n'),
        b"\nid;sequence;y\ra;MK;1\rb;AA;2",
        "id,Sequence,Y\na,MK,1\nb,AA,2\n".encode("utf-16"),
    ],
    # gzip.compress writes the time: an id made of it would change from second to second.
    ids=["csv", "tsv_with_byte_order_mark", "csv_in_gzip", "semicolons", "utf_16"],
)
def test_csv_and_tsv_are_told_apart(tmp_path, content):
    path = tmp_path / "table"
    path.write_bytes(content)
    assert read_columns(path, ["sequence"], ["y", "z"])[0] == {
        "sequence": ["MK", "AA"],
        "y": ["1", "2"],
    }
    assert [name.lower() for name in read_columns(path)[0]] == ["id", "sequence", "y"]


def test_a_cell_may_be_as_long_as_a_protein(tmp_path):
    # The csv module alone refuses more than 131,072 characters.
    path = tmp_path / "table"
    path.write_text("id,sequence\na," + "M" * 200_000 + "\n")
    assert len(read_columns(path)[0]["sequence"][0]) == 200_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has 0 rows"),
        (b"sequence,label\n", "has 1 row$"),
        (b"sequence,y\nMK,1\n", "no column 'label', only 'sequence', 'y'"),
        (b"label,label\n1,2\n", "2 columns are named 'label'"),
        (b"label,x\n1,2\n3\n", "line 3: has 1 cell, but the first line has 2"),
        (b"\x1f\x8bnothing", "cut off or damaged"),
        (b"label,x\n\xe9,2\n", "line 2: the byte 0xe9 .* is not UTF-8"),
        (b"label,x\n1,\0\n", "line 2: has a NUL byte"),
        (b'label,x\n1,2\n3,"5 prime\n4,5\n', "line 3: is not a valid table.*up to line 4"),
        (b'label,x\n1,"a\n2,"b\n', "line 2: is not a valid table"),
    ],
)
def test_what_is_no_table_is_told(tmp_path, content, expected):
    path = tmp_path / "table"
    path.write_bytes(content)
    with pytest.raises(RunError, match=expected):
        read_columns(path, ["label"])


def test_a_missing_table_is_told(tmp_path):
    with pytest.raises(RunError, match="no such file"):
        read_columns(tmp_path / "absent")
    with pytest.raises(RunError, match="is a folder"):
        read_columns(tmp_path)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_table_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(table_rows, "MOST_BYTES", 1000)
    path = tmp_path / "table"
    content = b"label\n" + b"1\n" * 1000
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(RunError, match="table has more than 1,000 bytes.*split it"):
        read_columns(path)
