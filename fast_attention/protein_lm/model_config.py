"""The configuration of a protein model from what a caller named."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from fast_attention.models.config import TransformerConfig
from fast_attention.protein_lm.domains import DiscreteDomain


def transformer_config(
    causal: bool, domain: DiscreteDomain, model_kwargs: dict[str, Any]
) -> TransformerConfig:
    """Makes the configuration of a protein model.

    Args:
      causal: Of a language model that reads on.
      domain: Gives the vocabulary, and the number of learned positions unless that is told.
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
            raise TypeError(f"the model has no parameter {name!r}: {hint}")
    options: dict[str, Any] = {"max_len": domain.length} | model_kwargs
    return TransformerConfig(vocab_size=domain.vocab_size, causal=causal, **options)
