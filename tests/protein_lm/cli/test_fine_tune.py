import json

import numpy as np
import pytest

from fast_attention.protein_lm import cli, read_fasta, write_fasta
from fast_attention.protein_lm.data.table_rows import read_columns
from fast_attention.protein_lm.finetune import finetuned, prediction_files
from fast_attention.protein_lm.finetune.finetuning import FineTuned
from fast_attention.protein_lm.finetune.linear_head import LinearHead
from fast_attention.protein_lm.loading import load_run


@pytest.fixture(scope="module")
def records(tiny_fasta):
    return [record for record in read_fasta(tiny_fasta) if len(record.sequence) <= 60]


@pytest.fixture(scope="module")
def table(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    lines = ["id,sequence,charge,kind"]
    for record in records:
        charge = sum(record.sequence.count(letter) for letter in "KR") / len(record.sequence)
        kind = "basic" if charge > 0.15 else "other"
        lines.append(f"{record.id},{record.sequence},{charge:.4f},{kind}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def arguments(lm_run, table):
    def make(folder, *more):
        given = [f"--run_dir={lm_run}", f"--table={table}", f"--output={folder}"]
        return ["fine-tune", *given, "--label_column=charge", "--task=regression", *more]

    return make


def test_a_property_is_learned_and_predicted(arguments, records, tmp_path, capsys):
    folder, fasta, output = tmp_path / "out", tmp_path / "new.fasta", tmp_path / "new.tsv"
    assert cli.main(arguments(folder)) == 0
    told = capsys.readouterr().out
    assert "spearman" in told and "rmse of mean" in told and "frozen trunk" in told
    result = json.loads((folder / "result.json").read_text())
    assert result["metrics"]["test"]["spearman"] > 0.5
    table = read_columns(folder / "predictions.tsv")[0]
    assert table["id"] == [record.id for record in records]
    assert set(table["part"]) == {"train", "valid", "test"}
    write_fasta(fasta, records[:5])
    command = ["predict", f"--model={folder}", f"--fasta={fasta}", f"--output={output}"]
    assert cli.main(command) == 0
    assert "5 proteins" in capsys.readouterr().out
    found = read_columns(output)[0]
    assert list(found) == ["id", "prediction"]
    np.testing.assert_allclose(
        np.array(found["prediction"], float), np.array(table["prediction"][:5], float), atol=1e-4
    )

    assert cli.main(arguments(folder)) == 0
    assert "is finished" in capsys.readouterr().out
    assert cli.main(arguments(folder, "--seed=1")) == 1
    assert "result of another options" in capsys.readouterr().err
    (folder / "result.json").unlink()
    assert cli.main(arguments(folder)) == 0
    assert json.loads((folder / "result.json").read_text()) == result


def test_classes_by_id_with_adapters_in_a_whole_model(
    lm_run, table, tiny_fasta, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "out"
    text = table.read_text().replace(",sequence,", ",unused,")
    (tmp_path / "t.csv").write_text(text)
    command = [
        "fine-tune",
        f"--run_dir={lm_run}",
        f"--table={tmp_path / 't.csv'}",
        f"--fasta={tiny_fasta}",
        "--label_column=kind",
        "--task=classification",
        "--method=lora",
        "--epochs=1",
        "--rank=2",
        "--balanced",
        "--whole_model",
        f"--output={folder}",
    ]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert "macro f1" in told and "epoch 1" in told and "true, predicted" in told
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["frozen", "valid", "train", "valid"]

    for extra, expected in (
        ([], [f"{folder} (predictor)", "a class: basic, other", "in the folder", "macro f1"]),
        (["--json"], ['"kind": "predictor"', '"method": "lora"']),
    ):
        assert cli.main(["info", f"--run_dir={folder}", *extra]) == 0
        told = capsys.readouterr().out
        assert all(text in told for text in expected)
    fasta = ["--fasta=x", f"--output={tmp_path / 'x.tsv'}"]
    assert cli.main(["score", f"--run_dir={folder}", *fasta]) == 1
    told = capsys.readouterr().err
    assert "is a predictor" in told and f"protein-lm predict --model={folder}" in told
    assert cli.main(["train", f"--work_dir={folder}", "--fasta=x"]) == 1
    assert "holds a predictor" in capsys.readouterr().err
    assert cli.main(["predict", f"--model={folder}", "--run_dir=x", *fasta]) == 1
    assert "holds the whole model, and --run_dir is not read" in capsys.readouterr().err

    def read_run(*_, **__):
        raise AssertionError("the whole model needs no run")

    monkeypatch.setattr(finetuned, "load_run", read_run)
    tuned = FineTuned.load(folder)
    assert tuned.classes == ("basic", "other")
    assert list(read_columns(folder / "predictions.tsv")[0])[-2:] == ["p_basic", "p_other"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--label_column=tm"], "table.csv, line 1: there is no column 'tm'"),
        (["--label_column=tm"], "name the column with --label_column"),
        (["--label_column=kind"], ": the label 'basic' is not a finite number"),
        (["--label_column=kind"], "--task=classification"),
        (["--split_column=kind"], "table.csv, line 2: the split 'basic'"),
        (["--split_column=kind"], "--split_column"),
    ],
)
def test_what_cannot_be_learned_is_told(arguments, tmp_path, more, expected, capsys):
    assert cli.main(arguments(tmp_path / "out", *more)) == 1
    told = capsys.readouterr().err
    assert expected in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--epochs=3"], "--epochs needs --method"),
        (["--method=full", "--rank=3"], "--rank needs --method=lora"),
        (["--balanced"], "--balanced needs --task=classification"),
        (["--valid_fasta=x"], "--split_column"),
    ],
)
def test_options_that_do_not_go_together_are_told(arguments, tmp_path, more, expected, capsys):
    assert cli.main(arguments(tmp_path / "out", *more)) == 2
    told = capsys.readouterr().err
    assert expected in told and "Traceback" not in told


def test_a_folder_that_holds_no_predictor_is_told(lm_run, tiny_fasta, tmp_path, capsys):
    command = ["predict", f"--model={lm_run}", f"--fasta={tiny_fasta}"]
    assert cli.main([*command, f"--output={tmp_path / 'x.tsv'}"]) == 1
    assert "protein-lm fine-tune" in capsys.readouterr().err
    command = ["fine-tune", f"--run_dir={lm_run}", f"--output={tmp_path / 'x'}"]
    assert cli.main(command) == 2
    assert "--table" in capsys.readouterr().err
    assert cli.main([*command, f"--fasta={tiny_fasta}", "--method=lora"]) == 2
    assert "--method needs --table" in capsys.readouterr().err


def test_a_run_is_not_written_over(lm_run, arguments, capsys):
    before = (lm_run / "metrics.jsonl").read_text()
    result = lm_run / "result.json"
    kept = result.rename(lm_run / "kept.json")
    try:
        assert cli.main(arguments(lm_run)) == 1
    finally:
        kept.rename(result)
    assert "holds a run" in capsys.readouterr().err
    assert (lm_run / "metrics.jsonl").read_text() == before


def test_files_of_others_are_not_written_over(arguments, tmp_path, capsys):
    (tmp_path / "predictions.tsv").write_text("mine")
    assert cli.main(arguments(tmp_path)) == 1
    assert "predictions.tsv would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "predictions.tsv").read_text() == "mine"
    assert cli.main(arguments("-")) == 1
    assert "standard output, but a folder is written" in capsys.readouterr().err


def test_a_predictor_of_python_is_not_replaced(arguments, lm_run, tmp_path, capsys):
    head = LinearHead(*(np.ones(shape, np.float32) for shape in ((32,), (32,), (32, 1), (1,))))
    FineTuned(load_run(lm_run).model, None, head, "frozen", None, "", None).save(tmp_path / "a")
    before = (tmp_path / "a" / "head.npz").read_bytes()
    assert cli.main(arguments(tmp_path / "a")) == 1
    assert "holds a predictor that was saved in Python" in capsys.readouterr().err
    assert (tmp_path / "a" / "head.npz").read_bytes() == before


def test_a_family_is_learned(lm_run, records, tmp_path, capsys):
    family, folder = tmp_path / "family.fasta", tmp_path / "run"
    write_fasta(family, records[:12])
    command = [
        "fine-tune",
        f"--run_dir={lm_run}",
        f"--fasta={family}",
        f"--valid_fasta={family}",
        "--epochs=8",
        "--learning_rate=0.01",
        f"--output={folder}",
    ]
    assert cli.main(command) == 0
    assert "is not used" not in capsys.readouterr().err
    before, after = (load_run(path) for path in (lm_run, folder))
    sequences = [record.sequence for record in records[:12]]
    losses = [run.model.evaluate(sequences)["loss"] for run in (before, after)]
    assert losses[1] < losses[0] - 0.1
    assert after.step == 8 * 3
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "is finished" in capsys.readouterr().out
    command[-1] = f"--output={lm_run}"
    assert cli.main(command) == 1
    assert "another folder" in capsys.readouterr().err


def test_predictions_are_written_window_by_window(arguments, records, tmp_path, monkeypatch):
    folder, fasta = tmp_path / "out", tmp_path / "new.fasta"
    assert cli.main(arguments(folder)) == 0
    write_fasta(fasta, records[:7])
    found, sizes, outputs = [], [], FineTuned.outputs

    def count(tuned, sequences):
        sequences = list(sequences)
        sizes.append(len(sequences))
        return outputs(tuned, sequences)

    monkeypatch.setattr(FineTuned, "outputs", count)
    for number, most in enumerate((100, 2)):
        monkeypatch.setattr(prediction_files, "_MOST", most)
        output = tmp_path / f"{number}.tsv"
        command = ["predict", f"--model={folder}", f"--fasta={fasta}", f"--output={output}"]
        assert cli.main(command) == 0
        found.append(read_columns(output)[0])
    assert sizes == [7, 2, 2, 2, 1]
    assert found[0]["id"] == found[1]["id"]
    values = [np.array(table["prediction"], float) for table in found]
    np.testing.assert_allclose(*values, atol=1e-5)


def write_labels(path, records, make):
    lines = [f"{r.id},{r.sequence},{make(r.sequence)!r}" for r in records]
    path.write_text("\n".join(["id,sequence,label", *lines]) + "\n")


def fine_tune(lm_run, table, folder):
    command = ["fine-tune", f"--run_dir={lm_run}", f"--table={table}", "--task=regression"]
    assert cli.main([*command, f"--output={folder}"]) == 0
    text = (folder / "result.json").read_text()
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))["metrics"]


def count_of_k(sequence):
    return float(sequence.count("K")) + len(sequence) / 100


def test_labels_of_any_size_keep_their_digits(lm_run, records, tmp_path):
    found = {}
    for name, make in {
        "plain": count_of_k,
        "shifted": lambda sequence: 1e9 + count_of_k(sequence),
        "tiny": lambda sequence: 1e-300 * count_of_k(sequence),
        "huge": lambda sequence: 1e300 * count_of_k(sequence),
    }.items():
        write_labels(tmp_path / f"{name}.csv", records[:60], make)
        metrics = fine_tune(lm_run, tmp_path / f"{name}.csv", tmp_path / name)
        found[name] = metrics["train"]
        table = read_columns(tmp_path / name / "predictions.tsv")[0]
        assert np.isfinite(np.array(table["prediction"], float)).all()
        tuned = FineTuned.load(tmp_path / name)
        np.testing.assert_allclose(
            tuned.predict([record.sequence for record in records[:60]]),
            np.array(table["prediction"], float),
            rtol=1e-5 if name != "shifted" else 1e-14,
        )
    plain = found["plain"]
    for name, unit in (("shifted", 1.0), ("tiny", 1e-300), ("huge", 1e300)):
        assert found[name]["spearman"] == pytest.approx(plain["spearman"], abs=1e-2)
        assert found[name]["r2"] == pytest.approx(plain["r2"], abs=1e-4)
        assert found[name]["rmse"] == pytest.approx(unit * plain["rmse"], rel=1e-3)


def test_few_and_repeated_proteins_are_said(lm_run, records, tmp_path, capsys):
    table = tmp_path / "t.csv"
    parts = ["train"] * 6 + ["valid"] * 3
    chosen = [*records[:6], records[0], records[1], records[7]]
    lines = [
        f"p{i},{record.sequence},{count_of_k(record.sequence)},{part}"
        for i, (record, part) in enumerate(zip(chosen, parts, strict=True))
    ]
    table.write_text("\n".join(["id,sequence,label,split", *lines]) + "\n")
    metrics = fine_tune(lm_run, table, tmp_path / "out")
    assert metrics["valid"]["proteins"] == 3 and metrics["valid"]["shared"] == 2
    told = capsys.readouterr().out
    assert "(of 3 proteins, which is too few" in told.splitlines()[0]
    assert "the figures of 'valid' are of 3 proteins, which is too few" in told
    assert "2 of 3 validation proteins are identical to training proteins" in told


def test_a_genome_in_a_table_is_refused_by_its_line(arguments, records, tmp_path, capsys):
    table = tmp_path / "t.csv"
    table.write_text(f"id,sequence,label\nNC_1,{'ACGT' * 20_000},1.0\n")
    command = [a for a in arguments(tmp_path / "out") if not a.startswith(("--table", "--label"))]
    assert cli.main([*command, f"--table={table}"]) == 1
    told = capsys.readouterr().err
    assert "t.csv, line 2 (NC_1): the sequence has more than 64 residues" in told
    assert "--max_length=N" in told


def test_a_protein_with_more_residues_than_positions_is_a_row_to_skip(
    arguments, table, records, tmp_path, capsys
):
    """The model of the run has learned positions for 64 residues."""
    lines = table.read_text().splitlines()
    lines[3] = f"long,{'MK' * 40},0.5,basic"
    longer = tmp_path / "longer.csv"
    longer.write_text("\n".join(lines) + "\n")
    given = [*arguments(tmp_path / "out"), f"--table={longer}"]
    assert cli.main(given) == 1
    assert "line 4 (long): the sequence has more than 64 residues" in capsys.readouterr().err
    assert cli.main([*given, "--on_error=skip"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["left_out"] == 1
    assert sum(part["proteins"] for part in result["metrics"].values()) == len(records) - 1
