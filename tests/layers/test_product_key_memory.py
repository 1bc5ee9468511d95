"""The memory against a search through all values, and its norm against masked statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fast_attention.layers import MaskedBatchNorm, ProductKeyMemory, is_memory_value
from tests.layers.definitions import array, compiled, draw, filled

HEADS, KEYS, WIDTH, FEATURES = 2, 3, 4, 6
X = draw(2, 5, FEATURES)
MASK = np.arange(5) < np.array([[5], [3]])


def build(top_k=2, norm="batch", **options):
    def make():
        return ProductKeyMemory(
            FEATURES,
            num_heads=HEADS,
            num_keys=KEYS,
            top_k=top_k,
            head_dim=WIDTH,
            norm=norm,
            rngs=nnx.Rngs(0),
            **options,
        )

    layer = filled(make)
    if norm == "batch":
        layer.norm.var[...] = jnp.exp(layer.norm.var[...])
    return layer


def normed(norm, x, mean, var):
    return (x - mean) / np.sqrt(var + 1e-5) * array(norm.scale) + array(norm.bias)


def read(layer, query, top_k):
    """One position: every value is scored for every head."""
    halves = query.reshape(2, HEADS, WIDTH // 2)
    keys, out = array(layer.keys), 0
    for h in range(HEADS):
        scores = np.array(
            [
                halves[0, h] @ keys[h, i, 0] + halves[1, h] @ keys[h, j, 1]
                for i, j in np.ndindex(KEYS, KEYS)
            ]
        )
        best = np.argsort(-scores)[:top_k]
        weights = np.exp(scores[best])
        out = out + weights / weights.sum() @ array(layer.memory_values)[best]
    return out


# There are 9 values: 20 asks for more than there are, 5 for more than keys in a half.
@pytest.mark.parametrize("top_k", [2, 5, 20])
def test_reads_the_best_of_all_values(top_k):
    layer = build(top_k)
    mean, var = array(layer.norm.mean), array(layer.norm.var)
    queries = normed(layer.norm, X @ array(layer.to_queries.kernel), mean, var)
    expected = [read(layer, query, top_k) for query in queries.reshape(-1, HEADS * WIDTH)]
    out = compiled(layer)(X)
    np.testing.assert_allclose(out.reshape(-1, FEATURES), expected, atol=1e-5)


def test_a_layer_norm_normalises_each_half_of_a_query():
    layer = build(norm="layer")
    halves = (X @ array(layer.to_queries.kernel)).reshape(-1, WIDTH // 2)
    mean, var = halves.mean(-1, keepdims=True), halves.var(-1, keepdims=True)
    queries = normed(layer.norm, halves, mean, var).reshape(-1, 2 * HEADS * (WIDTH // 2))
    expected = [read(layer, query, 2) for query in queries]
    out = compiled(layer)(X)
    np.testing.assert_allclose(out.reshape(-1, FEATURES), expected, atol=1e-5)


def test_padding_is_not_in_the_statistics_and_gets_no_gradient_through_them():
    layer, x = build(), draw(2, 5, HEADS * WIDTH)
    norm = layer.norm
    graphdef, state = nnx.split(norm)

    def call(x, state):
        norm = nnx.merge(graphdef, state, copy=True)
        out = norm(x, key_mask=jnp.asarray(MASK), use_running_average=False)
        seen = jnp.where(MASK[..., None], jnp.sin(out), 0)
        return jnp.sum(seen), (out, norm.mean[...], norm.var[...])

    step = compiled(jax.value_and_grad(call, has_aux=True))
    (_, (out, mean, var)), gradient = step(x, state)
    rows = np.float64(x[MASK])
    expected = normed(norm, np.float64(x), rows.mean(0), rows.var(0))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(mean, 0.9 * array(norm.mean) + 0.1 * rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(var, 0.9 * array(norm.var) + 0.1 * rows.var(0, ddof=1), atol=1e-6)
    assert np.all(gradient[~MASK] == 0) and np.all(np.abs(gradient[MASK]).max(-1) > 0)
    # A batch of nothing but padding moves no average.
    kept = array(norm.mean), array(norm.var)
    norm(jnp.asarray(x), key_mask=jnp.zeros((2, 5), bool), use_running_average=False)
    np.testing.assert_array_equal((norm.mean[...], norm.var[...]), kept)


def test_training_moves_the_averages_and_evaluation_does_not():
    layer = build(input_dropout=0.5, query_dropout=0.5, value_dropout=0.5)
    graphdef, state = nnx.split(layer)

    @compiled
    def call(state, keys):
        layer = nnx.merge(graphdef, state)
        rngs = None if keys is None else nnx.Rngs(keys)
        return layer(X, deterministic=keys is None, rngs=rngs), layer.norm.mean[...]

    out, mean = call(state, None)
    np.testing.assert_array_equal(mean, layer.norm.mean[...])
    dropped, mean = call(state, jax.random.key(1))
    assert np.all(mean != layer.norm.mean[...])
    assert np.mean(dropped == 0) > 0.2 and not np.any(out == 0)


def test_a_choice_made_before_is_read_again_and_gradients_are_finite():
    layer = build()
    graphdef, state = nnx.split(layer)

    def loss(state, x, chosen=None):
        out, chosen = nnx.merge(graphdef, state)(x, chosen=chosen, return_chosen=True)
        return jnp.sum(jnp.sin(out)), (out, chosen)

    step = compiled(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, (out, chosen)), gradients = step(state, X)
    (_, (again, _)), replayed = step(state, X, chosen)
    np.testing.assert_array_equal(out, again)
    jax.tree.map(np.testing.assert_array_equal, gradients, replayed)
    assert all(np.any(x) and np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    other = jnp.zeros_like(chosen)  # One value for all: whatever the scores, it is what is read.
    (_, (out, _)), _ = step(state, X, other)
    np.testing.assert_allclose(out[0, 0], HEADS * array(layer.memory_values)[0], rtol=1e-5)


def test_half_precision_is_kept_and_large_inputs_are_finite():
    layer = build(dtype=jnp.bfloat16)
    out = compiled(layer)(jnp.asarray(100 * X, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and np.isfinite(np.asarray(out, np.float32)).all()


def test_the_values_can_have_a_learning_rate_of_their_own():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([build()])

    parameters = nnx.state(Model(), nnx.Param)
    labels = jax.tree.map_with_path(
        lambda path, _: "memory" if is_memory_value(path) else "rest", parameters
    )
    optimizer = optax.multi_transform({"memory": optax.sgd(1.0), "rest": optax.sgd(0.0)}, labels)
    ones = jax.tree.map(jnp.ones_like, parameters)
    updates, _ = optimizer.update(ones, optimizer.init(parameters))
    moved = [bool(np.any(x)) for x in jax.tree.leaves(updates)]
    shapes = [x.shape for x in jax.tree.leaves(parameters)]
    assert moved == [shape == (KEYS**2, FEATURES) for shape in shapes]


def test_options_that_make_no_memory_are_told():
    with pytest.raises(ValueError, match="must be even, got 5"):
        ProductKeyMemory(4, head_dim=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be >= 1, got 4, 128, 0"):
        ProductKeyMemory(4, top_k=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'layer' or 'batch', got 'rms'"):
        ProductKeyMemory(4, norm="rms", rngs=nnx.Rngs(0))
    assert MaskedBatchNorm(3).scale.shape == (3,)
