import numpy as np
import pytest

from fast_attention.protein_lm import FastaRecord, cli, write_fasta
from fast_attention.protein_lm.inference import embedding
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

PROTEINS = [
    FastaRecord("a", "", "MKT"),
    FastaRecord("b", "", "MKTAYIAKQR" * 5),
    FastaRecord("c", "", "ACDEFGHIKLM"),
]
SEQUENCES = [record.sequence for record in PROTEINS]


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "proteins.fasta"
    write_fasta(path, PROTEINS)
    return path


def run(folder, fasta, output, *others):
    return cli.main(
        ["embed", f"--run_dir={folder}", f"--fasta={fasta}", f"--output={output}", *others]
    )


def test_every_protein_has_a_vector(lm_run, fasta, tmp_path, capsys):
    output = tmp_path / "vectors.npz"
    assert run(lm_run, fasta, output) == 0
    with np.load(output) as file:
        assert file["ids"].tolist() == ["a", "b", "c"]
        np.testing.assert_array_equal(file["embeddings"], FlaxLM.load(lm_run).embed(SEQUENCES))
    assert "3 proteins, 64 residues, " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"vectors.npz", "proteins.fasta"}


def test_layers_and_residues_of_a_masked_model(bert_run, fasta, tmp_path):
    output = tmp_path / "vectors.npz"
    options = ["--layers", "0", "-1", "last", "--pool=none", "--dtype=float16", "--max_length=10"]
    assert run(bert_run, fasta, output, *options) == 0
    expected = FlaxBERT.load(bert_run).embed(
        SEQUENCES, layers=(0, 1, "last"), pool=None, dtype="float16", max_length=10
    )
    with np.load(output) as file:
        assert file["layers"].tolist() == ["0", "1", "last"]
        for number, vectors in enumerate(expected):
            np.testing.assert_array_equal(file[str(number)], vectors)


def test_a_stopped_command_goes_on(lm_run, fasta, tmp_path, monkeypatch, capsys):
    whole, output = tmp_path / "whole.npz", tmp_path / "vectors.npz"
    small = "--tokens_per_batch=16"
    monkeypatch.setattr(embedding, "window_batches", lambda *_: 1)
    assert run(lm_run, fasta, whole, small) == 0
    compute, calls = embedding.embed_window, []

    def stop(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return compute(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(embedding, "embed_window", stop)
        assert run(lm_run, fasta, output, small) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert not output.exists()
    assert run(lm_run, fasta, output, small, "--pool=max") == 1
    told = capsys.readouterr().err
    assert "pool: 'mean' there, 'max' asked for now" in told
    assert told.count("\n") == 1 and "\\n" not in told
    assert run(lm_run, fasta, output, small) == 0
    assert "3 residues of these had been computed" in capsys.readouterr().out
    assert output.read_bytes() == whole.read_bytes()


def test_equal_ids_are_told_or_left_out(lm_run, tmp_path, capsys):
    fasta, output = tmp_path / "twice.fasta", tmp_path / "vectors.npz"
    write_fasta(fasta, [PROTEINS[0], PROTEINS[2], PROTEINS[0]])
    assert run(lm_run, fasta, output) == 1
    assert "line 5" in capsys.readouterr().err
    assert run(lm_run, fasta, output, "--on_error=skip") == 0
    with np.load(output) as file:
        assert file["ids"].tolist() == ["a", "c"]


def test_bad_options_are_told(lm_run, fasta, tmp_path, capsys):
    assert run(lm_run, fasta, tmp_path / "v.npy") == 1
    assert ".npz, .h5" in capsys.readouterr().err
    assert run(lm_run, fasta, tmp_path / "v.npz", "--layers=7") == 1
    assert "0 (the embedding of the tokens) .. 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(lm_run, fasta, tmp_path / "v.npz", "--layers=first")
    assert "expected 'last' or a whole number from" in capsys.readouterr().err
    assert not list(tmp_path.glob("v.*"))
