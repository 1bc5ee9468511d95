"""Every registered case compiles and runs, and computes what it is said to compute."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import baselines, torch_peers
from benchmarks.cases import attention_cases
from benchmarks.programs import BACKWARD, FORWARD, compile_jax
from benchmarks.settings import Setting, make_inputs
from fast_attention.feature_maps import PositiveFeatures
from fast_attention.mechanisms.lsh.exact import shared_qk_attention
from tests.linear import cases

SETTING = Setting(length=12, batch=2, heads=2, head_dim=8, features=16)
CASES = {case.info.name: case for case in attention_cases("cpu")}
JAX_CASES = [name for name in CASES if "torch" not in name]


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(SETTING)


def softmax_reference(inputs, causal):
    return lambda q, k, v: baselines.exact(q, k, v, causal=causal)


def favor_reference(inputs, causal):
    return lambda q, k, v: cases.attend(
        q,
        k,
        v,
        feature_map=PositiveFeatures(SETTING.features),
        parameters=inputs.projection,
        causal=causal,
        implementation="quadratic",
    )


def relu_reference(inputs, causal):
    def attend(q, k, v):
        q, k = (jax.nn.relu(x * x.shape[-1] ** -0.25 @ inputs.projection.T) + 1e-3 for x in (q, k))
        weights = jnp.einsum("bthm,bshm->bhts", q, k)
        weights = jnp.tril(weights) if causal else weights
        return jnp.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)

    return attend


def lsh_reference(inputs, causal):
    # Few tokens share one chunk, where all see all.
    return lambda q, _, v: shared_qk_attention(q, v, causal=causal)


BOTH_MEASURES = ("causal/favor-chunked", "identity")
REFERENCES = {
    "lsh": lsh_reference,
    "favor-chunked": favor_reference,
    "favor-quadratic": favor_reference,
    "favor-reference": favor_reference,
    "favor-pallas_gpu": favor_reference,
    "favor-parallel_chunks": favor_reference,
    "favor-time_minor_chunks": favor_reference,
    "relu": relu_reference,
    "per-token": favor_reference,
    "whole-sequence": favor_reference,
    "exact": softmax_reference,
    # The inputs are shorter than its window.
    "local": softmax_reference,
}


@functools.cache
def expected(reference, inputs, causal):
    """Output and gradients by definition."""
    return compile_jax(reference(inputs, causal), inputs.qkv, inputs, BACKWARD).call()


@pytest.mark.parametrize("name", JAX_CASES)
def test_every_case_computes_what_it_says(name, inputs):
    case = CASES[name]
    # The last measure has the outputs of the others too: one program shows what all compute.
    for measure in case.measures if name in BOTH_MEASURES else case.measures[-1:]:
        try:
            program = case.compile(inputs, measure)
        except NotImplementedError as error:
            if not name.endswith("pallas_gpu"):
                raise
            pytest.skip(str(error))
        found = program.wait(program.call())
        assert program.memory is None or program.memory >= SETTING.tensor_bytes
        kind, _, mechanism = name.partition("/")
        if mechanism not in REFERENCES:
            continue
        wanted = expected(REFERENCES[mechanism], inputs, kind == "causal")
        wanted = wanted[:1] if measure == FORWARD else wanted
        for a, b in zip(jax.tree.leaves(found), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_new_kind_of_case_is_compared_too():
    mechanisms = {name.partition("/")[2] for name in JAX_CASES if "/" in name}
    assert mechanisms == set(REFERENCES)


def test_the_identity_returns_the_values_and_their_gradient(inputs):
    out, d_query, d_key, d_value = CASES["identity"].compile(inputs, BACKWARD).call()
    np.testing.assert_array_equal(out, inputs.qkv[2])
    np.testing.assert_array_equal(d_value, inputs.cotangent)
    assert not d_query.any() and not d_key.any()


def test_the_floor_does_the_four_products(inputs):
    query, key, value = inputs.qkv
    # In one chunk the state that is read is that of all keys.
    found = CASES["floor"].compile(inputs, FORWARD).call()
    q, k = (jnp.einsum("bthd,md->bthm", x, inputs.projection) for x in (query, key))
    expected = jnp.einsum("bthm,bshm,bshd->bthd", q, k, value)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-2)


def test_the_floor_goes_over_all_chunks(inputs):
    found = baselines.matmul_floor(*inputs.qkv, inputs.projection, chunk=4)
    whole = baselines.matmul_floor(*inputs.qkv, inputs.projection)
    np.testing.assert_allclose(found[:, -4:], whole[:, -4:], rtol=1e-3, atol=1e-2)
    assert jnp.abs(found[:, :4] - whole[:, :4]).max() > 1
    with pytest.raises(NotImplementedError, match="multiple of 5"):
        baselines.matmul_floor(*inputs.qkv, inputs.projection, chunk=5)


def test_an_accelerator_has_cases_of_its_own(inputs):
    cases = {case.info.name: case for case in attention_cases("gpu")}
    assert {"causal/favor-chunked", "causal/exact", "causal/given", "identity"} <= set(cases)
    given = cases["bidirectional/given"].compile(inputs, FORWARD)
    features = relu_features(inputs)
    weights = jnp.einsum("bthm,bshm->bhts", *features)
    weights = weights / weights.sum(-1, keepdims=True)
    expected = jnp.einsum("bhts,bshd->bthd", weights, inputs.qkv[2])
    np.testing.assert_allclose(given.call(), expected, rtol=1e-3, atol=1e-4)


def relu_features(inputs):
    return [jax.nn.relu(x @ inputs.projection.T) + 1e-3 for x in inputs.qkv[:2]]


def test_exact_attention_without_cudnn_cannot_serve(inputs):
    with pytest.raises(NotImplementedError, match="cuDNN"):
        cases = {case.info.name: case for case in attention_cases("gpu")}
        cases["causal/exact"].compile(inputs, FORWARD)


def test_peers_are_there_only_when_installed(monkeypatch):
    monkeypatch.setattr(torch_peers, "installed", lambda *modules: True)
    names = {case.info.name for case in attention_cases("cpu")}
    assert {"causal/torch-sdpa", "causal/performer-pytorch"} <= names
    monkeypatch.setattr(torch_peers, "installed", lambda *modules: False)
    names = {case.info.name for case in attention_cases("cpu")}
    assert not {"causal/torch-sdpa", "causal/performer-pytorch"} & names


def test_inputs_are_the_same_in_every_run():
    for a, b in zip(make_inputs(SETTING).qkv, make_inputs(SETTING).qkv, strict=True):
        np.testing.assert_array_equal(a, b)
    half = make_inputs(dataclasses.replace(SETTING, dtype="bfloat16"))
    assert {x.dtype for x in (*half.qkv, half.cotangent)} == {jnp.dtype("bfloat16")}
