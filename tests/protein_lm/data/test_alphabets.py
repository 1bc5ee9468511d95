"""Readers, n-grams and reports take their symbols from the vocabulary, whatever it is."""

import numpy as np
import pytest

from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.alphabets import ALPHABETS
from fast_attention.protein_lm.data.corpus import load_corpus
from fast_attention.protein_lm.data.domains import (
    FixedLengthDiscreteDomain,
    VariableLengthDiscreteDomain,
    make_protein_domain,
)
from fast_attention.protein_lm.data.fasta import (
    FastaError,
    FastaRecord,
    read_fasta,
    write_fasta,
)
from fast_attention.protein_lm.data.vocabulary import ProteinVocab, Vocabulary
from fast_attention.protein_lm.evaluation.baselines import (
    evaluate_ngram,
    fit_ngram,
    fit_ngrams,
    ngram_sums,
)
from fast_attention.protein_lm.evaluation.ngrams import (
    Outcomes,
    load_baselines,
    save_baselines,
)
from fast_attention.protein_lm.modeling.batches import as_corpus, crop, select
from fast_attention.protein_lm.modeling.objectives import Masked
from fast_attention.protein_lm.modeling.pipeline import eval_batches, make_dataset

SIZES = (2, 255, 256, 257, 300, 65536, 70000)


def domain_of(size):
    return FixedLengthDiscreteDomain(vocab=Vocabulary(size, include_bos=True), length=4)


def aligned(length=20):
    vocab = ProteinVocab(
        include_align_tokens=True, include_bos=True, include_eos=True, include_pad=True
    )
    return VariableLengthDiscreteDomain(vocab, length)


def nucleotides(length=20):
    return make_protein_domain(alphabet="nucleotide", length=length)


def esm(length=20):
    return make_protein_domain(alphabet="esm", length=length)


@pytest.mark.parametrize("size", SIZES)
def test_ids_pass_unchanged_through_corpus_rows_and_batches(size):
    rows = np.array([[0, 1, size - 1, size // 2], [size - 1, size - 1, 0, 1]])
    domain = domain_of(size)
    corpus = as_corpus(rows, domain)
    np.testing.assert_array_equal(corpus.tokens, rows.reshape(-1))
    np.testing.assert_array_equal(select(corpus, [1, 0]).tokens, rows[::-1].reshape(-1))
    np.testing.assert_array_equal(crop(corpus, 2).tokens, rows[:, :2].reshape(-1))
    (batch,) = eval_batches(corpus, domain, length=4, batch_size=2)
    np.testing.assert_array_equal(batch["targets"], rows)
    np.testing.assert_array_equal(batch["inputs"][:, 0], [size, size])
    dataset = make_dataset(
        corpus, domain, length=8, batch_size=1, seed=0, shuffle=False, num_epochs=1
    )
    (packed,) = list(dataset)
    np.testing.assert_array_equal(packed["targets"], rows.reshape(1, -1))


@pytest.mark.parametrize("bad", [300, 301, -1, 2**32, 2**32 + 5, 1.5])
def test_what_is_no_id_of_the_vocabulary_is_refused(bad):
    with pytest.raises(ValueError, match="sequence 0 must be one or more ids .* 0 .. 299"):
        as_corpus([[1, bad, 2]], domain_of(300))


def test_fasta_of_a_large_vocabulary_keeps_its_ids(tmp_path):
    tokens = [*map(str, range(400)), *"ACGT"]
    tokens = [token for token in tokens if len(token) > 1 or token in "ACGT"]
    domain = VariableLengthDiscreteDomain(Vocabulary(tokens, include_eos=True), length=8)
    write_fasta(tmp_path / "a.fasta", [FastaRecord("a", "", "GATTACA")])
    corpus = load_corpus(tmp_path / "a.fasta", domain)
    assert domain.vocab.decode(corpus.tokens) == "GATTACA>"
    assert corpus.offsets.tolist() == [0, 8]


def test_gaps_are_residues_of_an_aligned_vocabulary(tmp_path):
    path = tmp_path / "aligned.fasta"
    records = [FastaRecord("a", "", "MK-TA."), FastaRecord("b", "", "..MKV-")]
    write_fasta(path, records)
    domain = aligned()
    corpus = load_corpus(path, domain)
    assert domain.vocab.decode(corpus.tokens) == "MK-TA.>..MKV->"
    assert list(read_fasta(path, alphabet=domain.vocab)) == records
    with pytest.raises(FastaError, match=r"symbol '-'.*aligned_protein"):
        load_corpus(path, make_protein_domain())
    path.write_text(">a\nMJ-T\n")
    assert [
        r.sequence for r in read_fasta(path, alphabet=Vocabulary("MTX-"), on_error="replace")
    ] == ["MX-T"]


def test_a_vocabulary_that_no_fasta_file_can_hold_is_refused(tmp_path):
    write_fasta(tmp_path / "a.fasta", [FastaRecord("a", "", "MK")])
    with pytest.raises(ValueError, match="no ordinary token of the vocabulary"):
        load_corpus(tmp_path / "a.fasta", domain_of(1).__class__(vocab=Vocabulary("ab"), length=2))


def test_every_registered_alphabet_reads_its_letters_and_keeps_special_tokens_apart(tmp_path):
    for name, alphabet in ALPHABETS.items():
        domain = make_protein_domain(alphabet=name, length=50)
        assert domain.vocab == alphabet
        write_fasta(tmp_path / "a.fasta", [FastaRecord("a", "", "".join(alphabet.letters))])
        (batch,) = eval_batches(tmp_path / "a.fasta", domain, length=50, batch_size=1)
        targets = batch["targets"][0]
        assert alphabet.decode(targets, stop_at_eos=True) == "".join(alphabet.letters)
        assert batch["inputs"][0, 0] == alphabet.bos
        assert alphabet.are_ordinary(targets).sum() == len(alphabet.letters)
        assert not alphabet.are_ordinary(alphabet.special_ids).any()
        assert [alphabet.tokens[i] for i in alphabet.ordinary_ids] == list(alphabet.letters)


def test_tokens_of_esm_have_the_ids_of_its_models():
    expected = {"<cls>": 0, "<pad>": 1, "<eos>": 2, "L": 4, "C": 23, "O": 28, "-": 30, "<mask>": 32}
    ids = ALPHABETS["esm"].ids
    assert len(ids) == 33 and {token: ids[token] for token in expected} == expected
    assert set(ALPHABETS["esm"].standard_symbols) == set(ALPHABETS["protein"].standard_symbols)


def test_corruption_gives_residues_of_the_alphabet_wherever_their_ids_are():
    domain = esm(200)
    corpus = as_corpus(["MKT-X" * 39] * 8, domain)
    objective = Masked(0.5, 0.0, 1.0)
    (batch,) = eval_batches(corpus, domain, length=200, batch_size=8, objective=objective)
    asked = batch["weights"] > 0
    assert set(batch["inputs"][asked].tolist()) == set(domain.vocab.standard_ids)
    np.testing.assert_array_equal(batch["inputs"][~asked], batch["targets"][~asked])


def test_an_unknown_letter_is_that_of_the_alphabet(tmp_path):
    path = tmp_path / "rna.fasta"
    path.write_text(">a\nACGUu\n")
    vocab = nucleotides().vocab
    with pytest.raises(FastaError, match="'U'.*read it as N"):
        list(read_fasta(path, alphabet=vocab))
    (record,) = read_fasta(path, alphabet=vocab, on_error="replace")
    assert record.sequence == "ACGNN"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rare": "A", "gaps": "A"}, "different tokens"),
        ({"unknown": "X"}, "different tokens"),
        ({"eos_token": "G"}, "different tokens"),
        ({"rare": "ACD"}, "at least one"),
        ({"longest": 0}, "longest"),
    ],
)
def test_tokens_with_two_meanings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Alphabet("ACD", **fields)
    with pytest.raises(ValueError, match="one of protein, .*got 'dna'"):
        make_protein_domain(alphabet="dna")


@pytest.mark.parametrize(
    ("domain", "sequences", "number"),
    [
        (domain_of(2), [[0, 1], [1, 0]], 2),
        (nucleotides(), ["ACGT", "TGCN"], 16),
        (esm(), ["MK-T", "LAGX"], 28),
        (aligned(), ["MK-T", "M.KT"], 23),
        (make_protein_domain(), ["MKTX", "MKV"], 26),
        (make_protein_domain(include_anomalous_amino_acids=False), ["MKT", "MKV"], 21),
    ],
    ids=["two", "nucleotides", "esm", "aligned", "protein", "standard"],
)
def test_ngrams_spread_over_the_outcomes_of_the_vocabulary(domain, sequences, number, tmp_path):
    corpus = as_corpus(sequences, domain)
    flat = fit_ngram(corpus, 1, alpha=1e12)
    assert evaluate_ngram(flat, corpus).perplexity == pytest.approx(number)
    for ngram in fit_ngrams(corpus, (1, 2, 3)):
        contexts = np.arange(min(ngram.outcomes.base ** (ngram.order - 1), 1000))
        np.testing.assert_allclose(ngram.predict(contexts).sum(-1), 1)
        save_baselines(tmp_path / "ngrams.npz", [ngram])
        (read,) = load_baselines(tmp_path / "ngrams.npz")
        assert evaluate_ngram(read, corpus) == evaluate_ngram(ngram, corpus)


def test_two_tokens_each_half_of_the_time_have_perplexity_two():
    corpus = as_corpus(np.array([[0, 1], [1, 0]]), domain_of(2))
    assert evaluate_ngram(fit_ngram(corpus, 1), corpus).perplexity == pytest.approx(2)


def test_many_tokens_are_counted_as_few_are():
    """Names of tokens do not matter: 3 of 70,000 tokens that occur are counted like 3 of 3."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (20, 4))
    names = np.array([5, 40000, 69999])
    small, large = as_corpus(rows, domain_of(3)), as_corpus(names[rows], domain_of(70000))
    one, other = fit_ngram(small, 3, alpha=1.0), fit_ngram(large, 3, alpha=3 / 70000)
    spread = one.counts.keys[:, None] // 4 ** np.arange(3) % 4
    digits = np.append(names, 70000)[spread]
    np.testing.assert_array_equal(other.counts.keys, digits @ 70001 ** np.arange(3))
    np.testing.assert_array_equal(other.counts.counts, one.counts.counts)
    assert ngram_sums(other, large).residues.sum() == 80
    assert [ngram.order for ngram in fit_ngrams(large)] == [1, 2, 3]
    with pytest.raises(ValueError, match="an order of at most 3"):
        fit_ngram(large, 5)


def test_ngrams_of_another_vocabulary_are_refused():
    ngram = fit_ngram(as_corpus(["ACGT"], nucleotides()), 2)
    with pytest.raises(ValueError, match="over 16 outcomes, but .* has 26"):
        evaluate_ngram(ngram, as_corpus(["ACDEF"], make_protein_domain()))


def test_outcomes_of_the_protein_vocabulary():
    outcomes = Outcomes.of(make_protein_domain().vocab)
    assert (outcomes.base, outcomes.number, outcomes.begin) == (27, 26, 25)
