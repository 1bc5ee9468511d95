"""Effects against the definition: one protein at a time, read whole, in float64."""

import numpy as np
import pytest

from fast_attention import make_fast_softmax_attention
from fast_attention.mechanisms.local.fn import make_local_attention
from fast_attention.mechanisms.lsh.fn import make_lsh_attention
from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference.mutation_effects import (
    choose_method,
    score_variants,
)
from fast_attention.protein_lm.inference.mutations import (
    all_substitutions,
    parse_variant,
)
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.models import FlaxLM

WILD = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRV"
SUBSTITUTIONS = ["K2G", "T3W", "T3A:V40M", "Q9L:R10L:S38P", "V40A", "M1X"]
INDELS = ["K2del", "A4_I6delinsW", "V40del", "M1_K2insGGS", "R39_V40insACDEFGHIKLMNPQRSTV", "K8R"]


def variants(texts):
    return [parse_variant(text, WILD) for text in texts]


@pytest.fixture(scope="module")
def lm(lm_run):
    return load_run(lm_run).model


@pytest.fixture(scope="module")
def bert(bert_run):
    return load_run(bert_run).model


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def log_likelihoods(model, sequences):
    """Of the residues, and with the end, [N, 2]: every protein is read whole."""
    vocab = model.domain.vocab
    wanted = [[*vocab.encode(sequence), vocab.eos] for sequence in sequences]
    inputs = np.full((len(sequences), 64), vocab.pad, np.int32)
    for row, ids in zip(inputs, wanted, strict=True):
        row[: len(ids)] = [vocab.bos, *ids[:-1]]
    visible = inputs != vocab.pad
    places = np.broadcast_to(np.arange(64, dtype=np.int32), inputs.shape)
    batch = {"inputs": inputs, "segment_ids": visible.astype(np.int32), "positions": places}
    logs = log_softmax(model.logits(batch))
    found = []
    for row, ids in zip(logs, wanted, strict=True):
        terms = [row[place, token] for place, token in enumerate(ids)]
        found.append([sum(terms[:-1]), sum(terms)])
    return np.array(found)


def marginals(model, variant, hide):
    vocab = model.domain.vocab
    ids = np.array([[*vocab.encode(WILD), vocab.eos]], np.int32)
    if hide:
        ids[0, [place for place, _ in variant.substitutions]] = vocab.mask
    batch = {
        "inputs": ids,
        "segment_ids": np.ones_like(ids),
        "positions": np.arange(ids.shape[1], dtype=np.int32)[None],
    }
    logs = log_softmax(model.logits(batch)[0])
    return sum(
        logs[place, vocab.encode(new)[0]] - logs[place, vocab.encode(WILD[place])[0]]
        for place, new in variant.substitutions
    )


def check_ratios(model, some, **options):
    found = score_variants(model, WILD, some, **options)
    wild, *mutants = log_likelihoods(model, [WILD, *(variant.apply(WILD) for variant in some)])
    naive = np.array(mutants) - wild
    np.testing.assert_allclose(found["log_likelihood_ratio"], naive[:, 0], atol=2e-4)
    np.testing.assert_allclose(found["log_likelihood_ratio_with_end"], naive[:, 1], atol=2e-4)


def test_ratios_are_differences_of_whole_log_likelihoods(lm):
    check_ratios(lm, variants(SUBSTITUTIONS + INDELS))


def test_ratios_do_not_depend_on_batches_and_strides(lm):
    some = variants(SUBSTITUTIONS + INDELS[:4])
    once = score_variants(lm, WILD, some)["log_likelihood_ratio"]
    parts = score_variants(lm, WILD, some[::-1], tokens_per_batch=70)["log_likelihood_ratio"]
    np.testing.assert_allclose(parts[::-1], once, atol=1e-4)
    alone = score_variants(lm, WILD, some[1:2])["log_likelihood_ratio"]
    np.testing.assert_allclose(alone, once[1:2], atol=1e-4)


@pytest.mark.parametrize(
    "attention_fn",
    [None, make_fast_softmax_attention(nb_features=8), make_local_attention(window_size=4)],
    ids=["exact", "fast", "local"],
)
def test_every_attention_that_decodes_begins_behind_what_is_shared(attention_fn):
    check_ratios(
        untrained(attention_fn), variants(["K2G", "S20W", "V40A", "S38del"]), tokens_per_batch=42
    )


def test_attention_that_cannot_decode_reads_everything():
    model = untrained(make_lsh_attention(bucket_size=4, n_hashes=1))
    some = variants(["K2G", "V40A"])
    (found, _) = score_variants(model, WILD, some).values()
    # Where the buckets end depends on the padding, so that only equal batches are comparable.
    wild, *mutants = model.score([WILD, *(variant.apply(WILD) for variant in some)])
    naive = [mutant.log_likelihood - wild.log_likelihood for mutant in mutants]
    np.testing.assert_allclose(found, naive, atol=1e-4)


def untrained(attention_fn):
    model = FlaxLM(
        make_protein_domain(length=64),
        attention_fn=attention_fn,
        emb_dim=8,
        num_heads=2,
        num_layers=1,
        qkv_dim=8,
        mlp_dim=8,
        positions="rotary",
    )
    return model


@pytest.mark.parametrize("method", ["masked-marginals", "wt-marginals"])
def test_marginals_are_those_of_one_variant_at_a_time(bert, method):
    some = variants(SUBSTITUTIONS)
    (found,) = score_variants(bert, WILD, some, method=method, tokens_per_batch=128).values()
    hide = method == "masked-marginals"
    np.testing.assert_allclose(found, [marginals(bert, v, hide) for v in some], atol=1e-4)


def test_pseudo_log_likelihood_ratios_are_differences(bert):
    wild, short = "MKTAY", "MTAY"
    some = [parse_variant(text, wild) for text in ("K2G", "K2del")]
    found = score_variants(bert, wild, some, method="pseudo-log-likelihood-ratio")
    scores = [score.pseudo_log_likelihood for score in bert.score([wild, "MGTAY", short])]
    naive = np.array(scores[1:]) - scores[0]
    np.testing.assert_allclose(found["pseudo_log_likelihood_ratio"], naive, atol=1e-4)


def test_what_changes_nothing_scores_zero(lm, bert):
    same = variants(["A4A", "WT", "K2K:T3T"])
    methods = [(lm, None), *((bert, m) for m in ("masked-marginals", "wt-marginals"))]
    for model, method in methods:
        for values in score_variants(model, WILD, same, method=method).values():
            np.testing.assert_array_equal(values, 0)
        half = score_variants(model, WILD, variants(["A4A:K2G", "K2G"]), method=method)
        for values in half.values():
            assert values[0] == values[1] != 0


def test_all_substitutions_are_scored(lm):
    some = all_substitutions(WILD[:8])
    found = score_variants(lm, WILD[:8], some)["log_likelihood_ratio"]
    assert found.shape == (8 * 19,) and np.isfinite(found).all() and (found != 0).all()


def test_a_model_is_not_asked_for_what_it_cannot_say(lm, bert):
    assert choose_method(lm) == "log-likelihood-ratio"
    assert choose_method(bert) == "masked-marginals"
    with pytest.raises(RunError, match="use a run with the objective masked, or take log-l"):
        score_variants(lm, WILD, variants(["K2G"]), method="wt-marginals")
    with pytest.raises(RunError, match="use a run with the objective causal"):
        choose_method(bert, "log-likelihood-ratio")
    with pytest.raises(RunError, match="K2del changes the length .* use a run of FlaxLM"):
        score_variants(bert, WILD, variants(["K2G", "K2del"]))
    with pytest.raises(ValueError, match="must be one of"):
        choose_method(lm, "llr")


def test_proteins_that_do_not_fit_are_named(lm):
    with pytest.raises(ValueError, match="K2J: 'J' is none of the residues"):
        score_variants(lm, WILD, variants(["K2J"]))
    with pytest.raises(ValueError, match="M1_K2insAAA.*: 65 residues .* 64"):
        score_variants(lm, WILD, variants(["M1_K2ins" + "A" * 25]))
    with pytest.raises(ValueError, match="the wild type: 65 residues"):
        score_variants(lm, "A" * 65, [])
