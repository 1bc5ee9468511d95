"""How arrays lie on meshes, as a matter of names and numbers: no devices are needed."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from fast_attention.mesh import meshes
from fast_attention.models.placement import parameter_shardings, parameter_spec


def mesh_of(data=1, fsdp=1, sequence=1, model=1):
    return AbstractMesh((data, fsdp, sequence, model), meshes.AXES)


def test_what_the_other_axes_leave_is_for_data():
    mesh = meshes.make_mesh()
    assert mesh.axis_names == meshes.AXES
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "sequence": 1, "model": 1}


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"fsdp": 3}, "fsdp 3 x sequence 1 x model 1 = 3 devices does not divide the 2 "),
        ({"data": 1}, "leave out data, or set it to 2"),
        ({"model": 0}, "'model' must have at least 1 device"),
    ],
)
def test_devices_that_make_no_mesh(sizes, told):
    with pytest.raises(meshes.MeshError, match=told):
        meshes.make_mesh(**sizes, devices=jax.devices()[:1] * 2)


def test_batches_are_divided_where_they_can_be():
    mesh = mesh_of(data=2, fsdp=4, sequence=3)
    both = PartitionSpec(("data", "fsdp"), "sequence")
    assert meshes.batch_spec(mesh, (16, 9)) == both
    assert meshes.batch_spec(mesh, (4, 9, 5)) == PartitionSpec(("fsdp",), "sequence")
    assert meshes.batch_spec(mesh, (2, 10)) == PartitionSpec(("data",), None)
    assert meshes.batch_spec(mesh, (3,)) == PartitionSpec(None)
    assert meshes.batch_spec(mesh, ()) == PartitionSpec()
    assert meshes.row_shards(mesh) == 8


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("query", (64, 32), ("fsdp", "model")),
        ("out", (32, 64), ("model", "fsdp")),
        ("up", (64, 256), ("fsdp", "model")),
        ("down", (3, 256, 64), (None, "model", "fsdp")),
        ("memory", (64, 32), ("fsdp", None)),
        # Devices that do not divide an axis leave it whole, or take the next.
        ("value", (66, 63), (None, None)),
        ("value", (33, 64), (None, "model")),
        ("value", (65, 62), (None, "model")),
        # What is small is everywhere.
        ("query", (16, 32), ()),
        ("query", (4096,), ()),
    ],
)
def test_where_parameters_lie(name, shape, wanted):
    spec = parameter_spec(("blocks", 0, name, "kernel"), shape, mesh_of(fsdp=4, model=2))
    assert spec == PartitionSpec(*wanted)


def test_the_state_of_a_module_lies_as_its_arrays_alone():
    state = nnx.state(nnx.Dict(up=nnx.Linear(32, 64, rngs=nnx.Rngs(0))))
    mesh = mesh_of(fsdp=2, model=2)
    alone = parameter_shardings(nnx.to_pure_dict(state), mesh)
    assert nnx.to_pure_dict(parameter_shardings(state, mesh)) == alone
    assert alone["up"]["kernel"].spec == PartitionSpec("fsdp", "model")


def test_the_vocabulary_is_divided_where_it_can_be():
    mesh = mesh_of(fsdp=2, model=2)
    assert parameter_spec(("embed", "embedding"), (32, 64), mesh) == PartitionSpec("model", "fsdp")
    assert parameter_spec(("embed", "embedding"), (29, 64), mesh) == PartitionSpec(None, "fsdp")
    assert parameter_spec(("head", "kernel"), (64, 32), mesh) == PartitionSpec("fsdp", "model")


def test_moments_lie_as_their_parameters():
    import optax

    mesh = mesh_of(fsdp=2, model=2)
    parameters = {"up": {"kernel": jnp.zeros((32, 64)), "bias": jnp.zeros(64)}}
    where = parameter_shardings(parameters, mesh)
    state = parameter_shardings(optax.adamw(1e-3).init(parameters), mesh)
    assert state[0].mu == state[0].nu == where
    assert where["up"]["kernel"].spec == PartitionSpec("fsdp", "model")
    assert state[0].count.spec == where["up"]["bias"].spec == PartitionSpec()
