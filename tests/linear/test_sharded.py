"""A sequence across devices is the sequence on one: eight of them, in a process of their own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.linear import cases

needs_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
# Not a multiple of the devices; three positions on each.
T = 21
# Runs within one device, across an edge, across several devices, and one that ends with a device.
SEGMENTS = np.asarray([[0] * 2 + [1] * 2 + [0] * 11 + [3] * 6, [5] * 18 + [1] * 3])
# Devices 3 and 4 see nothing at all.
MASK = np.random.default_rng(5).uniform(size=(cases.B, T)) < 0.7
MASK[:, 9:15] = False


def mesh_of(**axes):
    automatic = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=automatic)


def across(q, k, v, *, mesh, parameters, initial_state=None, return_state=False, **options):
    """Whole arrays in and out; each device attends with its stretch of the sequence.

    The length is filled up: what is filled in is hidden, and belongs to the last segment.
    """
    length, shards = q.shape[1], mesh.shape["seq"]
    of_keys = ("key_mask", "key_bias", "segment_ids", "log_decay")
    names = [name for name in of_keys if name in options]
    arrays = {name: jnp.asarray(options.pop(name)) for name in names}
    arrays.setdefault("key_mask", jnp.ones(k.shape[:2], bool))
    arrays |= {"query": q, "key": k, "value": v}
    padding = -length % shards

    def fill(name, x):
        mode = "edge" if name == "segment_ids" else "constant"
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode=mode)

    arrays = {name: fill(name, x) for name, x in arrays.items()}

    def of_shard(arrays, parameters, initial_state):
        return cases.attend(
            **arrays,
            parameters=parameters,
            initial_state=initial_state,
            return_state=return_state,
            axis_name="seq",
            **options,
        )

    rows, whole = PartitionSpec(None, "seq"), PartitionSpec()
    mapped = jax.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(rows, whole, whole),
        out_specs=(rows, whole) if return_state else rows,
    )
    found = mapped(arrays, parameters, initial_state)
    out, *state = found if return_state else (found,)
    return (out[:, :length], *state) if return_state else out[:, :length]


def differentiated(attend, smooth, name, *, extra="key_bias", **fixed):
    """Returns gradients of everything, the output and the final sums."""

    def loss(smooth):
        q, k, v, parameters, *others = smooth
        others = dict(zip((extra, "initial_state"), others, strict=False))
        out, state = attend(
            *(q, k, v),
            feature_map=cases.MAPS[name],
            parameters=parameters,
            return_state=True,
            **others,
            **fixed,
        )
        result = (out, *cases.true_state(state))
        return cases.weighted_sum(result), result

    grads, result = cases.compiled(jax.grad(loss, has_aux=True))(smooth)
    if len(smooth) > 5:
        grads = (*grads[:5], grads[5][:2])
    return result, grads


@functools.cache
def initial_state(name):
    q, k, v = cases.qkv(seed=3, length=2)
    options = {"feature_map": cases.MAPS[name], "parameters": cases.parameters_of(name)}
    return cases.attend(q, k, v, return_state=True, implementation="quadratic", **options)[1]


@pytest.mark.eight_devices
@needs_devices
@pytest.mark.parametrize("causal", [True, False])
def test_masks_biases_and_segments_across_edges(causal):
    name = "positive"
    bias = jnp.asarray(cases.draw(4, cases.B, T), jnp.float32)
    smooth = (*cases.qkv(length=T), cases.parameters_of(name), bias, initial_state(name))
    fixed = {"causal": causal, "key_mask": MASK, "segment_ids": SEGMENTS}
    expected = differentiated(cases.attend, smooth, name, implementation="quadratic", **fixed)
    of_devices = functools.partial(across, mesh=mesh_of(seq=8))
    outputs, grads = differentiated(of_devices, smooth, name, **fixed)
    cases.assert_close(outputs, expected[0], 1e-5)
    cases.assert_close(grads, expected[1], 1e-4)


@pytest.mark.eight_devices
@needs_devices
def test_decays_across_edges():
    """Small and large ones, one that resets the state, and masked tokens, which do not decay."""
    name = "positive"
    decays = -np.exp(2 * cases.draw(6, cases.B, T, cases.K))
    decays[0, 8, 0] = -np.inf
    decays = jnp.asarray(decays, jnp.float32)
    smooth = (*cases.qkv(length=T), cases.parameters_of(name), decays, initial_state(name))
    fixed = {"causal": True, "key_mask": MASK, "segment_ids": SEGMENTS, "extra": "log_decay"}
    expected = differentiated(cases.attend, smooth, name, **fixed)
    of_devices = functools.partial(across, mesh=mesh_of(seq=8))
    outputs, grads = differentiated(of_devices, smooth, name, **fixed)
    cases.assert_close(outputs, expected[0], 1e-5)
    cases.assert_close(grads, expected[1], 1e-4)


@pytest.mark.eight_devices
@needs_devices
@pytest.mark.parametrize(
    ("causal", "name", "kernels"),
    [(True, "elu+1", False), (False, "hyperbolic", False), (True, "positive", True)],
)
def test_batch_and_length_across_devices(causal, name, kernels):
    """Inside another ``jax.shard_map``, with rows along one axis and the sequence along the other.

    Every device returns the state; they are all the same. Kernels are interpreted, with decay.
    """
    mesh = mesh_of(data=2, seq=4)
    smooth = (*cases.qkv(length=8), cases.parameters_of(name))
    if kernels:
        decays = -np.exp(2 * cases.draw(6, cases.B, 8, cases.K))
        smooth = (*smooth, jnp.asarray(decays, jnp.float32))

    def attend(q, k, v, *, parameters, log_decay=None, **options):
        if kernels:
            options |= {"implementation": "pallas_tpu_interpret", "chunk_size": 8}

        def of_shard(q, k, v, log_decay, parameters):
            options["log_decay"] = log_decay
            out, state = cases.attend(q, k, v, axis_name="seq", parameters=parameters, **options)
            return out, jax.tree.map(lambda x: x[None], state)

        rows, every = PartitionSpec("data", "seq"), PartitionSpec("seq", "data")
        out, states = jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(rows, rows, rows, rows, PartitionSpec()),
            out_specs=(rows, every),
            check_vma=not kernels,  # JAX's interpreter of kernels does not pass the check.
        )(q, k, v, log_decay, parameters)
        jax.debug.callback(assert_all_equal, states)
        return out, jax.tree.map(lambda x: x[0], states)

    fixed = {"causal": causal, "extra": "log_decay"}
    implementation = "reference" if kernels else "quadratic"
    expected = differentiated(cases.attend, smooth, name, implementation=implementation, **fixed)
    outputs, grads = differentiated(attend, smooth, name, **fixed)
    cases.assert_close(outputs, expected[0], 1e-5)
    cases.assert_close(grads, expected[1], 1e-4)


def assert_all_equal(states):
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.stack([x[0]] * len(x))), states)


@pytest.mark.eight_devices
@needs_devices
def test_along_several_axes_in_any_order():
    """The order in which the axes are named, not that of the mesh, is that of the sequence."""
    axes = ("inner", "outer")
    arrays = (*cases.qkv(length=16), jnp.asarray(np.repeat([[0, 1], [2, 3]], [5, 11], axis=1)))
    rows = PartitionSpec(None, axes)
    options = {"feature_map": cases.MAPS["elu+1"], "parameters": None, "causal": True}

    def of_shard(q, k, v, ids):
        return cases.attend(q, k, v, segment_ids=ids, axis_name=axes, **options)

    mapped = jax.shard_map(
        of_shard, mesh=mesh_of(outer=2, inner=4), in_specs=(rows,) * 4, out_specs=rows
    )
    q, k, v, ids = arrays
    expected = cases.attend(q, k, v, segment_ids=ids, implementation="quadratic", **options)
    cases.assert_close(cases.compiled(mapped)(*arrays), expected, 1e-5)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_empty(batch, length):
    rows, whole = PartitionSpec(None, "seq"), PartitionSpec()
    arrays = (*cases.qkv(length=3), jnp.zeros((cases.B, 3), jnp.int32))
    parameters = cases.parameters_of("positive")
    mesh = jax.make_mesh(
        (1,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1]
    )

    def of_shard(q, k, v, ids):
        return cases.attend(
            *(q, k, v),
            segment_ids=ids,
            feature_map=cases.MAPS["positive"],
            parameters=parameters,
            causal=True,
            axis_name="seq",
            return_state=True,
        )

    mapped = jax.shard_map(of_shard, mesh=mesh, in_specs=(rows,) * 4, out_specs=(rows, whole))
    out, state = cases.compiled(mapped)(*(x[:batch, :length] for x in arrays))
    assert out.shape == (batch, length, cases.H, cases.V)
    assert state.kv.shape == (batch, cases.K, cases.V, cases.M)
    assert not any(np.asarray(x).any() for x in cases.true_state(state))


@pytest.mark.eight_devices
@needs_devices
def test_float64_and_the_future():
    """In float64 nothing is rounded to float32, and no later key changes a bit."""
    with jax.enable_x64(True):
        q, k, v = cases.qkv(length=T, dtype=jnp.float64)
        options = {
            "feature_map": cases.MAPS["positive"],
            "parameters": cases.parameters_of("positive", jnp.float64),
            "causal": True,
        }
        of_devices = cases.compiled(functools.partial(across, mesh=mesh_of(seq=8), **options))
        out = of_devices(q, k, v)
        expected = cases.attend(q, k, v, implementation="quadratic", **options)
        cases.assert_close(out, expected, 1e-12)
        for cut in (4, 9):
            later = (jnp.arange(T) >= cut)[None, :, None, None]
            changed = of_devices(*(jnp.where(later, 30 * x, x) for x in (q, k, v)))
            np.testing.assert_array_equal(changed[:, :cut], out[:, :cut])


@pytest.mark.eight_devices
@needs_devices
def test_what_devices_exchange_does_not_grow_with_the_length():
    def exchanged(length):
        def loss(q, k, v, parameters):
            total = 0.0
            for causal in (True, False):
                out = across(
                    *(q, k, v),
                    mesh=mesh_of(seq=8),
                    feature_map=cases.MAPS["positive"],
                    parameters=parameters,
                    causal=causal,
                    key_mask=jnp.ones((cases.B, length), bool),
                )
                total = total + cases.weighted_sum(out)
            return total

        mesh, rows = mesh_of(seq=8), PartitionSpec(None, "seq")
        arrays = jax.device_put(cases.qkv(length=length), jax.sharding.NamedSharding(mesh, rows))
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        return collectives(step.lower(*arrays, cases.parameters_of("positive")).compile())

    short, long = exchanged(16), exchanged(32)
    assert short == long
    assert {kind for kind, _ in short} == {"collective-permute", "all-reduce"}
    largest = max(size for _, size in short)
    assert largest <= cases.B * cases.K * cases.M * (cases.V + 1)


def collectives(program):
    """Kinds of collectives in a compiled program, each with the numbers it gives a device."""
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    found = []
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program.as_text()):
        sizes = [
            int(np.prod([int(n) for n in shape.split(",") if n], initial=1))
            for shape in re.findall(r"\w\[([\d,]*)\]", shapes)
        ]
        found.append((kind, sum(sizes)))
    return sorted(found)
