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
# Near fields both ways are two causal passes, which take long to compile.
QUICK = {name: f for name, f in ALL.items() if name != "near field"}
DECODING = {name: f for name, f in CAUSAL.items() if f.can_decode}
# These choose blocks by the length.
NEEDS_LENGTH = ("near field", "local", "lsh", "blindspot")

every_function = pytest.mark.parametrize("function", ALL.values(), ids=ALL)
every_quick_function = pytest.mark.parametrize("function", QUICK.values(), ids=QUICK)
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
    """Of the loss, and outputs."""
    return jax.jit(
        jax.grad(functools.partial(loss, function, **options), argnums=(0, 1, 2), has_aux=True)
    )


# One program for all tests that compare with it.
plain = functools.cache(gradients)
outputs = functools.cache(jax.jit)


def check_equal(found, expected, atol=3e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=atol)


@pytest.mark.devices
@two_devices
@every_quick_function
def test_explicit_mesh(function):
    """The batch sharded over a mesh as `jax.make_mesh` makes it, values and gradients."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=devices())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arrays, mask = draw(), key_mask()
    placed, placed_mask = jax.device_put((arrays, mask), rows)
    expected = plain(function)(*arrays, key_mask=mask)
    with jax.set_mesh(mesh):
        found = plain(function)(*placed, key_mask=placed_mask)
    check_equal(found, expected)
    assert found[1].sharding.is_equivalent_to(rows, 4)


# The others take long: one compiles, and a fit to the call is some hundred programs outside of jit.
@pytest.mark.devices
@two_devices
@pytest.mark.parametrize(
    "name", [name for name in BOTH_WAYS if name not in ("near field", "wderf_s")]
)
def test_explicit_mesh_outside_of_jit(name):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=devices())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arrays, mask = draw(), key_mask()
    placed, placed_mask = jax.device_put((arrays, mask), rows)
    with jax.set_mesh(mesh):
        found = BOTH_WAYS[name](*placed, key_mask=placed_mask)
    check_equal(found, plain(BOTH_WAYS[name])(*arrays, key_mask=mask)[1])
    assert found.sharding.is_equivalent_to(rows, 4)


@pytest.mark.devices
@two_devices
@every_decoder
def test_decoding_on_an_explicit_mesh(function):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,), devices=devices())
    arrays = draw()
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in arrays]
    with jax.set_mesh(mesh):
        found = jax.jit(decoded, static_argnums=0)(function, placed)
    check_equal(found, outputs(function)(*arrays))


@pytest.mark.devices
@two_devices
@every_quick_function
def test_shard_map_over_the_batch(function):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices())
    arrays, mask = draw(), key_mask()
    rows = PartitionSpec("data")

    def masked(*arrays):
        return function(*arrays[:3], key_mask=arrays[3])

    mapped = jax.shard_map(masked, mesh=mesh, in_specs=rows, out_specs=rows)
    found = gradients(mapped)(*arrays, mask)
    check_equal(found, plain(function)(*arrays, key_mask=mask))


@pytest.mark.parametrize("name", ALL)
def test_export_of_a_symbolic_length(name):
    function, arrays = ALL[name], draw()
    rows, length = export.symbolic_shape("b, t")
    shape = jax.ShapeDtypeStruct((rows, length, H, D), jnp.float32)
    mask = jax.ShapeDtypeStruct((rows, length), bool)

    def exported():
        return export.export(plain(function))(shape, shape, shape, key_mask=mask)

    if name.removesuffix(", causal") in NEEDS_LENGTH:
        with pytest.raises(ValueError, match="symbolic length"):
            exported()
        return
    program = export.deserialize(exported().serialize())
    found = program.call(*arrays, key_mask=key_mask())
    check_equal(found, plain(function)(*arrays, key_mask=key_mask()))


# Fitted parameters are constants for derivatives, which finite differences do not know. Strided
# attention is the one inside.
TWICE = {name: f for name, f in QUICK.items() if not name.startswith(("wderf", "strided"))}


@pytest.mark.parametrize("function", TWICE.values(), ids=TWICE)
def test_second_derivatives(function):
    """In reverse mode, and in forward mode over reverse mode, against finite differences."""
    shared = function.takes.shared_qk

    @jax.jit
    def run(query, key, value):
        """The gradient, and its derivative in a direction: forward, and in reverse."""

        def gradient(query):
            both = query if shared else key
            return jax.grad(lambda x: (loss(function, x, both, value)[1] ** 2).sum())(query)

        at, forward = jax.linearize(gradient, query)
        (reverse,) = jax.linear_transpose(forward, query)(direction)
        return at, forward(direction), reverse

    with jax.enable_x64(True):
        query, key, value = draw(jnp.float64)
        direction = jnp.cos(jnp.arange(query.size, dtype=query.dtype)).reshape(query.shape)
        near = 1e-5 * direction
        for norm in (1, 3):
            at = norm * query
            high, low = (run(at + x, norm * key, value)[0] for x in (near, -near))
            expected = (high - low) / 2e-5
            largest = jnp.abs(expected).max()
            _, *found = run(at, norm * key, value)
            for one in found:
                np.testing.assert_allclose(one / largest, expected / largest, atol=1e-6)


@every_function
def test_float64(function):
    """Under x64 float64 inputs give float64 outputs, to its accuracy."""
    with jax.enable_x64(True):
        narrow = outputs(function)(*draw())
        wide = outputs(function)(*(x.astype(jnp.float64) for x in draw()))
        assert narrow.dtype == jnp.float32 and wide.dtype == jnp.float64
        np.testing.assert_allclose(narrow, wide, atol=3e-5)


@every_decoder
def test_states_under_x64(function):
    """A state keeps its types, through steps and chunks in a scan, and float64 its accuracy."""

    @jax.jit
    def run(arrays):
        def chunk(state, arrays):
            out, state = function.prefill(state, *arrays)
            return state, out

        chunks = [x.reshape(B, T, 1, H, D).swapaxes(0, 1) for x in arrays]
        out = jax.lax.scan(chunk, start(function), chunks)[1]
        return decoded(function, arrays), out.swapaxes(0, 1).reshape(B, T, H, D)

    with jax.enable_x64(True):
        arrays = [x.astype(jnp.float64) for x in draw()]
        whole = outputs(function)(*arrays)
        for found in run(arrays):
            np.testing.assert_allclose(found, whole, atol=1e-12)
        # Of float32 tracing shows it.
        jax.eval_shape(run, draw())
        narrow = start(function, dtype=jnp.float32)
        for given in (arrays, draw()):
            after = jax.eval_shape(function.prefill, narrow, *given)[1]
            assert [x.dtype for x in jax.tree.leaves(after)] == [
                x.dtype for x in jax.tree.leaves(narrow)
            ]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
@every_function
def test_strict_promotion(function, dtype):
    """Under x64 counts are int64, and what is measured is float64. Tracing shows it."""
    with jax.enable_x64(dtype == jnp.float64), jax.numpy_dtype_promotion("strict"):
        arrays, mask = draw(dtype), key_mask()
        options = {"key_mask": mask, "query_mask": mask}
        if function.calibration != "call" and getattr(function, "blindspot_size", 1) == 1:
            options["segment_ids"] = jnp.zeros((B, T), jnp.int32)
        drop = {"dropout_rng": jax.random.key(1), "dropout_rate": 0.2}
        run = functools.partial(function, **options, **drop)
        found = jax.eval_shape(gradients(run) if dtype == jnp.float64 else run, *arrays)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
        if function.tuned_map is not None:
            jax.eval_shape(functools.partial(calibrate, function), *arrays[:2])
        if function in DECODING.values():
            state = start(function, dtype=jnp.float32)
            _, state = jax.eval_shape(function.prefill, state, *arrays, key_mask=mask)
            jax.eval_shape(function.step, state, *(x[:, 0] for x in arrays))


IMPLEMENTATIONS = ["threefry2x32", "rbg", "unsafe_rbg"]
RANDOM = ["favor+", "wderf_s", "exact", "local", "lsh", "efficient"]


# Of name, implementation and kind of key each pair occurs.
@pytest.mark.parametrize(
    ("name", "implementation", "make"),
    [
        (name, implementation, (jax.random.key, jax.random.PRNGKey)[(i + j) % 2])
        for i, name in enumerate(RANDOM)
        for j, implementation in enumerate(IMPLEMENTATIONS)
    ],
)
def test_random_keys(name, implementation, make):
    function = BOTH_WAYS[name]

    @jax.jit
    def run(key):
        function.draw_projection(key, D)
        return function(*draw(), key_mask=key_mask(), dropout_rng=key, dropout_rate=0.5)

    # A raw key does not say of which implementation it is.
    with jax.default_prng_impl(implementation):
        out = run(make(0))
    assert jnp.isfinite(out).all()
    whole = plain(function)(*draw(), key_mask=key_mask())[1]
    assert jnp.abs(out - whole).max() > 1e-3


@every_quick_function
def test_vmap_checkpoints_and_donated_buffers(function):
    arrays, mask = [jnp.stack([x, 2 * x]) for x in draw()], key_mask()
    expected = [plain(function)(*(x[i] for x in arrays), key_mask=mask) for i in range(2)]
    saving = jax.checkpoint(function, policy=jax.checkpoint_policies.nothing_saveable)
    run = jax.jit(jax.vmap(gradients(saving, key_mask=mask)), donate_argnums=(1, 2))
    found = run(*arrays)
    check_equal(found, jax.tree.map(lambda *x: jnp.stack(x), *expected))
    assert all(x.is_deleted() for x in arrays[1:])


@every_decoder
def test_rows_of_states_are_chosen(function):
    """As a beam search does."""
    query, key, value = draw()
    rows, step = jnp.array([1, 1]), jax.jit(function.step)
    state = jax.jit(function.prefill)(start(function), query[:, :-1], key[:, :-1], value[:, :-1])[1]
    tokens = [x[:, -1] for x in (query, key, value)]
    out, _ = step(state, *tokens)
    chosen = jax.tree.map(lambda x: x[rows], (state, *tokens))
    np.testing.assert_array_equal(step(*chosen)[0], out[rows])


def start(function, **options):
    return function.init_state((B,), H, D, D, max_length=T, **options)


def decoded(function, arrays):
    """Four tokens at once, the others one by one."""
    out, state = function.prefill(start(function), *(x[:, :4] for x in arrays))

    def step(state, token):
        out, state = function.step(state, *token)
        return state, out

    steps = jax.lax.scan(step, state, [x[:, 4:].swapaxes(0, 1) for x in arrays])[1]
    return jnp.concatenate([out, steps.swapaxes(0, 1)], axis=1)


def devices():
    return jax.devices()[:2]
