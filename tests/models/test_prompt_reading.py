"""Generation by reading all over again draws the tokens that a state does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention.mechanisms.efficient.fn import make_efficient_attention
from fast_attention.models import (
    LinearAttentionTransformerLM,
    LinformerContextSettings,
    PerformerLM,
    ReformerLM,
    Transformer,
    TransformerConfig,
)
from fast_attention.softmax_attention import make_softmax_attention
from tests.layers.definitions import draw, filled
from tests.models.cases import LM, M, V, build, generate

NEW = 5
PROMPTS = ([3, 1, 4, 1], [5, 2], [6, 0, 3])
PADDED = np.array([[3, 1, 4, 1], [99, -5, 5, 2], [6, 0, 3, 99]])
MASK = np.array([[True] * 4, [False, False, True, True], [True, True, True, False]])
GREEDY = {"key": jax.random.key(0), "max_new_tokens": NEW, "temperature": 0.0}
LSH = {"causal": True, "bucket_size": 2, "n_hashes": 2, "ff_chunks": 1, "depth": 1}


def stateless(function):
    """The attention function without its recurrent form."""

    def attend(query, key, value, mask=None, *, key_mask=None, is_causal=False):
        return function(query, key, value, mask=mask, key_mask=key_mask, is_causal=is_causal)

    return attend


@pytest.mark.parametrize(
    ("make", "positions"),
    [(make_softmax_attention, "learned"), (make_efficient_attention, "rotary")],
)
def test_both_ways_draw_the_same(make, positions):
    config = TransformerConfig(V, 8, 2, None, 1, 8, 12, 8, positions=positions)
    function = make()
    models = [
        filled(lambda: Transformer(config, f, rngs=nnx.Rngs(0)))  # noqa: B023
        for f in (function, stateless(function))
    ]
    assert [model.can_decode for model in models] == [True, False]
    drawn = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 2.0, "top_k": 5}
    for options in ({}, drawn | {"eos_token": 1, "pad_token": 0}):
        # Eight tokens are read: as many as there are learned positions.
        first, second = (
            np.asarray(generate(model, PADDED, prompt_mask=MASK, **(GREEDY | options)))
            for model in models
        )
        np.testing.assert_array_equal(first, second)
    with (
        pytest.raises(ValueError, match="9 tokens .* max_len=8")
        if positions == "learned"
        else (pytest.raises(ValueError, match="max_new_tokens"))
    ):
        number = NEW + 1 if positions == "learned" else 0
        generate(models[1], PADDED, prompt_mask=MASK, **(GREEDY | {"max_new_tokens": number}))


def greedy(model, row, room, **inputs):
    """One row of tokens, each the most likely after all before it, on a page of one length."""
    graphdef, state = nnx.split(model)
    read = jax.jit(lambda tokens, mask: nnx.merge(graphdef, state)(tokens, key_mask=mask, **inputs))
    row = list(row)
    for _ in range(NEW):
        page = np.array([row + [0] * (room - len(row))])
        logits = read(page, np.arange(room)[None] < len(row))
        row.append(int(jnp.argmax(logits[0, len(row) - 1])))
    return row[-NEW:]


CASES = {
    "hashed": (ReformerLM, LSH | {"num_mem_kv": 1, "axial_position_emb": True}, False),
    "hashed_context": (ReformerLM, LSH, True),
    "linformer_context": (
        LinearAttentionTransformerLM,
        {
            "causal": True,
            "depth": 1,
            "receives_context": True,
            "context_linformer_settings": LinformerContextSettings(3, 2),
            "local_attn_window_size": 4,
        },
        True,
    ),
    "performer_context": (PerformerLM, {"causal": True, "cross_attend": True, "depth": 1}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_every_row_of_ragged_prompts_is_as_if_alone(name):
    preset, options, has_context = CASES[name]
    model = build(preset, **(LM | options))
    assert model.can_decode == (name == "performer_context")
    given = {"context": draw(3, 3, M, seed=4)} if has_context else {}
    found = np.asarray(generate(model, PADDED, prompt_mask=MASK, **GREEDY, **given))
    room = PADDED.shape[1] + NEW - 1
    for index, prompt in enumerate(PROMPTS):
        own = {name: x[index : index + 1] for name, x in given.items()}
        np.testing.assert_array_equal(found[index], greedy(model, prompt, room, **own))


@functools.cache
def of_size(size, hashed):
    if hashed:
        return build(ReformerLM, **(LM | LSH | {"num_tokens": size}))
    config = TransformerConfig(size, 8, 2, None, 1, 8, 12, 16, positions="rotary")
    return filled(lambda: Transformer(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(("size", "hashed"), [(2, False), (5, True), (9, False)])
def test_any_vocabulary_ends_row_by_row_with_every_filter(size, hashed):
    options = {"max_new_tokens": 12, "top_k": size - 1, "top_p": 0.9, "repetition_penalty": 1.5}
    if size == 2:
        options |= {"top_k": None, "top_p": None}
    prompt = np.zeros((8, 2), np.int32)
    run = functools.partial(generate, of_size(size, hashed), prompt, temperature=4.0, **options)
    whole = np.asarray(run(key=jax.random.key(0)))
    np.testing.assert_array_equal(whole, run(key=jax.random.key(0)))
    assert whole.min() >= 0 and whole.max() < size
    # A token that rows come to at different times.
    eos = int(whole[0, 4])
    ends = [np.flatnonzero(np.append(row, eos) == eos)[0] for row in whole]
    assert len(set(ends)) > 1
    ended = np.asarray(run(key=jax.random.key(0), eos_token=eos, pad_token=(eos + 1) % size))
    for row, before, end in zip(ended, whole, ends, strict=True):
        np.testing.assert_array_equal(row[: end + 1], before[: end + 1])
        assert np.all(row[end + 1 :] == (eos + 1) % size)
