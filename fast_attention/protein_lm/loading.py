"""A trained run, or what was exported of it, read back from its folder.

A folder may come from anybody: its description of the model is read as data (`model_file`), and no
code is run that it names. The gin file of a run is parsed only where a person gives it by name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from fast_attention.protein_lm.models import FlaxModel
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.runs.stored_models import (
    LoadedRun,
    OpenedRun,
    load_stored,
    open_folder,
    open_stored,
)


def open_run(
    run_dir: str | os.PathLike[str],
    *,
    gin_file: Sequence[str] = (),
    model: FlaxModel | None = None,
) -> OpenedRun:
    """Makes the model of a run or an exported folder, without reading arrays.

    Args:
      run_dir: A folder written by ``protein-lm train`` or ``protein-lm export``.
      gin_file: Gin files that make the model, in place of the description in the folder: needed
        where a part of it is code of its author's. Gin files can run any code: give those that you
        trust. The gin configuration of this process is empty afterwards.
      model: A model like that of the run, in place of the description; it is not changed.

    Raises:
      OwnPartError: If a part of the model is code of its author's, and neither is given.
      RunError: If the folder is neither, was changed, or has another vocabulary than the model
        given.
    """
    return open_stored(run_dir, model=_made_by(gin_file, model))


def open_model(
    folder: RunFolder, *, gin_file: Sequence[str] = (), model: FlaxModel | None = None
) -> OpenedRun:
    """Makes the model that ``model.json`` of any folder describes, see `open_run`."""
    return open_folder(folder, model=_made_by(gin_file, model))


def load_run(
    run_dir: str | os.PathLike[str],
    *,
    checkpoint: str | int = "best",
    gin_file: Sequence[str] = (),
    model: FlaxModel | None = None,
) -> LoadedRun:
    """Reads a checkpoint of a run, or an exported model.

    Args:
      run_dir: As for `open_run`.
      checkpoint: ``"best"`` (the lowest validation loss; the newest where the run did not
        validate), ``"last"`` or the number of a step; see `checkpoints.restore_model`. An exported
        model has only one.
      gin_file: As for `open_run`.
      model: As for `open_run`.

    Raises:
      RunError: As `open_run`, or if the run has no such checkpoint.
      ValueError: If `checkpoint` is none of these.
    """
    return load_stored(run_dir, checkpoint=checkpoint, model=_made_by(gin_file, model))


def _made_by(gin_file: Sequence[str], model: FlaxModel | None) -> FlaxModel | None:
    if model is not None or not gin_file:
        return model
    # gin is imported for files that a person gives, and for nothing else.
    from fast_attention.protein_lm.gin_registry import make_model

    return make_model(gin_file)
