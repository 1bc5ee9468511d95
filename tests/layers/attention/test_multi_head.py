"""Multi-head attention against one head and one position at a time, and the laws of its state."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.layers import (
    AttentionConfig,
    HeadGroup,
    Inputs,
    MultiHeadAttention,
    Projection,
    redraw,
)
from fast_attention.mechanisms.efficient.fn import make_efficient_attention
from fast_attention.softmax_attention import make_softmax_attention
from tests.layers import definitions
from tests.layers.definitions import compiled, draw, filled

B, T, M = 2, 7, 6
X = draw(B, T, M)


def build(attention_fn=None, *, rotary=False, dropout_rate=0.0, dtype=None, **options: Any):
    group = HeadGroup(
        4,
        attention_fn or make_softmax_attention(),
        rotary="halves" if rotary else None,
        dropout_rate=dropout_rate,
    )
    config = AttentionConfig((group,), **({"head_dim": 4, "num_kv_heads": 2} | options))
    return filled(lambda: MultiHeadAttention(M, config, dtype=dtype, rngs=nnx.Rngs(0)))


def fast(**options):
    return make_fast_softmax_attention(nb_features=6, **options)


def masks_only(query, key, value, mask=None):
    """An attention function that knows nothing of causality, padding and segments."""
    return nnx.dot_product_attention(query, key, value, mask=mask)


def estimate(module):
    """The kernel of positive features with the module's own projection."""
    rows = definitions.array(module.projections[0])

    def features(x):
        x = x / len(x) ** 0.25
        return np.exp(rows @ x - x @ x / 2)

    return lambda query, key: features(query) @ features(key)


FUNCTIONS = {"exact": None, "flax": nnx.dot_product_attention, "masks_only": masks_only}


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equals_the_definition_with_grouped_queries_segments_and_hidden_keys(name, rotary):
    options = {"causal": rotary, "rotary": rotary}
    layer = build(FUNCTIONS[name], use_bias=rotary, out_bias=rotary, **options)
    # The last run has the id of the first one and is another sequence all the same.
    ids = np.array([[1, 1, 1, 2, 2, 1, 1], [3, 3, 3, 3, 3, 3, 3]])
    shown = np.array([[True, True, False, True, True, True, True], [True] * 5 + [False] * 2])
    positions = np.array([[0, 1, 2, 0, 1, 0, 1], [4, 5, 6, 7, 8, 9, 10]])
    runs = np.cumsum(np.diff(ids, prepend=0) != 0, axis=1)
    visible = (runs[:, :, None] == runs[:, None, :]) & shown[:, None, :]

    out = compiled(layer)(X, positions=positions, segment_ids=ids, key_mask=shown)
    for row in range(B):
        expected = definitions.attention(
            layer, X[row], 4, positions=positions[row], visible=visible[row], **options
        )
        np.testing.assert_allclose(out[row][shown[row]], expected[shown[row]], atol=2e-6)


def test_random_features_use_the_layers_own_projection_also_after_a_redraw():
    layer = build(fast(), causal=True)
    call = compiled(lambda layer: layer(X[:1])[0])

    def define(layer):
        return definitions.attention(layer, X[0], 4, causal=True, kernel=estimate(layer))

    before = call(layer)
    np.testing.assert_allclose(before, define(layer), atol=5e-6)
    redraw(layer, nnx.Rngs(0))
    after = call(layer)
    np.testing.assert_allclose(after, define(layer), atol=5e-6)
    assert np.max(np.abs(after - before)) > 0.01


@pytest.mark.parametrize("name", ["exact", "fast"])
def test_steps_from_an_empty_state_equal_the_whole_and_end_in_the_state_of_a_prefill(name):
    layer = build(None if name == "exact" else fast(), causal=True, rotary=True)
    places = jnp.broadcast_to(jnp.arange(T)[None], (B, T))

    def one_by_one(x):
        def step(state, token):
            x, place = token
            out, state = layer.step(state, x, Inputs(positions=place))
            return state, out

        tokens = jnp.swapaxes(x, 0, 1), places.T
        state, out = jax.lax.scan(step, layer.init_state(B, T), tokens)
        return jnp.swapaxes(out, 0, 1), state

    @compiled
    def three_ways(x):
        return (
            one_by_one(x),
            layer.prefill(layer.init_state(B, T), x, Inputs(positions=places)),
            layer(x),
        )

    (stepped, by_steps), (prefilled, by_prefill), whole = three_ways(X)
    np.testing.assert_allclose(stepped, whole, atol=5e-6)
    np.testing.assert_allclose(prefilled, whole, atol=5e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), by_steps, by_prefill)


def test_gradients_reach_every_parameter_and_not_the_projection():
    layer = build(fast(), causal=True, rotary=True)

    @compiled
    @nnx.grad
    def gradient(layer):
        return jnp.sum(layer(X) ** 2)

    leaves = {jax.tree_util.keystr(path): x for path, x in nnx.to_flat_state(gradient(layer))}
    assert len(leaves) == 4
    assert all(np.all(np.isfinite(x[...])) and np.all(x[...] != 0) for x in leaves.values())


def test_dropout_follows_its_key_differs_between_rows_and_is_off_when_deterministic():
    layer, without = build(dropout_rate=0.5), build()
    x = np.broadcast_to(X[:1], X.shape)

    @compiled
    def dropped(seed):
        return layer(x, deterministic=False, rngs=nnx.Rngs(dropout=jax.random.key(seed)))

    first, other = dropped(0), dropped(1)
    np.testing.assert_array_equal(first, dropped(0))
    assert np.all(np.abs(first - other).max((1, 2)) > 0.1)
    assert np.max(np.abs(first[0] - first[1])) > 0.1
    np.testing.assert_array_equal(layer(x), without(x, deterministic=False))
    with pytest.raises(ValueError, match="dropout_rate=0.5 needs rngs"):
        layer(x, deterministic=False)


@pytest.mark.parametrize("name", ["exact", "fast"])
def test_computes_in_its_dtype_and_keeps_a_float32_state(name):
    layer = build(None if name == "exact" else fast(), causal=True, dtype=jnp.bfloat16)
    assert jax.eval_shape(layer, X).dtype == jnp.bfloat16
    state = jax.eval_shape(lambda: layer.init_state(B, T))
    out, after = jax.eval_shape(layer.step, state, X[:, 0])
    assert out.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves((after, nnx.state(layer))))


def test_every_layer_of_a_stack_is_redrawn_by_itself():
    stack = build(fast())
    stack.projections[0] = Projection(jnp.zeros((3, 6, 4)))
    nnx.jit(redraw)(stack, nnx.Rngs(1))
    drawn = np.asarray(stack.projections[0][...])
    assert drawn.shape == (3, 6, 4) and np.all(drawn.any((1, 2)))
    assert len({x.tobytes() for x in drawn}) == 3


def test_exact_attention_has_no_projection_and_a_redraw_leaves_it_alone():
    layer = build()
    before = jax.tree.leaves(nnx.state(layer))
    redraw(layer, nnx.Rngs(1))
    assert layer.projections[0] is None and not nnx.state(layer, Projection)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.leaves(nnx.state(layer)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"head_dim": 3, "rotary": True}, "even width, got 3"),
        ({"context": "cross", "causal": True}, "not for cross attention"),
        ({"shared_qk": True}, "leave num_kv_heads out"),
        ({"context": "append"}, "needs shared_qk"),
        ({"context": "other"}, "'cross', 'append' or None, got 'other'"),
    ],
)
def test_shapes_that_make_no_layer_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_what_cannot_decode_says_why():
    with pytest.raises(ValueError, match="causal=True"):
        build().init_state(B, T)
    assert build(fast(unidirectional=True)).init_state(B, T) is not None
    with pytest.raises(TypeError, match="cannot decode"):
        build(masks_only, causal=True).init_state(B, T)


def test_padding_passed_as_mask_is_told_of_key_mask(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="passed as key_mask"):
        build()(X, mask=jnp.ones((B, T), bool))


def test_decoding_with_rotation_needs_positions():
    layer = build(causal=True, rotary=True)
    state = layer.init_state(B, T)
    with pytest.raises(ValueError, match="need positions="):
        layer.prefill(state, X)
    with pytest.raises(ValueError, match="need positions="):
        layer.step(state, X[:, 0])


MEMORY_MECHANISMS = {
    "exact": make_softmax_attention(),
    "softmax": fast(),
    "generalized": make_fast_generalized_attention(nb_features=6),
    "efficient": make_efficient_attention(),
    "flax": nnx.dot_product_attention,
    "masks_only": masks_only,
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MEMORY_MECHANISMS)
def test_memory_is_tokens_that_all_see_and_that_see_nothing(name, causal):
    function = MEMORY_MECHANISMS[name]
    layer, plain = (build(function, causal=causal, memory=n, num_kv_heads=4) for n in (2, 0))
    for part in ("query", "key", "value"):
        getattr(plain.project, part).kernel[...] = getattr(layer.project, part).kernel[...]
    plain.out.kernel[...] = layer.out.kernel[...]
    if plain.projections[0] is not None:
        plain.projections[0][...] = layer.projections[0][...]
    memory = np.broadcast_to(layer.project.memory[...], (B, 2, M))

    @compiled
    def both(x, memory):
        # Causal: the memory is what comes before all; else it may stand behind.
        tokens = [memory, x] if causal else [x, memory]
        joined = plain(jnp.concatenate(tokens, axis=1))
        return layer(x), joined[:, 2:] if causal else joined[:, :T]

    np.testing.assert_allclose(*both(X, memory), atol=5e-6)
