import re

import numpy as np
import pytest

from fast_attention.protein_lm.data.corpus import bundled_corpus, load_corpus
from fast_attention.protein_lm.data.domains import make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaRecord, write_fasta
from fast_attention.protein_lm.evaluation import baselines
from fast_attention.protein_lm.evaluation.baselines import (
    evaluate_ngram,
    fit_ngram,
    fit_ngrams,
    ngram_sums,
    tune_back_off,
)
from fast_attention.protein_lm.evaluation.ngrams import load_baselines, save_baselines

LETTERS = "ACDEFGHIKLMNPQRSTVWYBOUXZ"


def fasta(path, *sequences):
    write_fasta(path, [FastaRecord(f"p{i}", "", s) for i, s in enumerate(sequences)])
    return path


@pytest.fixture(scope="module")
def train():
    return load_corpus(bundled_corpus("train"), make_protein_domain())


def test_proteins_are_scored_in_parts_of_bounded_size(monkeypatch):
    some = load_corpus(bundled_corpus("tiny"), make_protein_domain())
    model = fit_ngram(some, 3)
    whole = ngram_sums(model, some)
    sizes, contexts = [], baselines._contexts_and_tokens

    def count(corpus, order):
        sizes.append(len(corpus.tokens))
        return contexts(corpus, order)

    monkeypatch.setattr(baselines, "_contexts_and_tokens", count)
    monkeypatch.setattr(baselines, "_TOKENS_AT_ONCE", 5000)
    for one, two in zip(whole, ngram_sums(model, some), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)
    assert sum(sizes) == len(some.tokens) and max(sizes) <= 5000


def probabilities(ngram):
    """After every context."""
    return ngram.predict(np.arange(27 ** (ngram.order - 1)))


def table_of_readme(split):
    readme = (bundled_corpus("train").parent / "README.md").read_text()
    cells = re.findall(rf"^\| `{split}` \|(.*)\|$", readme, re.M)[0].split("|")
    orders = dict(zip([1, 2, 3, 5], cells[2:], strict=True))
    return int(cells[0].replace(",", "")), orders


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_table_of_the_corpus_is_reproduced_to_its_digits(train, split):
    number, cells = table_of_readme(split)
    proteins = load_corpus(bundled_corpus(split), make_protein_domain())
    names = []
    for ngram in fit_ngrams(train):
        score = evaluate_ngram(ngram, proteins)
        told = f"{score.perplexity:.2f}, {100 * score.accuracy:.2f} %"
        assert told == cells[ngram.order].strip()
        assert score.num_residues == number
        names.append(score.name)
    assert names == ["unigram", "bigram", "trigram", "5-gram"]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_and_bos_is_never_next(tmp_path, order):
    model = fit_ngram(fasta(tmp_path / "a", "MKTAYIAK", "MX"), order)
    found = probabilities(model)
    assert found.shape == (27 ** (order - 1), 27)
    np.testing.assert_allclose(found.sum(-1), 1)
    assert not found[:, 25].any()
    assert (np.delete(found, 25, axis=1) > 0).all()


def test_the_unigram_is_laplace_smoothed_frequency(tmp_path):
    path = fasta(tmp_path / "a", "AAC", "D")
    model = fit_ngram(path, 1, alpha=0.5)
    counts = dict.fromkeys(LETTERS, 0) | {"A": 2, "C": 1, "D": 1, "end": 2}
    expected = [(count + 0.5) / (6 + 13) for count in counts.values()]
    np.testing.assert_allclose(np.delete(probabilities(model)[0], 25), expected)
    score = evaluate_ngram(model, path)
    mean = np.log([2.5 / 19, 2.5 / 19, 1.5 / 19, 1.5 / 19]).mean()
    assert score.perplexity == pytest.approx(np.exp(-mean))
    assert score.accuracy == 2 / 4
    assert score.num_residues == 4


def count(sequences, context, token):
    """Occurrences by brute force; '<' stands before and '>' after every sequence."""
    total = 0
    for sequence in sequences:
        text = "<" * 5 + sequence + ">"
        total += sum(
            text[end - len(context) : end] == context and token in (None, text[end])
            for end in range(5, len(text))
        )
    return total


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ngrams_follow_the_recursion(tmp_path, order):
    train = ["ACAACD", "CA", "DDAC"]
    test = ["ACD", "WA"]
    weights = (2.0, 3.0, 0.7)[: order - 1]

    def probability(context, token):
        if len(context) == 0:
            back, weight = 1 / 26, 26
        else:
            back, weight = probability(context[1:], token), weights[len(context) - 1]
        seen, total = count(train, context, token), count(train, context, None)
        return (seen + weight * back) / (total + weight)

    logs, hits = [], []
    for sequence in test:
        text = "<" * (order - 1) + sequence
        for end in range(order - 1, len(text)):
            context = text[end - order + 1 : end]
            logs.append(np.log(probability(context, text[end])))
            best = max(LETTERS, key=lambda token: probability(context, token))  # noqa: B023
            hits.append(best == text[end])
    model = fit_ngram(fasta(tmp_path / "a", *train), order, back_off=weights)
    score = evaluate_ngram(model, fasta(tmp_path / "b", *test))
    assert score.perplexity == pytest.approx(np.exp(-np.mean(logs)))
    assert score.accuracy == pytest.approx(np.mean(hits))
    assert score.num_residues == 5


def test_only_the_first_1022_residues_count(tmp_path):
    model = fit_ngram(fasta(tmp_path / "a", "A" * 1022 + "C" * 50), 1)
    expected = np.full(26, 1 / 1048)
    expected[0] = 1023 / 1048
    np.testing.assert_allclose(np.delete(probabilities(model)[0], 25), expected)
    for size, number in ((1021, 1021), (1022, 1022), (1023, 1022), (2000, 1022)):
        score = evaluate_ngram(model, fasta(tmp_path / "b", "A" * size))
        assert score.num_residues == number
    assert probabilities(fit_ngram(fasta(tmp_path / "a", "A" * 1022), 1))[0, 26] == 2 / 1049


def test_the_end_is_never_guessed_for_a_residue(tmp_path):
    model = fit_ngram(fasta(tmp_path / "a", "MA", "MA", "MA"), 2)
    assert probabilities(model)[0].argmax() == 26
    assert evaluate_ngram(model, fasta(tmp_path / "b", "MAA")).accuracy == 1


def test_longer_contexts_help_where_there_is_something_to_learn(tmp_path):
    path = fasta(tmp_path / "a", "ACD" * 100, "CDA" * 100)
    first, second = (
        evaluate_ngram(fit_ngram(path, order, back_off=back_off), path)
        for order, back_off in ((1, ()), (2, (0.5,)))
    )
    assert second.perplexity < 1.2 < first.perplexity
    assert second.accuracy > 0.99


def test_sums_of_each_protein_are_those_of_the_protein_alone(tmp_path):
    model = fit_ngram(fasta(tmp_path / "a", "MKTAYIAK", "MKV"), 3)
    sequences = ["MKTW", "A", "KTAYMKTAY"]
    domain = make_protein_domain()
    whole = ngram_sums(model, load_corpus(fasta(tmp_path / "b", *sequences), domain))
    for number, sequence in enumerate(sequences):
        alone = ngram_sums(model, load_corpus(fasta(tmp_path / "c", sequence), domain))
        for found, expected in zip(whole, alone, strict=True):
            assert found[number] == pytest.approx(expected[0])
    assert whole.residues.tolist() == [4, 1, 9]


def test_counting_once_gives_the_ngrams_of_every_order(tmp_path):
    path = fasta(tmp_path / "a", "MKTAYIAKMKT", "MX", "A" * 7)
    for ngram in fit_ngrams(path, (1, 2, 4)):
        alone = fit_ngram(path, ngram.order)
        assert ngram.weights == alone.weights
        for found, expected in zip(ngram.counts, alone.counts, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_weights_are_tuned_on_other_proteins(tmp_path, train):
    (default,) = fit_ngrams(train, (3,))
    (tuned,) = fit_ngrams(train, (3,), valid=bundled_corpus("valid"))
    assert tuned.weights[0] == default.weights[0]
    scores = [evaluate_ngram(ngram, bundled_corpus("valid")) for ngram in (default, tuned)]
    # The defaults were chosen on the same proteins.
    assert scores[1].perplexity == pytest.approx(scores[0].perplexity, rel=3e-4)
    # What repeats itself trusts long contexts, and what is of another kind does not.
    regular, other = fasta(tmp_path / "a", "ACDEF" * 20), fasta(tmp_path / "b", "FDACE" * 20)
    ngram = fit_ngram(regular, 2, back_off=(1.0,))
    assert tune_back_off(ngram, regular).weights[1] < 0.1
    assert tune_back_off(ngram, other).weights[1] > 10


def test_baselines_are_read_back(tmp_path):
    fitted = fit_ngrams(fasta(tmp_path / "a", "MKTAYIAKMKT", "MX"), (1, 2, 5))
    save_baselines(tmp_path / "baselines.npz", fitted)
    found = load_baselines(tmp_path / "baselines.npz")
    assert [ngram.order for ngram in found] == [1, 2, 5]
    contexts = np.array([0, 25, 26])
    for one, other in zip(found, fitted, strict=True):
        contexts %= 27 ** (one.order - 1)
        np.testing.assert_array_equal(one.predict(contexts), other.predict(contexts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 0}, "order must be in 1 .. 5"),
        ({"order": 6}, "order must be in 1 .. 5"),
        ({"order": 1, "alpha": 0}, "positive"),
        ({"order": 2, "back_off": ()}, "1 back-off weights"),
        ({"order": 3, "back_off": (1, -1)}, "positive"),
    ],
)
def test_arguments_are_checked(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit_ngram(fasta(tmp_path / "a", "MK"), **options)
