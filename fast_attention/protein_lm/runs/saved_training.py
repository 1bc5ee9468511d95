"""The training of a model in Python, written to a folder and taken up again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import read_text
from fast_attention.protein_lm.files.output_files import check_output_folder, write_file
from fast_attention.protein_lm.runs import checkpoints, model_file
from fast_attention.protein_lm.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from fast_attention.protein_lm.modeling.built_model import BuiltModel


def save_training(model: BuiltModel, output: str | os.PathLike[str]) -> None:
    """Writes the state of a model, its optimiser and its step among it.

    The folder has ``model.json`` and ``checkpoints``, so that `loading.load_run` reads it. Only the
    newest checkpoint is kept.

    Args:
      model: In any state of training.
      output: The folder; created when absent.

    Raises:
      FloatingPointError: If a parameter is infinite or not a number.
      OutputError: If the folder cannot be written.
      RunError: If it holds something else, another model, or a checkpoint of a later step.
    """
    folder, step = RunFolder(Path(output)), model.step
    if folder.config.exists() or folder.is_export():
        raise RunError(
            f"{folder.path} holds a run or an exported model: give the checkpoint another folder"
        )
    text = model_file.to_text(model_file.describe(model))
    if folder.model.exists() and read_text(folder.model) != text:
        raise RunError(f"{folder.path} holds another model: give the checkpoint another folder")
    newest = folder.newest_step()
    if newest is not None and newest > step:
        raise RunError(
            f"{folder.path} holds a checkpoint of step {newest}, which is later than step {step}: "
            "give the checkpoint another folder"
        )
    check_output_folder(folder.path)
    folder.path.mkdir(parents=True, exist_ok=True)
    progress = checkpoints.Progress(None, model.batch_size, 0, 0.0)
    with checkpoints.open_checkpoints(folder.checkpoints) as manager:
        if newest == step:
            manager.delete(step)
        checkpoints.save(manager, model.state, progress, keep=1)
    write_file(folder.model, text)


def load_training(model: BuiltModel, path: str | os.PathLike[str]) -> None:
    """Gives a model the state of the newest checkpoint of a folder.

    Args:
      model: Of the same shape; its state is replaced.
      path: A folder written by `save_training` or by ``protein-lm train``.

    Raises:
      RunError: If the checkpoint is damaged, or belongs to a model of another shape.
      ValueError: If there is no checkpoint.
    """
    folder = RunFolder(Path(path))
    if folder.newest_step() is None:
        hint = f"read it with {type(model).__name__}.load" if folder.is_export() else "check it"
        raise ValueError(f"{folder.path} holds no checkpoint: {hint}")
    with checkpoints.open_checkpoints(folder.checkpoints) as manager:
        restored = checkpoints.restore(manager, model.abstract_state)
    assert restored is not None, "there is a checkpoint"
    model.state = restored[0]
