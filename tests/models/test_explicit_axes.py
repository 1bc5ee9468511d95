"""Models on a mesh with Explicit axes, as `jax.make_mesh` makes it: as on one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fast_attention import models
from fast_attention.mesh.meshes import AXES, MeshError
from fast_attention.models.on_mesh import lay_on_mesh
from fast_attention.models.training import make_train_step
from tests.models.cases import LM, build, tokens

pytestmark = [
    pytest.mark.devices,
    pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices"),
]
PERFORMER = LM | {
    "depth": 1,
    "causal": True,
    "nb_features": 6,
    "local_attn_heads": 1,
    "local_window_size": 3,
    "emb_dropout": 0.2,
}
REFORMER = LM | {
    "depth": 1,
    "causal": True,
    "bucket_size": 4,
    "n_hashes": 2,
    "pkm_layers": (1,),
    "pkm_num_keys": 3,
}
BOTH = [False, True]


def mesh(sizes=(2,), names=("data",)):
    kinds = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(sizes, names, axis_types=kinds, devices=jax.devices()[: np.prod(sizes)])


def on_mesh(explicit, mesh):
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def laid(explicit, x, mesh, *axes):
    """The rows divided over `data`, or these axes over others."""
    x, spec = jnp.asarray(x), PartitionSpec(*(axes or ("data",)))
    return jax.device_put(x, NamedSharding(mesh, spec)) if explicit else x


def check_equal(expected, found):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        atol = 2e-5 * max(1.0, np.abs(other).max(initial=0))
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=atol)


@pytest.mark.parametrize(
    ("preset", "options"),
    [(models.PerformerLM, PERFORMER), (models.ReformerLM, REFORMER)],
    ids=["performer", "reformer"],
)
def test_training(preset, options):
    """Two steps of accumulated gradients, with dropout and running statistics."""

    def loss(model, batch, rngs):
        return models.next_token_loss(model, batch, deterministic=False, rngs=rngs)

    results = []
    for explicit in BOTH:
        with on_mesh(explicit, mesh()):
            model = build(preset, **options)
            optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
            step, rngs = make_train_step(loss, accumulate=2), nnx.Rngs(3)
            batch = laid(explicit, tokens(4, 9), mesh())
            losses = [step(model, optimizer, batch, rngs) for _ in range(2)]
            results.append((losses, nnx.state(model)))
    check_equal(*results)
    assert results[0][0][0] != results[0][0][1]


def test_generation_and_decoding():
    @nnx.jit
    def read(model, prompt, token):
        logits, state = model.prefill(model.init_state(4, 9), prompt)
        return logits, *model.step(state, token)

    results = []
    for explicit in BOTH:
        with on_mesh(explicit, mesh()):
            model = build(models.PerformerLM, **PERFORMER)
            prompt = laid(explicit, tokens(4, 5), mesh())
            options = {"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
            sampling = models.Sampling(**options)
            new = models.generate(
                model, prompt, key=jax.random.key(1), max_new_tokens=4, sampling=sampling
            )
            results.append((new, *read(model, prompt, new[:, 0])))
    check_equal(*results)


def test_encoder_and_decoder():
    options = {
        f"{side}_{name}": value
        for side in ("enc", "dec")
        for name, value in {
            "num_tokens": 7,
            "max_seq_len": 8,
            "depth": 1,
            "heads": 2,
            "nb_features": 4,
        }.items()
    }
    results = []
    for explicit in BOTH:
        with on_mesh(explicit, mesh()):
            model = build(models.PerformerEncoderDecoder, dim=8, **options)
            source, target = (laid(explicit, tokens(4, n), mesh()) for n in (6, 5))
            results.append(nnx.jit(models.EncoderDecoder.loss)(model, source, target))
    check_equal(*results)


def test_a_model_laid_on_the_mesh():
    """Rows and positions divided, by a mesh whose axes are Explicit."""
    four = mesh((2, 1, 2, 1), AXES)
    results = []
    for explicit in BOTH:
        with on_mesh(explicit, four):
            model = build(models.PerformerLM, **PERFORMER)
            if explicit:
                lay_on_mesh(model, four)
            batch = laid(explicit, tokens(4, 8), four, "data", "sequence")
            grad = nnx.grad(lambda model, batch: jnp.mean(jnp.sin(model(batch))))
            results.append(nnx.jit(grad)(model, batch))
    check_equal(*results)


def test_a_mesh_with_other_axes_is_an_error():
    with pytest.raises(MeshError, match="axes data, fsdp, sequence, model, got data: make it with"):
        lay_on_mesh(build(models.PerformerLM, **PERFORMER), mesh())
