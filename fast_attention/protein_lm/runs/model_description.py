"""What a model is, in numbers, names and text alone: the form of JSON."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np

from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.runs.array_records import named


def describe_model(model: BuiltModel) -> dict[str, Any]:
    """``model`` (its class), ``objective``, ``transformer``, ``attention`` and ``parameters``."""
    attention = "exact" if model.attention_fn is None else plain(model.attention_fn)
    if model.objective.causal:
        attention = _as_called(attention)
    return {
        "model": type(model).__name__,
        "objective": {"name": model.objective.name} | dataclasses.asdict(model.objective),
        "transformer": plain(model.config),
        "attention": attention,
        "parameters": count_parameters(model),
    }


def _as_called(value: Any) -> Any:
    """Attention as a causal model calls it: it is causal whatever the function's default is."""
    if isinstance(value, dict):
        return {
            name: True if name == "unidirectional" else _as_called(item)
            for name, item in value.items()
        }
    return [_as_called(item) for item in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as dictionaries, types and functions as their names."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
        return {"type": type(value).__name__} | fields
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, jax.Array)):
        return f"{value.dtype}{list(value.shape)}"
    return getattr(value, "__name__", None) or type(value).__name__


def count_parameters(model: BuiltModel) -> dict[str, int]:
    """Trained scalars by part of the model, ``total``, and ``drawn`` ones, which are not trained.

    The parts of a Transformer are ``embed``, ``positions``, ``attention``, ``feed_forward``,
    ``norm`` and ``head``; those of another model class are its own.
    """
    abstract = jax.eval_shape(model.initialize, jax.random.key(0))
    parts: dict[str, int] = {}
    for name, leaf in named(abstract.parameters).items():
        part = _part(name)
        parts[part] = parts.get(part, 0) + leaf.size
    drawn = sum(leaf.size for leaf in jax.tree.leaves(abstract.variables))
    return parts | {"total": sum(parts.values()), "drawn": drawn}


def _part(name: str) -> str:
    block = re.match(r"stack\.blocks\.\d+\.(\d)\.(\w+)", name)
    if block is None:
        return name.partition(".")[0]
    if block[2] != "inner":
        return block[2]
    return "feed_forward" if int(block[1]) else "attention"
