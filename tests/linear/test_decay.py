"""Decay against its own recurrence, written out token by token in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.linear import empty_state, linear_attention, merge, prefill, step
from tests.linear import cases
from tests.linear.decay_cases import (
    KERNELS,
    LENGTH,
    B,
    D,
    H,
    K,
    V,
    arrays,
    attended,
    check,
    decays,
    plan_of,
    program,
    recurrence,
    with_gradients,
)


@pytest.mark.parametrize(
    ("name", "length"),
    [*(("positive", length) for length in (1, 4, 5, 11)), ("relu", 3), ("relu", 11)],
)
def test_values_and_gradients(name, length):
    with jax.enable_x64(True):
        check(program(attended, name), program(recurrence, name), arrays(length))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("exp", {"saved_states": "few"}),
        ("positive", {"output": "sum", "saved_states": "few"}),
        ("elu+1", {"output": "sum"}),
        ("positive", {"implementation": "reference"}),
        ("relu", {"implementation": "by_platform"}),
    ],
    ids=str,
)
def test_other_ways(name, options):
    with jax.enable_x64(True):
        output = {"output": options["output"]} if "output" in options else {}
        expected = program(recurrence, name, **output)
        check(program(attended, name, **options), expected, arrays(LENGTH, most=2.0))


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

        return with_gradients(run)

    with jax.enable_x64(True):
        check(function("chunked"), function("reference"), arrays(LENGTH, most=2.0))


def in_kernels(*values):
    return pytest.param(*values, KERNELS, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "length", "most", "implementation"),
    [
        *((name, 48, most, "chunked") for name, most in (("positive", 0.1), ("positive", 20.0))),
        ("relu", 48, 2.0, "chunked"),
        *(in_kernels("positive", length, 20.0) for length in (15, 16, 17, 53)),
        in_kernels("relu", 17, 2.0),
    ],
)
def test_float32(name, length, most, implementation):
    """In chunks as long as users have them, of decays that sum to hundreds."""
    with jax.enable_x64(True):
        options = {"dtype": jnp.float32, "chunk_size": 16, "implementation": implementation}
        found = program(attended, name, **options)
        check(found, program(recurrence, name), arrays(length, most=most), 3e-5)


@pytest.mark.parametrize("implementation", ["chunked", in_kernels()])
def test_bfloat16(implementation):
    options = {"dtype": jnp.bfloat16, "implementation": implementation}
    with jax.enable_x64(True):
        query, key, value, log_decay = arrays(LENGTH, most=2.0)
        near = [x.astype(jnp.bfloat16) for x in (query, key, value)]
        attend = cases.compiled(functools.partial(attended, "positive", **options))
        found = attend(*near, log_decay)[0]
        exact = (x.astype(jnp.float64) for x in near)
        (expected, *_), _ = program(recurrence, "positive")(*exact, log_decay)
        assert found.dtype == jnp.bfloat16
        cases.assert_close(found, expected, 2e-2)


@pytest.mark.parametrize(
    ("output", "implementation"), [("mean", "chunked"), ("sum", "chunked"), in_kernels("mean")]
)
def test_the_gradient_of_strong_decays_in_bfloat16(output, implementation):
    """Their sum is the gradient of a decay that is the same at every token."""
    rng = np.random.default_rng(0)
    near = [jnp.asarray(rng.normal(size=(1, 256, 1, 32)), jnp.bfloat16) for _ in range(4)]
    log_decay = jnp.asarray(-8 * rng.random((1, 256, 1)), jnp.float32)
    parameters = cases.MAPS["positive"].init(jax.random.key(0), 32)

    def gradient(dtype, wide, implementation="chunked"):
        plan = plan_of("positive", chunk_size=32, output=output, implementation=implementation)
        *qkv, cotangent = (x.astype(dtype) for x in near)

        def loss(log_decay):
            rows = parameters.astype(wide)
            out = linear_attention(*qkv, plan, parameters=rows, log_decay=log_decay)
            return (out * cotangent).astype(wide).sum()

        return np.asarray(jax.jit(jax.grad(loss))(log_decay.astype(wide)), np.float64)

    found = gradient(jnp.bfloat16, jnp.float32, implementation)
    with jax.enable_x64(True):
        expected = gradient(jnp.float64, jnp.float64)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < 0.02
    assert abs(found.sum() - expected.sum()) < 0.05 * abs(expected.sum())


@pytest.mark.parametrize(
    ("name", "options"),
    [("positive", {}), ("positive", {"implementation": "reference"}), ("relu", {})],
    ids=str,
)
def test_segments(name, options):
    """Two of them begin with a masked token, whose row sees nothing."""
    with jax.enable_x64(True):
        ids = np.repeat([0, 1, 2, 3], [1, 5, 4, 2])
        masked = {"key_mask": jnp.asarray(~np.isin(np.arange(LENGTH), (1, 6)))[None]}
        options = {"segment_ids": jnp.asarray(ids)[None], **options, **masked}
        check(
            with_gradients(functools.partial(attended, name, **options)),
            with_gradients(functools.partial(recurrence, name, ids=ids, **masked)),
            arrays(LENGTH, most=2.0),
        )


@pytest.mark.parametrize(
    ("name", "length", "implementation"),
    [("positive", 12, "chunked"), ("relu", 13, "chunked"), in_kernels("positive", 12)],
)
def test_masked_tokens_neither_add_nor_decay(name, length, implementation):
    """Leading, interior and trailing ones; what they hold, NaN included, changes nothing."""
    mask = np.ones((B, length), bool)
    mask[0, [0, 1, 5, 6, 7, 8, length - 1]] = False
    mask[1, 4:9] = False
    with jax.enable_x64(True):
        operands = arrays(length, most=2.0)
        masked = {"key_mask": jnp.asarray(mask)}
        dtype = jnp.float32 if implementation == KERNELS else jnp.float64
        options = {"implementation": implementation, "dtype": dtype}
        found = with_gradients(functools.partial(attended, name, **options, **masked))
        plain = found(*operands)
        expected = with_gradients(functools.partial(recurrence, name, **masked))
        cases.assert_close(plain, expected(*operands), 3e-6 if dtype == jnp.float32 else 1e-10)
        query, *others = operands
        hidden = (
            np.where(mask.reshape(B, length, *(1,) * (x.ndim - 2)), x, np.nan) for x in others
        )
        jax.tree.map(np.testing.assert_array_equal, found(query, *hidden), plain)


# Of "exp", XLA contracts a product and a sum of the one program, but not of the other.
@pytest.mark.parametrize("name", ["positive", "relu", "elu+1"])
def test_no_decay_is_none_bit_by_bit(name):
    operands = cases.qkv(length=LENGTH)
    attend = cases.compiled(functools.partial(attended, name, dtype=jnp.float32))
    for one, other in zip(attend(*operands, jnp.zeros(K)), attend(*operands, None), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("scale", "implementation"), [(0.5, "chunked"), in_kernels(0.5), in_kernels(8.0)]
)
def test_later_tokens_change_no_bit(scale, implementation):
    query, key, value = cases.qkv(length=LENGTH, scale=scale)
    log_decay = jnp.asarray(decays(LENGTH), jnp.float32)
    options = {"dtype": jnp.float32, "implementation": implementation}
    attend = cases.compiled(functools.partial(attended, "positive", **options))
    first = attend(query, key, value, log_decay)[0]
    second = attend(query, key.at[:, 6:].mul(9), value, log_decay.at[:, 6:].add(-7))[0]
    np.testing.assert_array_equal(first[:, :6], second[:, :6])


def test_large_norms():
    """Squared norms up to thousands, where pairs of a chunk need scales of their own."""

    def output_and_gradient(dtype, **options):
        def loss(log_decay, *qkv):
            out = attended("positive", *qkv, log_decay, dtype=dtype, **options)[0]
            return cases.weighted_sum(out), out

        gradient, out = cases.compiled(jax.grad(loss, has_aux=True))(
            log_decay.astype(dtype), *(x.astype(dtype) for x in (query, key, value))
        )
        return np.asarray(out), np.asarray(gradient)

    with jax.enable_x64(True):
        *qkv, log_decay = (np.asarray(x) for x in arrays(LENGTH, scale=20.0))
        query, key, value, log_decay = (x.astype(np.float32) for x in (*qkv, 10 * log_decay))
        expected = output_and_gradient(jnp.float64, chunk_size=1)
    for implementation in ("chunked", "reference", KERNELS):
        found = output_and_gradient(jnp.float32, implementation=implementation)
        cases.assert_close(found[0], expected[0], 1e-3)
        cases.assert_close(found[1], expected[1], 2e-3)


@pytest.mark.parametrize("name", ["positive", "relu"])
def test_splits_and_steps(name):
    """Prefill, steps, and states merged: the whole, wherever it is cut."""
    with jax.enable_x64(True):
        operands = arrays(5, most=2.0)
        (expected, *sums), _ = program(recurrence, name)(*operands)
        parameters = cases.parameters_of(name, jnp.float64)
        plan = plan_of(name)
        empty = empty_state(cases.MAPS[name], parameters, (B,), K, D, V, jnp.float64)
        read, one = (
            cases.compiled(functools.partial(function, plan=plan, parameters=parameters))
            for function in (prefill, step)
        )
        together, true_state = cases.compiled(merge), cases.compiled(cases.true_state)
        operands = [np.asarray(x) for x in operands]
        for cut in (0, 1, 4, 5):
            left, right = ([x[:, :cut] for x in operands], [x[:, cut:] for x in operands])
            out, state = read(empty, *left[:3], log_decay=left[3])
            rest, whole = read(state, *right[:3], log_decay=right[3])
            _, alone = read(empty, *right[:3], log_decay=right[3])
            merged = together(state, alone, right[3].sum(1))
            cases.assert_close(np.concatenate([out, rest], 1), expected, 1e-12)
            cases.assert_close(true_state(whole), tuple(sums), 1e-12)
            cases.assert_close(true_state(merged), tuple(sums), 1e-12)
        state, outputs = empty, []
        for t in range(5):
            out, state = one(state, *(x[:, t] for x in operands[:3]), log_decay=operands[3][:, t])
            outputs.append(out)
        cases.assert_close(np.stack(outputs, 1), expected, 1e-12)
        cases.assert_close(true_state(state), tuple(sums), 1e-12)


@cases.compiled
def state_of(query, key, value, log_decay=None):
    return linear_attention(
        query,
        key,
        value,
        plan_of("positive"),
        parameters=cases.parameters_of("positive", query.dtype),
        log_decay=log_decay,
        return_state=True,
    )[1]


def test_gradient_of_a_step_and_of_a_merge():
    with jax.enable_x64(True):
        *operands, log_decay = arrays(5, most=2.0)
        parameters, plan = cases.parameters_of("positive", jnp.float64), plan_of("positive")
        state = state_of(*operands, log_decay)
        token = [x[:, 0] for x in operands]

        @cases.compiled
        @jax.value_and_grad
        def stepped(log_decay):
            out, after = step(state, *token, plan, parameters=parameters, log_decay=log_decay)
            both = merge(state, after, log_decay)
            return cases.weighted_sum((out, cases.true_state(after), cases.true_state(both)))

        at = np.full((B, K), -0.3)
        direction = np.array([[1.0, -2.0]])
        expected = stepped(at + 1e-6 * direction)[0] - stepped(at - 1e-6 * direction)[0]
        found = (stepped(at)[1] * direction).sum()
        np.testing.assert_allclose(found, expected / 2e-6, rtol=1e-6)


def test_forgetting_everything():
    """Minus infinity starts anew: nothing before is seen."""
    operands = [np.asarray(x) for x in cases.qkv(length=9)]
    log_decay = np.zeros((B, 9, K), np.float32)
    log_decay[:, 5] = -np.inf
    attend = cases.compiled(functools.partial(attended, "positive", dtype=jnp.float32))
    found = attend(*operands, log_decay)[0]
    after = attend(*(x[:, 5:] for x in operands), None)
    cases.assert_close(found[:, 5:], after[0], 1e-5)


@pytest.mark.parametrize(
    ("chunk", "implementation"), [(64, "chunked"), (256, "chunked"), in_kernels(128)]
)
def test_what_was_forgotten_leaves_no_trace(chunk, implementation):
    """Small decays are as exact behind many tokens that forget everything as alone."""
    with jax.enable_x64(True):
        *qkv, _ = arrays(256)
        options = {"chunk_size": chunk, "implementation": implementation}
        attend = cases.compiled(
            functools.partial(attended, "positive", dtype=jnp.float32, **options)
        )
        for low in (-np.inf, -1e3, -100.3):
            log_decay = np.full((B, 256, K), -0.01)
            log_decay[:, :200] = low
            found = attend(*qkv, log_decay)
            (expected, *_), _ = program(recurrence, "positive")(*qkv, log_decay)
            cases.assert_close(found[0], expected, 3e-5)


def test_a_merge_forgets_everything():
    operands = [np.asarray(x) for x in cases.qkv(length=9)]
    together = cases.compiled(lambda *states: cases.true_state(merge(*states)))
    left, right, none = (
        state_of(*(x[:, piece] for x in operands)) for piece in (slice(0, 5), slice(5, 9), slice(0))
    )
    for amount in (-np.inf, -1e30, -1e5):
        merged = together(left, right, np.full((B, K), amount, np.float32))
        cases.assert_close(merged, cases.true_state(right), 1e-6)
    for before in (left, none):
        merged = together(before, none, np.full((B, K), -np.inf, np.float32))
        assert not any(np.asarray(x).any() for x in merged)


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
    for name in ("quadratic", "parallel_chunks", "pallas_gpu"):
        with pytest.raises(NotImplementedError, match="does not support log_decay"):
            attend(plan_of("positive", implementation=name), log_decay=jnp.zeros(K))
    both = plan_of("positive", implementation=("pallas_gpu", "chunked"))
    assert attend(both, log_decay=jnp.zeros(K)).shape == (B, 4, H, V)
