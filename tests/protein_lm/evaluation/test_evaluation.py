import gzip
import json

import jax
import numpy as np
import pytest

from fast_attention.protein_lm import FastaRecord, read_fasta, write_fasta
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation import evaluation, groups
from fast_attention.protein_lm.evaluation.baselines import (
    BaselineScore,
    evaluate_ngram,
    fit_ngram,
    fit_ngrams,
)
from fast_attention.protein_lm.evaluation.ngrams import load_baselines
from fast_attention.protein_lm.evaluation.report import format_evaluation, format_table
from fast_attention.protein_lm.loading import load_run


@pytest.fixture(scope="module")
def lm(lm_run):
    return load_run(lm_run)


@pytest.fixture(scope="module")
def bert(bert_run):
    return load_run(bert_run)


@pytest.fixture(scope="module")
def ngrams(lm_run):
    return load_baselines(lm_run / "baselines.npz")


@pytest.fixture(scope="module")
def few(tmp_path_factory, tiny_fasta):
    """Twenty proteins, of which some are longer than the model's domain and some are shorter."""
    records = sorted(read_fasta(tiny_fasta), key=lambda record: len(record.sequence))
    path = tmp_path_factory.mktemp("few") / "few.fasta"
    write_fasta(path, records[:10] + records[-10:])
    return path


def test_every_residue_and_nothing_else_is_scored(lm, ngrams, few):
    result = evaluation.evaluate_on(lm.model, str(few), ngrams).result
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
    result = evaluation.evaluate_on(lm.model, few, ngrams).result
    cropped = tmp_path / "cropped.fasta"
    write_fasta(
        cropped,
        (FastaRecord(record.id, "", record.sequence[:64]) for record in read_fasta(few)),
    )
    tuned = fit_ngrams(tiny_fasta, valid=tiny_fasta)
    assert [ngram.weights for ngram in tuned] == [ngram.weights for ngram in ngrams]
    expected = [evaluate_ngram(ngram, cropped) for ngram in tuned]
    expected.append(BaselineScore("uniform over 26", 26.0, 1 / 26, result["residues"]))
    assert {score.num_residues for score in expected} == {result["residues"]}
    rows = {row["name"]: row for row in result["scores"][1:]}
    assert list(rows) == ["uniform over 26", "unigram", "bigram", "trigram", "5-gram"]
    for score in expected:
        assert rows[score.name]["perplexity"] == pytest.approx(score.perplexity)
        assert rows[score.name]["accuracy"] == pytest.approx(score.accuracy)


@pytest.mark.parametrize("batch_size", [7, 64])
def test_the_batch_size_does_not_matter(lm, bert, ngrams, few, batch_size):
    for model in (lm.model, bert.model):
        expected = evaluation.evaluate_on(model, few, ngrams).result
        found = evaluation.evaluate_on(model, few, ngrams, batch_size=batch_size).result
        for one, other in zip(expected["scores"], found["scores"], strict=True):
            assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)


def test_several_files_are_one(lm, ngrams, few, tmp_path):
    records = list(read_fasta(few))
    paths = [tmp_path / "one.fasta", tmp_path / "two.fasta.gz"]
    write_fasta(paths[0], records[:7])
    write_fasta(paths[1], records[7:])
    whole = evaluation.evaluate_on(lm.model, few, ngrams).result
    parts = evaluation.evaluate_on(lm.model, paths, ngrams).result
    for name in ("perplexity", "accuracy"):
        assert parts["scores"][0][name] == pytest.approx(whole["scores"][0][name], rel=1e-4)
    assert parts["fasta"] == [str(path) for path in paths]


def test_masks_come_from_the_seed(bert, ngrams, few):
    one, same, other = (
        evaluation.evaluate_on(bert.model, few, ngrams, seed=seed).result for seed in (5, 5, 6)
    )
    assert one == same
    assert one["scores"][0] != other["scores"][0]
    residues = sum(len(record.sequence[:64]) for record in read_fasta(few))
    assert 0.1 * residues < one["residues"] < 0.2 * residues
    assert [row["name"] for row in one["scores"]] == ["this model", "uniform over 25", "unigram"]


def test_the_unigram_of_masked_residues_is_that_of_the_training_proteins(bert, few, tiny_fasta):
    flat = fit_ngram(tiny_fasta, 1, alpha=1e12)
    rows = evaluation.evaluate_on(bert.model, few, [flat]).result["scores"]
    assert rows[2]["perplexity"] == pytest.approx(25, rel=1e-3)
    trained = evaluation.evaluate_on(bert.model, few, [fit_ngram(tiny_fasta, 1)]).result["scores"]
    assert 16 < trained[2]["perplexity"] < 20


def clustered_error(result, columns, clusters):
    """Of mean loss, from single proteins by the definition."""
    number = np.array(columns["residues_scored"], float)
    loss = number * np.log(columns["perplexity"])
    residual = loss - loss.sum() / number.sum() * number
    sums = [residual[[c == name for c in clusters]].sum() for name in sorted(set(clusters))]
    return np.sqrt(len(sums) / (len(sums) - 1) * np.square(sums).sum()) / number.sum()


def test_errors_are_over_proteins_or_over_components(lm, ngrams, few, tmp_path):
    ids = [record.id for record in read_fasta(few)]
    components = [str(number // 3) for number in range(len(ids))]
    table = tmp_path / "splits.tsv.gz"
    lines = ["accession\tsplit\tcomponent"]
    lines += [f"{i.split('|')[1]}\ttest\t{c}" for i, c in zip(ids, components, strict=True)]
    table.write_bytes(gzip.compress("\n".join(lines).encode()))
    plain = evaluation.evaluate_on(lm.model, few, ngrams)
    grouped = evaluation.evaluate_on(lm.model, few, ngrams, split_file=table)
    assert plain.result["errors"] == {"over": "protein", "groups": 20}
    assert grouped.result["errors"] == {"over": "component", "groups": 7}
    for found, clusters in ((plain, ids), (grouped, components)):
        row = found.result["scores"][0]
        expected = clustered_error(found.result, found.per_protein, clusters)
        assert row["perplexity_error"] == pytest.approx(row["perplexity"] * expected, rel=1e-3)
    families = grouped.result["by_family"]
    assert sum(row["proteins"] for row in families) == 20
    assert {row["family"] for row in families} == set(components)


def test_the_error_is_the_spread_of_redrawn_clusters():
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), rng.integers(1, 9, 40))
    weight = rng.integers(5, 30, len(clusters)).astype(float)
    total = weight * (1 + rng.normal(size=40)[clusters] * 0.3)
    by_cluster = [np.bincount(clusters, values) for values in (total, weight)]
    drawn = rng.integers(0, 40, (4000, 40))
    means = by_cluster[0][drawn].sum(1) / by_cluster[1][drawn].sum(1)
    assert groups.ratio_error(total, weight, clusters) == pytest.approx(means.std(), rel=0.08)
    assert groups.ratio_error(total, weight, np.zeros(len(total), int)) is None


def test_tables_of_lengths_and_families_add_up(lm, ngrams, few, tmp_path):
    ids = [record.id for record in read_fasta(few)]
    table = tmp_path / "families.csv"
    table.write_text("id,family\n" + "".join(f'{i},"a, {n % 2}"\n' for n, i in enumerate(ids)))
    result = evaluation.evaluate_on(lm.model, few, ngrams, families=table).result
    assert [row["length"] for row in result["by_length"]] == ["1-100", "201-400"]
    assert sorted(row["family"] for row in result["by_family"]) == ["a, 0", "a, 1"]
    for rows in (result["by_length"], result["by_family"]):
        assert sum(row["residues"] for row in rows) == result["residues"]
        for place, whole in enumerate(result["scores"]):
            loss = sum(row["residues"] * np.log(row["scores"][place]["perplexity"]) for row in rows)
            assert np.exp(loss / result["residues"]) == pytest.approx(whole["perplexity"])
    text = format_evaluation(result)
    assert "201-400" in text and "a, 1" in text and "over 20 proteins" in text


def test_proteins_without_a_group_are_told(lm, ngrams, few, tmp_path):
    table = tmp_path / "splits.tsv"
    table.write_text("accession\tcomponent\nP1\t1\n")
    with pytest.raises(RunError, match="20 of 20 proteins not found in") as error:
        evaluation.evaluate_on(lm.model, few, ngrams, split_file=table)
    assert next(read_fasta(few)).id in str(error.value)


def test_several_seeds_ask_for_more_residues(bert, ngrams, few):
    parts = [evaluation.evaluate_on(bert.model, few, ngrams, seed=seed).result for seed in (3, 4)]
    both = evaluation.evaluate_on(bert.model, few, ngrams, seed=3, num_seeds=2).result
    assert both["residues"] == sum(part["residues"] for part in parts)
    for place, row in enumerate(both["scores"]):
        loss = sum(part["residues"] * np.log(part["scores"][place]["perplexity"]) for part in parts)
        assert np.log(row["perplexity"]) == pytest.approx(loss / both["residues"])
    assert both["proteins"] == 20
    assert "seeds 3 to 4; of these 80 % are hidden" in format_evaluation(both)
    with pytest.raises(ValueError, match="number of seeds"):
        evaluation.evaluate_on(bert.model, few, ngrams, num_seeds=0)


def test_the_result_is_json_and_a_table(lm, ngrams, few):
    result = evaluation.evaluate_on(lm.model, few, ngrams).result
    assert json.loads(json.dumps(result)) == result
    text = format_evaluation(result)
    assert f"{result['residues']:,} residues of 20 proteins" in text
    assert "few.fasta" in text
    for row in result["scores"]:
        assert f"{row['perplexity']:.2f}" in text


def test_tables_are_aligned():
    text = format_table(("", "one"), [("long name", "1"), ("b", "123.45")])
    assert text.splitlines() == ["              one", "long name       1", "b          123.45"]
