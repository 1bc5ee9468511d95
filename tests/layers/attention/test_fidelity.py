"""What is told of layers is what `approximation_error` tells of their queries, keys and values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.diagnostics.errors import approximation_error
from fast_attention.layers import (
    AttentionConfig,
    HeadGroup,
    MultiAxisAttention,
    MultiHeadAttention,
    Stack,
    StackConfig,
    SublayerConfig,
    fidelity_sums,
    measure_fidelity,
    query_key_moments,
    summarize_fidelity,
)
from fast_attention.layers.attention.fidelity import (
    add_sums,
    chosen_rows,
    parameters_from_moments,
)
from fast_attention.layers.attention.observing import observed_copy
from fast_attention.mechanisms.local.fn import make_local_attention
from fast_attention.mechanisms.lsh.fn import make_lsh_attention
from fast_attention.softmax_attention import make_softmax_attention
from tests.layers.definitions import draw

B, T, H, K, D, M = 2, 11, 4, 2, 4, 8
X = 3 * draw(B, T, M)
MASK = np.arange(T)[None] < np.array([[T], [6]])
FAST = make_fast_softmax_attention(nb_features=6)
FIGURES = ("output", "uniform", "matrix", "effective_keys", "query_norm", "key_norm")


def layer(function=FAST, **options):
    config = AttentionConfig((HeadGroup(H, function, rotary="halves"),), D, **options)
    return MultiHeadAttention(M, config, rngs=nnx.Rngs(0))


def met(model, *args, **kwargs):
    calls = []
    observed_copy(model, calls.append)(*args, **kwargs)
    return calls


def assert_same(left, right, **tolerance):
    for a, b in zip(left, right, strict=True):
        for name in FIGURES:
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), **tolerance)


@pytest.mark.parametrize(
    ("function", "causal"),
    [
        (FAST, False),
        (FAST, True),
        (make_fast_generalized_attention(nb_features=6), False),
        (make_local_attention(3), True),
    ],
)
def test_figures_are_those_of_the_queries_keys_and_values_inside(function, causal):
    model = layer(function, num_kv_heads=K, causal=causal)
    (found,) = measure_fidelity(model, X, key_mask=MASK)
    (call,) = met(model, X, key_mask=MASK)
    assert call.query.shape == (B, T, H, D) and call.key.shape == (B, T, K, D)

    def own(q, k, v, **options):
        return function(q, k, v, **options, **call.options)

    expected = approximation_error(own, call.query, call.key, call.value, MASK, is_causal=causal)
    for name in expected._fields:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4)
    np.testing.assert_allclose(found.visible_keys, 87 / 17 if causal else (121 + 36) / 17)
    assert (found.output > 0.01).all() and (found.uniform > 0.01).all()
    assert (found.layer, found.first_head, found.causal) == (1, 1, causal)
    assert found.positions == MASK.sum() and found.attention_fn is function
    squares = (np.asarray(call.query) ** 2).sum(-1)[MASK].mean(0)
    np.testing.assert_allclose(found.query_norm, np.sqrt(squares), rtol=1e-5)
    squares = (np.asarray(call.key) ** 2).sum(-1)[MASK].mean(0).repeat(H // K)
    np.testing.assert_allclose(found.key_norm, np.sqrt(squares), rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_changes_nothing_and_batches_add_up(causal):
    model = layer(causal=causal)
    together = measure_fidelity(model, X, key_mask=MASK)
    wild = jnp.where(MASK[..., None], X, 1e3)
    assert_same(measure_fidelity(model, wild, key_mask=MASK), together, rtol=1e-5)
    parts = fidelity_sums(model, X[:1]), fidelity_sums(model, X[1:, :6])
    assert_same(summarize_fidelity(add_sums(*parts)), together, rtol=1e-4)


def test_rows_are_spread_over_what_is_no_padding():
    lengths = np.array([300, 200, 40, 0])
    rows, own = chosen_rows(jnp.arange(300)[None] < lengths[:, None])
    assert own.sum(1).tolist() == [128, 128, 40, 0]
    for length, row, counts in zip(lengths, np.asarray(rows), np.asarray(own), strict=True):
        assert len(set(row[counts])) == counts.sum() and (row[counts] < length).all()
    assert rows[0, -1] == 299 and rows[1, -1] == 199
    left, own = chosen_rows(jnp.arange(300)[None] >= 260)
    assert left[0][own[0]].tolist() == list(range(260, 300))


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"memory": 2}, {"causal": True, "memory": 2}]
)
def test_exact_attention_has_no_error(options):
    (found,) = measure_fidelity(layer(make_softmax_attention(), **options), X, key_mask=MASK)
    assert (found.output < 1e-6).all() and (found.matrix < 1e-6).all()
    assert (found.uniform > 0.01).all()
    assert found.visible_keys > found.effective_keys.max()


def test_memory_read_before_the_sequence_counts_as_keys():
    (found,) = measure_fidelity(layer(causal=True, memory=2), X, key_mask=MASK)
    np.testing.assert_allclose(found.visible_keys, 87 / 17 + 2, rtol=1e-5)
    assert (found.output > 0.01).all() and (found.matrix > 0.01).all()


def test_the_model_computes_on_and_layers_are_numbered_as_they_come():
    groups = HeadGroup(1, make_local_attention(3)), HeadGroup(2, FAST)
    block = (SublayerConfig(AttentionConfig(groups, 4)),)
    stack = Stack(StackConfig(M, (block,) * 2, remat=True), rngs=nnx.Rngs(0))
    copy = observed_copy(stack, lambda call: None)
    np.testing.assert_allclose(copy(X, key_mask=MASK), stack(X, key_mask=MASK), rtol=1e-5)
    found = measure_fidelity(stack, X)
    assert [(f.layer, f.group, f.first_head) for f in found] == [
        *((1, 0, 1), (1, 1, 2), (2, 0, 1), (2, 1, 2))
    ]
    assert [len(f.output) for f in found] == [1, 2, 1, 2]
    graphdef, state = nnx.split(stack)
    sums = jax.jit(lambda state: fidelity_sums(nnx.merge(graphdef, state), X))(state)
    assert_same(summarize_fidelity(sums), found, rtol=1e-4)


def test_several_axes_are_one():
    model = MultiAxisAttention(
        2, 4, features=M, attention_axes=(1, 2), attention_fn=FAST, rngs=nnx.Rngs(0)
    )
    x = draw(2, 3, 3, 2, M)
    (found,) = measure_fidelity(model, x, key_mask=jnp.ones((2, 3, 3, 2), bool).at[0, 2].set(False))
    assert found.positions == 36 - 6 and found.visible_keys == pytest.approx((2 * 36 + 2 * 81) / 30)


def test_hashed_layers_are_compared_with_themselves_unhashed():
    def hashed(**options):
        lsh = make_lsh_attention(bucket_size=2, n_hashes=1, **options)
        config = AttentionConfig((HeadGroup(2, lsh),), D, shared_qk=True, causal=True)
        return MultiHeadAttention(M, config, rngs=nnx.Rngs(0))

    (found,) = measure_fidelity(hashed(), X, key_mask=MASK)
    assert (found.output > 0.01).all() and (found.matrix > 0.01).all()
    (found,) = measure_fidelity(hashed(use_full_attn=True), X, key_mask=MASK)
    assert (found.output < 1e-6).all() and (found.matrix < 1e-6).all()
    with pytest.raises(ValueError, match="shares the projection"):
        measure_fidelity(hashed(), X, attention_fn=FAST)


@pytest.mark.parametrize("causal", [False, True])
def test_what_other_features_would_do_is_what_they_do_in_their_place(causal):
    exact, other = layer(make_softmax_attention(), causal=causal), draw(3, T, M)
    function = make_fast_softmax_attention(nb_features=6, estimator="wderf_s", calibration="stored")
    moments = query_key_moments(exact, other)
    parameters = parameters_from_moments(function, moments, jax.random.key(1))
    given = {"attention_fn": function, "parameters": parameters}
    (found,) = measure_fidelity(exact, X, key_mask=MASK, **given)
    (call,) = met(exact, X, key_mask=MASK)
    (own,) = parameters.values()

    def calibrated(q, k, v, **options):
        return function(q, k, v, **options, projection=own)

    expected = approximation_error(
        calibrated, call.query, call.key, call.value, MASK, is_causal=causal
    )
    for name in expected._fields:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-4)
    assert (found.output > 0.01).all()
    # What is left out is the function's own.
    (plain,) = measure_fidelity(exact, X, key_mask=MASK, attention_fn=FAST)
    expected = approximation_error(FAST, call.query, call.key, call.value, MASK, is_causal=causal)
    np.testing.assert_allclose(plain.output, expected.output, rtol=1e-4)


def test_long_matrices_are_left_out():
    (found,) = measure_fidelity(layer(), X, matrix_length=T - 1)
    assert np.isnan(found.matrix).all() and np.isnan(found.effective_keys).all()
    assert np.isfinite(found.output).all()


def test_a_model_without_attention_is_told():
    with pytest.raises(ValueError, match="no attention layers"):
        measure_fidelity(nnx.Linear(M, M, rngs=nnx.Rngs(0)), X)


def test_other_functions_are_judged_by_the_masks_they_are_given():
    config = AttentionConfig((HeadGroup(2, nnx.dot_product_attention),), D, causal=True)
    model = MultiHeadAttention(M, config, rngs=nnx.Rngs(0))
    (found,) = measure_fidelity(model, X, key_mask=MASK)
    assert (found.output < 1e-6).all() and found.positions == MASK.sum()
    cross = dataclasses.replace(config, causal=False, context="cross")
    model = MultiHeadAttention(M, cross, rngs=nnx.Rngs(0))
    (found,) = measure_fidelity(
        model, X, key_mask=MASK, context=draw(B, 5, M), context_mask=jnp.ones((B, 5), bool)
    )
    assert (found.output < 1e-6).all() and found.positions == MASK.sum()
    assert found.visible_keys == pytest.approx(5)
