import csv
import gzip
import math

import pyarrow.parquet as pq
import pytest

from fast_attention.protein_lm.tables import ROW_GROUP, open_table

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
