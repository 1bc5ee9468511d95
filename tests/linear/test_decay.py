"""Decay against its own recurrence, written out token by token in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.linear import Plan, empty_state, linear_attention, merge, prefill, step
from tests.linear import cases

CHUNK, LENGTHS = 4, (1, 3, 4, 5, 11)
NAMES = ("positive", "relu", "exp", "elu+1")
# Drawn before anything is traced.
PARAMETERS = {name: cases.numpy_parameters(name) for name in NAMES}
B, H, K, D, V = cases.B, cases.H, cases.K, cases.D, cases.V


def plan_of(name, **options):
    return Plan(**{"feature_map": cases.MAPS[name], "causal": True, "chunk_size": CHUNK} | options)


def decays(length, most=20.0, seed=5):
    """Some tokens keep everything, some forget nearly everything."""
    rng = np.random.default_rng((seed, length))
    drawn = rng.uniform(-most, 0, (B, length, K)) * (rng.random((B, length, K)) < 0.5)
    return drawn


def recurrence(name, query, key, value, log_decay, *, mask=None, ids=None, output="mean"):
    """One state ``[B, K, V, M]`` and its normaliser, in true units; returns outputs and both."""
    feature_map, parameters = cases.MAPS[name], cases.parameters_of(name, jnp.float64)

    def features(x, is_query):
        heads_first = jnp.swapaxes(x, 1, 2)
        if is_query:
            heads_first = heads_first.reshape(B, K, -1, D)
        found = feature_map.apply(heads_first, parameters, is_query=is_query, exact_scale=True)
        return found.shift(None)

    length = query.shape[1]
    queries = features(query, True).reshape(B, K, H // K, length, -1)
    keys = features(key, False)
    state, total = jnp.zeros((B, K, V, keys.shape[-1])), jnp.zeros((B, K, keys.shape[-1]))
    outputs = []
    for t in range(length):
        if ids is not None and t and ids[t] != ids[t - 1]:
            state, total = jnp.zeros_like(state), jnp.zeros_like(total)
        factor, new = jnp.exp(log_decay[:, t]), keys[:, :, t]
        if mask is not None:
            factor = jnp.where(mask[:, t, None], factor, 1)
            new = jnp.where(mask[:, t, None, None], new, 0)
        state = state * factor[..., None, None] + value[:, t, :, :, None] * new[..., None, :]
        total = total * factor[..., None] + new
        numerator = jnp.einsum("bkgm,bkvm->bkgv", queries[:, :, :, t], state)
        denominator = jnp.einsum("bkgm,bkm->bkg", queries[:, :, :, t], total)[..., None]
        seen = denominator != 0
        out = jnp.where(seen, numerator / jnp.where(seen, denominator, 1), 0)
        outputs.append((out if output == "mean" else numerator).reshape(B, H, V))
    return jnp.stack(outputs, 1), state, total


def attended(name, query, key, value, log_decay, *, dtype=jnp.float64, **options):
    arguments = ("key_mask", "segment_ids", "initial_state")
    given = {n: options.pop(n) for n in arguments if n in options}
    out, state = linear_attention(
        *(x.astype(dtype) for x in (query, key, value)),
        plan_of(name, **options),
        parameters=cases.parameters_of(name, dtype),
        log_decay=None if log_decay is None else log_decay.astype(dtype),
        return_state=True,
        **given,
    )
    return out, *cases.true_state(state)


def with_gradients(function):
    """The results of a function of four arrays, and the gradient of a sum of them."""

    def loss(arrays):
        found = function(*arrays)
        return cases.weighted_sum(found), found

    def both(*arrays):
        gradient, found = jax.grad(loss, has_aux=True)(arrays)
        return found, gradient

    return cases.compiled(both)


def arrays(length, most=20.0, **options):
    return *cases.qkv(length=length, dtype=jnp.float64, **options), jnp.asarray(
        decays(length, most)
    )


def check(function, expected, operands, tolerance=1e-10):
    with jax.enable_x64(True):
        cases.assert_close(
            with_gradients(function)(*operands), with_gradients(expected)(*operands), tolerance
        )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["positive", "relu"])
def test_values_and_gradients(name, length):
    with jax.enable_x64(True):
        check(
            functools.partial(attended, name),
            functools.partial(recurrence, name),
            arrays(length),
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("elu+1", {}),
        ("exp", {"saved_states": "few"}),
        ("positive", {"saved_states": "few"}),
        ("positive", {"output": "sum"}),
        ("relu", {"output": "sum"}),
        ("positive", {"implementation": "reference"}),
        ("relu", {"implementation": "by_platform"}),
    ],
    ids=str,
)
def test_other_ways(name, options):
    with jax.enable_x64(True):
        output = {"output": options["output"]} if "output" in options else {}
        check(
            functools.partial(attended, name, **options),
            functools.partial(recurrence, name, **output),
            arrays(13, most=2.0),
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [("relu", {"epsilon": 3.0}), ("relu", {"output": "parts"}), ("positive", {"output": "parts"})],
    ids=str,
)
def test_the_gradient_of_every_output_is_that_of_jax(name, options):
    def function(implementation):
        def run(*operands):
            out, *state = attended(name, *operands, implementation=implementation, **options)
            if options.get("output") == "parts":
                scale = 1 if out.log_scale is None else jnp.exp(out.log_scale)[..., None]
                out = out.numerator * scale, out.denominator[..., None] * scale
            return out, *state

        return run

    with jax.enable_x64(True):
        check(function("chunked"), function("reference"), arrays(13, most=2.0))


@pytest.mark.parametrize(("name", "most"), [("positive", 0.1), ("positive", 20.0), ("relu", 2.0)])
def test_float32(name, most):
    """In chunks as long as users have them, of decays that sum to hundreds."""
    with jax.enable_x64(True):
        operands = arrays(37, most=most)
        found = with_gradients(functools.partial(attended, name, dtype=jnp.float32, chunk_size=16))(
            *operands
        )
        expected = with_gradients(functools.partial(recurrence, name))(*operands)
        cases.assert_close(found, expected, 3e-5)


def test_bfloat16():
    with jax.enable_x64(True):
        query, key, value, log_decay = arrays(13, most=2.0)
        near = [x.astype(jnp.bfloat16) for x in (query, key, value)]
        found = attended("positive", *near, log_decay, dtype=jnp.bfloat16)[0]
        expected = recurrence("positive", *(x.astype(jnp.float64) for x in near), log_decay)[0]
        assert found.dtype == jnp.bfloat16
        cases.assert_close(found, expected, 2e-2)


@pytest.mark.parametrize("output", ["mean", "sum"])
def test_the_gradient_of_strong_decays_in_bfloat16(output):
    """Their sum is the gradient of a decay that is the same at every token."""
    rng = np.random.default_rng(0)
    near = [jnp.asarray(rng.normal(size=(1, 256, 1, 32)), jnp.bfloat16) for _ in range(4)]
    log_decay = jnp.asarray(-8 * rng.random((1, 256, 1)), jnp.float32)
    feature_map = cases.MAPS["positive"]
    parameters = feature_map.init(jax.random.key(0), 32)
    plan = Plan(feature_map=feature_map, causal=True, chunk_size=32, output=output)

    def gradient(dtype, wide):
        *qkv, cotangent = (x.astype(dtype) for x in near)

        def loss(log_decay):
            rows = parameters.astype(wide)
            out = linear_attention(*qkv, plan, parameters=rows, log_decay=log_decay)
            return (out * cotangent).astype(wide).sum()

        return np.asarray(jax.jit(jax.grad(loss))(log_decay.astype(wide)), np.float64)

    found = gradient(jnp.bfloat16, jnp.float32)
    with jax.enable_x64(True):
        expected = gradient(jnp.float64, jnp.float64)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < 0.02
    assert abs(found.sum() - expected.sum()) < 0.05 * abs(expected.sum())


@pytest.mark.parametrize("name", ["positive", "relu"])
def test_segments(name):
    with jax.enable_x64(True):
        ids = np.repeat([0, 1, 2, 3], [1, 5, 4, 3])
        check(
            functools.partial(attended, name, segment_ids=jnp.asarray(ids)[None]),
            functools.partial(recurrence, name, ids=ids),
            arrays(13, most=2.0),
        )


@pytest.mark.parametrize("name", ["positive", "relu"])
def test_masked_tokens_neither_add_nor_decay(name):
    """Leading, interior and trailing ones; what they hold, NaN included, changes nothing."""
    mask = np.ones((B, 13), bool)
    mask[0, [0, 1, 5, 6, 7, 8, 12]] = False
    mask[1, 4:9] = False
    with jax.enable_x64(True):
        operands = arrays(13, most=2.0)
        masked = functools.partial(attended, name, key_mask=jnp.asarray(mask))
        expected = functools.partial(recurrence, name, mask=jnp.asarray(mask))
        check(masked, expected, operands)
        query, *others = operands
        hidden = lambda x: jnp.where(mask.reshape(B, 13, *(1,) * (x.ndim - 2)), x, jnp.nan)  # noqa: E731
        both = with_gradients(masked)
        found, expected = both(query, *map(hidden, others)), both(*operands)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)


# Of "exp", XLA contracts a product and a sum of the one program, but not of the other.
@pytest.mark.parametrize("name", ["positive", "relu", "elu+1"])
def test_no_decay_is_none_bit_by_bit(name):
    operands = cases.qkv(length=13)
    attend = cases.compiled(functools.partial(attended, name, dtype=jnp.float32))
    for one, other in zip(attend(*operands, jnp.zeros(K)), attend(*operands, None), strict=True):
        np.testing.assert_array_equal(one, other)


def test_later_tokens_change_no_bit():
    query, key, value = cases.qkv(length=13)
    log_decay = jnp.asarray(decays(13), jnp.float32)
    attend = cases.compiled(functools.partial(attended, "positive", dtype=jnp.float32))
    first = attend(query, key, value, log_decay)[0]
    second = attend(query, key.at[:, 6:].mul(9), value, log_decay.at[:, 6:].add(-7))[0]
    np.testing.assert_array_equal(first[:, :6], second[:, :6])


def test_large_norms():
    """Squared norms up to thousands, where pairs of a chunk need scales of their own."""
    with jax.enable_x64(True):
        query, key, value, log_decay = arrays(13, scale=20.0)
        log_decay = 10 * log_decay
        narrow = np.asarray(log_decay, np.float32)
        token = functools.partial(attended, "positive", chunk_size=1)
        expected = token(query, key, value, log_decay)
    query, key, value = (jnp.asarray(np.asarray(x, np.float32)) for x in (query, key, value))
    found = attended("positive", query, key, value, jnp.asarray(narrow), dtype=jnp.float32)
    cases.assert_close(found[0], expected[0], 1e-3)
    for implementation in ("chunked", "reference"):

        def loss(log_decay, dtype, implementation=implementation, **options):
            options["implementation"] = implementation
            return cases.weighted_sum(
                attended("positive", query, key, value, log_decay, dtype=dtype, **options)[0]
            )

        with jax.enable_x64(True):
            expected = jax.grad(loss)(jnp.asarray(narrow, jnp.float64), jnp.float64, chunk_size=1)
        gradient = jax.grad(loss)(jnp.asarray(narrow), jnp.float32)
        cases.assert_close(gradient, expected, 2e-3)


@pytest.mark.parametrize("name", ["positive", "relu"])
def test_splits_and_steps(name):
    """Prefill, steps, and states merged: the whole, wherever it is cut."""
    with jax.enable_x64(True):
        length = 5
        operands = arrays(length, most=2.0)
        expected, *sums = recurrence(name, *operands)
        parameters = cases.parameters_of(name, jnp.float64)
        plan = plan_of(name)
        empty = empty_state(cases.MAPS[name], parameters, (B,), K, D, V, jnp.float64)
        read = functools.partial(prefill, plan=plan, parameters=parameters)
        one = jax.jit(functools.partial(step, plan=plan, parameters=parameters))
        read = jax.jit(read)
        for cut in range(length + 1):
            left, right = ([x[:, :cut] for x in operands], [x[:, cut:] for x in operands])
            out, state = read(empty, *left[:3], log_decay=left[3])
            rest, whole = read(state, *right[:3], log_decay=right[3])
            _, alone = read(empty, *right[:3], log_decay=right[3])
            merged = merge(state, alone, right[3].sum(1))
            cases.assert_close(jnp.concatenate([out, rest], 1), expected, 1e-12)
            cases.assert_close(cases.true_state(whole), tuple(sums), 1e-12)
            cases.assert_close(cases.true_state(merged), tuple(sums), 1e-12)
        state, outputs = empty, []
        for t in range(length):
            out, state = one(state, *(x[:, t] for x in operands[:3]), log_decay=operands[3][:, t])
            outputs.append(out)
        cases.assert_close(jnp.stack(outputs, 1), expected, 1e-12)
        cases.assert_close(cases.true_state(state), tuple(sums), 1e-12)


def test_gradient_of_a_step_and_of_a_merge():
    with jax.enable_x64(True):
        *operands, log_decay = arrays(5, most=2.0)
        parameters, plan = cases.parameters_of("positive", jnp.float64), plan_of("positive")
        state = attended_state(operands, log_decay)
        token = [x[:, 0] for x in operands]

        def stepped(log_decay):
            out, after = step(state, *token, plan, parameters=parameters, log_decay=log_decay)
            both = merge(state, after, log_decay)
            return cases.weighted_sum((out, cases.true_state(after), cases.true_state(both)))

        at = jnp.full((B, K), -0.3)
        direction = jnp.broadcast_to(jnp.array([1.0, -2.0]), (B, K))
        expected = (stepped(at + 1e-6 * direction) - stepped(at - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose((jax.grad(stepped)(at) * direction).sum(), expected, rtol=1e-6)


def attended_state(operands, log_decay):
    return linear_attention(
        *operands,
        plan_of("positive"),
        parameters=cases.parameters_of("positive", jnp.float64),
        log_decay=log_decay,
        return_state=True,
    )[1]


def test_forgetting_everything():
    """Minus infinity starts anew: nothing before is seen."""
    query, key, value = cases.qkv(length=9)
    log_decay = jnp.zeros((B, 9, K)).at[:, 5].set(-jnp.inf)
    found = attended("positive", query, key, value, log_decay, dtype=jnp.float32)[0]
    after = attended("positive", query[:, 5:], key[:, 5:], value[:, 5:], None, dtype=jnp.float32)
    cases.assert_close(found[:, 5:], after[0], 1e-5)


@pytest.mark.parametrize(("low", "chunk"), [(-np.inf, 64), (-1e3, 128), (-100.3, 256)])
def test_what_was_forgotten_leaves_no_trace(low, chunk):
    """Small decays are as exact behind many tokens that forget everything as alone."""
    with jax.enable_x64(True):
        query, key, value, _ = arrays(256)
        log_decay = np.full((B, 256, K), -0.01)
        log_decay[:, :200] = low
        log_decay = jnp.asarray(log_decay)
        found = attended(
            "positive", query, key, value, log_decay, dtype=jnp.float32, chunk_size=chunk
        )
        expected = recurrence("positive", query, key, value, log_decay)
        cases.assert_close(found[0], expected[0], 3e-5)


def test_a_merge_forgets_everything():
    query, key, value = cases.qkv(length=9)
    operands = (query.astype(jnp.float32), key.astype(jnp.float32), value.astype(jnp.float32))

    def state_of(piece):
        return linear_attention(
            *(x[:, piece] for x in operands),
            plan_of("positive"),
            parameters=cases.parameters_of("positive", jnp.float32),
            return_state=True,
        )[1]

    left, right = state_of(slice(0, 5)), state_of(slice(5, 9))
    for amount in (-jnp.inf, -1e30, -1e5):
        merged = merge(left, right, jnp.full((B, K), amount))
        cases.assert_close(cases.true_state(merged), cases.true_state(right), 1e-6)
    none = state_of(slice(9, 9))
    for before in (left, none):
        merged = cases.true_state(merge(before, none, jnp.full((B, K), -jnp.inf)))
        assert all(bool(jnp.all(x == 0)) for x in merged)


def test_refusals():
    query, key, value = cases.qkv(length=4)
    attend = functools.partial(
        linear_attention, query, key, value, parameters=cases.parameters_of("positive")
    )
    with pytest.raises(ValueError, match="causal=True"):
        attend(plan_of("positive", causal=False), log_decay=jnp.zeros(K))
    for wrong in (jnp.zeros(H), jnp.zeros((B, 4)), jnp.zeros((B, 4, H)), jnp.zeros(K, int)):
        with pytest.raises(ValueError, match="log_decay must be"):
            attend(plan_of("positive"), log_decay=wrong)
    for name in ("quadratic", "parallel_chunks", "pallas_gpu", "pallas_tpu_interpret"):
        with pytest.raises(NotImplementedError, match="does not support log_decay"):
            attend(plan_of("positive", implementation=name), log_decay=jnp.zeros(K))
    both = plan_of("positive", implementation=("pallas_gpu", "chunked"))
    assert attend(both, log_decay=jnp.zeros(K)).shape == (B, 4, H, V)
