"""Models of runs and of exported folders, read back from their folders.

A folder may come from anybody: its description of the model is read as data (`model_file`), and no
code is run that it names.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fast_attention.mesh.meshes import MeshError
from fast_attention.protein_lm import messages
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.runs import exporting, model_file
from fast_attention.protein_lm.runs.run_folder import RunFolder, content


class LoadedRun(NamedTuple):
    """A trained model and where it comes from.

    Attributes:
      model: With the parameters of that checkpoint; the averaged ones, where an average was kept.
      step: Of the checkpoint.
      folder: The run's.
    """

    model: Any
    step: int
    folder: RunFolder


class OpenedRun(NamedTuple):
    """The description of a model in its folder, before any arrays are read.

    Attributes:
      model: Without the trained parameters.
      about: The content of ``model.json``, see `model_file`.
      folder: Where it was read.
    """

    model: Any
    about: dict[str, Any]
    folder: RunFolder


def open_stored(run_dir: str | os.PathLike[str], *, model: BuiltModel | None = None) -> OpenedRun:
    """Makes the model of a run or an exported folder, without reading arrays.

    Args:
      run_dir: A folder written by ``protein-lm train`` or ``protein-lm export``.
      model: A model like that of the run, in place of the description; it is not changed.

    Raises:
      OwnPartError: If a part of the model is code of its author's, and no model is given.
      RunError: If the folder is neither, was changed, or has another alphabet than the model
        given.
    """
    folder = RunFolder(Path(run_dir))
    _check_folder(folder)
    return open_folder(folder, model=model)


def open_folder(folder: RunFolder, *, model: BuiltModel | None = None) -> OpenedRun:
    """Makes the model that ``model.json`` of any folder describes, see `open_stored`."""
    about = model_file.read(folder.model)
    if model is None:
        return OpenedRun(_build(folder.model, about), about, folder)
    if model_file.describe_domain(model.domain)["alphabet"] != about["alphabet"]:
        raise RunError(
            f"the model given has another alphabet than {folder.model}: its ids mean other residues"
        )
    return OpenedRun(model, about, folder)


def load_stored(
    run_dir: str | os.PathLike[str],
    *,
    checkpoint: str | int = "best",
    model: BuiltModel | None = None,
) -> LoadedRun:
    """Reads a checkpoint of a run, or an exported model.

    Args:
      run_dir: As for `open_stored`.
      checkpoint: ``"best"`` (the lowest validation loss; the newest where the run did not
        validate), ``"last"`` or the number of a step; see `checkpoints.restore_model`. An exported
        model has only one.
      model: As for `open_stored`.

    Raises:
      RunError: As `open_stored`, or if the run has no such checkpoint.
      ValueError: If `checkpoint` is none of these.
    """
    opened = open_stored(run_dir, model=model)
    folder, abstract = opened.folder, opened.model.abstract_state
    if opened.about["exported"] is not None and not folder.is_export():
        raise RunError(
            f"{folder.weights} is missing: fetch the folder again, or export the run again"
        )
    if folder.is_export():
        step, parameters, variables = exporting.read_arrays(folder, opened.about, abstract)
    else:
        # Orbax takes long to import, and exported models do without.
        from fast_attention.protein_lm.runs import checkpoints

        step, parameters, variables = checkpoints.restore_model(
            folder.checkpoints, abstract, checkpoint=checkpoint
        )
    loaded = copy.copy(opened.model)
    # Nobody else has these arrays.
    loaded.set_parameters(parameters, variables, share=True)
    return LoadedRun(loaded, step, folder)


def _check_folder(folder: RunFolder) -> None:
    path = folder.path
    if not path.is_dir():
        if path.exists():
            raise RunError(f"{path} is a file: give the folder of a run or of an exported model")
        raise RunError(f"{path}: no such folder; check the path")
    if content(folder) == "a predictor":
        raise RunError(
            f"{path} is a predictor, the --output of 'protein-lm fine-tune --table': use it with "
            f"'protein-lm predict --model={path}', and give a run or an exported model here"
        )
    if not folder.model.is_file():
        raise RunError(
            f"{path} is not the folder of a run: it has no {folder.model.name}; give the "
            "--work_dir of a 'protein-lm train' or the --output of a 'protein-lm export'"
        )


def _build(path: Path, about: dict[str, Any]) -> BuiltModel:
    try:
        return model_file.build(path, about)
    except MeshError:
        # What was trained on many devices is to be used on few; arrays are the same on any.
        messages.note(
            f"note: the run's mesh does not fit the {jax.device_count()} devices here; "
            "the rows of a batch are divided among them instead"
        )
        return model_file.build(path, about | {"mesh": dict.fromkeys(about["mesh"], 1)})
