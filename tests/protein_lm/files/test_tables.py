import csv
import gzip
import math
import os

import numpy as np
import pyarrow.parquet as pq
import pytest

from fast_attention.protein_lm.data.table_rows import read_columns
from fast_attention.protein_lm.files.output_targets import is_special
from fast_attention.protein_lm.files.tables import (
    ROW_GROUP,
    find_extension,
    open_table,
    write_table,
)

COLUMNS = {"id": str, "residues": int, "score": float}
ROWS = [('sp|P1,"a"', 3, -0.1), ("b", 10**12, 1e-300), ("c", 1, math.nan)]


def write(path):
    with open_table(path, COLUMNS) as add:
        for row in ROWS:
            add(row)


@pytest.mark.parametrize("name", ["a.tsv", "a.CSV", "a.tsv.gz", "a.csv.gz"])
def test_text_is_read_back(name, tmp_path):
    path = tmp_path / name
    write(path)
    content = path.read_bytes()
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
    found = list(csv.reader(text.splitlines(), delimiter="\t" if ".tsv" in name else ","))
    assert found[0] == list(COLUMNS)
    for row, (name, count, score) in zip(found[1:], ROWS, strict=True):
        assert row[:2] == [name, str(count)]
        assert float(row[2]) == score or math.isnan(score)
    write(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["a.tsv", "a.csv.gz", "a.parquet"])
def test_a_table_without_rows_names_its_columns(name, tmp_path):
    with open_table(tmp_path / name, COLUMNS):
        pass
    if name.endswith(".parquet"):
        assert pq.read_table(tmp_path / name).column_names == list(COLUMNS)
    else:
        content = (tmp_path / name).read_bytes()
        text = gzip.decompress(content) if name.endswith(".gz") else content
        assert text.replace(b",", b"\t") == b"id\tresidues\tscore\n"


def test_nothing_is_written_where_the_first_row_fails():
    reader, writer = os.pipe()
    with pytest.raises(RuntimeError), open_table(f"/dev/fd/{writer}", COLUMNS):
        raise RuntimeError
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read() == b""


def test_parquet_is_read_back_in_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    with open_table(path, COLUMNS) as add:
        for number in range(ROW_GROUP + 1):
            add((f"p{number}", number, number / 7))
    table = pq.read_table(path)
    assert pq.ParquetFile(path).num_row_groups == 2
    assert table.column_names == list(COLUMNS)
    assert table["id"][ROW_GROUP].as_py() == f"p{ROW_GROUP}"
    assert table["score"].to_pylist() == [number / 7 for number in range(ROW_GROUP + 1)]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv.gz", "a.parquet"])
def test_nothing_is_left_of_a_table_that_failed(name, tmp_path):
    path = tmp_path / name
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), open_table(path, COLUMNS) as add:
        add(ROWS[0])
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a.tsv", "a.parquet"])
def test_a_table_without_rows_has_its_columns(name, tmp_path):
    path = tmp_path / name
    with open_table(path, COLUMNS):
        pass
    names = (
        pq.read_table(path).column_names if "parquet" in name else path.read_text().strip().split()
    )
    assert names == list(COLUMNS)


def test_an_extension_must_say_what_is_written(tmp_path):
    with (
        pytest.raises(ValueError, match=r"scores.txt.*\.tsv, \.csv, .*\.parquet"),
        open_table(tmp_path / "scores.txt", COLUMNS),
    ):
        pass


TEXTS = [
    "plain",
    "with\ttab",
    "with, comma; and semicolon",
    'with "quotes"',
    '"',
    "line\nfeed",
    "carriage\rreturn",
    "both\r\n",
    "007",
    "1e5",
    "NA",
    "nan",
    "None",
    "",
    "=cmd()",
    "#comment",
    "'apostrophe",
    "\\backslash\\n",
    "\u2028 \x85 \x1c \x0b",
    "\N{GREEK SMALL LETTER ALPHA}\N{DNA DOUBLE HELIX}",
    " blanks ",
]
NUMBERS = [0.1, 1e-300, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, math.nan, 1 / 3]


def columns():
    return {
        "id": TEXTS,
        'a\tb"\nc,': TEXTS[::-1],
        "number": [NUMBERS[row % len(NUMBERS)] for row in range(len(TEXTS))],
        "single": [np.float32(0.1) + np.float32(row) for row in range(len(TEXTS))],
        "count": [10**18 + row for row in range(len(TEXTS))],
    }


def assert_numbers(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert float(one) == other or math.isnan(float(one)) and math.isnan(other)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.tsv.gz"])
def test_any_text_and_every_digit_is_read_back_by_the_csv_module(name, tmp_path):
    write_table(tmp_path / name, columns())
    opened = gzip.open if name.endswith(".gz") else open
    with opened(tmp_path / name, "rt", newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t" if ".tsv" in name else ",", strict=True))
    for key in ("id", 'a\tb"\nc,'):
        assert [row[key] for row in rows] == columns()[key]
    assert_numbers([row["number"] for row in rows], columns()["number"])
    assert [np.float32(row["single"]) for row in rows] == columns()["single"]
    assert rows[0]["single"] == "0.1"
    assert [int(row["count"]) for row in rows] == columns()["count"]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_any_text_and_every_digit_is_read_back_by_pandas(name, tmp_path):
    pandas = pytest.importorskip("pandas")
    write_table(tmp_path / name, columns())
    texts = ["id", 'a\tb"\nc,']
    found = pandas.read_csv(
        tmp_path / name,
        sep="\t" if ".tsv" in name else ",",
        dtype=dict.fromkeys(texts, str),
        keep_default_na=False,
        na_values={"number": ["nan"]},
    )
    for key in texts:
        assert found[key].tolist() == columns()[key]
    assert_numbers(found["number"], columns()["number"])
    assert found["single"].astype(np.float32).tolist() == columns()["single"]
    assert found["count"].tolist() == columns()["count"]


def test_parquet_has_any_text_and_every_digit(tmp_path):
    write_table(tmp_path / "a.parquet", columns())
    found = pq.read_table(tmp_path / "a.parquet").to_pydict()
    assert found["id"] == TEXTS
    assert_numbers(found["number"], columns()["number"])


@pytest.mark.parametrize("name", ["a.tsv", "a.parquet"])
def test_text_that_utf8_cannot_encode_is_written_with_backslashes(name, tmp_path):
    write_table(tmp_path / name, {"id": ["a\udcff"], "score": [1.0]})
    if name.endswith(".tsv"):
        assert (tmp_path / name).read_text() == "id\tscore\na\\udcff\t1.0\n"
    else:
        assert pq.read_table(tmp_path / name)["id"].to_pylist() == ["a\\udcff"]


def test_what_is_written_is_read(tmp_path):
    write_table(tmp_path / "a.tsv", {"id": TEXTS[:4], "y": [0.1, 1e-300, math.nan, 1.0]})
    assert read_columns(tmp_path / "a.tsv")[0] == {
        "id": TEXTS[:4],
        "y": ["0.1", "1e-300", "nan", "1.0"],
    }


def test_a_device_needs_no_extension(tmp_path):
    assert is_special(os.devnull)
    assert find_extension(os.devnull, (".tsv", ".csv")) == ".tsv"
    assert find_extension("-", (".npz", ".h5")) == ".npz"
