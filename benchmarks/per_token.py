"""The baseline: causal FAVOR+ as a scan over single tokens, with custom_vjp and unroll 1.

The algorithm of the first published implementations: features of the whole sequence at once, one
scan for the numerator and one for the denominator, and a backward pass that walks back by
subtracting each token from the sums.

Shape letters: T length, B batch, H heads, D head width, V value width, M features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float


def attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B T H D"],
    value: Float[Array, "B T H V"],
    projection: Float[Array, "M D"],
) -> Float[Array, "B T H V"]:
    """Causal attention with positive features, one token after the other."""
    query = jnp.moveaxis(softmax_features(query, projection, is_query=True), 1, 0)
    key = jnp.moveaxis(softmax_features(key, projection, is_query=False), 1, 0)
    numerator = _numerator(query, key, jnp.moveaxis(value, 1, 0))
    denominator = _denominator(query, key)
    return jnp.moveaxis(numerator / denominator[..., None], 0, 1)


def softmax_features(x: Array, projection: Array, *, is_query: bool) -> Array:
    """Positive features ``[B, T, H, M]`` of a whole sequence; the largest of all keys is 1."""
    x = x * x.shape[-1] ** -0.25
    logs = jnp.einsum("bthd,md->bthm", x, projection)
    axes = (-1,) if is_query else (1, 3)
    largest = jax.lax.stop_gradient(logs.max(axes, keepdims=True))
    return jnp.exp(logs - 0.5 * jnp.sum(x * x, -1, keepdims=True) - largest)


@jax.custom_vjp
def _numerator(query: Array, key: Array, value: Array) -> Array:
    return _numerator_forward(query, key, value)[0]


def _numerator_forward(query: Array, key: Array, value: Array):
    def body(sums, token):
        q, k, v = token
        sums = sums + jnp.einsum("...m,...d->...md", k, v)
        return sums, jnp.einsum("...m,...md->...d", q, sums)

    sums = jnp.zeros((*query.shape[1:], value.shape[-1]))
    sums, out = jax.lax.scan(body, sums, (query, key, value))
    return out, (sums, query, key, value)


def _numerator_backward(residuals, cotangent: Array):
    sums, query, key, value = residuals

    def body(carry, token):
        sums, d_sums = carry
        q, k, v, d_out = token
        d_q = jnp.einsum("...d,...md->...m", d_out, sums)
        d_sums = d_sums + jnp.einsum("...d,...m->...md", d_out, q)
        d_k = jnp.einsum("...md,...d->...m", d_sums, v)
        d_v = jnp.einsum("...md,...m->...d", d_sums, k)
        sums = sums - jnp.einsum("...m,...d->...md", k, v)
        return (sums, d_sums), (d_q, d_k, d_v)

    carry = (sums, jnp.zeros_like(sums))
    return jax.lax.scan(body, carry, (query, key, value, cotangent), reverse=True)[1]


_numerator.defvjp(_numerator_forward, _numerator_backward)


@jax.custom_vjp
def _denominator(query: Array, key: Array) -> Array:
    return _denominator_forward(query, key)[0]


def _denominator_forward(query: Array, key: Array):
    def body(sums, token):
        q, k = token
        sums = sums + k
        return sums, jnp.einsum("...m,...m->...", q, sums)

    sums, out = jax.lax.scan(body, jnp.zeros(query.shape[1:]), (query, key))
    return out, (sums, query, key)


def _denominator_backward(residuals, cotangent: Array):
    sums, query, key = residuals

    def body(carry, token):
        sums, d_sums = carry
        q, k, d_out = token
        d_q = d_out[..., None] * sums
        d_sums = d_sums + d_out[..., None] * q
        return (sums - k, d_sums), (d_q, d_sums)

    carry = (sums, jnp.zeros_like(sums))
    return jax.lax.scan(body, carry, (query, key, cotangent), reverse=True)[1]


_denominator.defvjp(_denominator_forward, _denominator_backward)
