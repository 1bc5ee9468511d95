"""Other alphabets and span corruption through the command line, from FASTA files to samples."""

import json

import numpy as np
import pytest

from fast_attention.protein_lm import cli
from fast_attention.protein_lm.data.alphabets import ALPHABETS
from fast_attention.protein_lm.data.fasta import FastaRecord, read_fasta, write_fasta


def write_random(path, letters, number=60):
    rng = np.random.default_rng(0)
    records = [
        FastaRecord(f"s{i}", "", "".join(rng.choice([*letters], rng.integers(20, 60))))
        for i in range(number)
    ]
    write_fasta(path, records)
    return path


def train(config, folder, fasta, *bindings):
    settings = [f"--gin_bindings={binding}" for binding in bindings]
    arguments = [f"--gin_file={config}", f"--work_dir={folder}", f"--fasta={fasta}"]
    assert cli.main(["train", *arguments, *settings]) == 0


def run(command, folder, **options):
    return cli.main([command, f"--run_dir={folder}", *(f"--{k}={v}" for k, v in options.items())])


@pytest.fixture(scope="module")
def dna_run(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("dna")
    fasta = write_random(folder / "dna.fasta", "ACGTACGTACGTN")
    train(tiny_config, folder / "run", fasta, "make_protein_domain.alphabet = 'nucleotide'")
    return folder


def test_nucleotides_are_trained_evaluated_scored_mutated_and_sampled(dna_run, tmp_path, capsys):
    folder, fasta = dna_run / "run", dna_run / "dna.fasta"
    about = json.loads((folder / "model.json").read_text())
    assert about["alphabet"]["unknown"] == "N" and about["alphabet"]["tokens"][:4] == [*"ACGT"]
    assert run("evaluate", folder, fasta=fasta) == 0
    # Unknown to an untrained model: 15 letters and the end.
    assert "uniform over 16" in capsys.readouterr().out
    assert run("score", folder, fasta=fasta, output=tmp_path / "scores.tsv") == 0
    assert len((tmp_path / "scores.tsv").read_text().splitlines()) == 61
    table = tmp_path / "mutants.tsv"
    assert cli.main([
        "mutate", f"--run_dir={folder}", "--sequence=ACGTN", "--all", f"--output={table}",
    ]) == 0  # fmt: skip
    assert len(table.read_text().splitlines()) == 1 + 4 * 3 + 4
    drawn = tmp_path / "drawn.fasta"
    assert run("sample", folder, num_samples=5, prompt="acg", output=drawn) == 0
    records = list(read_fasta(drawn, alphabet=ALPHABETS["nucleotide"]))
    assert len(records) == 5 and all(record.sequence.startswith("ACG") for record in records)
    assert run("sample", folder, prompt="AEC", output=drawn) != 0
    assert "'E', which is none of the residues ACGTRYSWKMBDHVN" in capsys.readouterr().err


def test_a_run_of_nucleotides_is_continued_and_exported(dna_run, tmp_path):
    exported = tmp_path / "export"
    assert run("export", dna_run / "run", output=exported) == 0
    for number, folder in enumerate((dna_run / "run", exported)):
        output = tmp_path / f"{number}.fasta"
        assert run("sample", folder, num_samples=2, output=output) == 0
    assert (tmp_path / "0.fasta").read_text() == (tmp_path / "1.fasta").read_text()


def test_aligned_sequences_are_trained_and_evaluated(tmp_path, tiny_config, capsys):
    fasta = write_random(tmp_path / "aligned.fasta", "ACDEFGHIKLMNPQRSTVWY---..")
    binding = "make_protein_domain.alphabet = 'aligned_protein'"
    train(tiny_config, tmp_path / "run", fasta, binding)
    assert run("evaluate", tmp_path / "run", fasta=fasta) == 0
    assert "uniform over 28" in capsys.readouterr().out
    assert run("sample", tmp_path / "run", num_samples=3, output=tmp_path / "drawn.fasta") == 0


@pytest.fixture(scope="module")
def span_run(tmp_path_factory, tiny_config, tiny_fasta):
    folder = tmp_path_factory.mktemp("span") / "run"
    train(
        tiny_config,
        folder,
        tiny_fasta,
        "experiment.model_cls = @FlaxModel",
        "FlaxModel.objective = @SpanCorruption()",
        "SpanCorruption.mean_span_length = 2.0",
    )
    return folder


def test_span_corruption_is_trained_evaluated_and_fills_in(span_run, tmp_path, capsys, tiny_fasta):
    about = json.loads((span_run / "model.json").read_text())
    assert about["objective"] == {
        "name": "span_corruption",
        "noise_density": 0.15,
        "mean_span_length": 2.0,
        "num_sentinels": 100,
    }
    assert run("evaluate", span_run, fasta=tiny_fasta, seed=3) == 0
    assert "15 % of the residues are hidden, in spans of 2, chosen by seed 3" in (
        capsys.readouterr().out
    )
    assert run("info", span_run) == 0
    assert "mean_span_length=2" in capsys.readouterr().out
    exported = tmp_path / "export"
    assert run("export", span_run, output=exported) == 0
    for number, folder in enumerate((span_run, exported)):
        output = tmp_path / f"{number}.fasta"
        options = {"infill": "MKT[5]GGA**", "num_samples": 4, "output": output}
        assert run("sample", folder, **options) == 0
        for record in read_fasta(output):
            assert record.sequence[:3] == "MKT" and record.sequence[8:11] == "GGA"
            assert len(record.sequence) == 13
    assert (tmp_path / "0.fasta").read_text() == (tmp_path / "1.fasta").read_text()


def test_spans_of_a_fasta_file_are_filled_in(span_run, tmp_path, capsys):
    given, output = tmp_path / "given.fasta", tmp_path / "filled.fasta"
    given.write_text(">a\nMKT[2-4]GGA\nWY\n>b\nM***\n")
    assert run("sample", span_run, infill=given, output=output) == 0
    one, other = read_fasta(output)
    assert one.id == "a_1" and one.sequence[:3] == "MKT" and one.sequence.endswith("GGAWY")
    assert 10 <= len(one.sequence) <= 12 and len(other.sequence) == 4
    for text, message in (("MKT[A]", "'['"), ("MKT", "nothing to fill in"), ("MKT[2-", "'['")):
        given.write_text(f">a\n{text}\n")
        assert run("sample", span_run, infill=given, output=output) != 0
        assert message in capsys.readouterr().err


def test_a_model_that_fills_in_scores_and_does_not_write(span_run, tmp_path, capsys):
    fasta = write_random(tmp_path / "few.fasta", "ACDEF", 3)
    assert run("score", span_run, fasta=fasta, output=tmp_path / "scores.tsv") == 0
    assert "pseudo_log_likelihood" in (tmp_path / "scores.tsv").read_text()
    assert run("sample", span_run, output=tmp_path / "drawn.fasta") != 0
    assert "span_corruption) fills in hidden residues" in capsys.readouterr().err
