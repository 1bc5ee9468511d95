"""Masked-token corruption: what a bidirectional model is given, and where it is asked.

Letters: B rows, L row length.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fast_attention.protein_lm.data.alphabet import Alphabet


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """How residues are corrupted; the defaults are those of BERT (arXiv:1810.04805, section 3.1).

    Attributes:
      mask_rate: share of the residues that are chosen, to be predicted.
      mask_token_proportion: share of the chosen that are hidden behind the mask token.
      random_token_proportion: share of the chosen that are replaced by a random standard residue
        (which may be the same one). The rest of the chosen is left as it is.

    Raises:
      ValueError: if a share, or the sum of the two proportions, is not in [0, 1].
    """

    mask_rate: float = 0.15
    mask_token_proportion: float = 0.8
    random_token_proportion: float = 0.1

    def __post_init__(self):
        """Checks the shares."""
        shares = dataclasses.asdict(self)
        shares["mask_token_proportion + random_token_proportion"] = (
            self.mask_token_proportion + self.random_token_proportion
        )
        for name, share in shares.items():
            if not 0 <= share <= 1 + 1e-9:
                raise ValueError(f"{name} must be in [0, 1], but is {share}.")


def mask_tokens(
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    vocab: Alphabet,
    draws: np.ndarray,
    config: MaskingConfig | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrupts residues, and says which.

    A residue is chosen when its first draw is below ``mask_rate``. Special tokens never are; but
    of every protein at least one residue is: failing others, that of the lowest draw. The second
    draw says what becomes of a chosen residue: mask token, random residue, or nothing.

    Args:
      tokens: int ``[B, L]``.
      segment_ids: int ``[B, L]``, equal within a protein, 0 at padding.
      vocab: says which tokens are special, and has a mask token.
      draws: uniform numbers in [0, 1), ``[2, B, L]``; equal draws give equal corruption.
      config: the shares; None takes the defaults.

    Returns:
      Corrupted tokens int32 ``[B, L]`` and the chosen positions bool ``[B, L]``.

    Raises:
      ValueError: if the vocabulary has no mask token.
    """
    if vocab.mask is None:
        raise ValueError(
            "Masking needs a mask token: build the vocabulary (or the domain) with "
            "include_mask=True."
        )
    config = config or MaskingConfig()
    choice, fate = draws
    maskable = (segment_ids > 0) & vocab.are_ordinary(tokens)

    protein = segment_ids + (segment_ids.max() + 1) * np.arange(len(tokens))[:, None]
    lowest = np.full(protein.max() + 1, np.inf)
    np.minimum.at(lowest, protein[maskable], choice[maskable])
    chosen = maskable & ((choice < config.mask_rate) | (choice == lowest[protein]))

    hidden = chosen & (fate < config.mask_token_proportion)
    until = config.mask_token_proportion + config.random_token_proportion
    replaced = chosen & ~hidden & (fate < until)
    # Within its interval the second draw is uniform again: it also picks the residue.
    residues = np.asarray(vocab.standard_ids, np.int32)
    share = (fate[replaced] - config.mask_token_proportion) / config.random_token_proportion
    picked = np.minimum((share * len(residues)).astype(np.int64), len(residues) - 1)

    inputs = tokens.astype(np.int32)
    inputs[hidden] = vocab.mask
    inputs[replaced] = residues[picked]
    return inputs, chosen


def row_draws(seed: list[int], shape: tuple[int, int], begin: int, end: int) -> np.ndarray:
    """Rows of ``default_rng(seed).random((2, *shape))``, for `mask_tokens`, without the others.

    Args:
      seed: of the generator.
      shape: ``(B, L)`` of the whole batch.
      begin: first of the rows.
      end: the row after the last.

    Returns:
      float64 ``[2, end - begin, L]``.
    """
    planes = []
    for plane in range(2):
        generator = np.random.PCG64(seed)
        # One number of the generator is one draw.
        generator.advance((plane * shape[0] + begin) * shape[1])
        planes.append(np.random.Generator(generator).random((end - begin, shape[1])))
    return np.stack(planes)
