"""Keyword names of the original systems: checked, completed, explained."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Final

REQUIRED: Final = object()
"""Stands for the default of a keyword that has none."""


def complete(
    name: str, keywords: Mapping[str, Any], defaults: Mapping[str, Any]
) -> SimpleNamespace:
    """Fills in defaults.

    Args:
      name: Of what is called, for messages.
      keywords: As given.
      defaults: Every keyword there is, with its default or `REQUIRED`.

    Returns:
      All keywords as attributes.

    Raises:
      TypeError: At an unknown keyword, or if a required one is missing.
    """
    for keyword in keywords:
        if keyword not in defaults:
            near = difflib.get_close_matches(keyword, defaults, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; there are {sorted(defaults)}."
            raise TypeError(f"{name} has no keyword {keyword!r}{hint}")
    missing = [k for k, v in defaults.items() if v is REQUIRED and k not in keywords]
    if missing:
        raise TypeError(f"{name} needs {', '.join(missing)}.")
    return SimpleNamespace(**{**defaults, **keywords})


def per_layer(name: str, value: int | tuple[int, ...], depth: int, heads: int) -> tuple[int, ...]:
    """One number of local heads for every layer.

    Raises:
      ValueError: If there are not as many as layers, or one is out of range.
    """
    numbers = (value,) * depth if isinstance(value, int) else tuple(value)
    if len(numbers) != depth or any(not 0 <= number <= heads for number in numbers):
        raise ValueError(
            f"{name} must be 0 to {heads} (heads), one number or {depth} (depth), got {value}."
        )
    return numbers


def split_prefixes(name: str, keywords: Mapping[str, Any]) -> tuple[dict, dict]:
    """Sorts ``enc_*`` and ``dec_*`` keywords of an encoder-decoder, without their prefixes.

    Raises:
      TypeError: At a keyword with neither.
    """
    encoder, decoder = {}, {}
    for keyword, value in keywords.items():
        prefix, _, rest = keyword.partition("_")
        if prefix not in ("enc", "dec") or rest == "dim":
            raise TypeError(
                f"{name} has no keyword {keyword!r}: those of the two models begin with enc_ or "
                "dec_, and both share dim."
            )
        (encoder if prefix == "enc" else decoder)[rest] = value
    return encoder, decoder


def head_width(dim: int, heads: int, dim_head: int | None) -> int:
    """Width of a head, by default dim / heads.

    Raises:
      ValueError: If that is no number of channels.
    """
    for name, value in (("heads", heads), ("dim_head", dim_head)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if dim_head is None and dim % heads:
        raise ValueError(f"dim={dim} must be a multiple of heads={heads}, or give dim_head.")
    return dim // heads if dim_head is None else dim_head


def chosen_layers(name: str, value: int | tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Numbers of layers, from 1.

    Raises:
      ValueError: At a layer that there is not.
    """
    layers = (value,) if isinstance(value, int) else tuple(value)
    if any(not 1 <= layer <= depth for layer in layers):
        raise ValueError(f"{name} must be layers, 1 to {depth} (depth), got {value}.")
    return layers
