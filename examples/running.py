"""What the examples have in common: a model with something to call it with, and a printed shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from flax import nnx


class Example(NamedTuple):
    """A model and a call of it.

    Attributes:
      model: A module; None where there are no parameters.
      call: Maps the model to the outputs.
    """

    model: Any
    call: Callable[[Any], Any]


def run(examples: Iterable[Callable[[], Example]]) -> None:
    """Computes every example at its default sizes and prints the shapes of what comes out."""
    for make in examples:
        model, call = make()
        outputs = call(model) if model is None else nnx.jit(call)(model)
        shapes = ", ".join(str(x.shape) for x in jax.tree.leaves(outputs))
        print(f"{make.__name__}: {shapes}", flush=True)
