"""Decay's own recurrence, written out token by token in float64, and what its tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.linear import Plan, linear_attention
from tests.linear import cases

CHUNK = 4
LENGTH = 12  # Whole chunks: one loop body to compile.
NAMES = ("positive", "relu", "exp", "elu+1")
KERNELS = "pallas_tpu_interpret"
# Drawn before anything is traced.
PARAMETERS = {name: cases.numpy_parameters(name) for name in NAMES}
B, H, K, D, V = cases.B, cases.H, cases.K, cases.D, cases.V


def plan_of(name, **options):
    return Plan(**{"feature_map": cases.MAPS[name], "causal": True, "chunk_size": CHUNK} | options)


def decays(length, most=20.0, seed=5):
    """Some tokens keep everything, some forget nearly everything."""
    rng = np.random.default_rng((seed, length))
    return rng.uniform(-most, 0, (B, length, K)) * (rng.random((B, length, K)) < 0.5)


def recurrence(name, query, key, value, log_decay, *, key_mask=None, ids=None, output="mean"):
    """One state ``[B, K, V, M]`` and its normaliser, in true units; returns outputs and both."""
    feature_map, parameters = cases.MAPS[name], cases.parameters_of(name, jnp.float64)

    def features(x, is_query):
        heads_first = jnp.swapaxes(x, 1, 2)
        if is_query:
            heads_first = heads_first.reshape(B, K, -1, D)
        found = feature_map.apply(heads_first, parameters, is_query=is_query, exact_scale=True)
        return found.shift(None)

    length = query.shape[1]
    queries = jnp.moveaxis(features(query, True).reshape(B, K, H // K, length, -1), 3, 0)
    keys = jnp.moveaxis(features(key, False), 2, 0)
    mask = jnp.ones((B, length), bool) if key_mask is None else key_mask
    starts = np.zeros(length, bool) if ids is None else np.diff(ids, prepend=ids[0]) != 0

    def token(sums, seen):
        query, key, value, log_decay, mask, start = seen
        factor = jnp.where(start, 0, jnp.where(mask[:, None], jnp.exp(log_decay), 1))
        key = jnp.where(mask[:, None, None], key, 0)
        state = sums[0] * factor[..., None, None] + value[..., None] * key[:, :, None]
        total = sums[1] * factor[..., None] + key
        numerator = jnp.einsum("bkgm,bkvm->bkgv", query, state)
        denominator = jnp.einsum("bkgm,bkm->bkg", query, total)[..., None]
        seen = denominator != 0
        out = jnp.where(seen, numerator / jnp.where(seen, denominator, 1), 0)
        return (state, total), (out if output == "mean" else numerator).reshape(B, H, V)

    width = keys.shape[-1]
    nothing = jnp.zeros((B, K, V, width), query.dtype), jnp.zeros((B, K, width), query.dtype)
    by_token = (jnp.swapaxes(x, 0, 1) for x in (value, log_decay, mask))
    sums, outputs = jax.lax.scan(token, nothing, (queries, keys, *by_token, jnp.asarray(starts)))
    return jnp.swapaxes(outputs, 0, 1), *sums


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


@functools.cache
def program(function, name, **options):
    """Compiled once for all tests that call it."""
    return with_gradients(functools.partial(function, name, **options))


def check(found, expected, operands, tolerance=1e-10):
    with jax.enable_x64(True):
        cases.assert_close(found(*operands), expected(*operands), tolerance)
