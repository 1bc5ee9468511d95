"""Chunks with positions in lanes compute the definition.

What they share with other implementations is tested beside those: laws, large norms, causality.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from fast_attention.feature_maps import (
    HyperbolicFeatures,
    PositiveFeatures,
    TrigonometricFeatures,
    TunedFeatures,
    elementwise_map,
)
from tests.linear import cases
from tests.linear.test_pallas_tpu import M, arguments, check, draw, with_everything

MAP = PositiveFeatures(M)
LANES = "time_minor_chunks"


@pytest.mark.parametrize(
    ("feature_map", "dtype", "causal"),
    [
        (MAP, jnp.float32, True),
        (MAP, jnp.bfloat16, False),
        (elementwise_map("elu+1", epsilon=0.0), jnp.bfloat16, False),
        pytest.param(HyperbolicFeatures(M // 2), jnp.bfloat16, True, marks=pytest.mark.slow),
        pytest.param(
            elementwise_map("exp", num_rows=M), jnp.bfloat16, True, marks=pytest.mark.slow
        ),
        pytest.param(
            elementwise_map("sigmoid", num_rows=M), jnp.bfloat16, True, marks=pytest.mark.slow
        ),
    ],
)
def test_with_everything_at_once(feature_map, dtype, causal):
    """A mask, a bias, an initial state and shared key heads, in whole chunks and a shorter one."""
    smooth, fixed = with_everything(feature_map, arguments(feature_map, 37, dtype=dtype))
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-5
    check(smooth, fixed, tolerance, feature_map=feature_map, causal=causal, implementation=LANES)


@pytest.mark.parametrize("causal", [True, False])
def test_widths_of_whole_lanes(causal):
    """Such heads have their width in lanes outside the chunks."""
    shapes = {"query": (1, 11, 2, 128), "key": (1, 11, 1, 128), "value": (1, 11, 1, 128)}
    inputs = {
        name: jnp.asarray(cases.draw((i,), *shape, scale=0.3), jnp.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }
    inputs["parameters"] = MAP.init(jax.random.key(0), 128)
    check(inputs, {}, 1e-5, feature_map=MAP, causal=causal, chunk_size=4, implementation=LANES)


def test_trained_features_in_bfloat16():
    feature_map = TunedFeatures("wderf_s", M, both_signs=True, trained=True)
    smooth = arguments(feature_map, 19, dtype=jnp.bfloat16)
    check(smooth, {}, 2e-2, feature_map=feature_map, implementation=LANES)


@pytest.mark.slow
def test_values_of_a_large_mean_spoil_no_gradient():
    """Numerators and denominators cancel; what is rounded must cancel too, but for the output."""
    smooth = arguments(MAP, 100, dtype=jnp.bfloat16, heads=1, kv_heads=1)
    smooth["value"] = smooth["value"] + 8
    check(smooth, {}, 1e-1, feature_map=MAP, causal=True, implementation=LANES)


@pytest.mark.parametrize("axes", [(2,), (2, 2)], ids=["head", "row and head"])
def test_parameters_of_every(axes):
    smooth = arguments(MAP, 16, heads=2, kv_heads=2, dtype=jnp.bfloat16)
    each = lambda key: MAP.init(key, smooth["key"].shape[-1])  # noqa: E731
    for _ in axes:
        each = jax.vmap(each)
    smooth["parameters"] = each(jax.random.split(jax.random.key(0), axes))
    check(smooth, {}, 2e-2, feature_map=MAP, causal=True, implementation=LANES)


def test_epsilon_and_the_highest_precision():
    feature_map = elementwise_map("relu", num_rows=M)
    smooth = arguments(feature_map, 9, heads=1, kv_heads=1, dtype=jnp.bfloat16)
    smooth = jax.tree.map(lambda x: x.astype(jnp.bfloat16), smooth)
    options = {"feature_map": feature_map, "causal": True, "epsilon": 0.5, "precision": "highest"}
    check(smooth, {}, 4e-3, implementation=LANES, **options)  # The output is rounded.


def test_a_branch_stays_a_branch_under_vmap():
    """For keys beyond the scale; a selection would compute it always."""
    attend = functools.partial(
        cases.attend, feature_map=MAP, causal=True, implementation=LANES, chunk_size=8
    )
    inputs = jax.tree.map(lambda x: x[None], arguments(MAP, 16))
    text = jax.jit(jax.vmap(lambda inputs: attend(**inputs))).lower(inputs).as_text()
    assert "stablehlo.case" in text


@pytest.mark.parametrize(
    ("causal", "twice"),
    [
        (True, jax.hessian),
        (False, jax.hessian),
        pytest.param(True, lambda f: jax.jacrev(jax.jacrev(f)), marks=pytest.mark.slow),
    ],
    ids=["causal", "bidirectional", "reverse over reverse"],
)
def test_second_derivatives(causal, twice):
    """In one chunk a key exceeds the scale."""
    shapes = {"query": (1, 6, 2, 4), "key": (1, 6, 1, 4), "value": (1, 6, 1, 3)}
    inputs = {name: draw(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    inputs["key"] = inputs["key"] * jnp.where(jnp.arange(6) == 3, 30, 1)[None, :, None, None]
    inputs["parameters"] = MAP.init(jax.random.key(0), 4)

    def second(dtype, **options):
        def loss(factors):
            arrays = {name: x.astype(dtype) for name, x in inputs.items()}
            for name, factor in zip(shapes, factors, strict=True):
                arrays[name] = arrays[name] * factor
            out = cases.attend(**arrays, feature_map=MAP, causal=causal, **options)
            return cases.weighted_sum(out**2)

        return cases.compiled(twice(loss))(jnp.ones(3, dtype))

    found = second(jnp.float32, implementation=LANES, chunk_size=4)
    with jax.enable_x64(True):
        cases.assert_close(found, second(jnp.float64, implementation="quadratic"), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": TrigonometricFeatures(M)}, "TrigonometricFeatures"),
        ({"segment_ids": jnp.zeros((1, 5), jnp.int32), "causal": True}, "segment_ids"),
        ({"output": "sum"}, "output='sum'"),
    ],
)
def test_refused(options, message):
    with pytest.raises(NotImplementedError, match=message):
        cases.attend(**{**arguments(MAP, 5), "feature_map": MAP, **options}, implementation=LANES)
