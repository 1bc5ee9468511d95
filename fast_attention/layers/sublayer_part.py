"""The interface of layers inside a sublayer, which add to the residual stream.

Shape letters: B batch, T length, M features.
"""

from __future__ import annotations

from typing import Any

from fast_attention.arrays.types import Array, Float
from fast_attention.layers.inputs import Inputs


class SublayerPart:
    """Base of attention, feed-forward and memory layers inside a `Sublayer`.

    The defaults are those of a position-wise layer: it is causal, it can decode, and it has no
    state.
    """

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one of its own sequence."""
        return True

    @property
    def can_decode(self) -> bool:
        """Whether the layer can continue from a state, token by token."""
        return True

    @property
    def reads_context(self) -> bool:
        """Whether the layer reads a second sequence; other layers are called without it."""
        return False

    def add(
        self, x: Float[Array, "B T M"], inputs: Inputs, *, choices: Any = None, **options: Any
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Computes the increment of the stream.

        Args:
          x: The stream, after the norm.
          inputs: The other arguments of a forward pass.
          choices: Choices returned by an earlier call, to be used again.
          **options: `deterministic` and `rngs`.

        Returns:
          ``[B, T, M]``, and the choices of the layer (hash buckets, memory slots) or None.
        """
        return self(x, **options), None  # pyright: ignore[reportCallIssue]

    def init_state(self, batch_size: int, max_length: int, inputs: Inputs) -> Any:
        """Returns the state before the first token."""
        return None

    def prefill(
        self, state: Any, x: Float[Array, "B T M"], inputs: Inputs
    ) -> tuple[Float[Array, "B T M"], Any]:
        """Reads T tokens; returns the increment and the next state."""
        return self(x), state  # pyright: ignore[reportCallIssue]

    def step(
        self, state: Any, x: Float[Array, "B M"], inputs: Inputs
    ) -> tuple[Float[Array, "B M"], Any]:
        """Reads one token; returns the increment and the next state."""
        return self(x[:, None])[:, 0], state  # pyright: ignore[reportCallIssue]
