"""Reading token by token: with a decoding state, or by recomputing the whole prefix.

Both give the same logits. Shape letters: B batch, P prompt length, L maximum length, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.models.language_model import LanguageModel


class Page(NamedTuple):
    """A text that is recomputed as a whole for every token.

    Attributes:
      tokens: ``[B, L]``, left-aligned tokens of each row.
      length: ``[B]``, number of tokens.
    """

    tokens: Int[Array, "B L"]
    length: Int[Array, " B"]


def read_prompt(
    model: LanguageModel,
    prompt: Int[Array, "B P"],
    mask: Bool[Array, "B P"] | None,
    room: int,
    context: dict[str, Any],
) -> tuple[Float[Array, "B V"], Any]:
    """Reads the prompt.

    Args:
      model: A causal language model.
      prompt: ``[B, P]`` ids.
      mask: ``[B, P]``, False is padding, on either side.
      room: L, total number of tokens that will be read.
      context: ``context`` and ``context_mask``, or nothing.

    Returns:
      The logits of the next token of each row, and the state.
    """
    batch, length = prompt.shape
    if not model.can_decode:
        tokens, lengths = _from_the_left(prompt, mask)
        page = Page(jnp.pad(tokens, ((0, 0), (0, room - length))), lengths)
        return _read_page(model, page, context), page
    state = model.init_state(batch, room, **context)
    logits, state = model.prefill(state, prompt, mask)
    last = jnp.full(batch, length - 1)
    if mask is not None:
        last = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], state


def read_token(
    model: LanguageModel, state: Any, token: Int[Array, " B"], context: dict[str, Any]
) -> tuple[Float[Array, "B V"], Any]:
    """Reads one more token per row; arguments and results as for `read_prompt`."""
    if not isinstance(state, Page):
        return model.step(state, token)
    place = jnp.arange(state.tokens.shape[1])[None] == state.length[:, None]
    page = Page(jnp.where(place, token[:, None], state.tokens), state.length + 1)
    return _read_page(model, page, context), page


def _read_page(model: LanguageModel, page: Page, context: dict[str, Any]) -> Array:
    mask = jnp.arange(page.tokens.shape[1])[None] < page.length[:, None]
    logits = model(page.tokens, key_mask=mask, **context)
    return jnp.take_along_axis(logits, (page.length - 1)[:, None, None], axis=1)[:, 0]


def _from_the_left(prompt: Array, mask: Array | None) -> tuple[Array, Array]:
    batch, length = prompt.shape
    if mask is None:
        return prompt, jnp.full(batch, length)
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(prompt, order, axis=1), jnp.sum(mask, axis=1)
