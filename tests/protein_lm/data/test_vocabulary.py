import json
from pathlib import Path

import numpy as np
import pytest

from fast_attention.protein_lm.data.vocabulary import ProteinVocab, Vocabulary

FIXTURE = Path(__file__).parents[2] / "data" / "fixtures" / "protein_vocabulary.json"
CASES = json.loads(FIXTURE.read_text())["vocabularies"]
FULL = {f"include_{name}": True for name in ("bos", "eos", "pad", "mask")}


def vocabulary_of(case):
    included = dict(case["include"])
    anomalous = included.pop("anom", False)
    return ProteinVocab(
        include_anomalous_amino_acids=anomalous,
        **{f"include_{name}": value for name, value in included.items()},
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case["include"]) or "plain")
def test_tokens_and_ids_are_those_of_the_original(case):
    vocab = vocabulary_of(case)
    assert list(vocab.tokens) == case["tokens_in_order"]
    assert dict(zip(vocab.tokens, vocab.token_ids, strict=True)) == case["token_to_id"]
    assert len(vocab) == case["vocab_size"]
    for name in ("bos", "eos", "pad", "mask"):
        assert getattr(vocab, name) == case[f"{name}_id"]
    for example in case["examples"]:
        assert vocab.encode(example["sequence"]) == example["ids"]
        assert vocab.decode(example["ids"]) == example["sequence"]


def test_ordinary_and_special_ids_partition_the_vocabulary():
    vocab = ProteinVocab(include_anomalous_amino_acids=True, include_align_tokens=True, **FULL)
    assert vocab.ordinary_ids + vocab.special_ids == vocab.token_ids
    assert vocab.decode(vocab.standard_ids) == "ACDEFGHIKLMNPQRSTVWY"
    assert vocab.decode(vocab.ordinary_ids) == "ACDEFGHIKLMNPQRSTVWYBOUXZ.-"
    assert vocab.decode(vocab.special_ids) == "<>_*"


def test_encode_takes_bytes_and_lists_of_tokens():
    vocab = ProteinVocab()
    assert vocab.encode(b"MKT") == vocab.encode("MKT") == vocab.encode(["M", "K", "T"])
    assert Vocabulary(12).encode(["11", "0"]) == [11, 0]


def test_decode_stops_at_the_first_end_token_when_asked():
    vocab = ProteinVocab(include_eos=True)
    ids = np.array([10, 8, vocab.eos, 16, vocab.eos])
    assert vocab.decode(ids, stop_at_eos=True) == "MK"
    assert vocab.decode(ids) == "MK>T>"
    assert vocab.decode(ids, stop_at_eos=True, as_str=False) == ["M", "K"]


def test_validity_is_membership():
    vocab = Vocabulary("abc", include_eos=True)
    assert [vocab.is_valid(value) for value in (0, 3, 4, -1, 1.5, "a", None)] == [
        True,
        True,
        *[False] * 5,
    ]
    np.testing.assert_array_equal(
        vocab.are_valid([[0, 9], [-1, 2]]), [[True, False], [False, True]]
    )


@pytest.mark.parametrize("value", [-1, 4, 99])
def test_decode_refuses_ids_it_does_not_have(value):
    with pytest.raises(KeyError, match=str(value)):
        Vocabulary("abc", include_eos=True).decode([0, value])


def test_encode_names_the_unknown_token_and_where_it_stands():
    with pytest.raises(KeyError, match="'J' at position 2"):
        ProteinVocab().encode("MKJ")
    with pytest.raises(KeyError, match="upper case"):
        ProteinVocab().encode("m")


def test_stop_at_eos_needs_an_end_token():
    with pytest.raises(ValueError, match="include_eos"):
        ProteinVocab().decode([0], stop_at_eos=True)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ("aba", {}, r"\['a'\]"),
        ("ab<", {"include_bos": True}, "'<'"),
        ("ab", {"include_bos": True, "include_eos": True, "eos_token": "<"}, "'<'"),
        ("a|", {}, "reserved"),
        ("a", {"include_pad": True, "pad_token": "|"}, "reserved"),
        ("", {"include_eos": True}, "at least one"),
        (0, {}, "at least one"),
    ],
)
def test_tokens_that_clash_are_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(tokens, **options)


def test_names_of_absent_special_tokens_do_not_clash():
    assert Vocabulary("<>").tokens == ("<", ">")
