"""Every implementation computes the same as the quadratic definition, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.linear import cases

OTHERS = [name for name in cases.IMPLEMENTATIONS if name != "quadratic"]
WHOLE = 16  # Whole chunks and blocks: one loop body to compile.


@functools.cache
def state_of(name):
    """The state after some keys, compiled once a map."""
    attend = functools.partial(
        cases.attend, feature_map=cases.MAPS[name], return_state=True, implementation="quadratic"
    )
    return cases.compiled(
        lambda k, v, parameters, bias: attend(k, k, v, parameters=parameters, key_bias=bias)[1]
    )


def everything(name, dtype, *, causal, length=WHOLE, keys=None):
    """Arguments with padding, a bias, an initial state and, if causal, segments."""
    q, k, v = cases.qkv(length=length, keys=keys, dtype=dtype)
    parameters = cases.parameters_of(name, dtype)
    size = k.shape[1]
    bias = jnp.asarray(cases.draw(4, cases.B, size, cases.K), dtype)
    _, k0, v0 = cases.qkv(1, length=3, dtype=dtype)
    # Its bias gives the state of a map without exponents a scale too.
    state = state_of(name)(k0, v0, parameters, bias[:, :3])
    smooth = {
        "query": q,
        "key": k,
        "value": v,
        "parameters": parameters,
        "key_bias": bias,
        "kv": state.kv,
        "k_sum": state.k_sum,
    }
    # Position 0 of row 0 and the first key of a later chunk are padding.
    mask = np.ones((cases.B, size), bool)
    mask[0, [0, -1]] = mask[1, 8:10] = False
    fixed = {"key_mask": jnp.asarray(mask), "initial_state": state}
    if causal:
        ids = [[0] * 3 + [1] * 6 + [5] * (length - 9), [2] * length]
        fixed["segment_ids"] = jnp.asarray(ids)
    return smooth, fixed


@functools.cache
def reference(**options):
    """The definition and its gradients, compiled once for all that is compared with it."""
    return cases.compiled(functools.partial(cases.gradients, implementation="quadratic", **options))


def both(implementation, smooth, fixed, *, unroll=1, chunk_size=cases.CHUNK, **options):
    actual = functools.partial(
        cases.gradients,
        implementation=implementation,
        chunk_size=chunk_size,
        unroll=unroll,
        **options,
    )
    return cases.compiled(actual)(smooth, fixed), reference(**options)(smooth, fixed)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize(
    ("name", "causal", "length", "keys"),
    [
        ("positive", True, WHOLE, None),
        ("trigonometric", True, WHOLE, None),
        ("relu", True, WHOLE + 1, None),
        ("positive", False, WHOLE + 1, WHOLE),
    ],
)
def test_with_everything_at_once(name, causal, length, keys, implementation):
    with jax.enable_x64(True):
        smooth, fixed = everything(name, jnp.float64, causal=causal, length=length, keys=keys)
        actual, expected = both(
            implementation, smooth, fixed, causal=causal, feature_map=cases.MAPS[name]
        )
        assert actual[0][0].dtype == jnp.float64
        cases.assert_close(actual, expected, 1e-9)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("hyperbolic", {"causal": True, "chunk_size": 1, "unroll": 2}),
        ("elu+1", {"causal": True, "chunk_size": 16}),
        ("exp", {"causal": True, "output": "sum"}),
        ("trigonometric", {"causal": False, "output": "sum"}),
        ("relu", {"causal": False, "epsilon": 0.5, "unroll": 2}),
    ],
)
def test_with_nothing_optional(name, options, implementation):
    with jax.enable_x64(True):
        length = options.get("chunk_size", cases.T - 1) + 1  # Whole chunks, and one more.
        q, k, v = cases.qkv(length=max(length, 5), dtype=jnp.float64)
        smooth = {
            "query": q,
            "key": k,
            "value": v,
            "parameters": cases.parameters_of(name, jnp.float64),
        }
        actual, expected = both(implementation, smooth, {}, feature_map=cases.MAPS[name], **options)
        cases.assert_close(actual, expected, 1e-9)


@pytest.mark.parametrize("implementation", OTHERS)
def test_segments_in_both_directions_with_everything(implementation):
    with jax.enable_x64(True):
        smooth, fixed = everything("positive", jnp.float64, causal=True)
        actual, expected = both(
            implementation, smooth, fixed, causal=False, feature_map=cases.MAPS["positive"]
        )
        cases.assert_close(actual, expected, 1e-9)


LONGEST = 5


@functools.cache
def causal_outputs():
    """Inputs and outputs of the longest length: the first outputs are those of shorter ones."""
    arrays = cases.qkv(length=LONGEST, dtype=jnp.float64)
    options = {
        "feature_map": cases.MAPS["positive"],
        "parameters": cases.parameters_of("positive", jnp.float64),
        "causal": True,
    }
    attend = functools.partial(cases.attend, implementation="quadratic", **options)
    return arrays, options, cases.compiled(attend)(*arrays)


@pytest.mark.parametrize("implementation", OTHERS)
@pytest.mark.parametrize(("chunk", "length"), [(1, 1), (1, 2), (4, 3), (4, 4), (4, LONGEST)])
def test_any_length_and_chunk_size(chunk, length, implementation):
    with jax.enable_x64(True):
        arrays, options, expected = causal_outputs()
        attend = functools.partial(
            cases.attend, chunk_size=chunk, implementation=implementation, **options
        )
        actual = cases.compiled(attend)(*(np.asarray(x)[:, :length] for x in arrays))
        cases.assert_close(actual, np.asarray(expected)[:, :length], 1e-10)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        *((name, dtype) for name in OTHERS for dtype in (jnp.float32, jnp.bfloat16)),
        ("quadratic", jnp.bfloat16),
    ],
)
@pytest.mark.usefixtures("optimized")
def test_lower_precision_against_float64(implementation, dtype):
    """Programs as users have them round no more; the float64 one sees the same rounded inputs."""
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    smooth, fixed = everything("positive", dtype, causal=True)
    smooth["parameters"] = cases.parameters_of("positive")
    options = {"causal": True, "feature_map": cases.MAPS["positive"]}
    (out, *sums), grads = cases.compiled(
        functools.partial(
            cases.gradients, implementation=implementation, chunk_size=cases.CHUNK, **options
        )
    )(smooth, fixed)
    assert out.dtype == dtype
    assert all(x.dtype == jnp.float32 for x in sums)
    assert {name: x.dtype for name, x in grads.items()} == {
        name: x.dtype for name, x in smooth.items()
    }
    with jax.enable_x64(True):
        exact = jax.tree.map(
            lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            (smooth, fixed),
        )
        expected = reference(**options)(*exact)
    cases.assert_close(((out, *sums), grads), expected, tolerance)
