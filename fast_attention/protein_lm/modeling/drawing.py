"""How residues are drawn when sequences are filled in.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float, Int
from fast_attention.models import samplers


class Drawing(NamedTuple):
    """How residues are drawn.

    Attributes:
      temperature: Divides the logits; 0 takes the most probable residue.
      top_k: Draw among so many most probable residues; None among all.
      top_p: Draw among the fewest residues that together have this probability; None among all.
      rounds: In how many rounds a masked model fills in, see `Masked.fill`; None is one for each
        residue.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    rounds: int | None = None

    def check(self) -> None:
        """Raises ValueError if an option is out of its range."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more; got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is the probability to keep, in (0, 1]; got {self.top_p}")
        for name in ("top_k", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None; got {value}")


def draw_tokens(
    keys: Array,
    logits: Float[Array, "B T V"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
    top_k: int | None,
) -> Int[Array, "B T"]:
    """Draws a token at each position; logits of -inf are those of forbidden ones."""
    greedy = temperature == 0
    filtered = logits / jnp.where(greedy, 1, temperature)
    if top_k is not None:
        filtered = samplers.keep_top_k(filtered, top_k)
    filtered = samplers.keep_top_p(filtered, top_p)
    sample = jax.vmap(samplers.sample_token, (0, 0, None))
    return sample(keys, filtered, jnp.where(greedy, 0.0, 1.0))
