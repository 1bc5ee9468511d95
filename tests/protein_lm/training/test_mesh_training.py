"""Training on a mesh is training on one device, up to the order of sums."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from fast_attention import make_fast_generalized_attention
from fast_attention.mesh.meshes import AXES, make_mesh
from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.modeling import train_state
from fast_attention.protein_lm.models import FlaxBERT, FlaxLM
from fast_attention.protein_lm.runs import checkpoints

pytestmark = [
    pytest.mark.eight_devices,
    pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices"),
]
LENGTH = 16
ATTENTION = make_fast_generalized_attention(kernel_fn="elu+1")


def make(model_class, mesh, dropout=0.1):
    return model_class(
        make_protein_domain(length=LENGTH),
        attention_fn=ATTENTION,
        mesh=mesh,
        ema_decay=0.9,
        emb_dim=32,
        num_heads=2,
        num_layers=1,
        qkv_dim=32,
        mlp_dim=64,
        positions="rotary",
        shift_tokens=model_class is FlaxLM,
        dropout_rate=dropout,
        attention_dropout_rate=dropout,
    )


def batch(step, rows=8, length=LENGTH):
    """Packed rows, with padding in the end."""
    rng = np.random.default_rng(step)
    ids = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    ids[:, length - 2 :] = 0
    return {
        "inputs": rng.integers(0, 20, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, 20, (rows, length)).astype(np.int32),
        "weights": (ids > 0).astype(np.float32),
        "segment_ids": ids.astype(np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def advance(model, state, steps):
    """Takes steps; returns the state and their losses and gradient norms."""
    rows = []
    for step in steps:
        state, sums = model.train_step(state, train_state.shard_batch(batch(step), model.mesh))
        # One program at a time: collectives of two can starve one another on few cores.
        jax.block_until_ready(state)
        rows.append((float(sums["loss"] / sums["denominator"]), float(sums["gradient_norm"])))
    return state, rows


def assert_same(found, expected):
    """Parameters, moments and averages, wherever they lie."""
    for name in ("parameters", "opt_state", "average"):
        pair = (jax.tree.leaves(getattr(state, name)) for state in (found, expected))
        for one, other in zip(*pair, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def moved(state, model, folder):
    """The state as another mesh reads it from a checkpoint."""
    with checkpoints.open_checkpoints(folder) as manager:
        checkpoints.save(manager, state, checkpoints.Progress(None, 8, 0, 0.0))
        found = checkpoints.restore(manager, model.abstract_state)
    assert found is not None
    return found[0]


def test_training_moves_between_eight_four_and_one_device(tmp_path):
    """Each on a mesh of its own, with the losses of one device, and back."""
    one = make(FlaxLM, make_mesh(devices=jax.devices()[:1]))
    expected, losses = advance(one, one.state, range(4))

    eight = make(FlaxLM, make_mesh(fsdp=2, model=2, sequence=2))
    state = eight.state
    assert_divided(state)
    state, found = advance(eight, state, range(2))
    assert_divided(state)
    four = make(FlaxLM, make_mesh(fsdp=4, devices=jax.devices()[:4]))
    for step, model in ((2, four), (3, one)):
        state, rows = advance(model, moved(state, model, tmp_path / str(step)), [step])
        found += rows
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    assert_same(state, expected)

    back = moved(state, eight, tmp_path / "back")
    assert_divided(back)
    _, again = advance(eight, back, [4])
    _, wanted = advance(one, state, [4])
    np.testing.assert_allclose(again, wanted, rtol=1e-5)


def assert_divided(state):
    """A device holds a quarter of a matrix, of its moments and of its average."""
    trees = (state.parameters, state.average, state.opt_state[0].mu, state.opt_state[0].nu)
    for tree in trees:
        kernel = tree["stack"]["blocks"][0][1]["inner"]["up"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec("fsdp", "model")
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 32)}


def test_masked_training_is_the_same_on_rows_and_heads():
    """Of a mesh as `jax.make_mesh` makes it."""
    one = make(FlaxBERT, make_mesh(devices=jax.devices()[:1]))
    kinds = (AxisType.Explicit,) * 4
    eight = make(FlaxBERT, jax.make_mesh((2, 2, 1, 2), AXES, axis_types=kinds))
    expected, losses = advance(one, one.state, range(3))
    found, rows = advance(eight, eight.state, range(3))
    np.testing.assert_allclose(rows, losses, rtol=1e-5)
    assert_same(found, expected)


def test_what_a_step_exchanges_does_not_grow_with_the_length():
    model = make(FlaxLM, make_mesh(sequence=8), dropout=0.0)

    def exchanged(length):
        state = model.abstract_state
        placed = train_state.shard_batch(batch(0, rows=2, length=length), model.mesh)
        text = model.train_step.lower(state, placed).compile().as_text()
        pattern = r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\("
        return sorted(re.findall(pattern, text))

    short, long = exchanged(64), exchanged(128)
    assert short
    assert short == long
