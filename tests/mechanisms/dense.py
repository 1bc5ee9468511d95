"""Attention by its definition: a matrix of weights ``[B, H, T, S]`` in numpy and float64.

A definition takes a function, queries ``[B, T, H, D]``, keys ``[B, S, K, D]``, and ``seen`` and
``bias`` of the shape of the weights, and gives the matrix that multiplies values ``[B, S, K, V]``.
Masks, causality and segments are all in ``seen``.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.feature_maps import LearnedFeatures, TunedParameters
from fast_attention.feature_maps.moments import measure
from fast_attention.mechanisms.favor.calibration import retune
from fast_attention.mechanisms.shared_qk import SELF_LOGIT
from tests.mechanisms.lsh.definition import meetings


def heads_before_length(x, heads=None):
    """``[B, S, K, D]`` to ``[B, H, S, D]`` in float64."""
    x = np.swapaxes(np.asarray(x, np.float64), -3, -2)
    return x if heads is None else np.repeat(x, heads // x.shape[-3], axis=-3)


def queries_and_keys(query, key):
    return heads_before_length(query), heads_before_length(key, query.shape[-2])


def normalized(logs, seen, bias, factor=1.0, normalize=True):
    """Weights ``factor exp(logs + bias)`` of seen keys, divided by their sum; 0 where it is 0."""
    logs = np.where(seen, logs + bias, -np.inf)
    most = logs.max(axis=-1, keepdims=True, initial=-np.inf)
    most = np.where(np.isfinite(most) & normalize, most, 0)
    weights = factor * np.exp(logs - most)
    if not normalize:
        return weights
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def softmax_logs(query, key):
    query, key = queries_and_keys(query, key)
    return query @ np.swapaxes(key, -1, -2) * query.shape[-1] ** -0.5


def exact(function, query, key, seen, bias, causal=False):
    return normalized(softmax_logs(query, key), seen, bias)


def local(function, query, key, seen, bias, causal=False):
    """Keys of neighbouring blocks, or those near each position."""
    size, ahead = function.window_size, function.look_forward
    ahead = (not causal) if ahead is None else ahead
    rows, columns = np.indices(seen.shape[-2:])
    start = rows if function.exact_window else rows // size * size
    stop = rows if function.exact_window else start + size - 1
    band = (columns >= start - function.look_backward * size) & (columns <= stop + ahead * size)
    return normalized(softmax_logs(query, key), seen & band, bias)


def features(function, x, parameters, is_query):
    """Values and logarithms of features, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), parameters)
        found = function.feature_map.apply(
            jnp.asarray(x), wide, is_query=is_query, exact_scale=True
        )
        return tuple(None if x is None else np.asarray(x, np.float64) for x in found)


def estimated(function, query, key, parameters):
    """Logarithms of estimated weights, and what multiplies their exponentials, of either sign."""
    query, key = queries_and_keys(query, key)
    values_q, log_q = features(function, query, parameters, True)
    values_k, log_k = features(function, key, parameters, False)
    if values_q is None:
        return np.logaddexp.reduce(log_q[..., :, None, :] + log_k[..., None, :, :], axis=-1), 1.0
    logs = np.zeros(1) if log_q is None else log_q + np.swapaxes(log_k, -1, -2)
    return logs, values_q @ np.swapaxes(values_k, -1, -2)


def parameters_of(function, query, key, seen, projection, query_mask):
    """Those of the call, with an axis of heads; fitted to each row where they are from the call."""
    parameters = function.resolve_parameters(projection, query.shape[-1])
    groups = query.shape[-2] // key.shape[-2]
    if projection is None and function.calibration == "call":
        keys = np.swapaxes(seen.any(axis=-2)[:, ::groups], -1, -2)
        queries = keys if query_mask is None else query_mask[..., None]
        arrays = (jnp.asarray(x, jnp.float32) for x in (query, key))
        moments = measure(*arrays, query_mask=jnp.asarray(queries), key_mask=jnp.asarray(keys))
        parameters = retune(function.feature_map, parameters, moments)
    if isinstance(function.feature_map, LearnedFeatures) and projection is not None:
        own = {n: x for n, x in parameters._asdict().items() if x is not None and n != "rows"}
        return parameters._replace(**{name: np.repeat(x, groups, 0) for name, x in own.items()})
    if not isinstance(parameters, TunedParameters) or parameters.query_shift.ndim == 1:
        return parameters
    axis = parameters.query_shift.ndim - 2
    repeated = jax.tree.map(lambda x: np.repeat(x, groups, axis), parameters._replace(rows=None))
    return repeated._replace(rows=parameters.rows)


def favor(function, query, key, seen, bias, projection=None, query_mask=None, causal=False):
    """Products of features; with ``exact_window`` softmax weights near by."""
    parameters = parameters_of(function, query, key, seen, projection, query_mask)
    logs, factor = estimated(function, query, key, parameters)
    if function.exact_window is not None:
        rows, columns = np.indices(seen.shape[-2:])
        window = function.exact_window
        near = (rows - columns < window) if causal else (np.abs(rows - columns) <= window)
        logs = np.where(near, softmax_logs(query, key), logs)
    return normalized(logs, seen, bias, factor, function.renormalize)


def efficient(function, query, key, seen, bias, causal=False):
    """Both ways one softmax over positions for each channel; causal one over both together."""
    query, key = queries_and_keys(query, key)
    if causal:
        size = function.blindspot_size
        if size > 1:
            rows, columns = np.indices(seen.shape[-2:])
            seen = seen & (columns < rows // size * size)
        pairs = query[..., :, None, :] + key[..., None, :, :]
        return normalized(np.logaddexp.reduce(pairs, axis=-1), seen, bias)
    query = np.exp(query - query.max(-1, keepdims=True))
    query = query / query.sum(-1, keepdims=True)
    channels = (key[..., None, :, d] for d in range(key.shape[-1]))
    keys = np.stack([normalized(x, seen, bias) for x in channels])
    return np.einsum("bhtd,dbhts->bhts", query, keys)


def hashed(function, query, key, seen, bias, buckets):
    """Shared queries and keys, which attend as often as they meet in the chunks of some round."""
    unit = np.asarray(key, np.float64)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    itself = np.eye(seen.shape[-1], dtype=bool)
    logs = np.where(itself, SELF_LOGIT, softmax_logs(query, unit))
    rows = np.asarray(buckets).reshape(-1, *buckets.shape[-2:])
    # What fills the last chunk stands behind all others and is seen by none.
    length = rows.shape[-1]
    filled = np.pad(
        rows,
        [(0, 0), (0, 0), (0, -length % function.hashing.bucket_size)],
        mode="constant",
        constant_values=rows.max() + 1,
    )
    met = np.stack(
        [meetings(row, function.hashing.bucket_size)[0][:length, :length] for row in filled]
    )
    met = met.reshape(seen.shape)
    return normalized(logs, (met > 0) & (seen | itself), bias, met)


def strided(define):
    """The inner definition for each class of positions a stride apart."""

    def of_classes(function, query, key, seen, bias, query_mask=None, **options):
        weights = np.zeros(seen.shape)
        for first in range(min(function.stride, seen.shape[-1])):
            own = slice(first, None, function.stride)
            if query_mask is not None:
                options["query_mask"] = query_mask[:, own]
            arrays = query[:, own], key[:, own], seen[..., own, own], bias[..., own, own]
            weights[..., own, own] = define(function.attention_fn, *arrays, **options)
        return weights

    return of_classes


def attend(weights, value):
    """``[B, T, H, V]``."""
    return np.swapaxes(weights @ heads_before_length(value, weights.shape[-3]), -3, -2)
