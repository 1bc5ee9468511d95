"""Effects of mutations are the same whether they were computed at once or in several attempts."""

import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.data.fasta import FastaRecord
from fast_attention.protein_lm.inference import effect_files, partial_work
from fast_attention.protein_lm.inference.effect_files import score_in_parts
from fast_attention.protein_lm.inference.mutation_effects import choose_method, score_variants
from fast_attention.protein_lm.inference.mutations import all_substitutions
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM

SIZES = {"emb_dim": 4, "num_heads": 1, "num_layers": 1, "qkv_dim": 4, "mlp_dim": 4}
WILD = [FastaRecord("a", "", "MKTAY"), FastaRecord("b", "", "ACDEF")]


@pytest.fixture(scope="module", params=[FlaxLM, FlaxBERT], ids=["causal", "masked"])
def model(request):
    return request.param(make_protein_domain(length=12), positions="none", **SIZES)


def proteins(records=WILD):
    for record in records:
        yield record, all_substitutions(record.sequence)


def score(model, folder, found=None):
    with partial_work.open_work(folder / "x.tsv", {}) as work:
        method = choose_method(model)
        return list(score_in_parts(model, work, found or proteins(), method=method))


def test_parts_give_what_one_call_gives(model, tmp_path, monkeypatch):
    monkeypatch.setattr(effect_files, "_MOST_EDITS", 50)
    found = score(model, tmp_path)
    assert [part.begins for part in found] == 2 * [True, False, False, False]
    for record in WILD:
        parts = [part for part in found if part.wild_type == record]
        variants = [variant for part in parts for variant in part.variants]
        assert variants == all_substitutions(record.sequence)
        scores = score_variants(model, record.sequence, variants)
        np.testing.assert_allclose(
            np.concatenate([part.scores for part in parts]),
            np.stack(list(scores.values()), axis=-1),
            atol=1e-5,
        )


def test_only_equal_parts_are_used_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(effect_files, "_MOST_EDITS", 50)
    found = score(model, tmp_path)
    again = score(model, tmp_path)
    assert all(part.resumed for part in again)
    for one, two in zip(found, again, strict=True):
        np.testing.assert_array_equal(one.scores, two.scores)
    (tmp_path / "x.tsv.partial" / "000001.npz").write_bytes(b"")
    other = [WILD[0], FastaRecord("b", "", "ACDEG")]
    changed = score(model, tmp_path, proteins(other))
    assert [part.resumed for part in changed] == [True, False, True, True, *[False] * 4]
    np.testing.assert_array_equal(changed[1].scores, found[1].scores)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # A group ends when it has read as much as two batches.
        ("log-likelihood-ratio", [40, 40, 40, 40, 30]),
        # The 19 mutants of a position share a pass.
        ("masked-marginals", [190]),
        ("wt-marginals", [190]),
        # At least so many, as the wild type is scored once more for each group.
        ("pseudo-log-likelihood-ratio", [*[32] * 5, 30]),
    ],
)
def test_groups_take_about_the_same_time(method, expected, monkeypatch):
    monkeypatch.setattr(effect_files.token_batches, "WINDOW", 2)
    variants = all_substitutions("MKTAYIAKQR")
    groups = list(effect_files._groups(variants, 10, method, tokens_per_batch=200))
    assert [len(group) for group in groups] == expected
    assert [variant for group in groups for variant in group] == variants
