import json
import os
import re
import shutil
from pathlib import Path

import pytest

from fast_attention.protein_lm import cli, read_fasta
from fast_attention.protein_lm.loading import load_run


def told(folder, capsys, *options):
    assert cli.main(["info", f"--run_dir={folder}", *options]) == 0
    return capsys.readouterr().out


def test_a_run_is_described(lm_run, tiny_fasta, capsys):
    about = json.loads(told(lm_run, capsys, "--json"))
    parameters = about["parameters"]
    assert parameters["total"] == load_run(lm_run).model.num_parameters
    parts = {name: n for name, n in parameters.items() if name not in ("total", "drawn")}
    assert sum(parts.values()) == parameters["total"]
    assert set(parts) == {"embed", "positions", "attention", "feed_forward", "norm", "head"}
    assert parts["attention"] == 4 * 32 * 32 and parts["embed"] == 29 * 32
    assert parameters["drawn"] == 16 * 16
    records = list(read_fasta(tiny_fasta))
    train = about["corpus"]["train"]
    assert (train["files"], train["proteins"]) == ([tiny_fasta], len(records))
    assert train["residues"] == sum(len(record.sequence) for record in records)
    assert about["step"] == 12 and about["checkpoints"] == [8, 12] and about["finished"]
    assert about["tokens"] == json.loads((lm_run / "result.json").read_text())["tokens"]
    assert about["metrics"]["train"]["step"] == about["metrics"]["valid"]["step"] == 12
    (evaluation,) = about["evaluations"]
    assert evaluation["scores"][0]["name"] == "this model" and evaluation["step"] == 12
    assert evaluation["fasta"] == [tiny_fasta] and evaluation["file"] == "result.json"


def test_the_text_says_the_same(bert_run, tiny_fasta, capsys):
    text = told(bert_run, capsys)
    for part in (
        "FlaxBERT, bidirectional",
        "finished run",
        "mask_rate=0.15",
        "FastAttention(",
        "29 tokens",
        f"{tiny_fasta}: 500 proteins",
        "step            12",
        "checkpoints     8, 12",
        "valid metrics   step=12",
        "this model",
    ):
        assert part in text
    skipped = told(bert_run, capsys, "--skip_corpus")
    assert f"train data      {tiny_fasta}: 500 proteins" in text and "data  " not in skipped


def test_a_run_without_a_checkpoint_is_described(lm_run, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(lm_run / "model.json", folder)
    text = told(folder, capsys)
    assert "unfinished run" in text and "step            none yet" in text
    assert "tiny.fasta.gz\n" in text
    about = json.loads(told(folder, capsys, "--json"))
    assert about["tokens"] is None and about["checkpoints"] == [] and about["evaluations"] == []


def test_an_exported_model_is_described(lm_run, tmp_path, capsys):
    folder = tmp_path / "model"
    assert cli.main(["export", f"--run_dir={lm_run}", f"--output={folder}"]) == 0
    capsys.readouterr()
    one, two = (json.loads(told(path, capsys, "--json")) for path in (lm_run, folder))
    assert two["kind"] == "export" and "exported" in told(folder, capsys)
    for name in ("model", "transformer", "attention", "parameters", "step", "tokens"):
        assert one[name] == two[name]
    names = [{split: found["files"] for split, found in x["corpus"].items()} for x in (one, two)]
    # The run evaluates on its validation proteins, which no setting repeats.
    assert names[0] == names[1] | {"test": names[1]["valid"]}


def test_files_that_a_run_names_are_counted_from_its_record(lm_run, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # Who opens it waits for ever.
    model, data = (json.loads((lm_run / f"{name}.json").read_text()) for name in ("model", "data"))
    model["training"] |= {"train_files": str(pipe), "valid_files": None, "test_files": None}
    data["train"][0]["file"] = str(pipe)
    data |= {"valid": [], "test": [], "held_out": {"fraction": 0.1, "proteins": 2}}
    data |= {"proteins": {"train": 7, "valid": 2}, "residues": {"train": 1234, "valid": 50}}
    (folder / "model.json").write_text(json.dumps(model))
    (folder / "data.json").write_text(json.dumps(data))
    text = told(folder, capsys)
    assert f"train data      {pipe}: 7 proteins, 1,234 residues" in text
    assert f"valid data      {folder}/held_out.fasta: 2 proteins, 50 residues" in text
    data["residues"]["train"] = "1234"
    (folder / "data.json").write_text(json.dumps(data))
    assert cli.main(["info", f"--run_dir={folder}"]) == 1
    assert "data.json is damaged" in capsys.readouterr().err


def test_what_is_no_folder_is_called_that(lm_run, capsys):
    assert cli.main(["info", f"--run_dir={lm_run / 'absent'}"]) == 1
    assert "absent: no such folder; check the path" in capsys.readouterr().err
    assert cli.main(["info", f"--run_dir={lm_run / 'model.json'}"]) == 1
    assert "model.json is a file: give the folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "export"])
def test_another_folder_is_refused(command, tmp_path, capsys):
    extra = [] if command == "info" else [f"--output={tmp_path / 'x'}"]
    assert cli.main([command, f"--run_dir={tmp_path}", *extra]) == 1
    assert "not the folder of a run" in capsys.readouterr().err


def test_every_evaluation_is_kept_and_said_of_which_proteins(lm_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(lm_run, folder)
    (folder / "result.json").unlink()
    names = ("first.fasta", "second.fasta")
    for name, text in zip(names, (">a\nMKT\n", ">a\nMKT\n>b\nACDE\n"), strict=True):
        (tmp_path / name).write_text(text)
        command = ["evaluate", f"--run_dir={folder}", f"--fasta={tmp_path / name}"]
        assert cli.main(command) == 0
    assert "the earlier evaluation, of other proteins" in capsys.readouterr().out
    about = json.loads(told(folder, capsys, "--json"))
    found = {Path(one["fasta"][0]).name: one for one in about["evaluations"]}
    assert set(found) == set(names)
    assert [found[name]["proteins"] for name in names] == [1, 2]
    text = told(folder, capsys, "--skip_corpus")
    sizes = ("1 protein, 3 residues", "2 proteins, 7 residues")
    for name, size in zip(names, sizes, strict=True):
        one = found[name]
        assert f"{name}: {size}" in text
        assert one["digest"][:12] in text and one["date"] in text
    # The same evaluation, given again, replaces itself.
    assert cli.main(command) == 0
    assert "earlier evaluation" not in capsys.readouterr().out
    assert len(list(folder.glob("evaluation*.json"))) == 2


def test_the_attention_of_a_causal_model_is_called_causal(lm_run, bert_run, capsys):
    for options in ([], ["--json"]):
        text = told(lm_run, capsys, "--skip_corpus", *options)
        assert not re.search(r"unidirectional\W+[Ff]alse", text)
        assert re.search(r"unidirectional\W+[Tt]rue", text)
        assert "unidirectional" in told(bert_run, capsys, "--skip_corpus", *options)


def test_control_characters_of_a_file_do_not_reach_the_terminal(lm_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(lm_run, folder)
    scores = [{"name": "\x1b[31mmodel", "perplexity": 1.0, "accuracy": 0.1}]
    about = {"objective": None, "fasta": ["\x1b]0;x\x07"], "digest": None}
    about |= {"proteins": 1, "residues": 2, "scores": scores}
    (folder / "evaluation.json").write_text(json.dumps(about))
    text = told(folder, capsys, "--skip_corpus")
    assert "\x1b" not in text and "\x07" not in text and r"\x1b[31mmodel" in text
