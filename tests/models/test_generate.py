"""Generation against the definition: read everything again for every token, one row at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fast_attention import make_fast_softmax_attention, models
from fast_attention.models import Transformer, TransformerConfig
from fast_attention.models.generation import Sampling
from tests.layers.definitions import compiled, filled
from tests.models.cases import generate

V, NEW, LONGEST = 7, 6, 9
PROMPTS = ([3, 1, 4, 1], [5, 2], [6, 0, 3])
# Padding stands on either side and is no token.
PADDED = np.array([[3, 1, 4, 1], [99, -5, 5, 2], [6, 0, 3, 99]])
MASK = np.array([[True] * 4, [False, False, True, True], [True, True, True, False]])
KEY = jax.random.key(3)


@functools.cache
def build(positions="learned", causal=True, attention_fn=None):
    config = TransformerConfig(
        vocab_size=V,
        emb_dim=8,
        num_heads=2,
        num_layers=1,
        qkv_dim=8,
        mlp_dim=12,
        max_len=LONGEST,
        causal=causal,
        positions=positions,
    )
    return filled(lambda: Transformer(config, rngs=nnx.Rngs(0), attention_fn=attention_fn))


@functools.cache
def forward():
    return compiled(build())


def filtered(
    logits,
    past,
    temperature=1.0,
    top_k=V,
    top_p=1.0,
    repetition_penalty=1.0,
    repetition_window=LONGEST,
    forbidden_tokens=(),
):
    """The logits `[V]` that a token is drawn from, in the documented order."""
    logits = np.array(logits, np.float64) / (temperature or 1)
    logits[list(forbidden_tokens)] = -np.inf
    for token in set(past[-repetition_window:]):
        factor = 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
        logits[token] *= factor
    order = np.argsort(-logits)
    logits[order[top_k:]] = -np.inf
    mass = np.cumsum(np.exp(logits - logits.max())[order])
    if top_p < 1:
        logits[order[1:][mass[:-1] >= top_p * mass[-1]]] = -np.inf
    return logits


def naive(number=NEW, **options):
    rows = [list(row) for row in PROMPTS]
    for index in range(number):
        tokens = np.array([row + [0] * (LONGEST - len(row)) for row in rows])
        # Positions beyond the last draw would not fit, and are never read.
        last = forward()(tokens)[np.arange(len(rows)), [len(row) - 1 for row in rows]]
        logits = np.stack([filtered(*pair, **options) for pair in zip(last, rows, strict=True)])
        if options.get("temperature") == 0:
            drawn = logits.argmax(-1)
        else:
            key = jax.random.fold_in(KEY, index)
            drawn = jax.random.categorical(key, logits.astype(np.float32))
        for row, token in zip(rows, np.asarray(drawn), strict=True):
            row.append(int(token))
    return np.array([row[-number:] for row in rows])


def run(**options):
    options = {"max_new_tokens": NEW, "prompt_mask": MASK, "key": KEY} | options
    return np.asarray(generate(build(), jnp.asarray(PADDED), **options))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {
            "temperature": 0.7,
            "top_k": 4,
            "repetition_penalty": 3.0,
            "repetition_window": 3,
            "forbidden_tokens": (2, 2),
        },
        {"temperature": 2.0, "top_p": 0.8, "repetition_penalty": 0.5},
    ],
    ids=["greedy", "filters", "nucleus"],
)
def test_ragged_prompts_are_continued_as_if_every_row_were_read_again(options):
    # The last token fills the learned positions to the end.
    assert PADDED.shape[1] + NEW - 1 == LONGEST
    np.testing.assert_array_equal(run(**options), naive(**options))


def test_rows_end_at_eos_are_filled_with_it_and_the_work_ends_with_the_last(monkeypatch):
    steps, step = [], Transformer.step

    def counted(self, state, tokens):
        jax.debug.callback(lambda: steps.append(None))
        return step(self, state, tokens)

    monkeypatch.setattr(Transformer, "step", counted)
    whole = naive(temperature=0)
    # A token that all rows come to before the end.
    eos = int(next(t for t in range(V) if np.all((whole[:, :-1] == t).any(1))))
    ends = (whole == eos).argmax(1)
    out = run(temperature=0.0, eos_token=eos)
    jax.effects_barrier()
    np.testing.assert_array_equal(out, np.where(np.arange(NEW) <= ends[:, None], whole, eos))
    assert len(steps) == ends.max() < NEW - 1


def test_no_row_ends_before_the_least_number_of_tokens():
    eos = int(naive(temperature=0)[0, 0])
    out = run(temperature=0.0, eos_token=eos, min_new_tokens=3)
    assert (out[:, :3] != eos).all()
    assert (run(temperature=0.0, eos_token=eos)[0] == eos).all()
    # Until then it is a forbidden token, and afterwards none.
    forbidden = naive(3, temperature=0, forbidden_tokens=(eos,))
    np.testing.assert_array_equal(out[:, :3], forbidden)


def test_rows_with_keys_of_their_own_do_not_depend_on_each_other():
    keys = jax.random.split(KEY, 3)
    together = run(key=keys, max_new_tokens=3)
    order = np.array([2, 2, 0])
    other = generate(
        build(),
        jnp.asarray(PADDED[order]),
        key=keys[order],
        prompt_mask=MASK[order],
        max_new_tokens=3,
    )
    np.testing.assert_array_equal(other, together[order])
    assert (run(key=KEY, max_new_tokens=3) != together).any()


def test_new_numbers_and_keys_compile_nothing(monkeypatch):
    traces, prefill = [], Transformer.prefill

    def counted(self, *arguments):
        traces.append(None)
        return prefill(self, *arguments)

    monkeypatch.setattr(Transformer, "prefill", counted)
    first = run(max_new_tokens=3, top_p=0.9)
    other = run(max_new_tokens=3, top_p=0.5, temperature=0.3, key=jax.random.key(8))
    assert len(traces) == 1
    assert np.any(first != other)


def test_numbers_may_be_traced():
    numbers = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3}
    options = {"max_new_tokens": 3, "prompt_mask": MASK, "key": KEY}
    traced = jax.jit(lambda x: generate(build(), jnp.asarray(PADDED), **options, **x))(numbers)
    np.testing.assert_array_equal(traced, run(max_new_tokens=3, **numbers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": NEW + 1}, f"{LONGEST + 1} tokens .* max_len={LONGEST}"),
        ({"min_new_tokens": NEW + 1}, f"at most max_new_tokens={NEW}, got {NEW + 1}"),
        ({"key": jax.random.split(KEY, 2)}, r"one key or 3, one per row, got \(2,\)"),
        ({"eos_token": 0, "min_new_tokens": 1, "forbidden_tokens": range(1, V)}, "not all"),
        ({"prompt_mask": MASK[:, :3]}, r"\(3, 4\), got \(3, 3\)"),
        ({"prompt_mask": MASK & [[True], [False], [True]]}, "hides a whole row"),
        ({"prompt_mask": None}, "0 to 6, got -5 to 99"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "got nan"),
        ({"top_k": 0}, "top_k must be at least 1, .* got 0"),
        ({"top_p": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive, got 0.0"),
        ({"repetition_window": 0}, "repetition_window must be at least 1, .* got 0"),
        ({"eos_token": V}, "eos_token must be a token, 0 to 6, got 7"),
        ({"pad_token": -1}, "pad_token must be a token, 0 to 6, got -1"),
        ({"forbidden_tokens": (1, V)}, r"0 to 6, got \(1, 7\)"),
        ({"forbidden_tokens": range(V)}, "some, not all"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (np.zeros((2, 0), int), r"\(2, 0\).*begin-of-sequence"),
        (np.zeros(3, int), r"int32 \(3,\)"),
        (np.zeros((2, 3), np.float32), r"float32 \(2, 3\)"),
    ],
)
def test_a_prompt_is_integers_with_at_least_one_token(prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(build(), prompt, key=KEY, max_new_tokens=1)


def test_only_causal_models_generate():
    with pytest.raises(ValueError, match="causal=True"):
        generate(build(causal=False), jnp.ones((1, 2), int), key=KEY, max_new_tokens=1)


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal"])
def test_a_hundred_thousand_tokens_take_no_more_memory_than_a_hundred(positions):
    model = build(positions, attention_fn=make_fast_softmax_attention(nb_features=8))
    prompt = jnp.asarray([PROMPTS[0]])

    def memory(number):
        program = jax.jit(lambda key: generate(model, prompt, key=key, max_new_tokens=number))
        used = program.lower(KEY).compile().memory_analysis()
        return used.temp_size_in_bytes + used.output_size_in_bytes

    tokens = 4 * 100_000
    # The tokens themselves, written once and returned.
    assert memory(100_000) - memory(100) <= 2 * tokens


def test_sampling_options_by_name_are_those_of_the_bundle():
    model, key = build(), jax.random.key(3)
    prompt = jnp.ones((1, 3), jnp.int32)
    call = functools.partial(models.generate, model, prompt, key=key, max_new_tokens=4)
    whole = call(sampling=Sampling(temperature=0.7, top_k=3))
    np.testing.assert_array_equal(call(temperature=0.7, top_k=3), whole)
    np.testing.assert_array_equal(jax.jit(lambda t: call(temperature=t, top_k=3))(0.7), whole)
    with pytest.raises(TypeError, match="sampling= and top_k are given"):
        call(sampling=Sampling(), top_k=3)
