"""Every attention function under every way in which JAX runs functions: right, or refused in words.

The judge is always the plain call.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fast_attention import (
    make_efficient_attention,
    make_fast_generalized_attention,
    make_fast_softmax_attention,
    make_local_attention,
    make_lsh_attention,
    make_softmax_attention,
    make_strided_attention,
)
from fast_attention.mechanisms.favor.calibration import calibrate

# Two rows, seven positions, two heads of width four.
B, T, H, D = 2, 7, 2, 4

softmax = functools.partial(make_fast_softmax_attention, D, nb_features=8)

BOTH_WAYS = {
    "favor+": softmax(),
    "wderf_s": softmax(estimator="wderf_s"),
    "near field": softmax(exact_window=2),
    "generalized": make_fast_generalized_attention(D),
    "exact": make_softmax_attention(),
    "local": make_local_attention(2),
    "lsh": make_lsh_attention(2, 2),
    "efficient": make_efficient_attention(),
    "strided": make_strided_attention(softmax(), 2),
}
CAUSAL = {
    "favor+": softmax(unidirectional=True),
    "wderf_s": softmax(estimator="wderf_s", unidirectional=True),
    "near field": softmax(exact_window=2, unidirectional=True),
    "generalized": make_fast_generalized_attention(D, unidirectional=True),
    "exact": make_softmax_attention(True),
    "local": make_local_attention(2, True),
    "lsh": make_lsh_attention(2, 2, True),
    "efficient": make_efficient_attention(True),
    "blindspot": make_efficient_attention(True, 2),
    "strided": make_strided_attention(softmax(unidirectional=True), 2),
}
ALL = {name: f for name, f in BOTH_WAYS.items()} | {
    f"{name}, causal": f for name, f in CAUSAL.items()
}
DECODING = {name: f for name, f in CAUSAL.items() if f.can_decode}
# These choose blocks by the length.
NEEDS_LENGTH = ("near field", "local", "lsh", "blindspot")

every_function = pytest.mark.parametrize("function", ALL.values(), ids=ALL)
every_decoder = pytest.mark.parametrize("function", DECODING.values(), ids=DECODING)
two_devices = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")


def draw(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, H, D)), dtype) for _ in range(3)]


def key_mask():
    return jnp.arange(T)[None] < jnp.array([[T], [5]])


def loss(function, *arrays, **options):
    """A number, and what it is made of, that depends on every output."""
    out = function(*arrays, **options)
    return jnp.vdot(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape), out), out


def gradients(function, **options):
    return jax.jit(
        jax.grad(functools.partial(loss, function, **options), argnums=(0, 1, 2), has_aux=True)
    )


def check_equal(found, expected, atol=3e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=atol)


@pytest.mark.devices
@two_devices
@every_function
def test_explicit_mesh(function):
    """The batch sharded over a mesh as `jax.make_mesh` makes it, values and gradients."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=devices())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arrays, mask = draw(), key_mask()
    placed = [jax.device_put(x, rows) for x in arrays]
    expected = gradients(function, key_mask=mask)(*arrays)
    with jax.set_mesh(mesh):
        found = gradients(function, key_mask=jax.device_put(mask, rows))(*placed)
        outside = function(*placed)
    check_equal(found, expected)
    assert found[1].sharding.is_equivalent_to(rows, 4)
    check_equal(outside, function(*arrays))


@pytest.mark.devices
@two_devices
@every_decoder
def test_decoding_on_an_explicit_mesh(function):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=devices())
    arrays = draw()
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in arrays]
    with jax.set_mesh(mesh):
        found = decoded(function, placed)
    check_equal(found, decoded(function, arrays))


@pytest.mark.devices
@two_devices
@every_function
def test_shard_map_over_the_batch(function):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices())
    arrays = draw()
    rows = PartitionSpec("data")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows)
    check_equal(gradients(mapped)(*arrays), gradients(function)(*arrays))


@pytest.mark.parametrize("name", ALL)
def test_export_of_a_symbolic_length(name):
    function, arrays = ALL[name], draw()
    rows, length = export.symbolic_shape("b, t")
    shape = jax.ShapeDtypeStruct((rows, length, H, D), jnp.float32)
    mask = jax.ShapeDtypeStruct((rows, length), bool)

    def masked(query, key, value, mask):
        return gradients(function, key_mask=mask)(query, key, value)

    def exported():
        return export.export(jax.jit(masked))(shape, shape, shape, mask)

    if name.removesuffix(", causal") in NEEDS_LENGTH:
        with pytest.raises(ValueError, match="symbolic length"):
            exported()
        return
    program = export.deserialize(exported().serialize())
    check_equal(program.call(*arrays, key_mask()), masked(*arrays, key_mask()))


# Fitted parameters are constants for derivatives, which finite differences do not know.
@pytest.mark.parametrize(
    "function",
    [f for name, f in ALL.items() if "wderf" not in name],
    ids=[name for name in ALL if "wderf" not in name],
)
@pytest.mark.parametrize("norm", [1.0, 3.0])
def test_second_derivatives(function, norm):
    """In reverse mode, and in forward mode over reverse mode, against finite differences."""
    with jax.enable_x64(True):
        query, key, value = draw(jnp.float64)
        direction = jnp.cos(jnp.arange(query.size, dtype=query.dtype)).reshape(query.shape)
        query, key = norm * query, norm * key
        if function.takes.shared_qk:
            key = query

        def gradient(query):
            both = query if function.takes.shared_qk else key
            return jax.grad(lambda x: (loss(function, x, both, value)[1] ** 2).sum())(query)

        near = 1e-5 * direction
        expected = jax.jit(lambda x: (gradient(x + near) - gradient(x - near)) / 2e-5)(query)
        largest = jnp.abs(expected).max()
        reverse = jax.jit(jax.grad(lambda x: jnp.vdot(gradient(x), direction)))(query)
        np.testing.assert_allclose(reverse / largest, expected / largest, atol=1e-6)
        forward = jax.jit(lambda x: jax.jvp(gradient, (x,), (direction,))[1])(query)
        np.testing.assert_allclose(forward / largest, expected / largest, atol=1e-6)


@every_function
def test_float64(function):
    """Under x64 float64 inputs give float64 outputs, to its accuracy."""
    with jax.enable_x64(True):
        arrays = draw(jnp.float64)
        out = function(*arrays)
        assert out.dtype == jnp.float64
        wide = function(*(x.astype(jnp.float64) for x in draw()))
        assert draw()[0].dtype == jnp.float32
        np.testing.assert_allclose(function(*draw()), wide, atol=3e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@every_decoder
def test_states_under_x64(function, dtype):
    """A state keeps its types, through steps and chunks in a scan, and float64 its accuracy."""
    with jax.enable_x64(True):
        arrays = draw(dtype)
        whole = function(*arrays)
        atol = 1e-12 if dtype == jnp.float64 else 3e-5
        check_equal(decoded(function, arrays), whole, atol)
        chunks = [x.reshape(B, 7, 1, H, D).swapaxes(0, 1) for x in arrays]

        def chunk(state, arrays):
            out, state = function.prefill(state, *arrays)
            return state, out

        out = jax.lax.scan(chunk, start(function), chunks)[1]
        check_equal(out.swapaxes(0, 1).reshape(B, T, H, D), whole, atol)
        narrow = start(function, dtype=jnp.float32)
        after = function.prefill(narrow, *arrays)[1]
        assert [x.dtype for x in jax.tree.leaves(after)] == [
            x.dtype for x in jax.tree.leaves(narrow)
        ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@every_function
def test_strict_promotion(function, dtype):
    arrays = draw(dtype)
    drop = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.2}
    with jax.numpy_dtype_promotion("strict"):
        found = function(*arrays, key_mask=key_mask(), **drop)
        if function in DECODING.values():
            decoded(function, arrays)
    np.testing.assert_array_equal(found, function(*arrays, key_mask=key_mask(), **drop))


@every_function
def test_strict_promotion_under_x64(function):
    """Counts are int64 there, and what is measured is float64. Tracing shows it."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        arrays, mask = draw(jnp.float64), key_mask()
        options = {"key_mask": mask, "query_mask": mask}
        if function.calibration != "call" and getattr(function, "blindspot_size", 1) == 1:
            options["segment_ids"] = jnp.zeros((B, T), jnp.int32)
        drop = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.2}
        jax.eval_shape(gradients(function, **options, **drop), *arrays)
        if function.tuned_map is not None:
            jax.eval_shape(functools.partial(calibrate, function), *arrays[:2])
        if function in DECODING.values():
            state = start(function, dtype=jnp.float32)
            _, state = jax.eval_shape(function.prefill, state, *arrays, key_mask=mask)
            jax.eval_shape(function.step, state, *(x[:, 0] for x in arrays))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
@pytest.mark.parametrize("name", ["favor+", "wderf_s", "exact", "local", "lsh", "efficient"])
def test_random_keys(name, make, implementation):
    function = BOTH_WAYS[name]
    # A raw key does not say of which implementation it is.
    with jax.default_prng_impl(implementation):
        key = make(0)
        out = function(*draw(), dropout_rng=key, dropout_rate=0.5)
        function.draw_projection(key, D)
    assert jnp.isfinite(out).all()
    assert jnp.abs(out - function(*draw())).max() > 1e-3


@every_function
def test_donated_buffers_and_checkpoints(function):
    expected = gradients(function)(*draw())
    policy = jax.checkpoint_policies.nothing_saveable
    check_equal(gradients(jax.checkpoint(function, policy=policy))(*draw()), expected)
    donating = jax.jit(function, donate_argnums=0)
    check_equal(donating(*draw()), expected[1])


@every_function
def test_vmap(function):
    arrays = [jnp.stack([x, 2 * x]) for x in draw()]
    expected = jnp.stack([function(*(x[i] for x in arrays)) for i in range(2)])
    check_equal(jax.vmap(function)(*arrays), expected)


@every_decoder
def test_rows_of_states_are_chosen(function):
    """As a beam search does."""
    query, key, value = draw()
    beams = jnp.array([1, 1])
    state = function.prefill(start(function), query[:, :-1], key[:, :-1], value[:, :-1])[1]
    state = jax.tree.map(lambda x: x[beams], state)
    out, _ = function.step(state, *(x[beams, -1] for x in (query, key, value)))
    check_equal(out, function(query, key, value)[beams, -1])


def start(function, **options):
    return function.init_state((B,), H, D, D, max_length=T, **options)


def decoded(function, arrays):
    """Four tokens at once, the others one by one."""
    out, state = function.prefill(start(function), *(x[:, :4] for x in arrays))
    outputs = [out]
    step = jax.jit(function.step)
    for t in range(4, T):
        out, state = step(state, *(x[:, t] for x in arrays))
        outputs.append(out[:, None])
    return jnp.concatenate(outputs, axis=1)


def devices():
    return jax.devices()[:2]
