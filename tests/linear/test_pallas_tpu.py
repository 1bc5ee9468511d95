"""The TPU kernels, interpreted, compute the definition; and they lower for TPUs.

What they share with other implementations is tested beside those: laws, large norms, causality.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import (
    HyperbolicFeatures,
    PositiveFeatures,
    TrigonometricFeatures,
    TunedFeatures,
    elementwise_map,
)
from fast_attention.feature_maps.gaussian_family import tune, untuned
from fast_attention.feature_maps.moments import measure
from fast_attention.feature_maps.tuned import fold
from fast_attention.linear.pallas_tpu.api import attend_on
from fast_attention.linear.state import empty_state
from fast_attention.linear.types import Inputs, Plan
from tests.linear import cases

KERNELS = "pallas_tpu_interpret"
B, H, K, D, V, M, C = 2, 4, 2, 16, 8, 24, 16
MAP = PositiveFeatures(M)


def draw(seed, *shape, dtype=jnp.float32, scale=0.7):
    return jnp.asarray(cases.draw(seed, *shape, scale=scale), dtype)


def arguments(feature_map, length, keys=None, *, dtype=jnp.float32, heads=H, kv_heads=K):
    keys = keys or length
    return {
        "query": draw(0, B, length, heads, D, dtype=dtype),
        "key": draw(1, B, keys, kv_heads, D, dtype=dtype),
        "value": draw(2, B, keys, kv_heads, V, dtype=dtype),
        "parameters": feature_map.init(jax.random.key(0), D),
    }


@functools.cache
def defined(feature_map, **options):
    """The definition, compiled once for calls of one shape."""
    return cases.compiled(
        functools.partial(
            cases.attend, feature_map=feature_map, implementation="quadratic", **options
        )
    )


def with_everything(feature_map, smooth):
    """Adds a mask, an initial state and, for log-features, a bias."""
    batch, size, heads = smooth["key"].shape[:3]
    k, v = draw(3, batch, 3, heads, D), draw(4, batch, 3, heads, V)
    read = defined(feature_map, return_state=True)
    _, state = read(k, k, v, parameters=smooth["parameters"])
    visible = np.ones((batch, size), bool)
    visible[0, [0, -1]] = visible[1, 5:9] = False
    smooth = {**smooth, "kv": state.kv, "k_sum": state.k_sum}
    if feature_map.log_kind == "feature":
        smooth["key_bias"] = draw(5, batch, size, heads)
    return smooth, {"key_mask": visible, "initial_state": state}


def check(
    smooth, fixed, tolerance, *, feature_map, chunk_size=C, implementation=KERNELS, **options
):
    """Compares outputs, final sums and all gradients with float64: the definition, or chunks."""
    expecting = "chunked" if "log_decay" in smooth else "quadratic"
    run = functools.partial(cases.gradients, feature_map=feature_map, **options)
    tried = functools.partial(run, implementation=implementation, chunk_size=chunk_size)
    actual = cases.compiled(tried)(smooth, fixed)
    for gradient, x in zip(*map(jax.tree.leaves, (actual[1], smooth)), strict=True):
        assert gradient.dtype == x.dtype
    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (smooth, fixed),
        )
        expected = cases.compiled(functools.partial(run, implementation=expecting))(*exact)
    cases.assert_close(actual, expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_with_everything_at_once(causal):
    smooth, fixed = with_everything(MAP, arguments(MAP, 37))
    check(smooth, fixed, 1e-5, feature_map=MAP, causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("feature_map", "length", "heads", "scale"),
    [
        (MAP, 37, H, 1.0),
        (MAP, 1, K, 1.0),
        (MAP, 37, K, 7.0),
        (elementwise_map("elu+1", epsilon=0.0), 37, K, 1.0),
    ],
    ids=["ordinary", "one token", "large norms", "elementwise"],
)
def test_decay_with_everything_at_once(feature_map, length, heads, scale):
    """Decays of up to 20, and a reset; at large norms, rows fall far below their scale."""
    smooth, fixed = with_everything(feature_map, arguments(feature_map, length, heads=heads))
    smooth["query"], smooth["key"] = smooth["query"] * scale, smooth["key"] * scale
    rng = np.random.default_rng(0)
    decays = rng.uniform(-20, 0, (B, length, K)) * (rng.random((B, length, K)) < 0.5)
    decays[:, 12:13] = -1e4
    smooth["log_decay"] = jnp.asarray(decays, jnp.float32)
    check(smooth, fixed, 2e-5, feature_map=feature_map, causal=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("feature_map", "causal"),
    [
        (HyperbolicFeatures(M // 2), True),
        (elementwise_map("relu", num_rows=M), True),
        (elementwise_map("elu+1", epsilon=0.0), False),
        (elementwise_map("squared_relu", num_rows=M, normalize_data=True), False),
        (elementwise_map("exp", num_rows=M, epsilon=0.0), True),
    ],
    ids=["hyperbolic", "relu", "elu+1", "squared_relu", "exp"],
)
def test_other_maps(feature_map, causal):
    smooth, fixed = with_everything(feature_map, arguments(feature_map, 2 * C + 1))
    check(smooth, fixed, 1e-5, feature_map=feature_map, causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize(("both_signs", "causal"), [(False, True), (True, False)])
def test_tuned_features_of_every_head(both_signs, causal):
    feature_map = TunedFeatures("wderf_s", M, both_signs=both_signs)
    smooth = arguments(feature_map, 19)
    moments = measure(smooth["query"], smooth["key"], pooled=True)
    smooth["parameters"] = fold(smooth["parameters"].rows, tune("wderf_s", moments, M))
    smooth, fixed = with_everything(feature_map, smooth)
    check(smooth, fixed, 1e-5, feature_map=feature_map, causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "keys", "causal"),
    [(1, 1, True), (C - 1, C - 1, True), (C, C, True), (C + 1, C + 1, True), (1, C + 1, False)],
)
def test_outputs_agree_at_any_length(length, keys, causal):
    inputs = arguments(MAP, length, keys, heads=2, kv_heads=2)
    run = functools.partial(cases.attend, feature_map=MAP, causal=causal)
    kernels = functools.partial(run, implementation=KERNELS, chunk_size=C)
    actual = cases.compiled(lambda inputs: kernels(**inputs))(inputs)
    cases.assert_close(actual, defined(MAP, causal=causal)(**inputs), 5e-6)


@pytest.mark.parametrize("shared", ["heads", "rows"])
def test_parameters_of_every_row_or_head(shared):
    inputs = arguments(MAP, C - 1, heads=2, kv_heads=2)
    each = jax.vmap(lambda key: MAP.init(key, D))(jax.random.split(jax.random.key(1), 2))
    inputs["parameters"] = each[:, None] if shared == "heads" else each[None]
    attend = functools.partial(cases.attend, feature_map=MAP, implementation=KERNELS, chunk_size=C)
    actual = cases.compiled(lambda inputs: attend(**inputs))(inputs)
    cases.assert_close(actual, defined(MAP)(**inputs), 5e-6)


def test_means_of_every_head_beside_shared_weights():
    feature_map = TunedFeatures("wderf_s", M)
    inputs = arguments(feature_map, C - 1, heads=2, kv_heads=2)
    tuning = untuned(D)._replace(query_shift=draw(6, 2, D), key_shift=draw(7, 2, D))
    inputs["parameters"] = fold(inputs["parameters"].rows, tuning)
    options = {"feature_map": feature_map, "implementation": KERNELS, "chunk_size": C}
    actual = cases.compiled(lambda inputs: cases.attend(**inputs, **options))(inputs)
    cases.assert_close(actual, defined(feature_map)(**inputs), 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16(causal):
    """Log-features are exact to 16 bits; features and values are rounded."""
    smooth, fixed = with_everything(MAP, arguments(MAP, 37, dtype=jnp.bfloat16))
    check(smooth, fixed, 2e-2, feature_map=MAP, causal=causal)


@pytest.mark.slow
def test_values_of_a_large_mean_spoil_no_gradient():
    """Numerators and denominators cancel; what is rounded must cancel too, but for the output."""
    smooth = arguments(MAP, 100, dtype=jnp.bfloat16, heads=1, kv_heads=1)
    smooth["value"] = smooth["value"] + 8
    check(smooth, {}, 1e-1, feature_map=MAP, causal=True)


def test_chunks_of_the_compiled_kernels():
    """Of 128 positions, with a block of which the last part is empty."""
    smooth, fixed = with_everything(MAP, arguments(MAP, 150, heads=2, kv_heads=1))
    check(smooth, fixed, 1e-5, feature_map=MAP, causal=True, chunk_size=None)


def test_epsilon():
    feature_map = elementwise_map("relu", num_rows=M)
    smooth = arguments(feature_map, 9, heads=1, kv_heads=1)
    check(smooth, {}, 1e-5, feature_map=feature_map, causal=True, epsilon=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": TrigonometricFeatures(M)}, "TrigonometricFeatures"),
        ({"feature_map": elementwise_map("gelu", num_rows=M)}, "gelu"),
        ({"segment_ids": jnp.zeros((1, 5), jnp.int32), "causal": True}, "segment_ids"),
        ({"output": "sum"}, "output='sum'"),
        ({"unroll": 2}, "unroll=2"),
        ({"saved_states": "all"}, "save no states"),
        ({"precision": jax.lax.DotAlgorithmPreset.TF32_TF32_F32}, "TF32_TF32_F32"),
        ({name: jnp.zeros((1, 5, 1, 512)) for name in ("query", "key", "value")}, "width of 256"),
    ],
)
def test_refused(options, message):
    smooth = arguments(MAP, 5)
    feature_map = options.get("feature_map", MAP)
    smooth["parameters"] = feature_map.init(jax.random.key(0), 512 if "value" in options else D)
    call = {**smooth, "feature_map": MAP, **options}
    with pytest.raises(NotImplementedError, match=message):
        cases.attend(**call, implementation=KERNELS)


@pytest.mark.slow
def test_no_races():
    """In the interpreter that simulates a TPU's memories and copies."""
    from jax.experimental.pallas import tpu as pltpu

    inputs = arguments(MAP, 2 * C + 3, heads=2, kv_heads=2)
    plan = Plan(feature_map=MAP, causal=True, chunk_size=C)
    state = empty_state(MAP, inputs["parameters"], (B,), 2, D, V)
    values = (inputs[name] for name in ("query", "key", "value", "parameters"))
    out, _ = attend_on(
        plan,
        Inputs(*values, None, None, None, state),
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    expected = defined(MAP, causal=True)(**inputs)
    cases.assert_close(out, expected, 5e-6)


@pytest.mark.parametrize(
    ("causal", "dtype", "width"), [(True, jnp.float32, 64), (False, jnp.bfloat16, 128)]
)
def test_lowers_for_tpus(causal, dtype, width):
    """To one kernel forward and two backward, at the sizes models have; none is run."""
    feature_map = PositiveFeatures(256)
    plan = Plan(feature_map=feature_map, causal=causal)
    like = jax.ShapeDtypeStruct((2, 1000, 8, width), dtype)
    parameters = jax.ShapeDtypeStruct((256, width), jnp.float32)

    def loss(query, key, value, parameters):
        state = empty_state(feature_map, parameters, (2,), 8, width, width)
        inputs = Inputs(query, key, value, parameters, None, None, None, state)
        return attend_on(plan, inputs, interpret=False)[0].astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(like, like, like, parameters)
    lowered = traced.lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("custom_call @tpu_custom_call") == 3
