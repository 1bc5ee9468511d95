"""The gin names of the original code, for functions and kernels."""

import inspect

import gin
import jax.numpy as jnp
import numpy as np
import pytest

import fast_attention
from fast_attention import (
    FastAttention,
    gin_bindings,
    make_efficient_attention,
    make_local_attention,
    make_strided_attention,
)
from fast_attention.feature_maps import (
    ExponentialFeatures,
    SignedElementwiseFeatures,
    TunedFeatures,
)

FORMULAS = {
    "jcos": np.cos,
    "jsin": np.sin,
    "jtanh": np.tanh,
    "jsigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "jgelu": None,
    "jrelu": lambda x: np.maximum(x, 0),
    "jrequ": lambda x: np.maximum(x, 0) ** 2,
    "jexp": np.exp,
    "jidentity": lambda x: x,
    "jshiftedelu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
}
X = jnp.linspace(-2, 2, 9)


@pytest.fixture(autouse=True)
def clean_gin():
    gin.clear_config()
    yield
    gin.clear_config()


@gin.configurable
def a_model(attention_fn=None):
    return attention_fn


def built(*bindings):
    gin.parse_config([*bindings])
    return a_model()


def test_softmax_attention_by_name():
    attention = built(
        "a_model.attention_fn = @make_fast_softmax_attention()",
        "make_fast_softmax_attention.qkv_dim = 64",
        "make_fast_softmax_attention.nb_features = 12",
        "make_fast_softmax_attention.unidirectional = True",
        "make_fast_softmax_attention.lax_scan_unroll = 16",
        "make_fast_softmax_attention.renormalize_attention = False",
    )
    assert isinstance(attention, FastAttention)
    assert attention.qkv_dim == 64 and attention.unroll == 16 and not attention.renormalize
    assert attention.unidirectional and attention.feature_map.num_rows == 12


def test_strided_efficient_attention_by_name():
    attention = built(
        "a_model.attention_fn = @make_strided_attention()",
        "make_strided_attention.attention_fn = @make_efficient_attention()",
        "make_strided_attention.stride = 16",
        "make_efficient_attention.unidirectional = True",
        "make_efficient_attention.blindspot_size = 8",
    )
    assert attention == make_strided_attention(make_efficient_attention(True, 8), 16)


def test_every_factory_has_a_gin_name():
    names = [name for name in vars(fast_attention) if name.startswith("make_")]
    assert len(names) >= 7
    for name in set(names) - {"make_mesh"}:
        found = gin.get_configurable(name).__wrapped__
        assert inspect.unwrap(found).__name__ == name


def test_local_attention_by_name():
    attention = built(
        "a_model.attention_fn = @make_local_attention()",
        "make_local_attention.window_size = 16",
        "make_local_attention.unidirectional = True",
    )
    assert attention == make_local_attention(16, unidirectional=True)


@pytest.mark.parametrize("name", FORMULAS)
def test_kernels_by_name(name):
    attention = built(
        "a_model.attention_fn = @make_fast_generalized_attention()",
        f"make_fast_generalized_attention.kernel_fn = @{name}",
        "make_fast_generalized_attention.kernel_epsilon = 0.0",
        "make_fast_generalized_attention.features_type = 'ortho'",
    )
    if FORMULAS[name] is not None:
        np.testing.assert_allclose(
            attention.feature_map.kernel(X), FORMULAS[name](np.asarray(X)), rtol=1e-5, atol=1e-6
        )
    signed = name in ("jcos", "jsin", "jtanh", "jgelu", "jidentity")
    assert isinstance(attention.feature_map, SignedElementwiseFeatures) == signed
    assert isinstance(attention.feature_map, ExponentialFeatures) == (name == "jexp")
    assert attention.epsilon == (1e-6 if signed else 0.0)


def test_the_list_is_complete():
    assert gin_bindings.KERNEL_NAMES.keys() == FORMULAS.keys()


def test_an_unknown_parameter_is_refused():
    with pytest.raises(ValueError, match="nb_featurs"):
        built("make_fast_softmax_attention.nb_featurs = 3")


def test_estimators_and_couplings_by_name():
    attention = built(
        "a_model.attention_fn = @make_fast_softmax_attention()",
        "make_fast_softmax_attention.unidirectional = True",
        "make_fast_softmax_attention.estimator = 'wderf_s'",
        "make_fast_softmax_attention.projection = 'orthogonal_antithetic'",
        "make_fast_softmax_attention.moment_decay = 0.99",
    )
    assert attention.feature_map == TunedFeatures("wderf_s", 128, "orthogonal", both_signs=True)
    assert attention.calibration == "stored" and attention.moment_decay == 0.99
