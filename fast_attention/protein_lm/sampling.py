"""Sampling proteins from a causal model, as records for a FASTA file."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fast_attention.protein_lm.fasta import FastaRecord
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.run_folder import RunError

_ROWS_AT_ONCE = 64


def sample_proteins(
    model: FlaxModel,
    num_samples: int,
    *,
    prompt: str = "",
    seed: int = 0,
    max_length: int | None = None,
    **options: Any,
) -> list[FastaRecord]:
    """Draws proteins; equal arguments give equal proteins.

    Args:
      model: A `FlaxLM`.
      num_samples: How many proteins.
      prompt: Residues that every protein begins with.
      seed: Of the draw.
      max_length: Most residues of a protein, the prompt included; None takes the model's limit.
      **options: ``temperature``, ``top_k``, ``top_p``, ``repetition_penalty`` and
        ``repetition_window`` of `FlaxLM.sample_with_prompt`.

    Returns:
      Records whose description says whether the protein ended by itself or at `max_length`.

    Raises:
      RunError: If the model is not causal, or never gives a residue.
      ValueError: If the prompt has a letter that the vocabulary lacks, or an argument is out of
        its range.
    """
    if not isinstance(model, FlaxLM):
        raise RunError(
            f"{type(model).__name__} fills in hidden residues and cannot write a protein from "
            "left to right: sample from a run of FlaxLM, or use FlaxBERT.sample in Python"
        )
    if num_samples < 1:
        raise ValueError(f"the number of samples must be at least 1; got {num_samples}")
    vocab = model.domain.vocab
    try:
        start = [vocab.bos, *vocab.encode(prompt.upper())]
    except KeyError as error:
        raise ValueError(f"prompt {prompt!r}: {error.args[0]}") from None
    rows = np.tile(np.array(start, np.int32), (min(num_samples, _ROWS_AT_ONCE), 1))
    records: list[FastaRecord] = []
    draw = 0
    while len(records) < num_samples:
        key = jax.random.fold_in(jax.random.key(seed), draw)
        drawn = model.sample_with_prompt(rows, key, max_length=max_length, **options)
        found = [_record(ids, model) for ids in drawn]
        found = [record for record in found if record.sequence]
        if not found:
            raise RunError(
                "the model ended every protein before its first residue: train it longer, or give "
                "a prompt"
            )
        records += found
        draw += 1
    return [
        record._replace(id=f"sample_{number}")
        for number, record in enumerate(records[:num_samples], 1)
    ]


def _record(ids: np.ndarray, model: FlaxLM) -> FastaRecord:
    vocab = model.domain.vocab
    ended = bool((ids == vocab.eos).any())
    sequence = "".join(vocab.decode(ids, stop_at_eos=vocab.eos is not None))
    how = "ended by itself" if ended else "cut at the greatest length"
    return FastaRecord("", f"{len(sequence)} residues, {how}", sequence)
