import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.optimizer import (
    create_learning_rate_scheduler,
    create_optimizer,
    decay_mask,
)

STEPS = np.array([0, 1, 5, 10, 11, 40, 109, 110, 160, 1000])


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        ("constant", lambda s: 0.5 + 0 * s),
        ("linear_warmup", lambda s: np.minimum(1, s / 10)),
        ("rsqrt_decay", lambda s: 1 / np.sqrt(np.maximum(s, 10))),
        ("rsqrt_normalized_decay", lambda s: np.sqrt(10 / np.maximum(s, 10))),
        ("decay_every", lambda s: 0.25 ** (s // 40)),
        ("cosine_decay", lambda s: (1 + np.cos(np.pi * (np.maximum(0, s - 10) / 100 % 1))) / 2),
        (
            "constant * linear_warmup*rsqrt_decay",
            lambda s: 0.5 * np.minimum(s / 10, 1) / np.sqrt(np.maximum(s, 10)),
        ),
    ],
)
def test_learning_rate_is_the_product_of_its_factors(factors, expected):
    schedule = create_learning_rate_scheduler(
        factors,
        base_learning_rate=0.5,
        warmup_steps=10,
        decay_factor=0.25,
        steps_per_decay=40,
        steps_per_cycle=100,
    )
    rates = [float(schedule(int(step))) for step in STEPS]
    np.testing.assert_allclose(rates, expected(STEPS), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(STEPS)), rates, rtol=1e-5, atol=1e-7)


def test_no_warmup_starts_at_the_full_rate():
    schedule = create_learning_rate_scheduler("constant * linear_warmup", 0.1, warmup_steps=0)
    assert float(schedule(0)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": "constant * linear_warmpu"}, "linear_warmpu"),
        ({"factors": ""}, "unknown"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"steps_per_cycle": 0}, "steps_per_cycle"),
    ],
)
def test_a_bad_schedule_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_learning_rate_scheduler(**arguments)


def test_a_bad_clip_is_refused():
    with pytest.raises(ValueError, match="grad_clip"):
        create_optimizer(0.1, grad_clip=0.0)


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
    optimizer = create_optimizer(0.5, weight_decay=0.1)
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
    clipped, plain = create_optimizer(0.1, grad_clip=0.5), create_optimizer(0.1)
    _, after_clipped = clipped.update(gradient, clipped.init(parameters), parameters)
    scaled = jax.tree.map(lambda leaf: leaf * 0.5 / norm, gradient)
    _, after_scaled = plain.update(scaled, plain.init(parameters), parameters)
    found, expected = jax.tree.leaves(after_clipped), jax.tree.leaves(after_scaled)
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-6)
