"""Loading published ESM-2 and BERT protein models as language models of this package.

Formats: Hugging Face's ``EsmForMaskedLM`` and ``BertForMaskedLM``, and fair-esm's ``.pt``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from fast_attention.layers.attention.switch import with_attention
from fast_attention.models.config import TransformerConfig
from fast_attention.models.originals import bert, esm
from fast_attention.models.originals.checkpoint_arrays import StoredArray, read_json_object
from fast_attention.models.originals.checkpoint_folder import read_folder
from fast_attention.models.originals.description import Description
from fast_attention.models.originals.places import Place
from fast_attention.models.originals.torch_files import read_torch
from fast_attention.models.transformer import Transformer

KINDS = {"esm": esm, "bert": bert}
"""Supported values of ``model_type``, and their modules."""


class Pretrained(NamedTuple):
    """A published model.

    Attributes:
      model: The model with its parameters in float32; `model.config` is its `TransformerConfig`.
      kind: "esm" or "bert".
      description: The content of its ``config.json``.
      other_heads: Names of arrays that belong to other heads, which were not loaded.
    """

    model: Transformer
    kind: str
    description: dict[str, Any]
    other_heads: list[str]


def load_pretrained(
    path: str | Path,
    *,
    attention_fn: Callable[..., Any] | None = None,
    rngs: nnx.Rngs | None = None,
    dtype: Any = jnp.float32,
) -> Pretrained:
    """Loads a published model. No code in its files is executed, and PyTorch is not needed.

    Args:
      path: A folder with ``config.json`` and ``model.safetensors`` (or several, with their index)
        or ``pytorch_model.bin``; or fair-esm's ``.pt`` file of an ESM-2 model.
      attention_fn: Replaces exact attention, for example a result of `make_fast_softmax_attention`;
        features with parameters fitted to data need `fast_attention.layers.calibrate`.
      rngs: Source of the projections of `attention_fn`; None is ``nnx.Rngs(0)``.
      dtype: Dtype of the computation; parameters are float32.

    Raises:
      OSError: If a file cannot be read.
      ValueError: If the model is of another kind, or a file is damaged; nothing is loaded then.
    """
    path = Path(path)
    kind, fields, arrays = _read_file(path) if path.is_file() else _read_folder(path)
    module = KINDS[kind]
    described = Description(path if path.is_file() else path / "config.json", fields)
    config = module.config_of(described, dtype)
    # Building so many layers would take long before the missing arrays were noticed.
    if config.num_layers > len(arrays):
        raise ValueError(
            f"{described.path}: num_hidden_layers is {config.num_layers}, but the files of the "
            f"model have {len(arrays)} arrays"
        )
    model, others = _fill(path, config, arrays, module)
    if attention_fn is not None:
        model = with_attention(model, attention_fn, nnx.Rngs(0) if rngs is None else rngs)
    return Pretrained(model, kind, fields, others)


def _read_folder(folder: Path) -> tuple[str, dict[str, Any], dict[str, StoredArray]]:
    path = folder / "config.json"
    if not folder.exists():
        raise ValueError(f"{folder}: no such file or folder; check the path")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: expected the folder of a published model")
    fields = read_json_object(path)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(
            f"{path} has model_type {kind!r}; expected one of {', '.join(map(repr, KINDS))}"
        )
    return kind, fields, read_folder(folder)


def _read_file(path: Path) -> tuple[str, dict[str, Any], dict[str, StoredArray]]:
    found = read_torch(path)
    fields, arrays = esm.from_fair_esm(path, found.value, found.arrays)
    return "esm", fields, arrays


def _fill(
    path: Path, config: TransformerConfig, arrays: Mapping[str, StoredArray], kind: ModuleType
) -> tuple[Transformer, list[str]]:
    """Builds a model around stored arrays; parameters are never drawn, and read one at a time."""
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    parameters = {
        ".".join(map(str, where)): variable
        for where, variable in nnx.iter_graph(model)
        if isinstance(variable, nnx.Param)
    }
    sources: dict[str, list[tuple[str, Place]]] = {}
    wrong, untyped, unknown, others = [], [], [], []
    for name, stored in arrays.items():
        place = kind.place(config, name)
        if place is None:
            (unknown if name.startswith(kind.OWN) else others).append(name)
        elif place.target:
            shape = _shape_after(place, stored.shape)
            if place.target not in parameters or shape != parameters[place.target].shape:
                wrong.append(f"{name} {list(stored.shape)}")
            if not jnp.issubdtype(stored.dtype, jnp.floating):
                # Such as weights of 8 bits, which mean nothing without their scales.
                untyped.append(f"{name} {stored.dtype}")
            sources.setdefault(place.target, []).append((name, place))
    missing = sorted(parameters.keys() - sources.keys())
    problems = {
        "left over": unknown,
        "of another shape": wrong,
        "not of floating-point numbers": untyped,
        "missing": missing,
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for what, names in problems.items()
            if names
        )
        raise ValueError(
            f"The arrays of {path} do not fit its description ({listed}): fetch all files of one "
            "model, not quantized."
        )
    for target, found in sources.items():
        pieces = (place.transform(arrays[name].read()).astype(np.float32) for name, place in found)
        # The error below reports what becomes infinite.
        with np.errstate(over="ignore", invalid="ignore"):
            value = functools.reduce(np.add, pieces)
        if not np.isfinite(value).all():
            raise ValueError(
                f"{path}: {found[0][0]} has values that are not finite in float32; fetch it again."
            )
        parameters[target].set_value(jnp.array(value))
    return model, sorted(others)


def _shape_after(place: Place, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of an array once it is transformed, found without memory for its values.

    None where it has too few axes for that, or is larger than any array.
    """
    try:
        return place.transform(np.broadcast_to(np.zeros((), np.int8), shape)).shape
    except (IndexError, OverflowError, TypeError, ValueError):
        return None
