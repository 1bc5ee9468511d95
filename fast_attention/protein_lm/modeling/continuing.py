"""Texts of unlike lengths, continued by a causal decoder, and how probable their tokens are.

Letters: B rows, T length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fast_attention.models.generation import Sampling, generate
from fast_attention.protein_lm.modeling import token_batches
from fast_attention.protein_lm.modeling.drawing import Drawing
from fast_attention.protein_lm.modeling.encoding import longest_input, row_lengths

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel

# Rows are padded to a multiple of it, so that few programs are compiled.
_STRIDE = 32


def continue_rows(
    model: BuiltModel,
    rows: Sequence[np.ndarray],
    keys: jax.Array,
    drawing: Drawing,
    *,
    bounds: tuple[int, int],
    closing: int,
) -> list[np.ndarray]:
    """Writes residues behind rows of tokens.

    Args:
      model: A causal one.
      rows: B rows of ids.
      keys: B random keys.
      drawing: How residues are drawn.
      bounds: The least and the most residues to write.
      closing: Id of the token that ends them, where they are not the most.

    Returns:
      The ids of the residues of each row.
    """
    low, high = bounds
    most = longest_input(model)
    width = -(-max(map(len, rows)) // _STRIDE) * _STRIDE
    width = width if most is None else min(width, most - high)
    # The closing token of a span of known length is not predicted: one program serves all spans.
    end = None if low == high else closing
    drawn = generate(
        nnx.merge(model.graphdef, model.weights, model.variables),
        jnp.asarray([np.pad(row, (width - len(row), 0)) for row in rows]),
        key=keys,
        max_new_tokens=high,
        min_new_tokens=low,
        prompt_mask=jnp.asarray([np.arange(width) >= width - len(row) for row in rows]),
        sampling=Sampling(
            temperature=drawing.temperature,
            top_k=drawing.top_k,
            top_p=drawing.top_p,
            forbidden_tokens=[token for token in model.tokens.special if token != end],
        ),
        eos_token=end,
    )
    return [row[: np.argmax(np.append(row, closing) == closing)] for row in np.asarray(drawn)]


def log_probabilities(model: BuiltModel, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Of each token of some rows given those before it, float64 ``[B, T - 1]``."""
    width = max(-(-max(map(len, rows)) // _STRIDE) * _STRIDE, 2)
    lengths = row_lengths(rows, len(rows)) - 1
    inputs, targets = (
        token_batches.fill(part, (len(rows), width - 1))
        for part in ([row[:-1] for row in rows], [row[1:] for row in rows])
    )
    batch = {"inputs": inputs, "targets": targets, "places": None, "lengths": lengths}
    found = model.residue_step(model.weights, model.variables, **batch)
    return np.asarray(found, np.float64)
