"""A trained run, or what was exported of it, read back from its folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import gin
import jax

from fast_attention.meshes import MeshError
from fast_attention.protein_lm import checkpoints, exporting, gin_registry, run_folder
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.run_folder import RunError, RunFolder


class LoadedRun(NamedTuple):
    """A trained model and where it comes from.

    Attributes:
      model: With the parameters of that checkpoint; the averaged ones, where an average was kept.
      step: Of the checkpoint.
      folder: The run's.
    """

    model: FlaxModel
    step: int
    folder: RunFolder


class OpenedRun(NamedTuple):
    """What a folder says of its model, before any arrays are read.

    Attributes:
      model: Without the trained parameters.
      settings: The gin parameters of ``experiment``, by name.
      folder: Where it was read.
    """

    model: FlaxModel
    settings: dict[str, Any]
    folder: RunFolder


def open_run(run_dir: str | os.PathLike[str]) -> OpenedRun:
    """Makes the model of a run or an exported folder, without reading arrays.

    gin knows one configuration per process, and it is empty afterwards: what the run had bound must
    not reach models made later. A model made before is not changed.

    Args:
      run_dir: A folder written by ``protein-lm train`` or ``protein-lm export``.

    Raises:
      RunError: If the folder is neither, or was changed.
    """
    folder = RunFolder(Path(run_dir))
    about = exporting.read_export(folder) if folder.export.is_file() else None
    if about is None and not folder.config.is_file():
        raise RunError(
            f"{folder.path} is not the folder of a run: it has no {folder.config.name}; give the "
            "--work_dir of a 'protein-lm train' or the --output of a 'protein-lm export'"
        )
    model, settings = _build(folder.config if about is None else about["gin"])
    if about is None:
        run_folder.check_vocabulary(folder, model.domain)
    elif about["vocabulary"] != run_folder.describe_vocabulary(model.domain):
        raise RunError(f"{folder.export} contradicts itself about the vocabulary: export it again")
    return OpenedRun(model, settings, folder)


def load_run(run_dir: str | os.PathLike[str], *, checkpoint: str | int = "best") -> LoadedRun:
    """Reads a checkpoint of a run, or an exported model.

    Args:
      run_dir: As for `open_run`.
      checkpoint: ``"best"`` (the lowest validation loss; the newest where the run did not
        validate), ``"last"`` or the number of a step; see `checkpoints.restore_model`. An exported
        model has only one.

    Raises:
      RunError: As `open_run`, or if the run has no such checkpoint.
      ValueError: If `checkpoint` is none of these.
    """
    model, _, folder = open_run(run_dir)
    abstract = model.abstract_state
    if folder.export.is_file():
        step, parameters, variables = exporting.read_arrays(folder, abstract)
    else:
        step, parameters, variables = checkpoints.restore_model(
            folder.checkpoints, abstract, checkpoint=checkpoint
        )
    model.set_parameters(parameters, variables)
    return LoadedRun(model, step, folder)


def build_model(config: Path) -> FlaxModel:
    """Makes the model of a run's configuration, untrained.

    Args:
      config: The ``config.gin`` of a run.
    """
    return _build(config)[0]


def _build(config: Path | str) -> tuple[FlaxModel, dict[str, Any]]:
    """The model of a gin file, or of its text, and the settings of ``experiment``."""
    try:
        if isinstance(config, Path):
            gin_registry.configure([config])
        else:
            gin_registry.configure(bindings=[config])
        settings = gin.get_bindings("experiment")
        try:
            return settings["model_cls"](), settings
        except MeshError:
            # What was trained on many devices is to be used on few; arrays are the same on any.
            with gin.unlock_config():
                for name, size in {"data": None, "fsdp": 1, "model": 1, "sequence": 1}.items():
                    gin.bind_parameter(f"make_mesh.{name}", size)
            print(
                f"note: the run's mesh does not fit the {jax.device_count()} devices here, among "
                "which rows are divided instead",
                file=sys.stderr,
            )
            return settings["model_cls"](), settings
    finally:
        gin.clear_config()
