"""The tokens and the shape of a protein language model, from keywords and its domain."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from fast_attention.models.config import TransformerConfig
from fast_attention.protein_lm.data.domains import DiscreteDomain, domain_to_bos

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
      vocab_size: Rows of the embedding table, and entries of the logits.
    """

    bos: int | None
    eos: int | None
    pad: int | None
    mask: int | None
    vocab_size: int

    @property
    def never_drawn(self) -> tuple[int, ...]:
        """Special tokens other than the end token."""
        return tuple(token for token in (self.bos, self.pad, self.mask) if token is not None)

    @property
    def special(self) -> tuple[int, ...]:
        """All special tokens."""
        return self.never_drawn if self.eos is None else (*self.never_drawn, self.eos)


def make_tokens(domain: DiscreteDomain, with_bos: bool, with_mask: bool) -> ModelTokens:
    """Gives a model the tokens of its domain, and new ids to those that it needs and lacks.

    Args:
      domain: Gives the vocabulary.
      with_bos: Whether there must be a begin token, see `domain_to_bos`.
      with_mask: Whether there must be a mask token.
    """
    vocab, size = domain.vocab, domain.vocab_size
    bos, mask = vocab.bos, vocab.mask
    if with_bos and bos is None:
        bos, size = domain_to_bos(domain), size + 1
    if with_mask and mask is None:
        mask, size = size, size + 1
    return ModelTokens(bos, vocab.eos, vocab.pad, mask, size)


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
