import numpy as np
import pytest

from fast_attention.protein_lm import FastaRecord
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference.infilling import infill_proteins
from fast_attention.protein_lm.loading import load_run

PROTEINS = [FastaRecord("a", "", "MK*AYI**RQ*"), FastaRecord("b", "", "***")]


@pytest.fixture(scope="module")
def model(bert_run):
    return load_run(bert_run).model


def fill(model, proteins=PROTEINS, **options):
    return list(infill_proteins(model, proteins, **options))


def facts(record):
    return {
        name: float(value) for name, value in (p.split("=") for p in record.description.split())
    }


def naive_greedy(model, sequence):
    """One residue after the other, the surest first, and the log-probability of them all."""
    vocab = model.domain.vocab
    ids, total = vocab.encode(sequence), 0.0
    while vocab.mask in ids:
        # `logits` takes residues only: hidden ones go in by way of a batch.
        row = np.array([[*ids, vocab.eos]], np.int32)
        batch = {
            "inputs": row,
            "segment_ids": np.ones_like(row),
            "positions": np.arange(row.shape[1], dtype=np.int32)[None],
        }
        logits = np.asarray(model.logits(batch)[0], np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        residues = np.exp(logs[:, vocab.ordinary_ids])
        sureness = residues.max(-1) / residues.sum(-1)
        hidden = [place for place, token in enumerate(ids) if token == vocab.mask]
        place = max(hidden, key=lambda place: sureness[place])
        ids[place] = int(residues[place].argmax())
        total += logs[place, ids[place]]
    return vocab.decode(ids), total


def test_greedy_filling_is_one_residue_after_the_other(model):
    for record, protein in zip(fill(model, temperature=0.0), PROTEINS, strict=True):
        sequence, total = naive_greedy(model, protein.sequence)
        assert record.sequence == sequence
        assert facts(record)["fill_log_probability"] == pytest.approx(total, abs=1e-3)
        assert facts(record)["filled"] == protein.sequence.count("*")


def test_known_residues_stay_and_hidden_ones_become_residues(model):
    records = fill(model, num_samples=20, temperature=5.0, rounds=2, seed=1)
    assert [record.id for record in records[:20]] == [f"a_{i}" for i in range(1, 21)]
    for record in records[:20]:
        assert set(record.sequence) <= set("ACDEFGHIKLMNPQRSTVWYBOUXZ")
        pairs = zip(record.sequence, PROTEINS[0].sequence, strict=True)
        assert all(new == old for new, old in pairs if old != "*")
    assert len({record.sequence for record in records[:20]}) > 15


def test_a_sample_depends_on_the_seed_and_its_number(model):
    one, same, other = (fill(model, PROTEINS[:1], num_samples=3, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert fill(model, PROTEINS[:1], num_samples=2, seed=1) == one[:2]


def test_filters_hold(model):
    greedy = fill(model, temperature=0.0, rounds=1)
    assert [r.sequence for r in fill(model, top_k=1, rounds=1)] == [r.sequence for r in greedy]
    assert [r.sequence for r in fill(model, top_p=1e-6, rounds=1)] == [r.sequence for r in greedy]


@pytest.mark.parametrize(
    ("sequence", "options", "message"),
    [
        ("MKT", {}, "nothing to fill in"),
        ("MK*J", {}, "'J'"),
        ("MK*_", {}, "'_' is none of the residues"),
        ("MK[]T", {}, r"'\[' is none of the residues.*\[5\]"),
        ("MK[0]T", {}, r"the span \[0\] must have 1 residue or more"),
        ("MK[4-2]T", {}, r"the span \[4-2\]"),
        ("MK[2-4]T", {}, r"write \[4\], or take a run .* span_corruption"),
        ("MK5T", {}, "'5' is none"),
        ("*" * 65, {}, "65 residues.* room for 64"),
        ("M*", {"rounds": 0}, "rounds must be at least 1"),
        ("M*", {"num_samples": 0}, "num_samples"),
        ("M*", {"temperature": -1.0}, "temperature"),
        ("M*", {"top_p": 0.0}, "top_p"),
        ("M*", {"top_k": 0}, "top_k"),
    ],
)
def test_bad_input_is_refused(model, sequence, options, message):
    with pytest.raises(ValueError, match=message):
        infill_proteins(model, [FastaRecord("a", "", sequence)], **options)


def test_a_span_is_as_many_stars(model):
    starred, counted = (FastaRecord("a", "", text) for text in ("MK***AY**", "MK[3]AY[2]"))
    assert fill(model, [starred], seed=3) == fill(model, [counted], seed=3)


def test_a_causal_model_is_refused(lm_run):
    with pytest.raises(RunError, match="FlaxBERT"):
        infill_proteins(load_run(lm_run).model, PROTEINS)
