"""The model that comes with the package works without any training or option."""

import csv
import io
import json

import numpy as np
import pytest

from fast_attention.protein_lm import cli, pretrained
from fast_attention.protein_lm.data.corpus import bundled_corpus
from fast_attention.protein_lm.data.fasta import read_fasta, write_fasta
from fast_attention.protein_lm.evaluation import evaluation
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.models import FlaxLM

PROTEINS = {
    "insulin": "MALWMRLLPLLALLALWGPDPAAAFVNQHLCGSHLVEALYLVCGERGFFYTPKT",
    "short": "MKTAYIAKQR",
}


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "x.fa"
    path.write_text("".join(f">{name}\n{protein}\n" for name, protein in PROTEINS.items()))
    return path


def files():
    return {path.name: path.stat().st_mtime_ns for path in pretrained.FOLDER.iterdir()}


def test_it_is_small():
    sizes = [(pretrained.FOLDER / name).stat().st_size for name in files() if "__" not in name]
    assert sum(sizes) <= 6e6


def test_it_predicts_new_proteins_better_than_its_n_grams(tmp_path):
    write_fasta(tmp_path / "x.fa", list(read_fasta(bundled_corpus("test")))[::40])
    model, _, folder = load_run(pretrained.FOLDER)
    baselines = evaluation.baselines_of(folder)
    own, *others = evaluation.evaluate_on(model, [tmp_path / "x.fa"], baselines).result["scores"]
    assert [row["name"] for row in others][-1] == "trigram"
    assert own["perplexity"] < 0.97 * min(row["perplexity"] for row in others)


def test_commands_take_it_without_a_run_folder(fasta, tmp_path, capfd):
    before = files()
    effects = tmp_path / "effects.tsv"
    assert cli.main(["score", f"--fasta={fasta}"]) == 0
    captured = capfd.readouterr()
    assert "no --run_dir: the model that comes with the package" in captured.err
    rows = list(csv.DictReader(io.StringIO(captured.out), delimiter="\t"))
    assert [row["id"] for row in rows] == list(PROTEINS)
    expected = FlaxLM.load(pretrained.FOLDER).score(list(PROTEINS.values()))
    np.testing.assert_allclose(
        [float(row["log_likelihood"]) for row in rows],
        [score.log_likelihood for score in expected],
        rtol=1e-5,
    )
    wild = tmp_path / "wild.fa"
    wild.write_text(">w\nMKTAYIAKQR\n")
    arguments = ["mutate", f"--fasta={wild}", "--mutations=M1A", f"--output={effects}", "--quiet"]
    assert cli.main(arguments) == 0
    assert capfd.readouterr().err == ""
    assert cli.main(["sample", "--num_samples=1", "--max_length=5", "--quiet"]) == 0
    assert capfd.readouterr().out.startswith(">sample_1 ")
    for named in ([], [f"--run_dir={pretrained.FOLDER}/"]):
        assert cli.main(["evaluate", f"--fasta={fasta}", *named]) == 0
        captured = capfd.readouterr().out
        assert "this model" in captured and "written to" not in captured
    assert cli.main(["info", "--skip_corpus", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["model"] == "FlaxLM"
    assert files() == before


def test_a_predictor_made_from_it_holds_the_model(tmp_path):
    table, output = tmp_path / "table.csv", tmp_path / "predictor"
    rng = np.random.default_rng(0)
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    rows = ["".join(rng.choice(letters, 12)) for _ in range(12)]
    table.write_text("sequence,label\n" + "".join(f"{row},{row.count('A')}.5\n" for row in rows))
    arguments = [f"--table={table}", "--task=regression", f"--output={output}"]
    assert cli.main(["fine-tune", *arguments]) == 0
    assert json.loads((output / "finetuned.json").read_text())["whole"]
