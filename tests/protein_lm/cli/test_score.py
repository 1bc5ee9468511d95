import csv
import math

import pytest

from fast_attention.protein_lm import FastaRecord, cli, write_fasta
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

PROTEINS = [
    FastaRecord("short", "", "MKT"),
    FastaRecord("long", "longer than the 64 residues of the model", "MKTAYIAKQR" * 8),
    FastaRecord("middle", "", "ACDEFGHIKLM"),
]


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "proteins.fasta"
    write_fasta(path, PROTEINS)
    return path


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_every_protein_has_a_row(lm_run, fasta, tmp_path, capsys):
    output = tmp_path / "scores.tsv"
    arguments = ["score", f"--run_dir={lm_run}", f"--fasta={fasta}", f"--output={output}"]
    assert cli.main([*arguments, "--max_length=20"]) == 0
    rows = read(output)
    scores = FlaxLM.load(lm_run).score([record.sequence for record in PROTEINS], max_length=20)
    assert [row["id"] for row in rows] == ["short", "long", "middle"]
    assert [row["residues"] for row in rows] == ["3", "80", "11"]
    assert [row["residues_scored"] for row in rows] == ["3", "20", "11"]
    for row, score in zip(rows, scores, strict=True):
        assert float(row["log_likelihood"]) == score.log_likelihood
        assert float(row["mean_log_likelihood"]) == score.mean_log_likelihood
        assert float(row["perplexity"]) == score.perplexity
        end = float(row["log_likelihood_with_end"])
        assert math.isnan(end) if row["id"] == "long" else end == score.log_likelihood_with_end
    assert "3 proteins, 34 residues, " in capsys.readouterr().out


def test_a_masked_model_gives_pseudo_likelihoods(bert_run, fasta, tmp_path):
    output = tmp_path / "scores.tsv"
    arguments = ["score", f"--run_dir={bert_run}", f"--fasta={fasta}", f"--output={output}"]
    assert cli.main([*arguments, "--max_length=5", "--tokens_per_batch=40"]) == 0
    sequences = [record.sequence for record in PROTEINS]
    scores = FlaxBERT.load(bert_run).score(sequences, max_length=5, tokens_per_batch=40)
    for row, score in zip(read(output), scores, strict=True):
        assert float(row["pseudo_log_likelihood"]) == score.pseudo_log_likelihood
        assert float(row["pseudo_perplexity"]) == score.pseudo_perplexity
        assert "log_likelihood" not in row


def test_too_long_is_told_or_left_out(lm_run, fasta, tmp_path, capsys):
    output = tmp_path / "scores.tsv"
    arguments = ["score", f"--run_dir={lm_run}", f"--fasta={fasta}", f"--output={output}"]
    assert cli.main(arguments) == 1
    told = capsys.readouterr().err
    assert "'long' has more than 64 residues" in told and "--max_length=64" in told
    assert not output.exists()
    assert cli.main([*arguments, "--max_length=65"]) == 1
    assert "room for 64" in capsys.readouterr().err
    listing = tmp_path / "left_out.tsv"
    assert cli.main([*arguments, "--on_error=skip", f"--skipped_list={listing}"]) == 0
    assert [row["id"] for row in read(output)] == ["short", "middle"]
    assert "1 of 3 records was left out" in capsys.readouterr().err
    assert "long" in listing.read_text()


@pytest.mark.parametrize(
    ("output", "message"),
    [("scores.txt", ".tsv, .csv"), ("absent/scores.tsv", "create it first")],
)
def test_an_output_that_cannot_be_written_is_told_at_once(fasta, tmp_path, output, message, capsys):
    arguments = ["score", f"--run_dir={tmp_path}", f"--fasta={fasta}"]
    assert cli.main([*arguments, f"--output={tmp_path / output}"]) == 1
    assert message in capsys.readouterr().err


def test_load_reads_a_run_of_its_class(lm_run, bert_run):
    model = FlaxLM.load(str(lm_run))
    assert isinstance(model, FlaxLM)
    with pytest.raises(RunError, match="is a run of FlaxBERT, not of FlaxLM.*FlaxBERT.load"):
        FlaxLM.load(bert_run)
