"""Laws that the models of every preset obey, whatever their options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.layers.stack import stack
from fast_attention.layers.stack.reversible import residual
from fast_attention.models import (
    LinearAttentionTransformer,
    Performer,
    Reformer,
    ReformerLM,
)
from tests.layers.definitions import draw
from tests.leaks import checking_leaks
from tests.models.cases import LM, MODELS, SMALL, Case, M, V, build, tokens

# Windows, buckets and strides are counted from the first place of a row: padding before a
# sequence is by whole ones.
B, T, S, PAD = 2, 13, 5, 6
TOKENS = tokens(B, T)
PLACES = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
CONTEXT = draw(B, S, M, seed=1)
ALL, ALL_OF_CONTEXT = np.ones((B, T), bool), np.ones((B, S), bool)


@functools.cache
def model_of(name: str):
    case: Case = MODELS[name]
    return build(case.preset, **(LM | case.options))


def context_of(case: Case, context, mask) -> dict:
    if not case.context:
        return {}
    linformer = case.options.get("context_linformer_settings") is not None
    return {"context": context} if linformer else {"context": context, "context_mask": mask}


@functools.cache
def program(name: str):
    """The logits, of one shape for all arguments."""
    case: Case = MODELS[name]
    graphdef, state = nnx.split(model_of(name))
    masks = case.options.get("linformer_settings") is None

    @jax.jit
    def run(tokens, positions, key_mask, context, context_mask):
        inputs = context_of(case, context, context_mask) | ({"key_mask": key_mask} if masks else {})
        return nnx.merge(graphdef, state)(tokens, positions=positions, **inputs)

    def call(tokens, positions=PLACES, key_mask=ALL, context=CONTEXT, context_mask=ALL_OF_CONTEXT):
        # Arrays of JAX's own: XLA rounds otherwise where numpy's happen to be aligned otherwise.
        arguments = tokens, positions, key_mask, context, context_mask
        return np.asarray(run(*(jnp.array(x) for x in arguments)))

    return call


@pytest.mark.parametrize("name", MODELS)
def test_models_are_shaped_causal_and_keep_rows_and_padding_apart(name):
    case, run = MODELS[name], program(name)
    whole = np.asarray(run(TOKENS))
    options = LM | case.options
    width = options.get("emb_dim") or M if options.get("return_embeddings") else V
    # emb_dim comes after the norm in the Reformer, whose embeddings are those of the stack.
    width = M if case.preset is ReformerLM and options.get("return_embeddings") else width
    assert whole.shape == (B, T, width) and whole.dtype == np.float32
    assert np.all(np.isfinite(whole))

    neighbour = run(np.concatenate([TOKENS[:1], (TOKENS[1:] + 2) % V]))
    np.testing.assert_array_equal(neighbour[0], whole[0])
    assert not np.allclose(neighbour[1], whole[1])

    future = np.where(PLACES < 7, TOKENS, (TOKENS + 3) % V)
    changed = np.asarray(run(future))
    if case.causal and not case.hashed:
        np.testing.assert_array_equal(changed[:, :7], whole[:, :7])
    elif not case.causal:
        assert not np.allclose(changed[:, 0], whole[:, 0])
    if case.options.get("linformer_settings") is None:
        shown = PLACES < 7
        hidden = run(future, key_mask=shown), run(TOKENS, key_mask=shown)
        np.testing.assert_array_equal(*(np.asarray(x)[:, :7] for x in hidden))
    if case.context and case.options.get("context_linformer_settings") is None:
        shown = np.arange(S)[None] < np.array([[3], [5]])
        other = np.where(shown[..., None], CONTEXT, 9)
        masked = run(TOKENS, context_mask=shown)
        np.testing.assert_array_equal(run(TOKENS, context=other, context_mask=shown), masked)
        assert not np.allclose(masked[0], whole[0])


@pytest.mark.parametrize("name", [name for name, case in MODELS.items() if case.truncates])
def test_padding_on_either_side_equals_truncation(name):
    case = MODELS[name]
    graphdef, state = nnx.split(model_of(name))
    short, places = TOKENS[:, : T - PAD], PLACES[:, : T - PAD]
    expected = np.asarray(
        jax.jit(
            lambda tokens: nnx.merge(graphdef, state)(
                tokens, positions=places, **context_of(case, CONTEXT[:, :4], None)
            )
        )(short)
    )
    shown = np.broadcast_to(np.arange(S) < 4, (B, S))
    run = functools.partial(program(name), context_mask=shown)
    before, behind = [(0, 0), (PAD, 0)], [(0, 0), (0, PAD)]
    mask = np.ones_like(short, bool)
    for side, cut in ((before, slice(PAD, None)), (behind, slice(T - PAD))):
        out = run(np.pad(short, side, constant_values=5), np.pad(places, side), np.pad(mask, side))
        np.testing.assert_allclose(out[:, cut], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in MODELS.items() if case.causal])
def test_prefill_and_steps_equal_the_whole(name):
    case, model = MODELS[name], model_of(name)
    assert model.causal and model.can_decode == case.decodes
    if not case.decodes:
        return
    graphdef, state = nnx.split(model)
    shown = np.arange(S)[None] < np.array([[3], [5]])
    whole = program(name)(TOKENS, context_mask=shown)
    # Row 0 begins with two tokens of padding, row 1 ends with them.
    first = np.stack([np.pad(TOKENS[0, :4], (2, 0)), np.pad(TOKENS[1, :4], (0, 2))])
    mask = np.stack([np.arange(6) >= 2, np.arange(6) < 4])

    @jax.jit
    def read(context, context_mask):
        model = nnx.merge(graphdef, state)
        memory = model.init_state(B, T + 2, **context_of(case, context, context_mask))
        prefilled, memory = model.prefill(memory, first, mask)

        def step(memory, token):
            logits, memory = model.step(memory, token)
            return memory, logits

        _, stepped = jax.lax.scan(step, memory, jnp.asarray(TOKENS[:, 4:].T))
        return prefilled, jnp.swapaxes(stepped, 0, 1)

    prefilled, stepped = read(CONTEXT, shown)
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-5)
    close(prefilled[0, 2:], whole[0, :4])
    close(prefilled[1, :4], whole[1, :4])
    close(stepped, whole[:, 4:])


BARE = {
    "performer_both_sides": (
        Performer,
        {"cross_attend": True, "nb_features": 6, "use_scalenorm": True},
    ),
    "reformer": (
        Reformer,
        {
            "causal": True,
            "use_full_attn": True,
            "bucket_size": 3,
            "n_local_attn_heads": 1,
            "num_mem_kv": 1,
            "lsh_attend_across_buckets": True,
        },
    ),
    "linear": (
        LinearAttentionTransformer,
        {
            "max_seq_len": 24,
            "receives_context": True,
            "n_local_attn_heads": 1,
            "local_attn_window_size": 3,
            "attend_axially": True,
        },
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_gradients_of_padded_stacks_are_those_of_truncated_ones(name):
    preset, options = BARE[name]
    graphdef, state = nnx.split(build(preset, dtype=None, **(SMALL | {"depth": 1} | options)))
    takes = options.get("cross_attend") or options.get("receives_context") or preset is Reformer
    length, context_length = T - PAD, S - 2
    x, context = draw(B, T, M, seed=2), CONTEXT
    weight = draw(B, length, M, seed=3)
    places = PLACES[:, :length]

    def out(x, context, **masks):
        given = {"context": context} if takes else masks.pop("context_mask", None) and {}
        return nnx.merge(graphdef, state)(x, **(given or {}), **masks)

    @jax.jit
    def truncated(x, context):
        def loss(x, context):
            return jnp.sum(weight * jnp.sin(out(x, context, positions=places)))

        return jax.value_and_grad(loss, (0, 1))(x, context)

    @jax.jit
    def padded(x, context, start, positions, key_mask, context_mask):
        masks = {"positions": positions, "key_mask": key_mask}
        masks |= {"context_mask": context_mask} if takes else {}

        def loss(x, context):
            seen = jax.lax.dynamic_slice_in_dim(out(x, context, **masks), start, length, 1)
            return jnp.sum(weight * jnp.sin(seen))

        return jax.value_and_grad(loss, (0, 1))(x, context)

    shown = np.broadcast_to(np.arange(S) < context_length, (B, S))
    for start, side in ((0, (0, PAD)), (PAD, (PAD, 0))):
        cut = slice(start, start + length)
        value, (d_x, d_context) = padded(
            x,
            np.where(shown[..., None], context, 1e4).astype(np.float32),
            start,
            np.pad(places, ((0, 0), side)),
            np.pad(np.ones((B, length), bool), ((0, 0), side)),
            shown,
        )
        expected, (e_x, e_context) = truncated(x[:, cut], context[:, :context_length])
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
        limit = 2e-5 * float(np.abs(e_x).max())
        np.testing.assert_allclose(d_x[:, cut], e_x, atol=limit)
        assert not np.delete(np.asarray(d_x), np.r_[cut], axis=1).any()
        np.testing.assert_allclose(d_context[:, :context_length], e_context, atol=limit)
        assert not np.asarray(d_context[:, context_length:]).any()
    # A row that sees nothing at all.
    nothing = padded(x, context, 0, PLACES, np.zeros_like(ALL), np.zeros_like(shown))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        (Performer, {"causal": True, "nb_features": 6, "shift_tokens": True}),
        (Reformer, {"causal": True, "bucket_size": 2, "n_hashes": 2, "num_mem_kv": 1}),
        (LinearAttentionTransformer, {"max_seq_len": 24, "causal": True, "shift_tokens": True}),
    ],
    ids=["performer", "reformer", "linear"],
)
def test_half_precision_and_large_inputs_stay_finite_and_the_past_has_no_future(preset, options):
    dtype = jnp.bfloat16
    graphdef, state = nnx.split(build(preset, dtype=dtype, **(SMALL | {"depth": 1} | options)))

    @jax.jit
    def run(x):
        def loss(x):
            out = nnx.merge(graphdef, state)(x)
            return jnp.sum(out[:, :6].astype(jnp.float32)), out

        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(x)
        return out, gradient

    x = jnp.asarray(100 * draw(B, T, M), dtype)
    out, gradient = run(x)
    assert out.dtype == gradient.dtype == dtype
    assert np.all(np.isfinite(np.asarray(out, np.float32)))
    assert np.all(np.isfinite(np.asarray(gradient, np.float32)))
    assert not np.asarray(gradient[:, 6:], np.float32).any()
    assert np.asarray(gradient[:, :6], np.float32).any()
    if preset is not Reformer:
        future, _ = run(x.at[:, 6:].multiply(-100))
        np.testing.assert_array_equal(*(np.asarray(y[:, :6], np.float32) for y in (future, out)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "reformer_hashed",
            {"depth": 1, "n_hashes": 1, "attn_chunks": None, "lsh_allow_duplicate_attention": True},
        ),
        ("linear", {"depth": 1, "n_local_attn_heads": 1, "pkm_layers": 1}),
    ],
)
def test_training_with_dropout_in_two_streams_has_the_gradients_of_plain_layers(
    name, options, monkeypatch
):
    case = MODELS[name]
    own = build(case.preset, **(LM | case.options | options))
    graphdef, parameters, rest = nnx.split(own, nnx.Param, ...)
    assert own.stack.config.reversible

    def gradients():
        @jax.jit
        def run(parameters, rest, key):
            def loss(parameters):
                model = nnx.merge(graphdef, parameters, rest, copy=True)
                logits = model(TOKENS, deterministic=False, rngs=nnx.Rngs(dropout=key))
                return jnp.mean(jnp.sin(logits))

            return jax.value_and_grad(loss)(parameters)

        return functools.partial(run, parameters, rest)

    reversible = gradients()
    key = jax.random.key(1)
    value, found = reversible(key)
    assert reversible(jax.random.key(2))[0] != value == reversible(key)[0]
    monkeypatch.setattr(stack, "reversible_residual", residual)
    expected_value, expected = gradients()(key)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * largest)


def test_local_heads_may_differ_from_layer_to_layer():
    for preset, name in (
        (Performer, "local_attn_heads"),
        (LinearAttentionTransformer, "n_local_attn_heads"),
    ):
        more = {"max_seq_len": 8} if preset is LinearAttentionTransformer else {}
        shape = nnx.eval_shape(
            lambda: preset(rngs=nnx.Rngs(0), **SMALL, **more, **{name: (0, 2)})  # noqa: B023
        )
        groups = [[g.num_heads for g in block[0].inner.config.groups] for block in shape.blocks]
        assert groups == [[2], [2]]
        assert shape.blocks[0][0].config != shape.blocks[1][0].config


@pytest.mark.parametrize("preset", [Performer, LinearAttentionTransformer])
def test_stacks_leak_nothing_under_jit_grad_vmap_scan_and_remat(preset):
    # Two streams have a test of their own: looking for leaks is slow.
    more = {"max_seq_len": 8} if preset is LinearAttentionTransformer else {"nb_features": 6}
    options = SMALL | {"depth": 1, "heads": 1, "causal": True} | more
    graphdef, state = nnx.split(build(preset, dtype=None, **options))

    def run(state, x):
        def layer(x, _):
            return jax.checkpoint(lambda x: nnx.merge(graphdef, state)(x))(x), None

        return jax.lax.scan(layer, x, None, length=2)[0]

    def loss(state, x):
        return jnp.sum(jnp.sin(jax.vmap(run, (None, 0))(state, x)))

    with checking_leaks():
        gradient = jax.eval_shape(jax.jit(jax.grad(loss, 1)), state, draw(2, 1, 6, M))
    assert gradient.shape == (2, 1, 6, M)
