import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_attention.models import samplers

FIXTURE = Path(__file__).parents[1] / "data" / "fixtures" / "protein_sampling_filters.npz"
DTYPES = (jnp.float32, jnp.bfloat16)


@pytest.fixture(scope="module")
def case():
    with np.load(FIXTURE) as archive:
        arrays = {name: archive[name] for name in archive.files if name != "meta"}
        return arrays, json.loads(str(archive["meta"]))["kwargs"]


def logits_of(seed=0, shape=(3, 11), dtype=jnp.float32):
    return 3 * jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_filtered_close(actual, expected):
    """The original marks a removed token by -1e12, not by -inf."""
    removed = expected < -1e11
    np.testing.assert_array_equal(np.isneginf(actual), removed)
    np.testing.assert_allclose(actual[~removed], expected[~removed], rtol=1e-5, atol=1e-5)


def window(arrays, kwargs):
    end = kwargs["i"] + 1
    start = max(0, end - kwargs["repetition_window"])
    return jnp.asarray(arrays["input/sequences"][:, start:end], jnp.int32)


@pytest.mark.parametrize("normalize", [False, True])
def test_penalty_is_that_of_the_original(case, normalize):
    arrays, kwargs = case
    actual = samplers.apply_repetition_penalty(
        jnp.asarray(arrays["input/logits"]),
        window(arrays, kwargs),
        kwargs["repetition_penalty"],
        normalize=normalize,
    )
    expected = arrays["output/penalised_normalized" if normalize else "output/penalised_raw"]
    assert_filtered_close(np.asarray(actual), expected)


@pytest.mark.parametrize("ties", ["", "_with_ties"])
def test_top_k_is_that_of_the_original(case, ties):
    arrays, kwargs = case
    actual = samplers.keep_top_k(jnp.asarray(arrays[f"input/logits{ties}"]), kwargs["top_k"])
    assert_filtered_close(np.asarray(actual), arrays[f"output/topk{ties}"])


def test_the_whole_chain_is_that_of_the_original(case):
    arrays, kwargs = case
    logits = jnp.asarray(arrays["input/logits"]) / kwargs["temperature"]
    logits = samplers.forbid_tokens(logits, kwargs["masked_tokens"])
    logits = samplers.apply_repetition_penalty(
        logits, window(arrays, kwargs), kwargs["repetition_penalty"]
    )
    logits = samplers.keep_top_k(logits, kwargs["top_k"])
    probabilities = np.asarray(jax.nn.softmax(logits))
    expected = arrays["output/pipeline_probabilities"]
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-5)
    drawn = (np.cumsum(probabilities, -1) >= arrays["input/uniform"]).argmax(-1)
    np.testing.assert_array_equal(drawn, arrays["output/sample"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_penalty_above_one_lowers_seen_tokens_and_no_others(dtype):
    logits = logits_of(dtype=dtype)
    history = jnp.array([[0, 0, 5], [1, 2, 10], [-2, -2, 4]])
    actual = samplers.apply_repetition_penalty(logits, history, 2)
    assert actual.dtype == dtype
    seen = np.zeros(logits.shape, bool)
    for row, tokens in enumerate(([0, 5], [1, 2, 10], [4])):
        seen[row, tokens] = True
    assert (np.asarray(actual < logits) == seen).all()
    assert (np.asarray(actual == logits) == ~seen).all()


def test_what_is_not_valid_in_the_history_is_not_penalised():
    logits = logits_of(shape=(1, 6))
    history = jnp.array([[3, 1, 4]])
    actual = samplers.apply_repetition_penalty(
        logits, history, 1.5, valid=jnp.array([[False, True, False]])
    )
    expected = samplers.apply_repetition_penalty(logits, history[:, 1:2], 1.5)
    np.testing.assert_array_equal(actual, expected)


def test_a_penalty_of_one_and_an_empty_history_change_nothing():
    logits = logits_of()
    history = jnp.zeros((3, 4), jnp.int32)
    np.testing.assert_array_equal(samplers.apply_repetition_penalty(logits, history, 1.0), logits)
    np.testing.assert_array_equal(
        samplers.apply_repetition_penalty(logits, history[:, :0], 3.0), logits
    )


def test_a_normalised_penalty_ignores_constants_added_to_a_row():
    logits, history = logits_of(), jnp.array([[1, 2], [3, 4], [5, 5]])
    one, other = (
        samplers.apply_repetition_penalty(logits + shift, history, 1.3, normalize=True)
        for shift in (0, 7)
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_forbidden_tokens_are_removed_from_every_row():
    logits = logits_of()
    actual = np.asarray(samplers.forbid_tokens(logits, (2, 10, 2)))
    assert np.isneginf(actual[:, [2, 10]]).all()
    kept = np.delete(np.arange(11), [2, 10])
    np.testing.assert_array_equal(actual[:, kept], logits[:, kept])
    np.testing.assert_array_equal(samplers.forbid_tokens(logits, ()), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 3, 10, 11, 99])
def test_top_k_keeps_the_k_largest(k, dtype):
    logits = logits_of(dtype=dtype)
    actual = samplers.keep_top_k(logits, k)
    assert actual.dtype == dtype
    kept = np.asarray(actual > -jnp.inf)
    for row, mask in zip(np.asarray(logits, np.float32), kept, strict=True):
        least = np.sort(row)[-min(k, 11)]
        np.testing.assert_array_equal(mask, row >= least)
    assert (np.asarray(actual == logits) == kept).all()


def test_top_k_keeps_removed_tokens_removed():
    logits = samplers.forbid_tokens(logits_of(), (0, 1, 2))
    actual = samplers.keep_top_k(logits, 10)
    np.testing.assert_array_equal(actual, logits)


def brute_force_top_p(row, p):
    probabilities = np.exp(row - row.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-row)
    number = np.searchsorted(np.cumsum(probabilities[order]), p) + 1
    return row >= row[order[min(number, len(row)) - 1]]


@pytest.mark.parametrize("p", [1e-6, 0.2, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_with_that_mass(p):
    logits = logits_of(shape=(20, 11))
    kept = np.asarray(samplers.keep_top_p(logits, p) > -jnp.inf)
    for row, mask in zip(np.asarray(logits, np.float64), kept, strict=True):
        np.testing.assert_array_equal(mask, brute_force_top_p(row, p))
    assert kept.any(1).all()


def test_top_p_of_one_keeps_everything_however_unlikely():
    logits = jnp.array([[0.0, -40.0, -80.0, -jnp.inf]])
    np.testing.assert_array_equal(samplers.keep_top_p(logits, 1.0), logits)
    np.testing.assert_array_equal(samplers.keep_top_p(logits, 1), logits)


def test_top_p_keeps_ties_and_removed_tokens_removed():
    logits = jnp.array([[1.0, 1.0, 1.0, -jnp.inf, -9.0]])
    actual = samplers.keep_top_p(logits, 0.3)
    np.testing.assert_array_equal(actual, [[1.0, 1.0, 1.0, -jnp.inf, -jnp.inf]])


@pytest.mark.parametrize(
    "filtered",
    [
        lambda logits: samplers.keep_top_k(logits, 4),
        lambda logits: samplers.keep_top_p(logits, 0.7),
        lambda logits: samplers.forbid_tokens(logits, [1, 5]),
        lambda logits: samplers.apply_repetition_penalty(
            logits, jnp.broadcast_to(jnp.array([1, 4]), (*logits.shape[:-1], 2)), 1.4
        ),
    ],
    ids=["top_k", "top_p", "forbid", "penalty"],
)
def test_rows_are_filtered_alone_and_alike_under_jit(filtered):
    logits = logits_of(shape=(2, 3, 11))
    together = filtered(logits)
    np.testing.assert_array_equal(jax.jit(filtered)(logits), together)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(filtered(logits[index]), together[index])


@given(st.integers(0, 2**31))
def test_temperature_zero_is_greedy(seed):
    logits = logits_of(seed)
    drawn = samplers.sample_token(jax.random.key(seed), logits, 0)
    assert drawn.dtype == jnp.int32
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


def test_greedy_takes_the_first_of_ties():
    logits = jnp.array([[0.0, 2.0, 2.0, -jnp.inf]])
    assert samplers.sample_token(jax.random.key(0), logits, 0.0) == 1


def test_greedy_makes_no_nan_on_the_way():
    with jax.debug_nans(True):
        assert samplers.sample_token(jax.random.key(0), jnp.array([[0.0, -1.0]]), 0.0) == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    row = jnp.array([1.0, 0.0, -1.0, 2.0, -jnp.inf])
    number = 20_000
    draws = samplers.sample_token(
        jax.random.key(0), jnp.broadcast_to(row, (number, 5)), temperature
    )
    shares = np.bincount(np.asarray(draws), minlength=5) / number
    expected = np.asarray(jax.nn.softmax(row / temperature))
    assert shares[4] == 0
    assert np.abs(shares - expected).max() < 5 * 0.5 / np.sqrt(number)


def test_draws_are_reproducible_and_the_temperature_may_be_traced():
    logits = logits_of(shape=(50, 11))
    draw = jax.jit(samplers.sample_token)
    for temperature in (0.0, 0.7):
        expected = samplers.sample_token(jax.random.key(3), logits, temperature)
        np.testing.assert_array_equal(draw(jax.random.key(3), logits, temperature), expected)
    other = samplers.sample_token(jax.random.key(4), logits, 0.7)
    assert not np.array_equal(other, expected)


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
def test_draws_are_finite_tokens_at_any_temperature(temperature):
    logits = samplers.forbid_tokens(1e4 * logits_of(shape=(200, 11)), (0, 3))
    draws = np.asarray(samplers.sample_token(jax.random.key(0), logits, temperature))
    assert ((draws >= 0) & (draws < 11)).all()
    assert not np.isin(draws, [0, 3]).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: samplers.keep_top_k(x, 0), "top_k must be at least 1"),
        (lambda x: samplers.keep_top_p(x, 0.0), "top_p is the mass to keep"),
        (lambda x: samplers.keep_top_p(x, 1.1), "top_p is the mass to keep"),
        (lambda x: samplers.forbid_tokens(x, [11]), r"0 .. 10, but got \[11\]"),
        (lambda x: samplers.forbid_tokens(x, [-1]), r"0 .. 10, but got \[-1\]"),
        (lambda x: samplers.forbid_tokens(x, list(range(11))), "not all"),
        (lambda x: samplers.sample_token(jax.random.key(0), x, -1.0), "temperature"),
        (lambda x: samplers.sample_token(jax.random.key(0), x, float("nan")), "temperature"),
        (
            lambda x: samplers.apply_repetition_penalty(x, jnp.zeros((3, 1), jnp.int32), 0.0),
            "penalty must be positive",
        ),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call(logits_of())
