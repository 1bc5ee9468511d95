"""FlaxLM (causal) and FlaxBERT (masked): models with a fixed objective.

Shape letters: B batch, T length, V vocabulary, P prompt length, L maximum length.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fast_attention.models.samplers import forbid_tokens, sample_token
from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.flax_model import FlaxModel as FlaxModel
from fast_attention.protein_lm.inference.continuation import continue_prompts
from fast_attention.protein_lm.modeling.model_classes import register_model
from fast_attention.protein_lm.modeling.objectives import Causal, Masked
from fast_attention.protein_lm.modeling.objectives.masked import unpacked
from fast_attention.protein_lm.modeling.sampling_config import SamplingConfig as SamplingConfig


@register_model
class FlaxLM(FlaxModel):
    """Predicts each residue from the residues before it.

    Attention is causal with every ``attention_fn``. Parameters are those of `FlaxModel`.
    """

    own_objective = Causal()

    def sample(self, num_samples: int, rng: jax.Array | None = None, **options: Any) -> np.ndarray:
        """Samples sequences.

        Args:
          num_samples: B.
          rng: Random key; None makes it from `random_seed`.
          **options: As for `sample_with_prompt`.

        Returns:
          ids, int32 [B, L], with padding only after the end token.

        Raises:
          ValueError: If `num_samples` is not positive, or as for `sample_with_prompt`.
        """
        ranges.check("num_samples", num_samples, ranges.COUNT)
        return self.sample_with_prompt(np.full((num_samples, 1), self.bos_token), rng, **options)

    def sample_with_prompt(
        self,
        prompt: Any,
        rng: jax.Array | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Continues sequences, at a cost per residue that does not grow with their length.

        This is true for attention with a recurrent state; exact attention keeps all keys. Begin,
        padding and mask tokens are never sampled.

        Args:
          prompt: ids [B, P], all of one length, each beginning with the begin token.
          rng: Random key, or one for each row, see `generate`; None makes it from `random_seed`.
          **options: Fields of `SamplingConfig`; the defaults are the model's ``sampling_kwargs``.

        Returns:
          ids, int32 [B, L]: the sequences without the begin token, with padding only after the
          end token.

        Raises:
          ValueError: If a prompt does not begin with the begin token or is too long, or
            `min_length` is more than `max_length`.
        """
        return continue_prompts(self, prompt, rng, **options)


@register_model
class FlaxBERT(FlaxModel):
    """Predicts masked residues from the residues on both sides (arXiv:1810.04805).

    The loss is over the chosen residues only. It also has the parameters of `FlaxModel`.
    """

    own_objective = Masked()

    def __init__(
        self,
        *args: Any,
        mask_rate: float = 0.15,
        mask_token_proportion: float = 0.8,
        random_token_proportion: float = 0.1,
        enclose: bool = False,
        **kwargs: Any,
    ):
        """Builds the model.

        Args:
          *args: See `FlaxModel`.
          mask_rate: Share of the residues that are chosen.
          mask_token_proportion: Share of the chosen residues that are replaced by the mask token.
          random_token_proportion: Share of the chosen residues that are replaced by a random
            residue; the rest is unchanged.
          enclose: Sequences are read between a begin and an end token, as ESM-2 and BERT do.
          **kwargs: See `FlaxModel`.

        Raises:
          ValueError: If a share is out of [0, 1] or the vocabulary has no mask token.
        """
        self.own_objective = Masked(
            mask_rate=mask_rate,
            mask_token_proportion=mask_token_proportion,
            random_token_proportion=random_token_proportion,
            enclose=enclose,
        )
        super().__init__(*args, **kwargs)

    def sample(
        self, masked: Any, rng: jax.Array | None = None, *, temperature: float | None = None
    ) -> np.ndarray:
        """Fills in mask tokens, each independently of the others.

        Args:
          masked: ids [B, T], with mask tokens at the residues to sample, and padding or end tokens
            at the ends of rows.
          rng: Random key; None makes it from `random_seed`.
          temperature: Divides the logits; 0 takes the most probable residue. None uses the model's
            ``sampling_kwargs``, or 1.

        Returns:
          ids, int32 [B, T]: mask tokens are replaced by residues, all other ids are unchanged.

        Raises:
          ValueError: If `masked` is not an array of ids.
        """
        vocab = self.domain.vocab
        masked = np.asarray(masked)
        if masked.ndim != 2 or not vocab.are_valid(masked).all():
            raise ValueError(f"expected ids [B, T] from 0 to {len(vocab) - 1}; got {masked}")
        masked = masked.astype(np.int32)
        if temperature is None:
            temperature = float(self.sampling_kwargs.get("temperature", 1.0))
        logits = self.logits(unpacked(masked, vocab))
        logits = forbid_tokens(logits.reshape(-1, logits.shape[-1]), self.tokens.special)
        key = jax.random.key(self.random_seed) if rng is None else rng
        drawn = np.asarray(sample_token(key, logits, temperature)).reshape(masked.shape)
        return np.where(masked == vocab.mask, drawn, masked)
