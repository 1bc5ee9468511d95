"""End-to-end laws of the Transformer with linear attention: packing, masks, causality, decoding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.layers import Projection, redraw
from fast_attention.models.config import TransformerConfig
from fast_attention.models.transformer import Transformer
from tests.models.cases import generate

VOCAB, LENGTH = 11, 14

ATTENTION = {
    # Bidirectional as bound: a causal model must make it causal.
    "softmax": lambda: make_fast_softmax_attention(nb_features=8, chunk_size=4),
    "generalized": lambda: make_fast_generalized_attention(chunk_size=4),
    "exact": lambda: None,
}


# Shifting comes before attention, and neither knows of the other.
with_or_without_shift = pytest.mark.parametrize(
    ("name", "shift"), [("softmax", True), ("generalized", False), ("exact", False)]
)


@functools.cache
def build(name: str, *, causal: bool = True, shift: bool = False, copy: int = 0) -> Transformer:
    """A model that tests share; another `copy` is for a test that changes it."""
    config = TransformerConfig(
        vocab_size=VOCAB,
        emb_dim=8,
        num_heads=2,
        num_kv_heads=1,
        num_layers=2,
        qkv_dim=8,
        mlp_dim=12,
        max_len=32,
        causal=causal,
        positions="rotary",
        shift_tokens=shift,
    )
    return Transformer(config, ATTENTION[name](), rngs=nnx.Rngs(0))


@functools.cache
def call(model: Transformer):
    """Its logits, compiled once for all tests."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def logits(tokens, positions, segment_ids, key_mask):
        return nnx.merge(graphdef, state)(
            tokens, positions=positions, segment_ids=segment_ids, key_mask=key_mask
        )

    return logits


TOKENS = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, VOCAB)
PLAIN = jnp.broadcast_to(jnp.arange(LENGTH)[None], TOKENS.shape)
ONE = jnp.ones_like(TOKENS)
ALL = jnp.ones(TOKENS.shape, bool)


@with_or_without_shift
def test_a_causal_model_is_causal_packs_and_keeps_rows_apart(name, shift):
    logits = call(build(name, shift=shift))
    whole = logits(TOKENS, PLAIN, ONE, ALL)
    assert whole.shape == (2, LENGTH, VOCAB) and whole.dtype == jnp.float32

    # The future changes nothing.
    future = TOKENS.at[:, 9:].set((TOKENS[:, 9:] + 3) % VOCAB)
    changed = logits(future, PLAIN, ONE, ALL)
    np.testing.assert_array_equal(changed[:, :9], whole[:, :9])
    assert not np.allclose(changed[:, 9:], whole[:, 9:])

    # A row's result does not depend on its neighbour.
    neighbour = logits(TOKENS.at[1].set(0), PLAIN, ONE, ALL)
    np.testing.assert_array_equal(neighbour[0], whole[0])

    # Two packed proteins do not see each other: the second one can be anything, and each is what
    # it would be alone.
    ids = jnp.where(jnp.arange(LENGTH)[None] < 6, 1, 2) * ONE
    positions = jnp.where(ids == 1, PLAIN, PLAIN - 6)
    packed = logits(TOKENS, positions, ids, ALL)
    other = logits(future, positions, ids, ALL)
    np.testing.assert_array_equal(packed[:, :6], other[:, :6])
    np.testing.assert_allclose(packed[:, :6], whole[:, :6], atol=2e-5)
    second = jnp.concatenate([TOKENS[:, 6:], TOKENS[:, :6]], axis=1)
    alone = logits(second, PLAIN, ONE, ALL)
    np.testing.assert_allclose(packed[:, 6:], alone[:, : LENGTH - 6], atol=2e-5)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_masked_model_sees_both_sides_but_neither_padding_nor_other_proteins(name):
    logits = call(build(name, causal=False))
    whole = logits(TOKENS, PLAIN, ONE, ALL)
    last = logits(TOKENS.at[:, -1].set((TOKENS[:, -1] + 1) % VOCAB), PLAIN, ONE, ALL)
    assert not np.allclose(last[:, 0], whole[:, 0])

    visible = ALL.at[:, 9:].set(False)
    padded = logits(TOKENS, PLAIN, ONE, visible)
    other = logits(TOKENS.at[:, 9:].set(0), PLAIN, ONE, visible)
    np.testing.assert_array_equal(padded[:, :9], other[:, :9])

    ids = jnp.where(jnp.arange(LENGTH)[None] < 9, 1, 2) * ONE
    packed = logits(TOKENS, jnp.where(ids == 1, PLAIN, PLAIN - 9), ids, ALL)
    np.testing.assert_allclose(packed[:, :9], padded[:, :9], atol=2e-5)


@with_or_without_shift
def test_prefill_and_steps_equal_the_whole(name, shift):
    model = build(name, shift=shift)
    whole = call(model)(TOKENS, PLAIN, ONE, ALL)
    graphdef, parameters = nnx.split(model)
    prefill = jax.jit(lambda s, t, m: nnx.merge(graphdef, parameters).prefill(s, t, m))
    step = jax.jit(lambda s, t: nnx.merge(graphdef, parameters).step(s, t))

    # The first row's prompt is padded on the left by two, the second row's on the right.
    width = 8
    mask = jnp.array([[False] * 2 + [True] * 6, [True] * 6 + [False] * 2])
    prompt = jnp.stack([jnp.pad(TOKENS[0, :6], (2, 0)), jnp.pad(TOKENS[1, :6], (0, 2))])
    logits, state = prefill(model.init_state(2, width + LENGTH), prompt, mask)
    np.testing.assert_allclose(logits[0, 2:], whole[0, :6], atol=2e-5)
    np.testing.assert_allclose(logits[1, :6], whole[1, :6], atol=2e-5)
    for t in range(6, 10):
        logits, state = step(state, TOKENS[:, t])
        np.testing.assert_allclose(logits, whole[:, t], atol=2e-5)


@pytest.mark.parametrize("name", ["softmax", "exact"])
def test_generation_equals_recomputing_the_prefix(name):
    model = build(name, shift=name == "softmax")
    logits = call(model)
    prompt = TOKENS[:, :5]
    new = generate(model, prompt, key=jax.random.key(3), max_new_tokens=6, temperature=0.0)
    tokens = jnp.zeros_like(TOKENS).at[:, :5].set(prompt)
    for t in range(5, 11):
        chosen = jnp.argmax(logits(tokens, PLAIN, ONE, ALL)[:, t - 1], axis=-1)
        tokens = tokens.at[:, t].set(chosen)
    np.testing.assert_array_equal(new, tokens[:, 5:11])


def test_sampling_is_reproducible_stops_at_eos_and_draws_nothing_forbidden():
    model = build("softmax", shift=True)
    prompt = TOKENS[:, :3]
    options = dict(max_new_tokens=12, eos_token=4, pad_token=10, forbidden_tokens=(10, 9))
    first = np.asarray(generate(model, prompt, key=jax.random.key(5), **options))
    again = np.asarray(generate(model, prompt, key=jax.random.key(5), **options))
    np.testing.assert_array_equal(first, again)
    drawn = [
        np.asarray(generate(model, prompt, key=jax.random.key(k), **options)) for k in range(6)
    ]
    assert any((tokens != first).any() for tokens in drawn)
    assert any((tokens == 4).any() for tokens in drawn)
    for row in np.concatenate(drawn):
        ends = np.flatnonzero(row == 4)
        end = ends[0] if len(ends) else len(row)
        assert not np.isin(row[:end], (9, 10)).any()
        assert (row[end + 1 :] == 10).all()


def test_layers_have_their_own_projections_and_redraw_changes_them():
    model = build("softmax", copy=1)
    before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, Projection))]
    assert len(before) == 2 and not np.array_equal(before[0], before[1])
    call(model)(TOKENS, PLAIN, ONE, ALL)
    after = jax.tree.leaves(nnx.state(model, Projection))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    redraw(model, nnx.Rngs(7))
    redrawn = jax.tree.leaves(nnx.state(model, Projection))
    assert not any(np.array_equal(a, b) for a, b in zip(before, redrawn, strict=True))
