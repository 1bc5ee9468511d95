import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fast_attention.protein_lm.data.domains import (
    FixedLengthDiscreteDomain,
    make_protein_domain,
)
from fast_attention.protein_lm.data.fasta import FastaRecord, read_fasta, write_fasta
from fast_attention.protein_lm.data.vocabulary import ProteinVocab
from fast_attention.protein_lm.modeling.objectives import Masked
from fast_attention.protein_lm.modeling.pipeline import (
    bundled_corpus,
    load_corpus,
    make_dataset,
)

FIXTURE = Path(__file__).parents[2] / "data" / "fixtures" / "protein_vocabulary.json"
DOMAIN = make_protein_domain()
VOCAB = DOMAIN.vocab
KEYS = {"inputs", "targets", "weights", "segment_ids", "positions"}
OBJECTIVES = ("causal", "masked")


@pytest.fixture(scope="module")
def tiny():
    return load_corpus(bundled_corpus("tiny"), DOMAIN)


@pytest.fixture(scope="module")
def tiny_sequences():
    return [record.sequence for record in read_fasta(bundled_corpus("tiny"))]


def fasta(path, *sequences):
    write_fasta(path, [FastaRecord(f"p{i}", "", s) for i, s in enumerate(sequences)])
    return path


def dataset(source, **options: Any):
    return make_dataset(source, DOMAIN, **{"length": 64, "batch_size": 4, "seed": 0, **options})


def take(source, number, **options):
    return list(itertools.islice(dataset(source, **options), number))


def segments(batch, key="targets"):
    """The token strings of the proteins of a batch, in order."""
    found = []
    for row in range(len(batch["inputs"])):
        ids = batch["segment_ids"][row]
        for segment in range(1, ids.max() + 1):
            found.append(VOCAB.decode(batch[key][row][ids == segment]))
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys() == KEYS
    for key in KEYS:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("pack", [True, False])
def test_batches_are_well_formed(tiny, objective, pack):
    batches = take(tiny, 5, objective=objective, pack=pack, length=512)
    assert (max(batch["segment_ids"].max() for batch in batches) > 2) == pack
    for batch in batches:
        assert batch.keys() == KEYS
        for key, array in batch.items():
            assert array.shape == (4, 512)
            assert array.dtype == (np.float32 if key == "weights" else np.int32)
        visible = batch["segment_ids"] > 0
        assert not batch["weights"][~visible].any()
        assert not batch["positions"][~visible].any()
        assert (batch["targets"][~visible] == VOCAB.pad).all()
        assert (batch["inputs"][~visible] == VOCAB.pad).all()
        # Segments are contiguous runs 1, 2, ... and then padding; positions restart with each.
        for ids, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
            runs = [(segment, len(list(run))) for segment, run in itertools.groupby(ids)]
            expected = [*range(1, ids.max() + 1)] + [0] * int(ids[-1] == 0)
            assert [segment for segment, _ in runs] == expected
            counted = [np.arange(size) * (segment > 0) for segment, size in runs]
            np.testing.assert_array_equal(positions, np.concatenate(counted))


def test_causal_inputs_are_targets_shifted_behind_bos(tiny):
    for batch in take(tiny, 5, length=512):
        np.testing.assert_array_equal(batch["weights"], batch["segment_ids"] > 0)
        targets, inputs = segments(batch), segments(batch, "inputs")
        assert [given[0] for given in inputs] == ["<"] * len(inputs)
        assert [given[1:] for given in inputs] == [target[:-1] for target in targets]


def test_masked_inputs_are_targets_but_for_some_residues(tiny):
    for batch in take(tiny, 5, objective="masked", length=512):
        asked = batch["weights"] > 0
        np.testing.assert_array_equal(batch["inputs"][~asked], batch["targets"][~asked])
        assert (batch["inputs"][asked] != batch["targets"][asked]).mean() > 0.7
        assert not np.isin(batch["targets"][asked], VOCAB.special_ids).any()
        assert (batch["inputs"] == VOCAB.mask).any()
        for segment in range(1, batch["segment_ids"].max() + 1):
            present = batch["segment_ids"] == segment
            assert (present.any(1) == (present & asked).any(1)).all()


@pytest.mark.parametrize("pack", [True, False])
def test_an_epoch_sees_every_protein_once(tiny, tiny_sequences, pack):
    seen = [
        protein
        for batch in dataset(tiny, length=320, num_epochs=1, pack=pack)
        for protein in segments(batch)
    ]
    assert sorted(seen) == sorted(f"{sequence}>" for sequence in tiny_sequences)
    twice = [
        protein
        for batch in dataset(tiny, length=320, num_epochs=2, pack=pack)
        for protein in segments(batch)
    ]
    assert sorted(twice) == sorted(2 * seen)
    assert sorted(twice[: len(seen)]) == sorted(seen)
    assert twice[len(seen) :] != twice[: len(seen)] == seen


def test_crops_are_parts_of_proteins_and_only_ends_have_eos(tiny, tiny_sequences):
    whole = {f"{sequence}>" for sequence in tiny_sequences}
    long = [protein for protein in whole if len(protein) >= 64]
    ends = 0
    for batch in take(tiny, 40):
        for piece in segments(batch):
            if len(piece) < 64:
                assert piece in whole
            else:
                assert any(piece in protein for protein in long)
                ends += piece.endswith(">")
    assert ends > 0


def test_crops_move_from_epoch_to_epoch_unless_told_otherwise(tmp_path):
    sequence = "".join(np.random.default_rng(0).choice(list("ACDEFGHIKL"), 200))
    path = fasta(tmp_path / "a", sequence)
    crops = [segments(batch) for batch in take(path, 4, batch_size=1)]
    assert len({crop for (crop,) in crops}) == 4
    (start,) = {crop for batch in take(path, 4, crop="start") for crop in segments(batch)}
    assert start == sequence[:64]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batches_depend_on_the_seed_alone(tiny, objective):
    one, same, other = (take(tiny, 3, objective=objective, seed=seed) for seed in (0, 0, 1))
    for left, right in zip(one, same, strict=True):
        assert_equal(left, right)
    assert not np.array_equal(one[0]["inputs"], other[0]["inputs"])


def test_masks_differ_between_epochs(tmp_path):
    path = fasta(tmp_path / "a", "ACDEFGHIKLMNPQRSTVWY" * 3)
    batches = take(path, 5, batch_size=1, objective="masked")
    assert len({batch["weights"].tobytes() for batch in batches}) == 5
    assert len({batch["targets"].tobytes() for batch in batches}) == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("after", [0, 1, 7, 1000])
def test_a_restored_iterator_goes_on_as_if_never_stopped(tiny, objective, after):
    iterator = iter(dataset(tiny, objective=objective))
    for _ in range(min(after, 7)):
        next(iterator)
    state = iterator.get_state()
    if after == 1000:
        state = {"next_index": after}
        iterator.set_state(state)
    state = json.loads(json.dumps(state))
    expected = [next(iterator) for _ in range(3)]
    fresh = iter(dataset(tiny, objective=objective))
    next(fresh)
    fresh.set_state(state)
    for batch in expected:
        assert_equal(next(fresh), batch)


def test_another_process_restores_the_same_batch(tiny):
    iterator = iter(dataset(tiny, objective="masked"))
    for _ in range(5):
        next(iterator)
    program = f"""
import hashlib
from fast_attention.protein_lm.modeling.pipeline import bundled_corpus, make_dataset
from fast_attention.protein_lm.data.domains import FixedLengthDiscreteDomain, make_protein_domain
iterator = iter(make_dataset(bundled_corpus("tiny"), make_protein_domain(), length=64,
                             batch_size=4, seed=0, objective="masked"))
iterator.set_state({iterator.get_state()!r})
batch = next(iterator)
print(*(int(batch[key].astype(float).dot(range(64)).dot(range(1, 5))) for key in sorted(batch)))
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    batch = next(iterator)
    expected = [
        int(batch[key].astype(float).dot(range(64)).dot(range(1, 5))) for key in sorted(batch)
    ]
    assert run.stdout.split() == list(map(str, expected))


def test_packing_leaves_little_padding(tiny):
    batches = list(dataset(tiny, length=512, batch_size=1, num_epochs=1))
    assert np.mean([(batch["segment_ids"] > 0).mean() for batch in batches]) > 0.98


def test_the_last_batch_of_a_finite_run_is_filled_with_padding(tmp_path):
    path = fasta(tmp_path / "a", "MKT", "ACD", "WYW")
    first, last = dataset(path, length=4, batch_size=2, num_epochs=1)
    assert len(segments(first)) == 2
    assert len(segments(last)) == 1
    assert not last["weights"][1].any()
    assert not last["segment_ids"][1].any()


def test_a_batch_larger_than_the_corpus_holds_several_epochs(tmp_path):
    path = fasta(tmp_path / "a", "MKT", "ACD")
    (batch,) = take(path, 1, length=4, batch_size=5)
    assert sorted(segments(batch)[:4]) == ["ACD>", "ACD>", "MKT>", "MKT>"]


def test_several_files_are_one_corpus(tmp_path):
    paths = [fasta(tmp_path / "a", "MKT"), fasta(tmp_path / "b.gz", "ACD")]
    (batch,) = dataset(paths, num_epochs=1)
    assert sorted(segments(batch)) == ["ACD>", "MKT>"]


def test_rows_are_those_of_the_original_but_with_an_end(tmp_path):
    (full, *_) = json.loads(FIXTURE.read_text())["vocabularies"]
    for example in full["examples"]:
        path = fasta(tmp_path / "a", example["sequence"])
        length = example["length"]
        (batch,) = dataset(
            path, length=length, batch_size=1, num_epochs=1, crop="start", pack=False
        )
        row = example["batch_row_cropped_to_prefix_then_padded_with_pad"]
        with_end = example["packing_form_with_eos"][:length]
        expected = with_end + row[len(with_end) :]
        assert batch["targets"].tolist() == [expected]
        shifted = example["decoder_input_after_right_shift_with_bos"][:length]
        assert batch["inputs"][0, : len(shifted)].tolist() == shifted
        assert load_corpus(path, DOMAIN).tokens.tolist() == example["packing_form_with_eos"]


def test_other_vocabularies(tmp_path):
    path = fasta(tmp_path / "a", "MKT")
    plain = make_protein_domain(False, False, True, False, False)
    (batch,) = make_dataset(path, plain, length=6, batch_size=1, seed=0, num_epochs=1)
    eos, fresh = plain.vocab.eos, plain.vocab_size
    assert batch["inputs"].tolist() == [[fresh, 10, 8, 16, eos, eos]]
    assert batch["targets"].tolist() == [[10, 8, 16, eos, eos, eos]]
    assert batch["weights"].tolist() == [[1, 1, 1, 1, 0, 0]]
    endless = FixedLengthDiscreteDomain(vocab=ProteinVocab(include_bos=True), length=4)
    (batch,) = make_dataset(path, endless, length=4, batch_size=1, seed=0, num_epochs=1)
    assert batch["targets"].tolist() == [[10, 8, 16, 0]]
    assert batch["weights"].tolist() == [[1, 1, 1, 0]]


def test_masking_shares_reach_the_masks(tiny):
    shares = Masked(mask_rate=1.0, mask_token_proportion=1.0, random_token_proportion=0.0)
    (batch,) = take(tiny, 1, objective=shares)
    assert set("".join(segments(batch, "inputs"))) <= {"*", ">"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": "bert"},
            "objective must be one of causal, masked, span_corruption, but got 'bert'",
        ),
        ({"length": 0}, "length must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"crop": "end"}, "crop must be one of random, start"),
        ({"num_epochs": 0}, "num_epochs must be at least 1"),
    ],
)
def test_arguments_are_checked_at_once(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        dataset(tiny, **options)


def test_masks_need_a_mask_token(tiny):
    maskless = make_protein_domain(include_mask=False)
    with pytest.raises(ValueError, match="include_mask=True"):
        make_dataset(tiny, maskless, length=8, batch_size=1, seed=0, objective="masked")
