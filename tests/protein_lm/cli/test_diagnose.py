"""``protein-lm diagnose``: what it prints and writes is what layers tell of themselves."""

import csv
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.layers import measure_fidelity
from fast_attention.protein_lm import FlaxLM, cli
from fast_attention.protein_lm.data.domains import make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaRecord, write_fasta
from fast_attention.protein_lm.evaluation.diagnosis import (
    Features,
    diagnose,
    spread_evenly,
)
from fast_attention.protein_lm.evaluation.diagnosis_report import format_diagnosis

PROTEINS = ["MKTAYIAKQRQISFVKSH", "MALWMRLLPLLALLAL", "MGDVEKGKKIFIM", "MSKGEELFTGVVPIL"]
TINY = {"emb_dim": 16, "num_heads": 2, "num_layers": 1, "qkv_dim": 16, "mlp_dim": 16}


@pytest.fixture
def fasta(tmp_path) -> str:
    path = tmp_path / "some.fasta"
    write_fasta(path, [FastaRecord(f"p{i}", "", x) for i, x in enumerate(PROTEINS)])
    return str(path)


def diagnosed(run, fasta, *options):
    return cli.main(["diagnose", f"--run_dir={run}", f"--fasta={fasta}", *options])


def test_the_table_is_what_layers_tell_and_padding_does_not_count(lm_run, fasta, tmp_path, capsys):
    output = tmp_path / "found.tsv"
    assert diagnosed(lm_run, fasta, f"--output={output}", "--max_proteins=2") == 0
    printed = capsys.readouterr().out
    with open(output) as stream:
        heads = list(csv.DictReader(stream, delimiter="\t"))
    assert [(row["layer"], row["head"], row["attention"]) for row in heads] == [
        ("1", "1", "features"),
        ("1", "2", "features"),
    ]
    # The first and the last protein, one by one and without padding.
    model = FlaxLM.load(lm_run)
    module = nnx.merge(model.graphdef, model.weights, model.state.variables)
    parts = []
    for protein in (PROTEINS[0], PROTEINS[-1]):
        tokens = [model.domain.vocab.bos, *map(model.domain.vocab.tokens.index, protein)]
        parts.append((len(tokens), measure_fidelity(module, jnp.asarray([tokens]))[0]))
    positions = sum(length for length, _ in parts)
    assert f"{positions} positions of 2 proteins" in printed
    norms = np.sqrt(sum(length * part.query_norm**2 for length, part in parts) / positions)
    assert (
        re.search(rf"  1     1  features .* {norms[0]:.2f} +\d", printed) and "|q|^2" not in printed
    )
    np.testing.assert_allclose([float(row["query_norm"]) for row in heads], norms, rtol=1e-4)
    keys = sum(length * part.effective_keys for length, part in parts) / positions
    np.testing.assert_allclose([float(row["effective_keys"]) for row in heads], keys, rtol=1e-4)
    errors = np.array([float(row["error"]) for row in heads])
    low, high = (f([part.output for _, part in parts], axis=0) for f in (np.min, np.max))
    assert (low <= errors).all() and (errors <= high).all() and (errors > 0.01).all()
    assert f"{errors[0]:.3f}" in printed and "heads are no better than uniform" in printed


def test_features_are_judged_in_place_of_the_models_own(lm_run, fasta, tmp_path, capsys):
    output, picture = tmp_path / "found.json", tmp_path / "found.png"
    options = ["--nb_features=8", "--target_error=0.9", f"--output={output}", f"--plot={picture}"]
    assert diagnosed(lm_run, fasta, *options, "--head=2") == 0
    printed = capsys.readouterr().out
    assert "wderf_s, 8 features; calibrated on 2 other proteins" in printed
    found = json.loads(output.read_text())
    assert found["summary"]["proteins"] == found["summary"]["calibrated_on"] == 2
    assert found["target_error"] == 0.9 and found["heads"][0]["features"] >= 16
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_features_are_calibrated_on_none_of_the_proteins_they_are_judged_on(lm_run):
    model = FlaxLM.load(lm_run)
    features = Features(nb_features=8)
    first = diagnose(model, PROTEINS, features=features)
    others = [PROTEINS[0][::-1], PROTEINS[1], PROTEINS[2][::-1], PROTEINS[3]]
    second = diagnose(model, others, features=features)
    for a, b in zip(*(jax.tree.leaves(x.parameters) for x in (first, second)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first.layers[0].output != second.layers[0].output).all()
    with pytest.raises(ValueError, match="needs 2 or more proteins, but there is 1"):
        diagnose(model, PROTEINS[:1], features=features)


def test_a_masked_model_takes_parameters_from_each_protein(bert_run, fasta, capsys):
    assert diagnosed(bert_run, fasta, "--exact_window=2", "--nb_features=8") == 0
    printed = capsys.readouterr().out
    assert "of 4 proteins" in printed and "exact within 2 residues" in printed
    assert "calibrated" not in printed


def test_exact_attention_has_no_error_and_is_told_what_to_ask():
    model = FlaxLM(make_protein_domain(length=32), **TINY)
    found = diagnose(model, PROTEINS[:2])
    assert (found.layers[0].output < 1e-6).all() and (found.layers[0].uniform > 0).all()
    text = format_diagnosis(found)
    assert "exact" in text and "--nb_features=256" in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--estimator=best"], "wderf_s"),
        (["--layer=9"], "layers 1 to 1"),
        (["--output=figures.txt"], ".json"),
        (["--output=missing/figures.tsv"], "folder does not exist"),
    ],
)
def test_what_cannot_be_is_told(lm_run, fasta, capsys, options, told):
    assert diagnosed(lm_run, fasta, *options) == 1
    assert told in capsys.readouterr().err


def test_a_stream_is_thinned_evenly():
    assert spread_evenly(iter(range(5)), 8) == [0, 1, 2, 3, 4]
    chosen = spread_evenly(iter(range(1000)), 10)
    assert len(chosen) == 10 and chosen[0] == 0 and chosen[-1] > 900
    gaps = np.diff(chosen)
    assert gaps.min() > 60 and gaps.max() < 150
