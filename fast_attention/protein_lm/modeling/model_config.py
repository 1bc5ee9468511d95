"""The tokens and the shape of a protein language model, from keywords and its domain."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from fast_attention.models.config import TransformerConfig
from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.domains import DiscreteDomain

_REPLACED = {
    "causal": "FlaxLM is causal and FlaxBERT is not",
    "vocab_size": "it follows from the domain",
    "pad_token": "it is that of the domain's vocabulary",
    "positional_encoding_module": "set positions='learned', 'sinusoidal', 'rotary' or 'none'",
    "self_attention_module": "set attention_fn, which every layer takes",
    "output_head": (
        "logits() and embed() return what a model gives; a regression head is trained by "
        "'protein-lm fine-tune'"
    ),
    "train": "fit() trains, and everything else is deterministic",
}
"""Keywords of the Transformer of Google's protein_lm, and what took their place."""


@dataclasses.dataclass(frozen=True)
class ModelTokens:
    """Ids that a model knows: those of its domain, and special ones that only the model has.

    Attributes:
      bos: Id of the begin token; None where there is none, and so are the others.
      eos: Id of the end token.
      pad: Id of the padding token.
      mask: Id of the mask token.
      never_drawn: Ids of special tokens other than the end token, sentinels among them.
      vocab_size: Rows of the embedding table, and entries of the logits.
    """

    bos: int | None
    eos: int | None
    pad: int | None
    mask: int | None
    never_drawn: tuple[int, ...]
    vocab_size: int

    @property
    def special(self) -> tuple[int, ...]:
        """All special tokens."""
        return self.never_drawn if self.eos is None else (*self.never_drawn, self.eos)


def make_tokens(
    alphabet: Alphabet, with_bos: bool, with_mask: bool, num_sentinels: int = 0
) -> ModelTokens:
    """Gives a model the tokens of its alphabet, and new ids to those that it needs and lacks.

    Args:
      alphabet: Of its domain.
      with_bos: Whether there must be a begin token, see `Alphabet.begin`.
      with_mask: Whether there must be a mask token.
      num_sentinels: Sentinel tokens, whose ids follow those of the alphabet.
    """
    bos, mask, size = alphabet.bos, alphabet.mask, len(alphabet) + num_sentinels
    if with_bos and bos is None:
        bos, size = size, size + 1
    if with_mask and mask is None:
        mask, size = size, size + 1
    special = [*alphabet.special_ids, *range(len(alphabet), size)]
    never_drawn = tuple(token for token in special if token != alphabet.eos)
    return ModelTokens(bos, alphabet.eos, alphabet.pad, mask, never_drawn, size)


def make_config(
    causal: bool, domain: DiscreteDomain, tokens: ModelTokens, model_kwargs: dict[str, Any]
) -> TransformerConfig:
    """Makes the shape of a model from keywords.

    Args:
      causal: Of the model.
      domain: Gives ``max_len`` unless that is among the keywords.
      tokens: Of the model.
      model_kwargs: Fields of `TransformerConfig`.

    Raises:
      TypeError: At a keyword that `TransformerConfig` does not have.
    """
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    known -= {"vocab_size", "causal"}
    for name in model_kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {sorted(known)}"
            raise TypeError(f"the model has no parameter {name!r}: {_REPLACED.get(name, hint)}")
    options: dict[str, Any] = {"max_len": domain.length} | model_kwargs
    return TransformerConfig(vocab_size=tokens.vocab_size, causal=causal, **options)
