"""The description of a model as gin bindings, to train it further as a new run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fast_attention.protein_lm.data.alphabet import SPECIAL
from fast_attention.protein_lm.data.alphabets import ALPHABETS
from fast_attention.protein_lm.data.domains import make_protein_domain
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.modeling.model_classes import registered_models
from fast_attention.protein_lm.modeling.objectives import OBJECTIVES
from fast_attention.protein_lm.runs import attention_recipes, model_file


def gin_lines(path: Path, about: dict[str, Any]) -> list[str]:
    """Bindings that make a model and set its data as the run had it, except the learning rate.

    Every value was compared with its type when the file was read, and is written as a literal: no
    line can import, include or call anything but what is named here.

    Args:
      path: The ``model.json``, for errors.
      about: From `model_file.read`, of a model that `model_file.build` has made.

    Raises:
      RunError: If the vocabulary has no gin name, or a part of the model is code of its author's.
    """
    model_file.check_describable(path, about)
    own = registered_models()[about["model"]].own_objective
    options = dict(about["objective"])
    objective = OBJECTIVES[options.pop("name")].__name__
    model = {
        **about["transformer"],
        **{name: value for name, value in about["optimizer"].items() if name != "learning_rate"},
    }
    bindings = {
        **_domain(path, about),
        **_named("FlaxModel", model),
        **_named(objective if own is None else about["model"], options),
        **_named("make_mesh", about["mesh"]),
        **_named("experiment", about["training"] or {}),
    }
    return [
        f"experiment.model_cls = @{about['model']}",
        "FlaxModel.domain = @make_protein_domain()",
        "FlaxModel.mesh = @make_mesh()",
        *([f"FlaxModel.objective = @{objective}()"] if own is None else []),
        *attention_recipes.gin_lines(about["attention"], "FlaxModel.attention_fn"),
        *(f"{name} = {value!r}" for name, value in bindings.items()),
    ]


def _named(configurable: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{configurable}.{name}": value for name, value in values.items()}


def _domain(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    wanted = {name: about[name] for name in ("alphabet", "domain")}
    alphabet = about["alphabet"]
    options = {f"include_{name}": alphabet[f"{name}_token"] is not None for name in SPECIAL}
    options |= {"include_anomalous_amino_acids": bool(alphabet["rare"])}
    options |= {"length": about["domain"]["length"]}
    for name in ALPHABETS if options["include_eos"] else ():
        if model_file.describe_domain(make_protein_domain(**options, alphabet=name)) == wanted:
            return _named("make_protein_domain", options | {"alphabet": name})
    raise RunError(
        f"{path}: the alphabet is not one of make_protein_domain ({', '.join(ALPHABETS)}): give "
        "--gin_file and the gin file that the model was trained with"
    )
