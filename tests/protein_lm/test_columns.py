import gzip

import pytest

from fast_attention.protein_lm import columns
from fast_attention.protein_lm.columns import read_columns
from fast_attention.protein_lm.run_folder import RunError


@pytest.mark.parametrize(
    "content",
    [
        b"id,sequence,y\na,MK,1\nb,AA,2\n",
        b"\xef\xbb\xbfid\tsequence\ty\r\na\tMK\t1\r\n\r\nb\tAA\t2",
        gzip.compress(b'id,"sequence",y\n"a",MK, 1\nb,AA,2\n'),
    ],
    # gzip.compress writes the time: an id made of it would change from second to second.
    ids=["csv", "tsv_with_byte_order_mark", "csv_in_gzip"],
)
def test_csv_and_tsv_are_told_apart(tmp_path, content):
    path = tmp_path / "table"
    path.write_bytes(content)
    assert read_columns(path, ["sequence"], ["y", "z"]) == {
        "sequence": ["MK", "AA"],
        "y": ["1", "2"],
    }
    assert list(read_columns(path)) == ["id", "sequence", "y"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "has 0 lines"),
        (b"sequence,label\n", "has 1 lines"),
        (b"sequence,y\nMK,1\n", "no column 'label', only 'sequence', 'y'"),
        (b"label,label\n1,2\n", "2 columns are named 'label'"),
        (b"label,x\n1,2\n3\n", "line 3: 1 cells, but the first line names 2"),
        (b"\x1f\x8bnothing", "cut off or damaged"),
        (b"\xff\xfe", "is no text"),
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
    monkeypatch.setattr(columns, "MOST_BYTES", 1000)
    path = tmp_path / "table"
    content = b"label\n" + b"1\n" * 1000
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(RunError, match="table has more than 1,000 bytes.*split it"):
        read_columns(path)
