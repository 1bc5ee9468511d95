"""A trained model as two files that other programs can read.

``config.json`` says what the model is: its class, the Transformer, the attention function, the
vocabulary, the step, and the text of the gin configuration that makes it. ``model.safetensors``
holds the arrays, named by their place in the model: ``parameters`` are what was trained,
``variables`` are what was drawn once, such as the projections of random features.
``baselines.npz``, if the run has it, is copied, so that ``protein-lm evaluate`` works.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fast_attention.protein_lm import descriptions
from fast_attention.protein_lm.array_records import describe, named
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.output_files import (
    check_output_folder,
    open_output,
    open_output_folder,
    write_json,
)
from fast_attention.protein_lm.run_folder import (
    RunError,
    RunFolder,
    describe_vocabulary,
)
from fast_attention.protein_lm.train_state import TrainState, weights

_FORMAT = "fast_attention.protein_lm"
_VERSION = 1


def export_model(
    model: FlaxModel, folder: RunFolder, output: str | Path, *, step: int, tokens: int | None
) -> RunFolder:
    """Writes a trained model to a folder that `loading.load_run` reads, too.

    Args:
      model: With its trained parameters.
      folder: The run it comes from, or a folder written by this function.
      output: The new folder; created when absent.
      step: Of the checkpoint.
      tokens: That it was trained on, if that is known.

    Raises:
      OutputError: If the folder cannot be written.
      RunError: If it holds a run, or is the exported folder itself.
    """
    target = RunFolder(Path(output))
    check_export(folder, target)
    about = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "step": step,
        "tokens": tokens,
        **descriptions.describe_model(model),
        "vocabulary": describe_vocabulary(model.domain),
        "gin": configuration(folder),
    }
    with open_output_folder(target.path, last=target.export.name) as path:
        new = RunFolder(path)
        _write_arrays(new.weights, named(_arrays(model.state)))
        if folder.baselines.is_file():
            with open_output(new.baselines) as file, open(folder.baselines, "rb") as source:
                shutil.copyfileobj(source, file)
        write_json(new.export, about)
    return target


def check_export(folder: RunFolder, target: RunFolder) -> None:
    """Checks whether a run can be exported to a folder, before any work.

    Raises:
      OutputError: If the folder cannot be created or filled.
      RunError: If it holds a run, or is the exported folder itself.
    """
    check_output_folder(target.path)
    same = target.path.exists() and folder.path.exists() and target.path.samefile(folder.path)
    if target.config.exists() or same:
        raise RunError(f"{target.path} holds a run already: give the export a folder of its own")


def configuration(folder: RunFolder) -> str:
    """The gin configuration of a run or an exported folder."""
    if folder.export.is_file():
        return read_export(folder)["gin"]
    return folder.config.read_text(encoding="utf-8")


def read_export(folder: RunFolder) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
      RunError: If it was not written by `export_model`, or by that of a later version.
    """
    try:
        about = json.loads(folder.export.read_text(encoding="utf-8"))
        version = about["format_version"] if about["format"] == _FORMAT else None
    except (ValueError, KeyError, TypeError):
        version = None
    if version is None:
        raise RunError(f"{folder.export} was not written by 'protein-lm export'")
    if version != _VERSION:
        raise RunError(
            f"{folder.export} has the format version {version}, and this version of fast_attention "
            f"reads {_VERSION}: update it"
        )
    return about


def read_arrays(folder: RunFolder, abstract: TrainState) -> tuple[int, Any, Any]:
    """Reads the arrays of an exported folder.

    Args:
      folder: Written by `export_model`.
      abstract: A state of `jax.ShapeDtypeStruct`: what the model expects.

    Returns:
      The step, the parameters and the other variables.

    Raises:
      RunError: If the file is absent, damaged or of another model.
    """
    import safetensors
    import safetensors.flax

    try:
        found = safetensors.flax.load_file(folder.weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(
            f"{folder.weights} cannot be read ({error}): export the run again"
        ) from error
    expected, stored = describe(_arrays(abstract)), describe(found)
    for name in [*expected, *stored]:
        there, wanted = (tree.get(name, "absent") for tree in (stored, expected))
        if there != wanted:
            raise RunError(
                f"{folder.weights} does not fit {folder.export.name}: {name} is {there} there, and "
                f"the model expects {wanted}; export the run again"
            )
    structure = jax.tree.structure(_arrays(abstract))
    arrays = jax.tree.unflatten(structure, [found[name] for name in expected])
    return read_export(folder)["step"], arrays["parameters"], arrays["variables"]


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    import safetensors.numpy

    host = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with open_output(path, seekable=True) as file:
        safetensors.numpy.save_file(host, file.name, metadata={"format": _FORMAT})


def _arrays(state: TrainState) -> dict[str, Any]:
    return {"parameters": weights(state), "variables": state.variables}
