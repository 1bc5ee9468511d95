"""Sequences continued by a causal model, as arrays of ids.

Letters: B batch, P prompt length, L greatest length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fast_attention.models.generation import Sampling, generate
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.sampling_config import SamplingConfig


def continue_prompts(
    model: BuiltModel, prompt: Any, rng: jax.Array | None = None, **options: Any
) -> np.ndarray:
    """Continues sequences, see `FlaxLM.sample_with_prompt`.

    Args:
      model: A causal model.
      prompt: ids [B, P], all of one length, each beginning with the begin token.
      rng: Key of the draw, or one for each row; None makes it from ``model.random_seed``.
      **options: Fields of `SamplingConfig`; those left out are ``model.sampling_kwargs``.

    Returns:
      ids, int32 [B, L]: the sequences without the begin token, with padding only after the end
      token.

    Raises:
      ValueError: As `FlaxLM.sample_with_prompt`.
    """
    config = SamplingConfig(**(model.sampling_kwargs | options))
    prompt = np.asarray(prompt)
    bos, vocab = model.bos_token, model.domain.vocab
    if prompt.ndim != 2 or prompt.shape[1] < 1 or (prompt[:, 0] != bos).any():
        raise ValueError(
            f"expected prompts [B, P] that begin with the begin token, {bos}; got {prompt}"
        )
    if not vocab.are_ordinary(prompt[:, 1:]).all():
        raise ValueError(f"a prompt must be residues after the begin token; got {prompt}")
    prompt = prompt.astype(np.int32)
    length = model.max_length if config.max_length is None else config.max_length
    new = length + 1 - prompt.shape[1]
    if new < 1 or length > model.max_length:
        raise ValueError(
            f"max_length is {length}, but must be more than the residues of the prompt "
            f"({prompt.shape[1] - 1}) and at most {model.max_length}, the model's limit"
        )
    if not 0 <= config.min_length <= length:
        raise ValueError(
            f"min_length must be from 0 to max_length={length}; got {config.min_length}"
        )
    drawn = generate(
        nnx.merge(model.graphdef, model.weights, model.variables),
        jnp.asarray(prompt),
        key=jax.random.key(model.random_seed) if rng is None else rng,
        max_new_tokens=new,
        min_new_tokens=config.min_length + 1 - prompt.shape[1],
        sampling=Sampling(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            repetition_window=config.repetition_window,
            forbidden_tokens=model.tokens.never_drawn,
        ),
        eos_token=model.eos_token,
        pad_token=model.eos_token if model.pad_token is None else model.pad_token,
    )
    return np.concatenate([prompt[:, 1:], np.asarray(drawn)], axis=1)
