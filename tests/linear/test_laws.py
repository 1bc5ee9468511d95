"""Laws of linear attention: what is not seen does not count, whatever it holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import PositiveFeatures
from fast_attention.linear import Plan, empty_state, linear_attention, prefill, step
from tests.leaks import checking_leaks
from tests.linear import cases

T = 16  # Whole chunks and blocks: one loop body to compile.
PADDING = 5
MAPS = ("positive", "relu")
# Implementation, direction, map and type; half precision rounds alike in all of them.
CALLS = [
    *(
        (i, causal, (name, jnp.float32))
        for i in cases.IMPLEMENTATIONS
        for causal in (True, False)
        for name in MAPS
    ),
    ("chunked", True, ("positive", jnp.bfloat16)),
    ("time_minor_chunks", True, ("positive", jnp.bfloat16)),
    ("time_minor_chunks", False, ("relu", jnp.float32)),
    ("pallas_tpu_interpret", True, ("positive", jnp.float32)),
    ("pallas_tpu_interpret", False, ("relu", jnp.float32)),
]


@functools.cache
def attend_and_differentiate(name, dtype, implementation, causal):
    """Returns ``(q, k, v, parameters, mask, cotangent) -> out, gradients``, compiled once."""

    def function(q, k, v, parameters, mask, cotangent):
        def attend(q, k, v, parameters):
            return cases.attend(
                q,
                k,
                v,
                feature_map=cases.MAPS[name],
                parameters=parameters,
                causal=causal,
                key_mask=mask,
                chunk_size=cases.CHUNK,
                implementation=implementation,
            )

        out, pull = jax.vjp(attend, q, k, v, parameters)
        return out, pull(cotangent.astype(dtype))

    return cases.compiled(function)


law = pytest.mark.parametrize(("implementation", "causal", "kind"), CALLS)


def arguments(kind):
    """In numpy, as all that is done to them: JAX would compile every cut and every filling."""
    name, dtype = kind
    q, k, v = (np.asarray(x) for x in cases.qkv(length=T, dtype=dtype))
    return q, k, v, cases.parameters_of(name)


def visible_from(*starts, stop=T):
    """Which keys `[B, T]` are visible: in each row those from its start on."""
    positions = np.arange(T)
    return np.stack([(positions >= start) & (positions < stop) for start in starts])


def cotangent_of(visible):
    cotangent = cases.draw(5, cases.B, T, cases.H, cases.V).astype(np.float32)
    return np.where(visible[:, :, None, None], cotangent, 0)


def numpy_of(function, *arguments):
    return jax.tree.map(np.asarray, function(*arguments))


@law
def test_masked_is_truncated(kind, causal, implementation):
    function = attend_and_differentiate(*kind, implementation, causal)
    q, k, v, parameters = arguments(kind)
    tolerance = 1e-5 if kind[1] == jnp.float32 else 2e-2
    for real in (slice(0, T - PADDING), slice(PADDING, T)):
        visible = visible_from(real.start, real.start, stop=real.stop)
        cotangent = cotangent_of(visible)
        length = T - PADDING
        expected = attend_and_differentiate(*kind, "quadratic", causal)(
            q[:, real],
            k[:, real],
            v[:, real],
            parameters,
            np.ones((cases.B, length), bool),
            cotangent[:, real],
        )
        outputs = []
        for content in (0.3, 1e4, np.inf, np.nan):

            def fill(x, content=content, visible=visible):
                return np.where(visible[..., None, None], x, x.dtype.type(content))

            queries = fill(q) if np.isfinite(content) else q
            out, (*grads, d_parameters) = function(
                queries, fill(k), fill(v), parameters, visible, cotangent
            )
            out, *grads = (np.asarray(x) for x in (out, *grads))
            actual = (out[:, real], (*(x[:, real] for x in grads), d_parameters))
            cases.assert_close(actual, expected, tolerance)
            for gradient in grads:
                assert not gradient[~visible].any()
            outputs.append(out[:, real].astype(np.float32))
        for other in outputs[1:]:
            np.testing.assert_array_equal(other, outputs[0])


@law
def test_rows_that_see_nothing_are_zero(kind, causal, implementation):
    function = attend_and_differentiate(*kind, implementation, causal)
    q, k, v, parameters = arguments(kind)
    visible = visible_from(0, T)
    cotangent = cotangent_of(visible_from(0, 0))
    for size in (1, 300):
        scaled = q * q.dtype.type(size)
        out, grads = numpy_of(function, scaled, k, v, parameters, visible, cotangent)
        assert not out[1].any()
        assert out[0].all()
        assert all(np.isfinite(x.astype(np.float32)).all() for x in jax.tree.leaves(grads))
        for gradient in grads[:3]:
            assert not gradient[1].any()
    if causal:
        visible = visible_from(PADDING, PADDING)
        out, grads = function(q, k, v, parameters, visible, cotangent)
        out, d_query = np.asarray(out), np.asarray(grads[0])
        assert not out[:, :PADDING].any()
        assert out[:, PADDING:].all()
        assert not d_query[:, :PADDING].any()


@law
def test_batch_rows_do_not_know_of_each_other(kind, causal, implementation):
    function = attend_and_differentiate(*kind, implementation, causal)
    q, k, v, parameters = arguments(kind)
    visible = visible_from(0, 2)
    cotangent = cotangent_of(visible)
    function = functools.partial(numpy_of, function)
    out, grads = function(q, k, v, parameters, visible, cotangent)
    flipped = (x[::-1] for x in (q, k, v))
    other, other_grads = function(*flipped, parameters, visible[::-1], cotangent[::-1])
    np.testing.assert_array_equal(other[::-1], out)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[::-1], y), other_grads[:3], grads[:3])
    factor = np.array([1, 1e3])[:, None, None, None]
    crowded = (x * factor.astype(x.dtype) for x in (q, k, v))
    other, other_grads = function(*crowded, parameters, visible, cotangent)
    np.testing.assert_array_equal(other[0], out[0])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[0]), other_grads[:3], grads[:3])


@functools.cache
def alone_of(causal):
    return cases.compiled(
        functools.partial(
            cases.attend,
            feature_map=cases.MAPS["positive"],
            causal=causal,
            implementation="quadratic",
        )
    )


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [True, False])
def test_segments_are_separate_calls(causal, implementation):
    q, k, v, parameters = arguments(("positive", jnp.float32))
    packed = cases.compiled(
        functools.partial(
            cases.attend,
            feature_map=cases.MAPS["positive"],
            parameters=parameters,
            causal=causal,
            chunk_size=cases.CHUNK,
            implementation=implementation,
        )
    )
    alone = functools.partial(alone_of(causal), parameters=parameters)
    # The same id names two runs that do not touch: they stay apart, too.
    for lengths in ((5, 10, 1), (4, 8, 4), (1, 5, 10)):
        ids = np.stack([np.repeat([1, 2, 1], lengths)] * cases.B)
        out = np.asarray(packed(q, k, v, segment_ids=ids))
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            cases.assert_close(out[:, part], alone(q[:, part], k[:, part], v[:, part]), 1e-5)
            start += length
        later = (np.arange(T) >= lengths[0])[:, None, None]
        changed = packed(
            q,
            np.where(later, k * np.float32(1e4), k),
            np.where(later, np.float32(9), v),
            segment_ids=ids,
        )
        np.testing.assert_array_equal(np.asarray(changed)[:, : lengths[0]], out[:, : lengths[0]])


@pytest.mark.parametrize("implementation", [*cases.IMPLEMENTATIONS, "time_minor_chunks"])
def test_under_every_transformation(implementation):
    """Vmap in remat in scan in grad in jit, with leak checks, against a plain loop."""
    q, k, v = cases.qkv(length=4)
    parameters = cases.parameters_of("positive")

    def attend(q, k, v):
        return cases.attend(
            q,
            k,
            v,
            feature_map=cases.MAPS["positive"],
            parameters=parameters,
            causal=True,
            chunk_size=2,
            implementation=implementation,
        )

    def layers(q, k, v, attend):
        def layer(x, _):
            return x + 0.1 * jnp.sum(attend(x, k, v)), None

        return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0] ** 2)

    with checking_leaks():
        value, grads = cases.compiled(
            jax.value_and_grad(
                lambda *x: layers(*x, jax.checkpoint(jax.vmap(attend))), argnums=(0, 1, 2)
            )
        )(q, k, v)
    reference = functools.partial(
        cases.attend,
        feature_map=cases.MAPS["positive"],
        parameters=parameters,
        causal=True,
        implementation="quadratic",
    )
    expected = cases.compiled(
        jax.value_and_grad(lambda *x: layers(*x, reference), argnums=(0, 1, 2))
    )(q, k, v)
    cases.assert_close((value, grads), expected, 1e-4)


@pytest.mark.devices
@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_sharded_batch_is_one_device():
    q, k, v = cases.qkv(length=4, batch=4)
    attend = functools.partial(
        cases.attend,
        feature_map=cases.MAPS["positive"],
        parameters=cases.parameters_of("positive"),
        causal=True,
        chunk_size=2,
    )
    loss = jax.value_and_grad(lambda *x: cases.weighted_sum(attend(*x)), argnums=(0, 1, 2))
    expected = cases.compiled(loss)(q, k, v)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    spread = jax.device_put((q, k, v), jax.sharding.NamedSharding(mesh, rows))
    actual = cases.compiled(loss)(*spread)
    assert actual[1][0].sharding.spec[0] == "data"
    cases.assert_close(actual, expected, 1e-5)
    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False
    )
    cases.assert_close(cases.compiled(mapped)(q, k, v), attend(q, k, v), 1e-5)


def test_options_by_name_are_those_of_the_plan():
    feature_map = PositiveFeatures(8)
    plan = Plan(feature_map, causal=True, chunk_size=4)
    named = {"feature_map": feature_map, "causal": True, "chunk_size": 4}
    parameters = np.asarray(feature_map.init(jax.random.key(1), 4))
    given = {"parameters": parameters}
    arrays = cases.draw(0, 3, 9, 2, 4).astype(np.float32)

    @cases.compiled
    def by_name(q, k, v):
        state = empty_state(feature_map, parameters, (), 2, 4, 4)
        _, state = prefill(state, q, k, v, **named, **given)
        stepped = step(state, q[0], k[0], v[0], feature_map=feature_map, **given)
        return linear_attention(q, k, v, **named, **given), stepped

    @cases.compiled
    def by_plan(q, k, v):
        state = empty_state(feature_map, parameters, (), 2, 4, 4)
        _, state = prefill(state, q, k, v, plan, **given)
        stepped = step(state, q[0], k[0], v[0], plan, **given)
        return linear_attention(q, k, v, plan, **given), stepped

    jax.tree.map(np.testing.assert_array_equal, by_name(*arrays), by_plan(*arrays))
    with pytest.raises(TypeError, match="plan= and causal are given"):
        linear_attention(*arrays, plan, causal=True, **given)
