"""What feature maps with learned parameters have in common.

An optimiser changes the parameters; layers hold them, with an axis of key heads in front. A call
that is given none has those of the start.
"""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from fast_attention.arrays.types import Array
from fast_attention.feature_maps.base import FeatureMap, Parameters

ROWS = "rows"
"""The field of parameters that is drawn at random and not learned."""


class LearnedFeatures(FeatureMap, abc.ABC):
    """A feature map whose parameters an optimiser changes.

    Class attributes:
      parameters_type: the NamedTuple of its parameters; every field but :data:`ROWS` is learned.
    """

    parameters_type: ClassVar[type[tuple[Any, ...]]]

    @abc.abstractmethod
    def head_dim(self, parameters: Parameters) -> int:
        """Returns the head width D that parameters are made for."""

    def from_rows(self, rows: Array) -> Parameters:
        """Returns the start with given random rows ``[*B, R, D]``.

        Raises:
          ValueError: for a map without random rows.
        """
        raise ValueError(
            f"{type(self).__name__} has no random projection, got an array of shape {rows.shape} "
            f"for it: pass {self.parameters_type.__name__}, or leave it out."
        )

    def redraw(self, key: Array, parameters: Parameters) -> Parameters:
        """Draws new random rows, if there are any; what is learned stays as it is."""
        del key
        return parameters

    def resolve(self, given: Any, head_dim: int) -> Parameters:
        """Returns the parameters that stand for what a call was given.

        Args:
          given: parameters, or random rows ``[*B, R, D]``.
          head_dim: D of the queries and keys of the call.

        Raises:
          ValueError: for parameters of another map or of another width.
        """
        expected = f"{self.parameters_type.__name__} for heads of width {head_dim}"
        if isinstance(given, tuple) and not isinstance(given, self.parameters_type):
            raise ValueError(
                f"projection must be {expected}, as draw_projection(...) of this attention "
                f"function returns, got {type(given).__name__}."
            )
        parameters = given if isinstance(given, tuple) else self.from_rows(given)
        width = self.head_dim(parameters)
        if width != head_dim:
            raise ValueError(f"projection must be {expected}, got one for width {width}.")
        return parameters
