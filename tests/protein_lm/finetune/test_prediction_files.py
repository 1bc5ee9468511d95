"""Predictions are the same whether they were computed at once or in several attempts."""

import dataclasses

import numpy as np
import pytest

from fast_attention.protein_lm import FlaxLM, make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.finetune import prediction_files
from fast_attention.protein_lm.finetune.finetuned import FineTuned
from fast_attention.protein_lm.finetune.linear_head import LinearHead
from fast_attention.protein_lm.finetune.prediction_files import predict_to_file

RECORDS = [FastaRecord(f"p{i}", "", "MKTAYIAK"[i:]) for i in range(5)]


@pytest.fixture(scope="module", params=[None, ("a", "b")], ids=["regression", "classes"])
def tuned(request):
    model = FlaxLM(
        make_protein_domain(length=8), emb_dim=4, num_heads=1, qkv_dim=4, mlp_dim=4, num_layers=1
    )
    outputs = len(request.param or "1")
    rng = np.random.default_rng(0)
    shapes = ((4,), (4,), (4, outputs), (outputs,))
    head = LinearHead(*(rng.random(shape, np.float32) + 1 for shape in shapes))
    return FineTuned(model, request.param, head, "frozen", None, "")


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch):
    monkeypatch.setattr(prediction_files, "_MOST", 2)


def interrupted(number):
    yield from RECORDS[:number]
    raise KeyboardInterrupt


def test_a_stopped_call_resumes(tuned, tmp_path):
    assert predict_to_file(tuned, RECORDS, tmp_path / "whole.tsv") == (5, 0)
    output = tmp_path / "x.tsv"
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(tuned, interrupted(4), output)
    assert not output.exists()
    assert predict_to_file(tuned, RECORDS, output) == (5, 2)
    assert output.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.tsv", "x.tsv"]


def test_other_predictors_do_not_resume(tuned, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(tuned, interrupted(4), tmp_path / "x.tsv")
    other = tuned.head._replace(bias=tuned.head.bias + 1)
    with pytest.raises(RunError, match="other settings.*head"):
        predict_to_file(dataclasses.replace(tuned, head=other), RECORDS, tmp_path / "x.tsv")


def test_changed_proteins_are_predicted_again(tuned, tmp_path):
    output = tmp_path / "x.tsv"
    with pytest.raises(KeyboardInterrupt):
        predict_to_file(tuned, interrupted(4), output)
    changed = [RECORDS[0], FastaRecord("p1", "", "CCCC"), *RECORDS[2:]]
    assert predict_to_file(tuned, changed, output) == (5, 0)
    predict_to_file(tuned, changed, tmp_path / "whole.tsv")
    assert output.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
