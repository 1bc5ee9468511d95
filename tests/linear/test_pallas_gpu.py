"""The GPU kernels, interpreted, compute the definition; and they lower for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import HyperbolicFeatures, PositiveFeatures, elementwise_map
from fast_attention.linear.pallas_gpu import segments
from fast_attention.linear.pallas_gpu.api import attend_on
from fast_attention.linear.state import empty_state
from fast_attention.linear.types import Inputs, Plan
from tests.linear import cases

KERNELS = "pallas_gpu_interpret"
C, H, K, D, V, M = 64, 2, 1, 16, 8, 40
MAP = PositiveFeatures(M)


def draw(seed, *shape, dtype=jnp.float32, scale=1.0):
    return jnp.asarray(cases.draw(seed, *shape, scale=scale), dtype)


def arguments(length, keys=None, *, dtype=jnp.float32, scale=1.0, batch=1):
    keys = keys or length
    return {
        "query": draw(0, batch, length, H, D, dtype=dtype, scale=scale),
        "key": draw(1, batch, keys, K, D, dtype=dtype, scale=scale),
        "value": draw(2, batch, keys, K, V, dtype=dtype),
        "parameters": MAP.init(jax.random.key(0), D),
    }


@functools.cache
def defined(**options):
    """The definition, compiled once for calls of one shape."""
    return cases.compiled(
        functools.partial(cases.attend, feature_map=MAP, implementation="quadratic", **options)
    )


def with_state_and_padding(smooth):
    """Adds an initial state and a mask."""
    k, v = draw(3, 1, 3, K, D), draw(4, 1, 3, K, V)
    _, state = defined(return_state=True)(k, k, v, parameters=smooth["parameters"])
    size = smooth["key"].shape[1]
    mask = jnp.ones(smooth["key"].shape[:2], bool).at[:, size // 2].set(size == 1)
    smooth = {**smooth, "kv": state.kv, "k_sum": state.k_sum}
    return smooth, {"key_mask": mask, "initial_state": state}


def check(smooth, fixed, tolerance, *, feature_map=MAP, precision="highest", **options):
    """Compares outputs, final sums and all gradients with the definition in float64."""
    run = functools.partial(cases.gradients, feature_map=feature_map, **options)
    actual = cases.compiled(functools.partial(run, implementation=KERNELS, precision=precision))(
        smooth, fixed
    )
    for name, gradient in actual[1].items():
        assert gradient.dtype == smooth[name].dtype
    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (smooth, fixed),
        )
        expected = cases.compiled(functools.partial(run, implementation="quadratic"))(*exact)
    cases.assert_close(actual, expected, tolerance)


@functools.cache
def attend(causal, **options):
    return jax.jit(
        functools.partial(
            cases.attend, feature_map=MAP, causal=causal, implementation=KERNELS, **options
        )
    )


@pytest.mark.slow
def test_causal_gradients_agree():
    check(*with_state_and_padding(arguments(2 * C + 3)), 5e-6, causal=True)


@pytest.mark.slow
def test_bidirectional_gradients_agree():
    check(*with_state_and_padding(arguments(C + 1, 7)), 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "keys", "causal"),
    [(1, 1, True), (C, C, True), (C + 1, C + 1, True), (1, C + 1, False)],
)
def test_outputs_agree_at_any_length(length, keys, causal):
    inputs = arguments(length, keys)
    expected = defined(causal=causal)(**inputs)
    cases.assert_close(attend(causal, precision="highest")(**inputs), expected, 5e-6)


@pytest.mark.slow
def test_true_numerators_of_hyperbolic_features_with_a_bias():
    """Also more features than a tile, and a projection for each head."""
    feature_map = HyperbolicFeatures(C // 2 + 3)
    smooth = arguments(9, scale=0.7)
    smooth["parameters"] = feature_map.init(jax.random.key(1), D)[None]
    smooth["key_bias"] = draw(4, 1, 9, K)
    check(smooth, {}, 5e-6, feature_map=feature_map, output="sum", causal=True)


@pytest.mark.slow
def test_a_projection_for_each_row_and_head_in_segments():
    """All segments of a sequence have the projections of its row."""
    smooth = arguments(2 * C + 2, batch=2)
    smooth["parameters"] = draw(5, 2, K, M, D)
    check(smooth, {}, 5e-6, causal=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "causal", "tolerance"), [(jnp.float32, True, 3e-5), (jnp.bfloat16, False, 2e-2)]
)
def test_default_precision(dtype, causal, tolerance):
    """Two parts of 8 bits for float32, one for bfloat16; log-features are float32 in both."""
    check(arguments(C + 3, dtype=dtype), {}, tolerance, causal=causal, precision=None)


@pytest.mark.slow
def test_past_is_bit_equal_under_any_future():
    inputs = {name: np.asarray(x) for name, x in arguments(C + 9, dtype=jnp.bfloat16).items()}
    out = np.asarray(attend(True)(**inputs), np.float32)
    for t in (1, 5, C - 1, C, C + 1, C + 8):
        later = (np.arange(C + 9) >= t)[:, None, None]
        changed = {
            name: x if name == "parameters" else np.where(later, x * x.dtype.type(1e4), x)
            for name, x in inputs.items()
        }
        changed = np.asarray(attend(True)(**changed), np.float32)
        np.testing.assert_array_equal(changed[:, :t], out[:, :t])
        assert (changed[:, t:] != out[:, t:]).any()


@pytest.mark.slow
@pytest.mark.parametrize(("causal", "dtype"), [(True, jnp.bfloat16), (False, jnp.float16)])
def test_inputs_times_100_stay_finite(causal, dtype):
    inputs = arguments(C + 9, dtype=dtype, scale=100.0)

    def loss(inputs):
        out = attend(causal)(**inputs)
        return jnp.sum(out.astype(jnp.float32) ** 2) * 1e-4, out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    for x in (out, *grads.values()):
        assert np.isfinite(np.asarray(x, np.float32)).all()
    largest = np.abs(np.asarray(inputs["value"], np.float32)).max()
    assert np.abs(np.asarray(out, np.float32)).max() <= 1.01 * largest


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1, -1])
def test_opposed_and_aligned_keys_of_large_norm(sign):
    """Squared norms of 200 after scaling; exponents there have a float32 spacing of 1.5e-5."""
    inputs = arguments(C + 9)
    key = inputs["key"]
    inputs["key"] = key * (200 * D**0.5) ** 0.5 / jnp.linalg.norm(key, axis=-1, keepdims=True)
    inputs["query"] = sign * jnp.repeat(inputs["key"], H // K, axis=2)
    expected = defined(causal=True)(**inputs)
    cases.assert_close(attend(True)(**inputs), expected, 2e-4)


@pytest.mark.slow
def test_gradients_agree_at_squared_norms_of_2000():
    """Rows whose exponents are too far apart for the kernels are computed in chunks."""
    inputs = arguments(C + 9)
    for name in ("query", "key"):
        x = inputs[name]
        inputs[name] = x * (2000 * D**0.5) ** 0.5 / jnp.linalg.norm(x, axis=-1, keepdims=True)
    check(inputs, {}, 5e-4, causal=True)


@pytest.mark.slow
@pytest.mark.parametrize(("causal", "unseen"), [(True, 3), (False, 9)])
def test_rows_with_nothing_to_see_are_0(causal, unseen):
    inputs = arguments(9)
    mask = (jnp.arange(9) >= unseen)[None]
    inputs["key"] = jnp.where(mask[..., None, None], inputs["key"], jnp.nan)

    def loss(inputs):
        out = attend(causal)(**inputs, key_mask=mask)
        return jnp.sum(out[:, unseen:] ** 2), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    assert not np.asarray(out[:, :unseen]).any()
    assert np.isfinite(out).all() and all(np.isfinite(x).all() for x in grads.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": elementwise_map("relu", num_rows=M)}, "ElementwiseFeatures"),
        ({"segment_ids": jnp.zeros((1, 5), jnp.int32), "causal": True}, "segment_ids"),
        ({"chunk_size": 32}, "chunk_size=32"),
        ({"unroll": 2}, "unroll=2"),
        ({"saved_states": "all"}, "save no states"),
        ({"precision": jax.lax.DotAlgorithmPreset.TF32_TF32_F32}, "precisions"),
        ({name: jnp.zeros((1, 5, H, 256)) for name in ("query", "key", "value")}, "shared memory"),
    ],
)
def test_refused(options, message):
    smooth = arguments(5)
    if "value" in options:
        smooth["parameters"] = MAP.init(jax.random.key(0), 256)
    call = {**smooth, "feature_map": MAP, **options}
    with pytest.raises(NotImplementedError, match=message):
        cases.attend(**call, implementation=KERNELS)


def test_float64_is_refused():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="float64"):
        attend(False)(**arguments(5, dtype=jnp.float64))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_another_platform_is_refused_and_the_next_implementation_asked():
    inputs = arguments(5)
    with pytest.raises(NotImplementedError, match="Hopper.*got cpu"):
        cases.attend(**inputs, feature_map=MAP, implementation="pallas_gpu")
    run = functools.partial(cases.attend, **inputs, feature_map=MAP)
    np.testing.assert_array_equal(run(implementation=("pallas_gpu", "chunked")), run())


@pytest.mark.parametrize(
    ("causal", "dtype", "width"), [(True, jnp.float32, 64), (False, jnp.bfloat16, 128)]
)
def test_lowers_for_cuda(causal, dtype, width):
    """To two kernels forward and two backward, or three if causal; none is run."""
    feature_map = PositiveFeatures(256)
    plan = Plan(feature_map=feature_map, causal=causal)
    like = jax.ShapeDtypeStruct((2, 1000, 8, width), dtype)
    parameters = jax.ShapeDtypeStruct((256, width), jnp.float32)

    def loss(query, key, value, parameters):
        state = empty_state(feature_map, parameters, (2,), 8, width, width)
        inputs = Inputs(query, key, value, parameters, None, None, None, state)
        return attend_on(plan, inputs, interpret=False)[0].astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(like, like, like, parameters)
    lowered = traced.lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 4 + causal


@pytest.mark.parametrize("rows", [1, 16, 64, 100, 132, 500])
@pytest.mark.parametrize("length", [1, 511, 512, 1000, 4096, 4100, 65536])
def test_segments_keep_all_multiprocessors_busy(rows, length):
    count = segments.segment_count(rows, length)
    enough = -(-segments.MULTIPROCESSORS // rows)
    if count * segments.SHORTEST > length:
        assert count <= 1
    # Fewer only where segments would be too short; not many more in any case.
    assert count >= enough or (count + 1) * segments.SHORTEST > length
    assert count < 2 * enough
