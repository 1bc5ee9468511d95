"""Flax's two multi-head attention modules behind one pure interface, and what they are held to.

The expected value of every test here is the same module with the same parameters, its
`attention_fn` replaced by the quadratic definition.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention

BATCH, LENGTH, FEATURES, HEADS, HEAD_DIM, ROWS = 2, 11, 12, 4, 8, 24
PROJECTION = jax.random.normal(jax.random.key(7), (ROWS, HEAD_DIM))


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """One of our factories, and its features written down once more."""

    name: str
    make: Callable[..., Any]
    features: Callable[[jax.Array], jax.Array]

    def definition(self, *, unidirectional=False):
        return quadratic_attention(self.features, unidirectional=unidirectional)


def _softmax_features(x):
    x = x * HEAD_DIM**-0.25
    return jnp.exp(x @ PROJECTION.T - 0.5 * jnp.sum(x * x, axis=-1, keepdims=True))


def _generalized_features(x):
    return jax.nn.relu(x @ PROJECTION.T) + 1e-3


def _make_softmax(**options):
    options = {"projection_matrix": PROJECTION, "redraw_features": False} | options
    return make_fast_softmax_attention(HEAD_DIM, nb_features=ROWS, **options)


def _make_generalized(**options):
    options = {"projection_matrix": PROJECTION, "features_type": "ortho"} | options
    return make_fast_generalized_attention(HEAD_DIM, nb_features=ROWS, **options)


SOFTMAX = Mechanism("softmax", _make_softmax, _softmax_features)
GENERALIZED = Mechanism("generalized", _make_generalized, _generalized_features)
MECHANISMS = (SOFTMAX, GENERALIZED)

mechanisms = pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.name)
# One mechanism a direction, where all four together would show no more.
in_turn = pytest.mark.parametrize(
    ("mechanism", "unidirectional"),
    [(SOFTMAX, True), (GENERALIZED, False)],
    ids=["softmax-causal", "generalized-both_ways"],
)
directions = pytest.mark.parametrize("unidirectional", [False, True], ids=["both_ways", "causal"])


def quadratic_attention(features, *, unidirectional=False):
    """sum_j a_ij v_j / sum_j a_ij with a_ij = phi(q_i).phi(k_j) exp(bias_ij), or 0 where hidden."""

    def attention_fn(query, key, value, bias=None, mask=None, is_causal=False, **_):
        group = query.shape[-2] // key.shape[-2]
        key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
        weights = jnp.einsum("...thm,...shm->...hts", features(query), features(key))
        length, memory = weights.shape[-2:]
        allowed = jnp.ones_like(weights, bool)
        if mask is not None:
            allowed = jnp.broadcast_to(jnp.asarray(mask), weights.shape).astype(bool)
        if (unidirectional or is_causal) and length > 1:
            allowed &= jnp.broadcast_to(jnp.tri(length, memory, dtype=bool), weights.shape)
        if bias is not None:
            weights = weights * jnp.exp(jnp.broadcast_to(jnp.asarray(bias), weights.shape))
        weights = jnp.where(allowed, weights, 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = weights / jnp.where(total == 0, 1.0, total)
        return jnp.einsum("...hts,...shv->...thv", weights, value)

    return attention_fn


@dataclasses.dataclass(frozen=True)
class Host:
    """A module as parameters and a pure function: `apply(parameters, x, memory, **keywords)`.

    `dropout_key=None` makes the call deterministic.
    """

    name: str
    build: Callable[..., tuple[Any, Callable[..., Any]]]


def _build_nnx(attention_fn, **options):
    module = nnx.MultiHeadAttention(
        num_heads=HEADS,
        in_features=FEATURES,
        qkv_features=HEADS * HEAD_DIM,
        attention_fn=attention_fn,
        decode=False,
        keep_rngs=False,
        rngs=nnx.Rngs(0),
        **options,
    )
    graph, parameters = nnx.split(module)

    def apply(parameters, x, memory=None, *, dropout_key=None, **keywords):
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        return nnx.merge(graph, parameters)(
            x, memory, deterministic=dropout_key is None, rngs=rngs, **keywords
        )

    return parameters, apply


def _build_linen(attention_fn, **options):
    module = flax.linen.MultiHeadDotProductAttention(
        num_heads=HEADS, qkv_features=HEADS * HEAD_DIM, attention_fn=attention_fn, **options
    )
    inputs = jnp.zeros((1, 2, FEATURES))
    parameters = module.init(jax.random.key(0), inputs, deterministic=True)

    def apply(parameters, x, memory=None, *, dropout_key=None, **keywords):
        return module.apply(
            parameters,
            x,
            memory,
            deterministic=dropout_key is None,
            dropout_rng=dropout_key,
            **keywords,
        )

    return parameters, apply


NNX = Host("nnx", _build_nnx)
LINEN = Host("linen", _build_linen)
HOSTS = (NNX, LINEN)


@functools.cache
def build(host, mechanism, *, unidirectional=False, **options):
    """Parameters and `apply` of a module with our attention."""
    return host.build(mechanism.make(unidirectional=unidirectional), **options)


@functools.cache
def pair(host, mechanism, *, unidirectional=False, **options):
    """Parameters, `apply` with our attention, and `apply` with the definition in its place.

    Both are compiled and kept, so that tests share what they compile. Masks that are arguments of
    a compiled function are traced; `traced_with` is for masks that must be seen.
    """
    parameters, apply = build(host, mechanism, unidirectional=unidirectional, **options)
    _, define = host.build(mechanism.definition(unidirectional=unidirectional), **options)
    static = ("is_causal", "sow_weights")
    return parameters, jax.jit(apply, static_argnames=static), jax.jit(define)


def traced_with(host, mechanism, *, unidirectional=False, **keywords):
    """Traces a call with concrete keywords: cheaper than a call, and as strict about a mask."""
    parameters, apply = build(host, mechanism, unidirectional=unidirectional)
    return jax.eval_shape(lambda x: apply(parameters, x, **keywords), inputs())


def assert_close(actual, expected, tolerance=2e-5):
    """Agreement to `tolerance`, relative or absolute, entry by entry."""
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def inputs(*shape, seed=1):
    """Module inputs `[..., FEATURES]`, by default `[BATCH, LENGTH, FEATURES]`."""
    return jax.random.normal(jax.random.key(seed), (*(shape or (BATCH, LENGTH)), FEATURES))
