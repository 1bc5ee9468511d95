"""A trained run, read back from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import gin

from fast_attention.protein_lm import checkpoints, gin_registry, run_folder, train
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


def load_run(run_dir: str | Path, *, checkpoint: str | int = "best") -> LoadedRun:
    """Reads a checkpoint of a run.

    gin knows one configuration per process, and it is empty afterwards: what the run had bound must
    not reach models made later. A model made before is not changed.

    Args:
      run_dir: A folder written by ``protein-lm train``.
      checkpoint: ``"best"`` (the lowest validation loss; the newest where the run did not
        validate), ``"last"`` or the number of a step; see `checkpoints.restore_model`.

    Raises:
      RunError: If the folder is not a run's, has no such checkpoint, or was changed.
      ValueError: If `checkpoint` is none of these.
    """
    folder = RunFolder(Path(run_dir))
    if not folder.config.is_file():
        raise RunError(
            f"{folder.path} is not the folder of a run: it has no {folder.config.name}; give the "
            "--work_dir of a 'protein-lm train'"
        )
    try:
        gin_registry.configure([folder.config])
        model = gin.get_bindings("experiment")["model_cls"]()
    finally:
        gin.clear_config()
    run_folder.check_vocabulary(folder, model.domain)
    step, parameters, variables = checkpoints.restore_model(
        folder.checkpoints, train.abstract_state(model), checkpoint=checkpoint
    )
    model.set_parameters(parameters, variables)
    return LoadedRun(model, step, folder)
