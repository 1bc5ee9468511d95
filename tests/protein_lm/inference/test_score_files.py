"""A table of scores is the same whether it was written at once or in several attempts."""

import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference import partial_work, score_files
from fast_attention.protein_lm.inference.score_files import score_to_file
from fast_attention.protein_lm.modeling import token_batches
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES = {"emb_dim": 4, "num_heads": 1, "num_layers": 1, "qkv_dim": 4, "mlp_dim": 4}
RANDOM = np.random.default_rng(0)
PROTEINS = [
    FastaRecord(f"p{i}", "", "".join(RANDOM.choice(list("ACDEFGHIKL"), n)))
    for i, n in enumerate((7, 1, 9, 3, 10, 8, 2, 5))
]


@pytest.fixture(scope="module", params=[FlaxLM, FlaxBERT], ids=["causal", "masked"])
def model(request):
    return request.param(make_protein_domain(length=12), positions="none", **SIZES)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr(score_files, "_MOST", 2)


class Stopped(RuntimeError):
    pass


def stop_after(proteins):
    yield from PROTEINS[:proteins]
    raise Stopped


def score(model, path, records=PROTEINS, **options):
    return score_to_file(model, records, path, tokens_per_batch=24, **options)


def test_a_stopped_command_resumes(model, tmp_path):
    whole, path = tmp_path / "whole.tsv", tmp_path / "s.tsv"
    assert score(model, whole).computed == sum(len(record.sequence) for record in PROTEINS)
    with pytest.raises(Stopped):
        score(model, path, stop_after(5))
    assert not path.exists()
    done = score(model, path)
    assert done.computed == sum(len(record.sequence) for record in PROTEINS[4:])
    assert done._replace(computed=0) == score(model, whole)._replace(computed=0)
    assert path.read_bytes() == whole.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {"whole.tsv", "s.tsv"}


def test_damaged_parts_are_computed_again(model, tmp_path):
    whole, path = tmp_path / "whole.tsv", tmp_path / "s.tsv"
    score(model, whole)
    with pytest.raises(Stopped):
        score(model, path, stop_after(7))
    for part in ("000000.npz", "000002.npz"):
        (tmp_path / "s.tsv.partial" / part).write_bytes(b"")
    assert score(model, path).computed > 0
    assert path.read_bytes() == whole.read_bytes()


def test_other_settings_are_refused_and_another_output_is_not(model, tmp_path):
    with pytest.raises(Stopped):
        score(model, tmp_path / "s.tsv", stop_after(5))
    with pytest.raises(RunError, match="max_length: None there, 3 asked for now"):
        score(model, tmp_path / "s.tsv", max_length=3)
    assert score(model, tmp_path / "t.tsv", max_length=3).proteins == len(PROTEINS)


def test_the_longest_protein_is_named_where_memory_runs_out(model, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(token_batches, "compute_window", fail)
    with pytest.raises(RunError, match="out of memory.*'p0' with 7 residues.*--max_length"):
        score(model, tmp_path / "s.tsv")
    assert not list(tmp_path.iterdir())


def test_very_long_ids_fill_a_window(model, tmp_path, monkeypatch):
    monkeypatch.setattr(score_files, "_MOST", 1000)
    sizes = []
    digest = partial_work.window_digest
    monkeypatch.setattr(
        partial_work, "window_digest", lambda *a: sizes.append(len(a[1])) or digest(*a)
    )
    records = [FastaRecord(f"{i}" + "i" * 900_000, "", "MK") for i in range(4)]
    assert score(model, tmp_path / "s.tsv", records).proteins == 4
    assert sizes == [1] * 4
