"""Right at any norm: values and gradients against dense float64, squared norms of 1e-3 to 2000.

A squared norm is ``|q|^2 / sqrt(D)``, what a feature's exponent has. Keys of a chunk then differ by
hundreds of nats in one feature, more than a product of two float32 numbers spans.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import HyperbolicFeatures, PositiveFeatures
from fast_attention.linear import empty_state, linear_attention, prefill, step
from fast_attention.mechanisms.favor import near_field
from tests.linear import cases

B, T, H, K, D, V, M, CHUNK, WINDOW = 2, 20, 2, 1, 16, 4, 32, 8, 3
MAP = PositiveFeatures(M)
NORMS = (1e-3, 1.0, 30.0, 200.0, 800.0, 2000.0)
IDS = np.repeat(np.arange(5), [6, 1, 8, 2, 3])[None]
VISIBLE = np.arange(T)[None] % 5 != 0
BACK = np.arange(T)[:, None] - np.arange(T)

TPU = {"implementation": "pallas_tpu_interpret"}
LANES = {"implementation": "time_minor_chunks"}

# Options of the call, who sees whom, and who is read exactly.
KINDS = {
    "causal": ({"causal": True}, BACK >= 0, None),
    "bidirectional": ({}, BACK >= -T, None),
    "causal segments": (
        {"causal": True, "segment_ids": IDS},
        (BACK >= 0) & (IDS == IDS.T),
        None,
    ),
    "segments and mask": (
        {"segment_ids": IDS, "key_mask": VISIBLE},
        (IDS == IDS.T) & VISIBLE,
        None,
    ),
    "causal, parallel chunks": (
        {"causal": True, "key_mask": VISIBLE, "implementation": "parallel_chunks"},
        (BACK >= 0) & VISIBLE,
        None,
    ),
    "causal segments, parallel chunks": (
        {"causal": True, "segment_ids": IDS, "implementation": "parallel_chunks"},
        (BACK >= 0) & (IDS == IDS.T),
        None,
    ),
    "causal mask": ({"causal": True, "key_mask": VISIBLE}, (BACK >= 0) & VISIBLE, None),
    "TPU causal mask": (
        {"causal": True, "key_mask": VISIBLE, **TPU},
        (BACK >= 0) & VISIBLE,
        None,
    ),
    "TPU bidirectional": (TPU, BACK >= -T, None),
    "causal mask, chunks in lanes": (
        {"causal": True, "key_mask": VISIBLE, **LANES},
        (BACK >= 0) & VISIBLE,
        None,
    ),
    "chunks in lanes": (LANES, BACK >= -T, None),
    "near field": (
        {"causal": True, "exact_window": WINDOW},
        BACK >= 0,
        (BACK >= 0) & (BACK < WINDOW),
    ),
    "near field both ways": (
        {"exact_window": WINDOW, "key_mask": VISIBLE},
        (BACK >= -T) & VISIBLE,
        np.abs(BACK) <= WINDOW,
    ),
}


def sphere(seed, heads, squared_norm):
    x = cases.draw(seed, B, T, heads, D)
    return x * np.sqrt(squared_norm * D**0.5) / np.linalg.norm(x, axis=-1, keepdims=True)


def arrays(seed, squared_norm, key_norm=None):
    """Queries, keys, values, and a cotangent."""
    q, k = sphere((seed, 0), H, squared_norm), sphere((seed, 1), K, key_norm or squared_norm)
    v, g = cases.draw((seed, 2), B, T, K, V), cases.draw((seed, 3), B, T, H, V)
    return tuple(x.astype(np.float32) for x in (q, k, v, g))


@functools.cache
def projection_of(feature_map):
    return np.asarray(jax.jit(feature_map.init, static_argnums=1)(jax.random.key(0), D))


def with_gradients(attend):
    """Returns outputs, and gradients of queries, keys and values."""

    def run(q, k, v, g, *rest):
        def loss(q, k, v):
            out = attend(q, k, v, *rest)
            return jnp.sum(out.astype(g.dtype) * g), out

        grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    return run


@functools.cache
def defined(feature_map):
    """The definition: logarithms of all weights, added up over features in float64."""

    def attend(q, k, v, projection, sees, exact):
        k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
        exponents = (
            feature_map.apply(
                jnp.swapaxes(x, 1, 2), projection, is_query=is_query, exact_scale=True
            ).log
            for x, is_query in ((q, True), (k, False))
        )
        queries, keys = exponents
        logs = jax.nn.logsumexp(queries[:, :, :, None] + keys[:, :, None], axis=-1)
        logs = jnp.where(exact, jnp.einsum("bthd,bshd->bhts", q, k) * D**-0.5, logs)
        weights = jax.nn.softmax(jnp.where(sees, logs, -jnp.inf), axis=-1)
        # A row that sees nothing is 0.
        weights = jnp.where(sees.any(-1, keepdims=True), weights, 0)
        return jnp.einsum("bhts,bshv->bthv", weights, v)

    return jax.jit(with_gradients(attend))


def definition(feature_map, inputs, sees, exact):
    exact = np.zeros((T, T), bool) if exact is None else exact
    masks = (np.broadcast_to(x, (1, 1, T, T)) for x in (sees, exact))
    with jax.enable_x64(True):
        exactly = [np.asarray(x, np.float64) for x in (*inputs, projection_of(feature_map))]
        return defined(feature_map)(*exactly, *masks)


def attend(options, feature_map=MAP):
    near = "exact_window" in options
    function = near_field.near_field_attention if near else linear_attention
    return functools.partial(
        cases.with_plan(function),
        feature_map=feature_map,
        parameters=projection_of(feature_map),
        chunk_size=CHUNK,
        **options,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_at_every_norm(kind):
    options, sees, exact = KINDS[kind]
    function = cases.compiled(with_gradients(attend(options)))
    pairs = [(norm, norm) for norm in NORMS] + [(3.0, 2000.0), (2000.0, 3.0)]
    for seed, (norm, key_norm) in enumerate(pairs):
        inputs = list(arrays(seed, norm, key_norm))
        # The definition divides by nothing where nothing is seen.
        inputs[3] = np.where(sees.any(-1)[:, None, None], inputs[3], 0)
        expected = definition(MAP, inputs, sees, exact)
        # Exponents near 1000 have a float32 spacing of 6e-5. A gradient that cancels is left with
        # the rounding of its terms, which are of order 1.
        tolerance = 3e-4 if max(norm, key_norm) > 100 else 1e-4
        if "implementation" in options and max(norm, key_norm) > 100:
            tolerance = 5e-4  # Exponents to base 2 are 1.44 times as large: 4.95e-4 was seen.
        for x, y in zip(function(*inputs), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1))


@pytest.mark.parametrize(
    ("feature_map", "dtype", "tolerance"),
    [
        (HyperbolicFeatures(M // 2), jnp.float32, 3e-4),
        (MAP, jnp.bfloat16, 3e-2),
    ],
    ids=["hyperbolic", "bfloat16"],
)
def test_other_maps_and_types(feature_map, dtype, tolerance):
    function = cases.compiled(attend({"causal": True}, feature_map))
    for norm in (200.0, 2000.0):
        q, k, v, g = (np.asarray(x).astype(dtype) for x in arrays(1, norm))
        expected, *_ = definition(feature_map, (q, k, v, g), BACK >= 0, None)
        cases.assert_close(function(q, k, v), expected, tolerance)


@pytest.mark.parametrize(
    ("functions", "window"),
    [
        ((empty_state, prefill, step), None),
        ((near_field.empty_state, near_field.prefill, near_field.step), WINDOW),
    ],
    ids=["linear", "near field"],
)
def test_prefill_and_steps_are_the_whole(functions, window):
    empty, read, advance = functions
    shape, exact = ((B,),), None
    if window is not None:
        shape, exact = (window, (B,)), (BACK >= 0) & (window > BACK)
    projection, start = projection_of(MAP), 9
    given = {"feature_map": MAP, "parameters": projection}
    read = cases.compiled(functools.partial(cases.with_plan(read), chunk_size=CHUNK, **given))
    advance = cases.compiled(functools.partial(cases.with_plan(advance), **given))
    for norm in NORMS[2:]:
        q, k, v, g = arrays(2, norm)
        expected, *_ = definition(MAP, (q, k, v, g), BACK >= 0, exact)
        state = empty(MAP, projection, *shape, K, D, V)
        out, state = read(state, q[:, :start], k[:, :start], v[:, :start])
        rows = [out]
        for t in range(start, T):
            row, state = advance(state, q[:, t], k[:, t], v[:, t])
            rows.append(row[:, None])
        cases.assert_close(np.concatenate(rows, axis=1), expected, 3e-4)


@pytest.mark.parametrize("options", [{}, TPU, LANES], ids=["chunked", "TPU", "chunks in lanes"])
def test_past_is_bit_equal_where_later_keys_exceed_it(options):
    """The later key alone is beyond the range, so that nothing is added to its chunk without it."""
    function = cases.compiled(attend({"causal": True, **options}))
    q, k, v, _ = arrays(3, 3.0)
    out = np.asarray(function(q, k, v))
    for t in (1, 6, CHUNK, CHUNK + 5, T - 1):
        later = (np.arange(T) >= t)[:, None, None]
        changed = np.asarray(function(np.where(later, 20 * q, q), np.where(later, 20 * k, k), v))
        np.testing.assert_array_equal(changed[:, :t], out[:, :t])
        assert (changed[:, t:] != out[:, t:]).any()


def test_vmap_is_the_batch():
    function = attend({"causal": True})
    q, k, v, _ = arrays(4, 2000.0)
    one_by_one = cases.compiled(jax.vmap(function))(q, k, v)
    cases.assert_close(one_by_one, cases.compiled(function)(q, k, v), 1e-4)


@pytest.mark.parametrize("kind", ["causal", "near field", "near field both ways"])
def test_second_derivatives_in_float32_are_those_in_float64(kind):
    """Also of pairs of rows and keys that are summed by themselves; in whole chunks."""
    options = dict(KINDS[kind][0])
    if "key_mask" in options:
        options["key_mask"] = VISIBLE[:, : 2 * CHUNK]
    function = attend(options)

    def second(q, k, v, g):
        def gradient(q):
            return jax.grad(lambda q: (function(q, k, v) * g).sum())(q)

        return jax.grad(lambda q: jnp.vdot(gradient(q), g.repeat(D // V, axis=-1)))(q)

    second = jax.jit(second)
    for norm in (30.0, 200.0, 800.0):
        inputs = [x[:, : 2 * CHUNK] for x in arrays(0, norm)]
        with jax.enable_x64(True):
            expected = np.asarray(second(*(x.astype(np.float64) for x in inputs)))
            found = np.asarray(second(*inputs))
        assert found.dtype == np.float32
        # Where attention is all but hard, terms of order 1 cancel.
        scale = max(np.abs(expected).max(), 1.0)
        np.testing.assert_allclose(found / scale, expected / scale, atol=3e-4)
