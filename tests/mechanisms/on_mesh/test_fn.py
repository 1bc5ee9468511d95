"""Attention of whole arrays on a mesh is attention on one device."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fast_attention import (
    make_fast_generalized_attention,
    make_fast_softmax_attention,
    make_local_attention,
    make_lsh_attention,
)
from fast_attention.feature_maps.gaussian_family import untuned
from fast_attention.feature_maps.tuned import fold
from fast_attention.mechanisms.on_mesh.fn import MeshAttention, on_mesh
from fast_attention.mesh.meshes import MeshError, make_mesh
from tests.compiling import compiled

needs_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
LINEAR = make_fast_generalized_attention(kernel_fn="elu+1", unidirectional=True)
TUNED = make_fast_softmax_attention(nb_features=4, unidirectional=True, estimator="wderf_s")


def draw(length, *, rows=2, heads=4, kv_heads=2):
    rng = np.random.default_rng(length)
    sizes = (heads, 4), (kv_heads, 4), (kv_heads, 3)
    return [jnp.asarray(rng.normal(size=(rows, length, *s)), jnp.float32) for s in sizes]


def differentiated(function, arrays, **options):
    """Outputs, and the gradients of a sum of them."""

    def loss(arrays):
        out = function(*arrays, **options)
        weight = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(weight * out), out

    return compiled(jax.grad(loss, has_aux=True))(arrays)


def check(function, mesh, arrays, **options):
    expected = differentiated(function, arrays, **options)
    found = differentiated(on_mesh(function, mesh), arrays, **options)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.eight_devices
@needs_devices
def test_rows_heads_and_positions_across_devices():
    """Of 7 positions, that 2 devices do not divide; parameters by head; keys dropped alike."""
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4)), jnp.float32)
    check(
        TUNED,
        make_mesh(data=2, sequence=2, model=2),
        draw(7),
        key_mask=jnp.arange(7)[None] < jnp.array([[7], [5]]),
        segment_ids=jnp.array([[1, 1, 1, 2, 2, 2, 2]] * 2),
        projection=fold(rows, untuned(4)),
        dropout_rng=jax.random.key(0),
        dropout_rate=0.5,
        broadcast_dropout=False,
    )


@pytest.mark.eight_devices
@needs_devices
def test_windows_across_devices():
    """Of 3 rows and one key head, that 2 devices do not divide: every device has all of those."""
    check(
        make_local_attention(3, unidirectional=True),
        make_mesh(fsdp=2, model=2, sequence=2),
        draw(9, rows=3, kv_heads=1),
        key_mask=jnp.arange(9)[None] < jnp.array([[9], [4], [7]]),
    )


@pytest.mark.eight_devices
@needs_devices
def test_masks_and_biases_of_keys_across_devices():
    """Those of all forms, also a mask of pairs that the compiled program has to check."""
    seen = jnp.arange(8)[None] < jnp.array([[8], [6]])
    favor = make_fast_softmax_attention(nb_features=4, unidirectional=True)
    check(
        favor,
        make_mesh(data=2, sequence=2, model=2),
        draw(8),
        mask=seen[:, None, :, None] & seen[:, None, None],
        bias=jnp.linspace(-1, 1, 8)[None, None, None],
    )


@pytest.mark.eight_devices
@needs_devices
def test_a_projection_is_of_its_head_also_without_a_sequence_axis():
    arrays = draw(5, rows=4, kv_heads=4)
    function = make_fast_softmax_attention(nb_features=6)
    projection = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 4)), jnp.float32)
    check(function, make_mesh(data=2, model=4), arrays, projection=projection)


@pytest.mark.eight_devices
@needs_devices
@pytest.mark.parametrize("estimator", ["hedgehog", "darkformer"])
def test_learned_parameters_of_each_head_across_devices(estimator):
    """Values, and gradients in the parameters themselves, with and without divided positions."""
    function = make_fast_softmax_attention(nb_features=4, estimator=estimator)
    start = function.draw_projection(jax.random.key(0), 4)
    rng = np.random.default_rng(1)
    parameters = jax.tree.map(
        lambda x: jnp.asarray(x + 0.3 * rng.normal(size=(2, *x.shape)), jnp.float32),
        jax.tree.map(np.asarray, start),
    )

    def attend(attention_fn):
        return lambda q, k, v, parameters: attention_fn(q, k, v, projection=parameters)

    expected = differentiated(attend(function), [*draw(7), parameters])
    for mesh in (make_mesh(data=2, sequence=2, model=2), make_mesh(data=4, model=2)):
        found = differentiated(attend(on_mesh(function, mesh)), [*draw(7), parameters])
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.eight_devices
@needs_devices
def test_what_decodes_still_does():
    function = on_mesh(LINEAR, make_mesh(sequence=8))
    query, key, value = draw(5)
    state = function.init_state((2,), 2, 4, 3)
    out, _ = function.prefill(state, query, key, value)
    np.testing.assert_allclose(out, LINEAR(query, key, value), atol=1e-5)
    # A query over a cache is on every device.
    last = function(query[:, -1:], key, value)
    np.testing.assert_allclose(last, out[:, -1:], atol=1e-5)


@pytest.mark.eight_devices
@needs_devices
def test_what_cannot_be_done_across_devices_says_so():
    with pytest.raises(ValueError, match="make_local_attention"):
        on_mesh(make_lsh_attention(8), make_mesh(sequence=8))
    x = jnp.ones((1, 8, 1, 2))
    local = on_mesh(make_local_attention(2), make_mesh(sequence=8))
    with pytest.raises(ValueError, match="bias must be left out"):
        local(x, x, x, bias=jnp.zeros((1, 1, 1, 8)))
    with pytest.raises(ValueError, match="dropout_rate must be left out"):
        local(x, x, x, dropout_rate=0.1, dropout_rng=jax.random.key(0))


@pytest.mark.eight_devices
@needs_devices
def test_what_cannot_be_taken_apart_is_left_to_the_compiler():
    function = make_lsh_attention(8)
    assert on_mesh(function, make_mesh(model=8)) is function


@pytest.mark.eight_devices
@needs_devices
def test_a_mesh_with_explicit_axes():
    """Values and gradients, of arrays with and without their sharding in their types."""
    auto = make_mesh(data=2, sequence=2, model=2)
    kinds = (AxisType.Explicit,) * 4
    mesh = jax.make_mesh(auto.devices.shape, auto.axis_names, axis_types=kinds)
    arrays = draw(8)
    place = NamedSharding(mesh, PartitionSpec("data", "sequence", "model"))
    check(TUNED, mesh, arrays)
    expected = differentiated(LINEAR, arrays)
    with jax.set_mesh(mesh):
        found = differentiated(on_mesh(LINEAR, mesh), jax.device_put(arrays, place))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert found[1].sharding.is_equivalent_to(place, 4)


def test_a_mesh_with_other_axes_is_an_error():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    with pytest.raises(MeshError, match="axes data, fsdp, sequence, model, got data"):
        on_mesh(LINEAR, mesh)


def test_one_device_needs_nothing():
    assert on_mesh(LINEAR, make_mesh(devices=jax.devices()[:1])) is LINEAR


def test_layers_can_tell_what_it_takes():
    """They pass what is in the signature, which is that of the functions on one device."""
    own = inspect.signature(MeshAttention.__call__).parameters
    for function in (LINEAR, make_local_attention(2)):
        assert inspect.signature(function).parameters.keys() - own.keys() <= {"query_mask"}
