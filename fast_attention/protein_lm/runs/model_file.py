"""``model.json``: what a model is, as plain data from which it is made again.

The file names the class of the model, its alphabet, the shape of the Transformer, the factory of
the attention function with its arguments, objective, mesh, optimiser and the settings of the
training. It is compared with names and types that are listed here, so that a foreign
file can describe a model and do nothing else. What cannot be described, such as an attention
function of one's own, is named in the file as such: the model can then be opened with the gin file
that made it, or with the Python object.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jax.numpy as jnp

from fast_attention.mesh.meshes import FSDP, MODEL, SEQUENCE, MeshError, make_mesh
from fast_attention.models.config import TransformerConfig
from fast_attention.models.transformer import Transformer
from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.data.alphabet import Alphabet
from fast_attention.protein_lm.data.domains import (
    DiscreteDomain,
    FixedLengthDiscreteDomain,
    VariableLengthDiscreteDomain,
)
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import check_fields, one_line, read_json, shown
from fast_attention.protein_lm.modeling import schedules
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.model_classes import is_registered, registered_models
from fast_attention.protein_lm.modeling.objectives import OBJECTIVES, Objective
from fast_attention.protein_lm.modeling.optimizer import OptimizerOptions
from fast_attention.protein_lm.modeling.sampling_config import SamplingConfig
from fast_attention.protein_lm.ranges import Range
from fast_attention.protein_lm.runs import attention_recipes
from fast_attention.protein_lm.runs.attention_recipes import OWN, name_of
from fast_attention.recipes import recipe

FORMAT = "fast_attention.protein_lm"
VERSION = 4

_DOMAINS = ("VariableLengthDiscreteDomain", "FixedLengthDiscreteDomain")
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_MESH = (FSDP, MODEL, SEQUENCE)

# Sizes beyond these are no model's: making it would take hours or more memory than there is.
_LIMITS = {"num_layers": 4096, "length": 2**31 - 1, "batch_size": 2**31 - 1}
_MAX_SIZE = 2**24
_SIZED = ("transformer", "domain", "mesh", "objective")

_HINTS: dict[str, Any] = {
    "format": str,
    "format_version": int,
    "model": str | dict,
    "alphabet": dict,
    "domain": dict,
    "transformer": dict,
    "attention": dict | None,
    "objective": dict,
    "special": dict,
    "sampling": dict,
    "mesh": dict,
    "optimizer": dict,
    "training": dict | None,
    "exported": dict | None,
}
_ALPHABET = get_type_hints(Alphabet) | {"tokens": list[str], "unused": list[str]}
_DOMAIN = {"type": Literal[_DOMAINS], "length": int, "min_length": int | None}
_ADDED = {"with_bos": bool | None, "with_mask": bool}
_OPTIMIZER = {
    "learning_rate": dict | None,
    **get_type_hints(OptimizerOptions),
    "ema_decay": float | None,
    "batch_size": int,
    "random_seed": int,
}
_EXPORTED = {"step": int, "tokens": int | None, "parameters": dict[str, int]}
_FILES = str | list[str] | None
_TRAINING = {
    "train_files": _FILES | dict[str, float],
    "valid_files": _FILES,
    "test_files": _FILES,
    "on_error": str,
    "batch_size": int | None,
    "batch_size_per_device": int,
    "max_train_length": int,
    "max_eval_length": int | None,
    "pack_sequences": bool,
    "crop": str,
    "num_eval_steps": int | None,
    "checkpoints_to_keep": int,
    "num_samples": int,
    "max_sample_length": int | None,
}


class OwnPartError(RunError):
    """A part of a model is code of its author's, which ``model.json`` cannot describe."""


def describe_domain(domain: DiscreteDomain) -> dict[str, Any]:
    """``alphabet`` and ``domain`` of a model's file."""
    alphabet = domain.vocab
    own_domain = type(domain) not in (VariableLengthDiscreteDomain, FixedLengthDiscreteDomain)
    return {
        "alphabet": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(alphabet).items()
        },
        "domain": {
            "type": _own(type(domain)) if own_domain else type(domain).__name__,
            "length": domain.length,
            "min_length": getattr(domain, "min_length", None),
        },
    }


def describe(model: BuiltModel) -> dict[str, Any]:
    """The content of ``model.json`` except ``training`` and ``exported``, which are None."""
    ours = is_registered(type(model)) and model.model_cls is Transformer
    transformer = dataclasses.asdict(model.config)
    transformer["exact_layers"] = list(model.config.exact_layers)
    for name in ("vocab_size", "causal"):
        del transformer[name]
    attention = model.attention_fn
    schedule = recipe(model.schedule)
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "model": type(model).__name__ if ours else _own(type(model), model.model_cls),
        **describe_domain(model.domain),
        "transformer": _plain(transformer | {"dtype": jnp.dtype(model.config.dtype).name}),
        "attention": None if attention is None else attention_recipes.describe(attention),
        "objective": {"name": model.objective.name} | dataclasses.asdict(model.objective),
        "special": {name: getattr(model.options, name) for name in _ADDED},
        "sampling": _plain(model.sampling_kwargs),
        "mesh": {name: model.mesh.shape[name] for name in _MESH},
        "optimizer": {
            "learning_rate": None if schedule is None else _plain(schedule.arguments),
            **_plain(dataclasses.asdict(model.optimizer_options)),
            "ema_decay": model.ema_decay,
            "batch_size": model.batch_size,
            "random_seed": model.random_seed,
        },
        "training": None,
        "exported": None,
    }


def training_settings(experiment: Any) -> dict[str, Any]:
    """``training``: the settings of an `experiment.Experiment` that concern its data."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): float(weight) for name, weight in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [str(item) for item in value]
        return str(value) if isinstance(value, os.PathLike) else value

    return {name: plain(getattr(experiment, name)) for name in _TRAINING}


def read(path: Path) -> dict[str, Any]:
    """The content of a ``model.json``, compared with the names and types that it may have.

    Raises:
      RunError: If the file is absent or damaged, or anything in it is unknown or of another type.
    """
    about = read_json(path)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise RunError(
            f'{path} describes no model: "format" must be "{FORMAT}"; was it written by '
            "'protein-lm train' or 'export'?"
        )
    if about.get("format_version") != VERSION:
        raise RunError(
            f"{path} has format_version {shown(about.get('format_version'))}, and this version of "
            f"fast_attention reads {VERSION}: use the version that wrote it"
        )
    about = check_fields(path, "", about, _HINTS)
    # Files of before it was there.
    about["transformer"].setdefault("exact_layers", [])
    parts = {
        "alphabet": _ALPHABET,
        "domain": _DOMAIN | {"type": str | dict},
        "transformer": _transformer_hints(),
        "special": _ADDED,
        "mesh": dict.fromkeys(_MESH, int),
        "optimizer": _OPTIMIZER,
        "training": _TRAINING,
        "exported": _EXPORTED,
    }
    for name, hints in parts.items():
        if about[name] is not None:
            about[name] = check_fields(path, name, about[name], hints)
            _check_sizes(path, name, about[name])
    about["objective"] = _check_objective(path, about["objective"])
    about["sampling"] = check_fields(
        path, "sampling", about["sampling"], get_type_hints(SamplingConfig), optional=True
    )
    _check_ranges(path, "optimizer", about["optimizer"], ranges.SETTINGS["FlaxModel"])
    _check_ranges(path, "sampling", about["sampling"], ranges.SAMPLING)
    rate = about["optimizer"]["learning_rate"]
    if rate is not None:
        hints = get_type_hints(schedules.create_learning_rate_scheduler)
        del hints["return"]
        about["optimizer"]["learning_rate"] = check_fields(
            path, "optimizer.learning_rate", rate, hints
        )
    return about


def to_text(about: dict[str, Any]) -> str:
    """The text of a ``model.json`` that `read` takes."""
    return json.dumps(about, indent=1, allow_nan=False) + "\n"


def check_describable(path: Path, about: dict[str, Any]) -> None:
    """Checks that a model can be made of its description alone.

    Raises:
      OwnPartError: If a part of it is code of its author's.
    """
    parts = {
        "model": about["model"],
        "domain.type": about["domain"]["type"],
        "attention": attention_recipes.own_part(about["attention"]),
    }
    for name, part in parts.items():
        if isinstance(part, dict):
            code = check_fields(path, name, part, {OWN: str})[OWN]
            raise OwnPartError(
                f"{path}: {name} is {shown(code)}, code that does not belong to fast_attention and "
                "is not part of the file: open the model with --gin_file and the gin file that it "
                "was trained with, or in Python with load_run(run_dir, model=...)"
            )


def build(path: Path, about: dict[str, Any]) -> BuiltModel:
    """Makes a model of its description, untrained.

    Args:
      path: The file, for errors.
      about: From `read`.

    Raises:
      MeshError: If the devices that there are do not make the mesh.
      OwnPartError: See `check_describable`.
      RunError: If the values make no model.
    """
    check_describable(path, about)
    classes = registered_models()
    if about["model"] not in classes:
        raise RunError(f"{path}: model is {shown(about['model'])}; expected {' or '.join(classes)}")
    model_cls = classes[about["model"]]
    transformer = about["transformer"]
    if transformer["dtype"] not in _DTYPES:
        raise RunError(
            f"{path}: transformer.dtype is {shown(transformer['dtype'])}; expected one of "
            + ", ".join(_DTYPES)
        )
    attention_fn = attention_recipes.build(path, "attention", about["attention"])
    options = dict(about["optimizer"])
    rate = options.pop("learning_rate")
    try:
        return model_cls(
            _build_domain(path, about),
            **_objective_keywords(path, about, model_cls.own_objective),
            attention_fn=attention_fn,
            learning_rate=_unknown_rate
            if rate is None
            else schedules.create_learning_rate_scheduler(**rate),
            mesh=make_mesh(**about["mesh"]),
            sampling_kwargs=about["sampling"],
            **about["special"],
            **options,
            **(transformer | {"dtype": jnp.dtype(transformer["dtype"]).type}),
        )
    except MeshError:
        raise
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{path}: these values do not describe a valid model: {one_line(error)}"
        ) from error


def _build_domain(path: Path, about: dict[str, Any]) -> DiscreteDomain:
    domain = about["domain"]
    vocab = Alphabet(**about["alphabet"])
    if domain["type"] == "FixedLengthDiscreteDomain":
        made: DiscreteDomain = FixedLengthDiscreteDomain(vocab=vocab, length=domain["length"])
    else:
        made = VariableLengthDiscreteDomain(vocab, domain["length"], domain["min_length"] or 0)
    for name, value in describe_domain(made)["domain"].items():
        if domain[name] != value:
            raise RunError(
                f"{path}: domain.{name} is {shown(domain[name])}, which contradicts the rest of "
                f"the domain; expected {shown(value)}"
            )
    return made


def _check_objective(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    name = given.get("name")
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise RunError(
            f"{path}: objective.name is {shown(name)}; expected {' or '.join(OBJECTIVES)}"
        )
    hints = get_type_hints(OBJECTIVES[name])
    fields = {field.name: hints[field.name] for field in dataclasses.fields(OBJECTIVES[name])}
    found = check_fields(path, "objective", given, {"name": str} | fields)
    _check_sizes(path, "objective", found)
    return found


def _objective_keywords(path: Path, about: dict[str, Any], own: Objective | None) -> dict[str, Any]:
    """A class that has an objective takes its options, and `FlaxModel` the objective itself."""
    options = dict(about["objective"])
    name = options.pop("name")
    if own is None:
        return {"objective": OBJECTIVES[name](**options)}
    if own.name != name:
        raise RunError(f"{path}: objective.name is {name}, but {about['model']} needs {own.name}")
    return options


def _unknown_rate(step: Any) -> Any:
    raise RunError(
        "the learning rate of this model was a custom function, which model.json does not store: "
        "train with the gin file of the run, or give with_attention a learning_rate"
    )


def _transformer_hints() -> dict[str, Any]:
    hints = get_type_hints(TransformerConfig) | {"dtype": str, "exact_layers": list[int]}
    return {name: hint for name, hint in hints.items() if name not in ("vocab_size", "causal")}


def _check_sizes(path: Path, place: str, values: dict[str, Any]) -> None:
    for name, value in values.items():
        limit = _LIMITS.get(name, _MAX_SIZE)
        if place in _SIZED and type(value) is int and value > limit:
            raise RunError(f"{path}: {place}.{name} is {value}; at most {limit} is expected")


def _check_ranges(
    path: Path, place: str, values: dict[str, Any], allowed: dict[str, Range]
) -> None:
    for name, value in values.items():
        # A learning rate is a schedule, which is looked at by itself.
        known = name in allowed and isinstance(value, (int, float))
        if known and not allowed[name].holds(value):
            raise RunError(f"{path}: {place}.{name} is {shown(value)}; expected {allowed[name]}")


def _own(*parts: Any) -> dict[str, str]:
    """Stands for code that does not belong to this package."""
    foreign = [part for part in parts if not _is_ours(part)] or parts
    return {OWN: name_of(foreign[0])}


def _is_ours(part: Any) -> bool:
    return part is Transformer or is_registered(part)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers of NumPy and JAX as those of Python."""
    return {
        name: value.item() if hasattr(value, "item") else value for name, value in values.items()
    }
