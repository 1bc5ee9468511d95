"""Where the arrays of published models belong in ours.

A dense layer's weight is ``[out, in]`` there and ``[in, out]`` here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A parameter, and what makes an array fit it.

    Attributes:
      target: The path of the parameter in the model, with dots; "" is no parameter: an array that
        we compute, or that is there under another name as well.
      transform: Applied to the array. Arrays with one target are added.
    """

    target: str
    transform: Callable[[Any], Any] = lambda x: x


NOT_NEEDED = Place("")


def dense(target: str, leaf: str) -> Place:
    """The weight or bias of a dense layer."""
    if leaf == "weight":
        return Place(f"{target}.kernel", lambda x: x.T)
    return Place(f"{target}.bias")


def norm(target: str, leaf: str) -> Place:
    """The weight (gamma) or bias (beta) of a layer norm."""
    return Place(f"{target}.{'scale' if leaf in ('weight', 'gamma') else 'bias'}")


def of_block(name: str, blocks: int, parts: dict[str, tuple[Any, str]]) -> Place | None:
    """The place of an array of a block.

    Args:
      name: Behind ``encoder.layer.``: the block, the part and the leaf.
      blocks: How many there are.
      parts: For each part `dense` or `norm`, and the path inside our block.
    """
    index, _, rest = name.partition(".")
    part, _, leaf = rest.rpartition(".")
    if not index.isdecimal() or int(index) >= blocks or part not in parts:
        return None
    kind, target = parts[part]
    known = ("weight", "bias") if kind is dense else ("weight", "bias", "gamma", "beta")
    return kind(f"stack.blocks.{int(index)}.{target}", leaf) if leaf in known else None
