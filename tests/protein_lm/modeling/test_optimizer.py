import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.modeling.optimizer import (
    OptimizerOptions,
    create_optimizer,
    decay_mask,
)
from fast_attention.protein_lm.models import FlaxLM


def test_a_bad_clip_is_refused():
    with pytest.raises(ValueError, match="grad_clip"):
        create_optimizer(0.1, OptimizerOptions(grad_clip=0.0))


@pytest.fixture(scope="module")
def parameters():
    model = FlaxLM(
        make_protein_domain(length=8),
        emb_dim=16,
        num_heads=2,
        num_layers=1,
        qkv_dim=16,
        mlp_dim=32,
    )
    return model.state.parameters


def test_decay_spares_norms_biases_and_embeddings(parameters):
    paths, _ = jax.tree_util.tree_flatten_with_path(decay_mask(parameters))
    decayed = {jax.tree_util.keystr(path) for path, decays in paths if decays}
    spared = {jax.tree_util.keystr(path) for path, decays in paths if not decays}
    assert decayed and all("kernel" in name for name in decayed)
    assert not any("kernel" in name for name in spared)
    for word in ("bias", "scale", "embed"):
        assert any(word in name for name in spared)


def test_without_gradient_only_decay_changes_parameters(parameters):
    optimizer = create_optimizer(0.5, OptimizerOptions(weight_decay=0.1))
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    updates, _ = optimizer.update(zeros, optimizer.init(parameters), parameters)
    updated = optax.apply_updates(parameters, updates)
    expected = jax.tree.map(
        lambda leaf, decays: leaf * 0.95 if decays else leaf, parameters, decay_mask(parameters)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updated, expected)


def test_clipping_shrinks_the_whole_gradient_to_the_norm():
    parameters = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    gradient = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.array([4.0, 0.0])}
    norm = float(jnp.sqrt(4 * 9.0 + 16.0))
    clipped, plain = create_optimizer(0.1, OptimizerOptions(grad_clip=0.5)), create_optimizer(0.1)
    _, after_clipped = clipped.update(gradient, clipped.init(parameters), parameters)
    scaled = jax.tree.map(lambda leaf: leaf * 0.5 / norm, gradient)
    _, after_scaled = plain.update(scaled, plain.init(parameters), parameters)
    found, expected = jax.tree.leaves(after_clipped), jax.tree.leaves(after_scaled)
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)


def test_muon_moves_matrices_along_orthogonal_directions(parameters):
    muon = create_optimizer(0.5, OptimizerOptions(optimizer="muon", weight_decay=0.0))
    adamw = optax.nadamw(0.5, b1=0.9, b2=0.98, eps=1e-9)
    keys = iter(jax.random.split(jax.random.key(0), 100))
    gradient = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), parameters)
    updates, _ = jax.jit(muon.update)(gradient, muon.init(parameters), parameters)
    expected, _ = jax.jit(adamw.update)(gradient, adamw.init(parameters), parameters)
    decays = decay_mask(parameters)
    leaves = zip(*map(jax.tree.leaves, (updates, expected, decays)), strict=True)
    for update, of_adamw, orthogonal in leaves:
        if orthogonal:
            sizes = np.linalg.svd(update, compute_uv=False)
            # Small singular values grow the slowest.
            assert sizes.max() < 2 * np.median(sizes)
            # The size of a step is about that of AdamW.
            assert 0.1 < np.sqrt(np.mean(update**2)) / 0.5 < 0.3
        else:
            np.testing.assert_allclose(update, of_adamw, rtol=1e-3)


def test_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon; got 'sgd'"):
        create_optimizer(0.1, OptimizerOptions(optimizer="sgd"))
