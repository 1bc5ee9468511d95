import csv
import math

import numpy as np
import pytest

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.finetune.labelled import choose_parts, read_labelled

SHARES = {"test_share": 0.25, "valid_share": 0.25, "seed": 0}


def write(path, text):
    path.write_text(text)
    return path


def test_columns_are_read(tmp_path):
    text = "name,sequence,tm,split,family\np1,mk v,50,train,a\np2,AAC*,61.5,VAL,b\n"
    found = read_labelled(
        write(tmp_path / "t.csv", text),
        label_column="tm",
        id_column="name",
        group_column="family",
    )
    assert found.ids == ["p1", "p2"] and found.sequences == ["MKV", "AAC"]
    assert found.labels == ["50", "61.5"] and found.groups == ["a", "b"]
    assert found.parts == ["train", "valid"] and not found.left_out


def test_sequences_may_come_by_id(tmp_path):
    path = write(tmp_path / "t.tsv", "id\tlabel\na\t1\nb\t2\n")
    known = {"a": "MK", "b": "AC"}
    assert read_labelled(path, sequences=known).sequences == ["MK", "AC"]
    with pytest.raises(RunError, match=r"line 3 \(b\): no protein of this id"):
        read_labelled(path, sequences={"a": "MK"})


def test_rows_that_cannot_be_read(tmp_path):
    path = write(tmp_path / "t.csv", "sequence,label\nMK,1\nMJ,2\nM-,3\n,4\nMA,\n")
    with pytest.raises(RunError, match=r"line 3 \(2\): the sequence has 'J'"):
        read_labelled(path)
    with pytest.raises(RunError, match=r"line 4 \(3\): the sequence has '-'"):
        read_labelled(path, on_error="replace")
    found = read_labelled(path, on_error="skip")
    assert found.sequences == ["MK"] and found.ids == ["1"]
    assert len(found.left_out) == 4 and "is empty" in found.left_out[2]
    replaced = write(tmp_path / "u.csv", "sequence,label\nMJ,2\n")
    assert read_labelled(replaced, on_error="replace").sequences == ["MX"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("seq,label\nMK,1\n", {}, "no column 'sequence'"),
        ("sequence,y\nMK,1\n", {}, "no column 'label'"),
        ("sequence,label\nMK,1\n", {"split_column": "part"}, "no column 'part'"),
        ("sequence,label,split\nMK,1,holdout\n", {}, "split 'holdout'"),
        ("sequence,label\nM1,1\n", {"on_error": "skip"}, "no row is left"),
    ],
)
def test_tables_that_cannot_be_used_are_told(tmp_path, text, options, message):
    with pytest.raises(RunError, match=message):
        read_labelled(write(tmp_path / "t.csv", text), **options)


def test_a_protein_without_a_group_is_an_error_of_its_row(tmp_path):
    """Else all such proteins would be one family, in one part."""
    path = write(tmp_path / "t.csv", "sequence,label,family\nMK,1,a\nMA,2,\n")
    with pytest.raises(RunError, match=r"line 3 \(2\): the column 'family' .* is empty"):
        read_labelled(path, group_column="family")
    found = read_labelled(path, group_column="family", on_error="skip")
    assert found.groups == ["a"] and len(found.left_out) == 1


@pytest.mark.parametrize("group", [None, math.nan, np.float32("nan"), "", " "], ids=repr)
def test_a_group_that_is_missing_is_told(group):
    with pytest.raises(RunError, match="group 3 is missing"):
        choose_parts(16, None, ["a", "nan", group, *"bcdefghijklmn"], **SHARES)


def test_parts_are_drawn_once_and_for_all():
    found = choose_parts(40, None, None, **SHARES)
    assert [(found == part).sum() for part in ("train", "valid", "test")] == [22, 8, 10]
    np.testing.assert_array_equal(found, choose_parts(40, None, None, **SHARES))
    assert (found != choose_parts(40, None, None, **(SHARES | {"seed": 1}))).any()


def test_relatives_stay_together():
    groups = [str(number % 7) for number in range(60)]
    found = choose_parts(60, None, groups, **SHARES)
    assert set(found) == {"train", "valid", "test"}
    for group in set(groups):
        assert len({part for part, g in zip(found, groups, strict=True) if g == group}) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_large_group_is_trained_on(seed):
    groups = ["large"] * 70 + [f"small {i}" for i in range(10)]
    found = choose_parts(80, None, groups, test_share=0.2, valid_share=0.1, seed=seed)
    assert (found[:70] == "train").all()
    assert {"test", "valid", "train"} == set(found[70:])


@pytest.mark.parametrize("seed", range(5))
def test_a_part_is_at_most_the_share(seed):
    groups = np.random.default_rng(seed).integers(12, size=100).astype(str).tolist()
    found = choose_parts(100, None, groups, test_share=0.3, valid_share=0.2, seed=seed)
    assert 0 < (found == "test").sum() <= 30 and 0 < (found == "valid").sum() <= 20


def test_a_share_may_be_large():
    found = choose_parts(100, None, None, test_share=0.8, valid_share=0.5, seed=0)
    assert [(found == part).sum() for part in ("train", "valid", "test")] == [10, 10, 80]


def test_given_parts_are_kept():
    given = ["train"] * 12 + ["test"] * 4
    found = choose_parts(16, given, None, **SHARES)
    assert (found[12:] == "test").all() and (found[:12] == "valid").sum() == 3
    given[0] = "valid"
    assert choose_parts(16, given, None, **SHARES).tolist() == given


def test_too_few_are_told():
    with pytest.raises(RunError, match="7 proteins: too few"):
        choose_parts(7, None, None, **SHARES)
    with pytest.raises(RunError, match="1 protein: too few"):
        choose_parts(1, None, None, **SHARES)
    with pytest.raises(RunError, match="too few: 9 proteins to train on and 0 to validate"):
        choose_parts(9, None, ["one family"] * 9, **SHARES)
    with pytest.raises(RunError, match="too few: 0 proteins to train on"):
        choose_parts(9, ["test"] * 9, None, **SHARES)


@pytest.mark.parametrize("column", ["id", "label", "family"])
@pytest.mark.parametrize("control", ["\t", "\n", "\r"], ids=ascii)
def test_names_that_break_tables_are_refused_or_left_out(tmp_path, column, control):
    rows = [{"id": f"p{row}", "sequence": "MK", "label": "x", "family": "f"} for row in range(3)]
    rows[1][column] = f"a{control}b"
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(RunError, match=r"line \d .*has the control character"):
        read_labelled(path, group_column="family")
    found = read_labelled(path, group_column="family", on_error="skip")
    assert found.ids == ["p0", "p2"] and len(found.left_out) == 1


@pytest.mark.parametrize(
    ("label", "remedy"), [("NA", "correct it"), ("1,5", "with a point"), ("1_5", "correct it")]
)
def test_a_label_that_is_no_number_is_an_error_of_its_row(tmp_path, label, remedy):
    path = write(tmp_path / "t.csv", f'id,sequence,label\na,MK,1\nb,MA,"{label}"\n')
    with pytest.raises(RunError, match=rf"t.csv, line 3 \(b\): the label '{label}'.*{remedy}"):
        read_labelled(path, numeric=True)
    found = read_labelled(path, numeric=True, on_error="skip")
    assert found.ids == ["a"] and len(found.left_out) == 1
    assert read_labelled(path).labels == ["1", label]
