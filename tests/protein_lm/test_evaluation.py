import json

import jax
import numpy as np
import pytest

from fast_attention.protein_lm import FastaRecord, evaluation, read_fasta, write_fasta
from fast_attention.protein_lm.baselines import baseline_scores, fit_ngram
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.report import format_evaluation, format_table


@pytest.fixture(scope="module")
def lm(lm_run):
    return load_run(lm_run)


@pytest.fixture(scope="module")
def bert(bert_run):
    return load_run(bert_run)


@pytest.fixture(scope="module")
def ngrams(lm_run):
    return evaluation.load_baselines(lm_run / "baselines.npz")


@pytest.fixture(scope="module")
def few(tmp_path_factory, tiny_fasta):
    """Twenty proteins, of which some are longer than the model's domain and some are shorter."""
    records = sorted(read_fasta(tiny_fasta), key=lambda record: len(record.sequence))
    path = tmp_path_factory.mktemp("few") / "few.fasta"
    write_fasta(path, records[:10] + records[-10:])
    return path


def test_every_residue_and_nothing_else_is_scored(lm, ngrams, few):
    result = evaluation.evaluate_on(lm.model, str(few), ngrams)
    sequences = [record.sequence[:64] for record in read_fasta(few)]
    assert min(map(len, sequences)) < 64
    assert result["residues"] == sum(map(len, sequences))
    assert (result["proteins"], result["max_residues"]) == (20, 64)

    vocab = lm.model.domain.vocab
    total = hits = 0.0
    for sequence, logits in zip(sequences, lm.model.logits(sequences), strict=True):
        ids = np.array(vocab.encode(sequence))
        log_probabilities = jax.nn.log_softmax(logits)[: len(ids)]
        total += float(np.asarray(log_probabilities)[np.arange(len(ids)), ids].sum())
        hits += float((np.asarray(logits)[: len(ids)].argmax(-1) == ids).sum())
    row = result["scores"][0]
    assert row["name"] == "this model"
    assert np.log(row["perplexity"]) == pytest.approx(-total / result["residues"], rel=1e-4)
    assert row["accuracy"] == pytest.approx(hits / result["residues"], abs=2 / result["residues"])


def test_baselines_score_the_same_residues(lm, ngrams, few, tiny_fasta, tmp_path):
    result = evaluation.evaluate_on(lm.model, few, ngrams)
    cropped = tmp_path / "cropped.fasta"
    write_fasta(
        cropped,
        (FastaRecord(record.id, "", record.sequence[:64]) for record in read_fasta(few)),
    )
    expected = baseline_scores(tiny_fasta, cropped)
    assert [score.num_residues for score in expected[2:]] == [result["residues"]] * 2
    rows = {row["name"]: row for row in result["scores"][1:]}
    assert list(rows) == ["uniform over 26", "unigram", "bigram"]
    for score in [expected[0], *expected[2:]]:
        assert rows[score.name]["perplexity"] == pytest.approx(score.perplexity)
        assert rows[score.name]["accuracy"] == pytest.approx(score.accuracy)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_the_batch_size_does_not_matter(lm, bert, ngrams, few, batch_size):
    for model in (lm.model, bert.model):
        expected = evaluation.evaluate_on(model, few, ngrams)
        found = evaluation.evaluate_on(model, few, ngrams, batch_size=batch_size)
        for one, other in zip(expected["scores"], found["scores"], strict=True):
            assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)


def test_several_files_are_one(lm, ngrams, few, tmp_path):
    records = list(read_fasta(few))
    paths = [tmp_path / "one.fasta", tmp_path / "two.fasta.gz"]
    write_fasta(paths[0], records[:7])
    write_fasta(paths[1], records[7:])
    whole = evaluation.evaluate_on(lm.model, few, ngrams)
    parts = evaluation.evaluate_on(lm.model, paths, ngrams)
    for name in ("perplexity", "accuracy"):
        assert parts["scores"][0][name] == pytest.approx(whole["scores"][0][name], rel=1e-4)
    assert parts["fasta"] == [str(path) for path in paths]


def test_masks_come_from_the_seed(bert, ngrams, few):
    one, same, other = (
        evaluation.evaluate_on(bert.model, few, ngrams, seed=seed) for seed in (5, 5, 6)
    )
    assert one == same
    assert one["scores"][0] != other["scores"][0]
    residues = sum(len(record.sequence[:64]) for record in read_fasta(few))
    assert 0.1 * residues < one["residues"] < 0.2 * residues
    assert [row["name"] for row in one["scores"]] == ["this model", "uniform over 25", "unigram"]


def test_the_unigram_of_masked_residues_is_that_of_the_training_proteins(bert, few, tiny_fasta):
    flat = fit_ngram(tiny_fasta, 1, alpha=1e12)
    rows = evaluation.evaluate_on(bert.model, few, [flat])["scores"]
    assert rows[2]["perplexity"] == pytest.approx(25, rel=1e-3)
    trained = evaluation.evaluate_on(bert.model, few, [fit_ngram(tiny_fasta, 1)])["scores"]
    assert 16 < trained[2]["perplexity"] < 20


def test_baselines_are_read_back(ngrams, tiny_fasta):
    expected = evaluation.fit_baselines(tiny_fasta)
    assert [ngram.order for ngram in ngrams] == [1, 2]
    for found, ngram in zip(ngrams, expected, strict=True):
        np.testing.assert_array_equal(found.probabilities, ngram.probabilities)


def test_the_result_is_json_and_a_table(lm, ngrams, few):
    result = evaluation.evaluate_on(lm.model, few, ngrams)
    assert json.loads(json.dumps(result)) == result
    text = format_evaluation(result)
    assert f"{result['residues']:,} residues of 20 proteins" in text
    assert "few.fasta" in text
    for row in result["scores"]:
        assert f"{row['perplexity']:.2f}" in text


def test_tables_are_aligned():
    text = format_table(("", "one"), [("long name", "1"), ("b", "123.45")])
    assert text.splitlines() == ["              one", "long name       1", "b          123.45"]
