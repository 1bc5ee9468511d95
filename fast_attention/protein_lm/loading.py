"""A trained run, read back from its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import gin

from fast_attention.protein_lm import checkpoints, gin_registry, run_folder, train
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.run_folder import RunError, RunFolder


class LoadedRun(NamedTuple):
    """A trained model and where it comes from.

    Attributes:
      model: With the parameters of the newest checkpoint.
      step: Of that checkpoint.
      folder: The run's.
    """

    model: FlaxModel
    step: int
    folder: RunFolder


def load_run(run_dir: str | os.PathLike[str]) -> LoadedRun:
    """Reads the newest checkpoint of a run.

    gin knows one configuration per process, and it is empty afterwards: what the run had bound must
    not reach models made later. A model made before is not changed.

    Args:
      run_dir: A folder written by ``protein-lm train``.

    Raises:
      RunError: If the folder is not a run's, has no checkpoint yet, or was changed.
    """
    folder = RunFolder(Path(run_dir))
    if not folder.config.is_file():
        raise RunError(
            f"{folder.path} is not the folder of a run: it has no {folder.config.name}; give the "
            "--work_dir of a 'protein-lm train'"
        )
    model = build_model(folder.config)
    run_folder.check_vocabulary(folder, model.domain)
    step, parameters, variables = checkpoints.restore_model(
        folder.checkpoints, train.abstract_state(model)
    )
    model.set_parameters(parameters, variables)
    return LoadedRun(model, step, folder)


def build_model(config: Path) -> FlaxModel:
    """Makes the model of a run's configuration, untrained.

    Args:
      config: The ``config.gin`` of a run.
    """
    try:
        gin_registry.configure([config])
        return gin.get_bindings("experiment")["model_cls"]()
    finally:
        gin.clear_config()
