"""Softmax weights near, products of positive features far, written out: for use in float64."""

import jax.numpy as jnp


def features(x, projection):
    """``M^(-1/2) exp(w.x - |x|^2/2)`` of rows scaled by ``D^(-1/4)``."""
    x = x * x.shape[-1] ** -0.25
    log = x @ projection.T - 0.5 * jnp.sum(x * x, -1, keepdims=True)
    return jnp.exp(log) * len(projection) ** -0.5


def near_field(
    q, k, v, projection, bias, window, causal, mask, segments, normalize=True, log_decay=None
):
    """Attention ``[B, T, H, V]`` by a matrix of weights ``[B, H, T, T]``."""
    length, heads, groups = q.shape[1], q.shape[2], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    exact = jnp.exp(jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5)
    estimated = jnp.einsum("bthm,bshm->bhts", features(q, projection), features(k, projection))
    ahead = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    near = (ahead >= 0) & (ahead < window) if causal else abs(ahead) <= window
    weights = jnp.where(near[None, None], exact, estimated)
    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, k.shape[:2] + log_decay.shape[-1:])
        if mask is not None:
            log_decay = jnp.where(mask[..., None], log_decay, 0)
        until = jnp.moveaxis(jnp.repeat(jnp.cumsum(log_decay, axis=1), groups, axis=2), 1, 2)
        weights = weights * jnp.exp(until[..., :, None] - until[..., None, :])
    if bias is not None:
        weights = weights * jnp.exp(bias)[:, None, None]
    seen = jnp.ones((1, 1, 1, 1), bool)
    if causal:
        seen = seen & (ahead >= 0)[None, None]
    if mask is not None:
        seen = seen & mask[:, None, None]
    if segments is not None:
        seen = seen & (segments[:, None, :, None] == segments[:, None, None, :])
    weights = jnp.where(seen, weights, 0)
    assert weights.shape[1] == heads
    out = jnp.einsum("bhts,bshv->bthv", weights, v)
    if not normalize:
        return out
    total = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]
    return out / jnp.where(total == 0, 1, total)
