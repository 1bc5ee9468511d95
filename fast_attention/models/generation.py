"""Generation: read the prompt at once, then sample one token after another.

A model without a decoding state (LSH attention) recomputes the whole prefix for each token.

Shape letters: B batch, P prompt length, N new tokens, V vocabulary, W previous tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.core import Tracer

from fast_attention.arrays.bundles import bundle_of
from fast_attention.arrays.dtypes import is_random_key
from fast_attention.arrays.explicit_axes import runs_on_auto_axes
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.models import samplers
from fast_attention.models.language_model import LanguageModel
from fast_attention.models.prompt_reading import read_prompt, read_token


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling options.

    Logits are divided by the temperature, forbidden tokens are removed, and the repetition penalty,
    top-k and top-p are applied, in this order; then a token is sampled. Changing the temperature,
    ``top_p`` or the penalty does not trigger a compilation; under ``jax.jit`` these three may be
    traced, and are then not checked.

    Attributes:
      temperature: At least 0; 0 takes the most likely token.
      top_k: Sample from the k most likely tokens.
      top_p: Sample from the most likely tokens with this total probability, in (0, 1].
      repetition_penalty: A value above 1 makes previous tokens less likely.
      repetition_window: Number of previous tokens for the penalty, including the prompt; None is
        all.
      forbidden_tokens: Tokens that are never sampled.
    """

    temperature: float | Array = 1.0
    top_k: int | None = None
    top_p: float | Array | None = None
    repetition_penalty: float | Array = 1.0
    repetition_window: int | None = None
    forbidden_tokens: Sequence[int] = ()


class _Options(NamedTuple):
    """Static options of the compiled program."""

    max_new_tokens: int
    top_k: int | None
    has_top_p: bool
    has_penalty: bool
    has_minimum: bool
    window: int
    eos_token: int | None
    pad_token: int
    forbidden_tokens: tuple[int, ...]


class _Numbers(NamedTuple):
    """Dynamic options of the compiled program."""

    temperature: Array
    top_p: Array
    repetition_penalty: Array
    min_new_tokens: Array


class _Loop(NamedTuple):
    index: Array  # tokens drawn so far, 1 to N
    tokens: Array  # [B, N]
    token: Array  # [B], the last drawn, which the model has not read
    history: Array  # [B, W], the last tokens, newest last; -1 where there was none
    ended: Array  # [B]
    state: Any


def generate(
    model: LanguageModel,
    prompt: Int[Array, "B P"],
    *,
    key: Array,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    prompt_mask: Bool[Array, "B P"] | None = None,
    sampling: Sampling | None = None,
    eos_token: int | None = None,
    pad_token: int | None = None,
    context: Float[Array, "B S M"] | None = None,
    context_mask: Bool[Array, "B S"] | None = None,
    **options: Any,
) -> Int[Array, "B N"]:
    """Continues prompts, one token after another.

    With the recurrent state of linear attention, the cost of a token does not depend on the length.
    The program is compiled once for each prompt shape and set of options.

    Args:
      model: A causal `LanguageModel`.
      prompt: ``[B, P]`` ids, P at least 1; padding may be any integers.
      key: Random key; equal keys give equal tokens. Token n of the output is sampled with
        ``jax.random.fold_in(key, n)``. Or typed keys [B], one for each row, so that a row does not
        depend on the other rows.
      max_new_tokens: N.
      min_new_tokens: Minimum number of tokens before the end token, at least 0.
      prompt_mask: ``[B, P]`` bool, False at padding of a shorter prompt, on either side.
        Each row needs at least one token.
      sampling: Sampling options; None takes them from `options`.
      eos_token: Ends a row.
      pad_token: Fills ended rows; None is `eos_token`.
      context: ``[B, S, M]``, a second sequence, for models that attend to one.
      context_mask: ``[B, S]``, False is padding of it.
      **options: Fields of `Sampling`, such as ``temperature=0.8``.

    Returns:
      int32 ``[B, N]``: the new tokens, including an end-of-sequence token.

    Raises:
      ValueError: For an argument out of range, a model that is not causal, or more tokens than
        learned positions.
    """
    sampling = bundle_of(Sampling, "sampling", sampling, options)
    prompt = jnp.asarray(prompt)
    _check(model, prompt, prompt_mask, max_new_tokens, eos_token, pad_token)
    has_minimum = min_new_tokens > 0 and eos_token is not None
    forbidden = set(sampling.forbidden_tokens)
    never = forbidden | ({eos_token} if min_new_tokens > 0 and eos_token is not None else set())
    _check_sampling(sampling, never, model)
    if min_new_tokens > max_new_tokens:
        raise ValueError(
            f"min_new_tokens must be at most max_new_tokens={max_new_tokens}, got {min_new_tokens}."
        )
    if key.shape and is_random_key(key) and key.shape != prompt.shape[:1]:
        raise ValueError(f"key must be one key or {len(prompt)}, one per row, got {key.shape}.")
    length = prompt.shape[1]
    window = length + max_new_tokens
    if sampling.repetition_window is not None:
        window = min(window, sampling.repetition_window)
    penalty, top_p = sampling.repetition_penalty, sampling.top_p
    has_penalty = isinstance(penalty, Tracer) or bool(penalty != 1)
    pad = pad_token if pad_token is not None else eos_token
    static = _Options(
        max_new_tokens=max_new_tokens,
        top_k=sampling.top_k,
        has_top_p=top_p is not None and (isinstance(top_p, Tracer) or bool(top_p < 1)),
        has_penalty=has_penalty,
        has_minimum=has_minimum,
        window=window if has_penalty else 0,
        eos_token=eos_token,
        pad_token=0 if pad is None else pad,
        forbidden_tokens=tuple(sorted(forbidden)),
    )
    numbers = _Numbers(
        temperature=jnp.asarray(sampling.temperature, jnp.float32),
        top_p=jnp.asarray(1.0 if top_p is None else top_p, jnp.float32),
        repetition_penalty=jnp.asarray(penalty, jnp.float32),
        min_new_tokens=jnp.asarray(min_new_tokens, jnp.int32),
    )
    graphdef, variables = nnx.split(model)
    mask = None if prompt_mask is None else jnp.asarray(prompt_mask, bool)
    given = {"context": context, "context_mask": context_mask}
    given = {name: jnp.asarray(x) for name, x in given.items() if x is not None}
    return _generate(graphdef, variables, prompt, mask, key, numbers, given, static)


@functools.partial(jax.jit, static_argnames=("graphdef", "options"))
@runs_on_auto_axes
def _generate(
    graphdef: Any,
    variables: Any,
    prompt: Array,
    mask: Array | None,
    key: Array,
    numbers: _Numbers,
    context: dict[str, Array],
    options: _Options,
) -> Array:
    model = nnx.merge(graphdef, variables)
    batch, length = prompt.shape
    if mask is not None:
        prompt = jnp.where(mask, prompt, 0)  # Padding may be no token at all.
    steps = options.max_new_tokens
    # The last token is drawn and never read.
    logits, state = read_prompt(model, prompt, mask, length + steps - 1, context)
    past = _past(prompt, mask)
    past = jnp.pad(past, ((0, 0), (options.window, 0)), constant_values=-1)
    history = past[:, past.shape[1] - options.window :]
    ended = jnp.zeros(batch, bool)

    def draw(index: Array, logits: Array, history: Array, ended: Array) -> tuple[Array, ...]:
        token = _draw(key, index, logits, history, numbers, options)
        token = jnp.where(ended, options.pad_token, token)
        history = jnp.concatenate([history, token[:, None]], axis=1)[:, 1:]
        if options.eos_token is not None:
            ended |= token == options.eos_token
        return token, history, ended

    def running(loop: _Loop) -> Array:
        return (loop.index < steps) & ~jnp.all(loop.ended)

    def advance(loop: _Loop) -> _Loop:
        logits, state = read_token(model, loop.state, loop.token, context)
        token, history, ended = draw(loop.index, logits, loop.history, loop.ended)
        tokens = lax.dynamic_update_slice(loop.tokens, token[:, None], (0, loop.index))
        return _Loop(loop.index + 1, tokens, token, history, ended, state)

    index = jnp.zeros((), jnp.int32)
    token, history, ended = draw(index, logits, history, ended)
    tokens = jnp.full((batch, steps), options.pad_token, jnp.int32).at[:, 0].set(token)
    first = _Loop(index + 1, tokens, token, history, ended, state)
    return lax.while_loop(running, advance, first).tokens


def _past(prompt: Array, mask: Array | None) -> Array:
    """The tokens ``[B, P]``, after -1 for padding."""
    prompt = prompt.astype(jnp.int32)
    if mask is None:
        return prompt
    order = jnp.argsort(mask, axis=1, stable=True)
    return jnp.take_along_axis(jnp.where(mask, prompt, -1), order, axis=1)


def _draw(
    key: Array,
    index: Array,
    logits: Array,
    history: Array,
    numbers: _Numbers,
    options: _Options,
) -> Array:
    """Samples token ``index`` of every row."""
    greedy = numbers.temperature == 0
    logits = logits / jnp.where(greedy, 1, numbers.temperature)
    logits = samplers.forbid_tokens(logits, options.forbidden_tokens)
    if options.has_minimum and options.eos_token is not None:
        unended = samplers.forbid_tokens(logits, (options.eos_token,))
        logits = jnp.where(index < numbers.min_new_tokens, unended, logits)
    if options.has_penalty:
        logits = samplers.apply_repetition_penalty(logits, history, numbers.repetition_penalty)
    if options.top_k is not None:
        logits = samplers.keep_top_k(logits, options.top_k)
    if options.has_top_p:
        logits = samplers.keep_top_p(logits, numbers.top_p)
    temperature = jnp.where(greedy, 0.0, 1.0)
    if key.shape and is_random_key(key):
        keys = jax.vmap(jax.random.fold_in, (0, None))(key, index)
        return jax.vmap(samplers.sample_token, (0, 0, None))(keys, logits, temperature)
    return samplers.sample_token(jax.random.fold_in(key, index), logits, temperature)


def _check(
    model: LanguageModel,
    prompt: Array,
    prompt_mask: Any,
    max_new_tokens: int,
    eos_token: int | None,
    pad_token: int | None,
) -> None:
    if not model.causal:
        raise ValueError("Only causal models can generate: build the model with causal=True.")
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(
            f"prompt must be integers [batch, length >= 1], got {prompt.dtype} {prompt.shape}: "
            "start an empty prompt with a begin-of-sequence token."
        )
    if prompt_mask is not None:
        mask = jnp.asarray(prompt_mask)
        if mask.shape != prompt.shape:
            raise ValueError(
                f"prompt_mask must have the shape of the prompt, {prompt.shape}, got {mask.shape}."
            )
        if not isinstance(prompt_mask, Tracer) and not np.asarray(prompt_mask).any(1).all():
            raise ValueError("prompt_mask hides a whole row: each needs at least one token.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    size = model.config.vocab_size
    if not isinstance(prompt, Tracer) and not isinstance(prompt_mask, Tracer):
        shown = np.asarray(prompt)
        shown = shown if prompt_mask is None else shown[np.asarray(prompt_mask, bool)]
        low, high = shown.min(initial=0), shown.max(initial=0)
        if low < 0 or high >= size:
            raise ValueError(f"prompt must hold tokens, 0 to {size - 1}, got {low} to {high}.")
    for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is not None and not 0 <= token < size:
            raise ValueError(f"{name} must be a token, 0 to {size - 1}, got {token}.")


def _check_sampling(
    sampling: Sampling, forbidden_tokens: Collection[int], model: LanguageModel
) -> None:
    """Checks numbers that the samplers get as arrays and cannot check."""
    temperature, top_k, top_p = sampling.temperature, sampling.top_k, sampling.top_p
    repetition_penalty, window = sampling.repetition_penalty, sampling.repetition_window
    if window is not None and window < 1:
        raise ValueError(f"repetition_window must be at least 1, or None for all, got {window}.")
    if not isinstance(temperature, Tracer) and not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all tokens, got {top_k}.")
    if top_p is not None and not isinstance(top_p, Tracer) and not 0 < top_p <= 1:
        raise ValueError(f"top_p is the probability to keep, in (0, 1], got {top_p}.")
    if not isinstance(repetition_penalty, Tracer) and not repetition_penalty > 0:
        raise ValueError(f"repetition_penalty must be positive, got {repetition_penalty}.")
    size = model.config.vocab_size
    if any(not 0 <= t < size for t in forbidden_tokens) or len(set(forbidden_tokens)) >= size:
        raise ValueError(
            f"forbidden_tokens must be some, not all, of 0 to {size - 1}, "
            f"got {tuple(forbidden_tokens)}."
        )
