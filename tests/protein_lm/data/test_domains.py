import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_attention.protein_lm.data.domains import (
    FixedLengthDiscreteDomain,
    VariableLengthDiscreteDomain,
    check_if_discrete,
    domain_to_bos,
    is_discrete,
    is_variable_length,
    make_protein_domain,
)
from fast_attention.protein_lm.data.vocabulary import ProteinVocab, Vocabulary

FIXTURE = Path(__file__).parents[2] / "data" / "fixtures" / "protein_vocabulary.json"
CASES = json.loads(FIXTURE.read_text())["vocabularies"]


def domain_of(case, length):
    names = ("bos", "eos", "pad", "mask")
    included = {f"include_{name}": case["include"].get(name, False) for name in names}
    vocab = ProteinVocab(case["include"].get("anom", False), **included)
    if case["eos_id"] is None:
        return FixedLengthDiscreteDomain(length=length, vocab=vocab)
    return VariableLengthDiscreteDomain(vocab, length)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case["include"]) or "plain")
def test_encodings_are_those_of_the_original(case):
    assert domain_to_bos(domain_of(case, 5)) == case["bos_when_absent"]
    for example in case["examples"]:
        domain = domain_of(case, example["length"])
        if "domain_encode_padded_with_eos" in example:
            encoded = domain.encode([example["sequence"]])
            assert isinstance(encoded, np.ndarray)
            assert encoded.dtype == np.int32
            assert encoded.tolist() == [example["domain_encode_padded_with_eos"]]
            decoded = example["decode_of_domain_encode_stop_at_eos"]
            assert domain.decode(encoded) == [decoded]


def test_the_default_domain_has_every_token():
    domain = make_protein_domain()
    assert (domain.vocab_size, domain.length, domain.min_length) == (29, 1024, 0)
    assert "".join(domain.vocab.tokens) == "ACDEFGHIKLMNPQRSTVWYBOUXZ<>_*"
    assert is_variable_length(domain)
    assert not is_variable_length(FixedLengthDiscreteDomain(vocab=domain.vocab, length=3))


def test_without_an_end_token_there_is_no_domain_of_proteins():
    with pytest.raises(ValueError, match="include_eos=True, or use FixedLength"):
        make_protein_domain(include_eos=False)


def test_long_sequences_are_refused_and_not_cut():
    with pytest.raises(ValueError, match="Sequence 1 has 4 tokens, more than the 3"):
        make_protein_domain(length=3).encode(["MKT", "MKTA"])


def test_one_string_is_not_taken_for_many():
    with pytest.raises(TypeError, match=r"encode\(\[sequence\]\)"):
        make_protein_domain().encode("MKT")


@given(st.lists(st.text("ACDEFGHIKLMNPQRSTVWY", max_size=6), min_size=1), st.booleans())
def test_decoding_inverts_encoding(sequences, pad):
    domain = make_protein_domain(length=6)
    encoded = domain.encode(sequences, pad=pad)
    assert domain.decode(encoded) == sequences
    assert domain.are_valid(encoded).all()


@pytest.mark.parametrize(
    ("ids", "valid"),
    [
        ([0, 1, 2], True),
        ([0, 1, 3], True),
        ([0, 3, 3, 3, 3, 3], True),
        ([0, 3, 1], False),
        ([3, 3, 3], False),
        ([0, 1, 2, 0, 1], False),
        ([0, 1, 7], False),
        ([7, 1, 2], False),
        ([[0, 1, 2]], False),
    ],
)
def test_validity_of_variable_lengths(ids, valid):
    domain = VariableLengthDiscreteDomain(Vocabulary("abc", include_eos=True), 4, min_length=1)
    assert domain.is_valid(ids) is valid


def test_every_token_must_be_valid():
    domain = FixedLengthDiscreteDomain(vocab_size=3, length=3)
    np.testing.assert_array_equal(
        domain.are_valid([[0, 1, 2], [0, 1, 3], [3, 1, 0], [0, 1]]), [True, False, False, False]
    )


@pytest.mark.parametrize("pad", [True, False])
def test_uniform_samples_are_ordinary_tokens_of_lengths_in_bounds(pad):
    domain = make_protein_domain(length=6)
    samples = domain.sample_uniformly(400, min_seq_len=2, max_seq_len=5, pad=pad, seed=0)
    assert domain.are_valid(samples).all()
    contents = domain.encode(domain.decode(samples), pad=False)
    assert {len(content) for content in contents} == {2, 3, 4, 5}
    assert set(np.concatenate(contents).tolist()) == set(domain.vocab.ordinary_ids)
    again = domain.sample_uniformly(400, min_seq_len=2, max_seq_len=5, pad=pad, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(samples, again, strict=True))


def test_uniform_samples_of_fixed_length_have_no_special_tokens():
    vocab = ProteinVocab(include_bos=True, include_pad=True, include_mask=True)
    samples = FixedLengthDiscreteDomain(length=50, vocab=vocab).sample_uniformly(40, seed=1)
    assert samples.shape == (40, 50)
    assert set(samples.ravel().tolist()) == set(vocab.ordinary_ids)


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_index_and_structure_are_inverse(vocab_size, length, data):
    domain = FixedLengthDiscreteDomain(vocab_size=vocab_size, length=length)
    index = data.draw(st.integers(0, domain.size - 1))
    structure = domain.index_to_structure(index)
    assert domain.is_valid(structure)
    assert domain.structure_to_index(structure) == index


def test_indices_are_lexicographic_and_bounded():
    domain = FixedLengthDiscreteDomain(vocab_size=3, length=2)
    assert domain.size == 9
    structures = [domain.index_to_structure(index).tolist() for index in range(9)]
    assert structures == sorted(structures)
    large = FixedLengthDiscreteDomain(vocab_size=60, length=20)
    assert large.index_to_structure(large.size - 1).tolist() == [59] * 20
    for index in (-1, 9):
        with pytest.raises(ValueError, match="0 .. 8"):
            domain.index_to_structure(index)
    with pytest.raises(ValueError, match="2 ids below 3"):
        domain.structure_to_index([0, 3])


@pytest.mark.parametrize(
    "options",
    [
        {"length": 3},
        {"length": 3, "vocab_size": 2, "vocab": Vocabulary(2)},
        {"vocab_size": 2},
        {"vocab_size": 2, "length": 0},
    ],
)
def test_fixed_domains_check_their_arguments(options):
    with pytest.raises(ValueError, match="length|exactly one"):
        FixedLengthDiscreteDomain(**options)


def test_variable_domains_check_their_arguments():
    with pytest.raises(ValueError, match="include_eos"):
        VariableLengthDiscreteDomain(Vocabulary(2), 3)
    vocab = Vocabulary(2, include_eos=True)
    with pytest.raises(ValueError, match="min_length"):
        VariableLengthDiscreteDomain(vocab, 3, min_length=4)
    with pytest.raises(ValueError, match="0 .. 5"):
        VariableLengthDiscreteDomain(vocab, 3).sample_uniformly(1, max_seq_len=5)


def test_fixed_encode_wants_the_exact_length():
    with pytest.raises(ValueError, match="VariableLengthDiscreteDomain"):
        FixedLengthDiscreteDomain(vocab=Vocabulary("ab"), length=3).encode(["ab"])


def test_discreteness():
    assert is_discrete(FixedLengthDiscreteDomain(vocab_size=2, length=1))
    check_if_discrete(make_protein_domain())
    with pytest.raises(ValueError, match="got str"):
        check_if_discrete("protein")


@pytest.mark.parametrize("length", [0, -1, 1.5, float("nan"), 10**30], ids=str)
def test_a_length_is_a_whole_number(length):
    with pytest.raises(ValueError, match="length must be a whole number from 1"):
        FixedLengthDiscreteDomain(vocab=Vocabulary("AB"), length=length)
