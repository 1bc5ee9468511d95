"""A trained model as files that other programs can read.

``model.json`` says what the model is (see `model_file`), with the step, the tokens it was trained
on and the number of its parameters. ``model.safetensors`` holds the arrays, named by their place in
the model: ``parameters`` are what was trained, ``variables`` are what was drawn once, such as the
projections of random features. ``config.gin`` and ``baselines.npz``, if the run has them, are
copied: the former for people, the latter so that ``protein-lm evaluate`` works.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import open_plain
from fast_attention.protein_lm.files.output_files import (
    check_output_folder,
    open_output,
    open_output_folder,
    write_file,
)
from fast_attention.protein_lm.machine_failures import machine_failure
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.train_state import TrainState
from fast_attention.protein_lm.runs import model_description, model_file
from fast_attention.protein_lm.runs.array_records import describe, named
from fast_attention.protein_lm.runs.run_folder import RunFolder, check_free, content, inside

# Names of the types in a safetensors file.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_DTYPES |= {
    f"{kind}{bits}": f"{name}{bits}"
    for kind, name in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}


HALF = ("float16", "bfloat16")
"""Types of 16 bits in which an export may store its float32 arrays."""


def export_model(
    model: BuiltModel,
    folder: RunFolder,
    output: str | Path,
    *,
    step: int,
    tokens: int | None,
    dtype: str | None = None,
) -> RunFolder:
    """Writes a trained model to a folder that `loading.load_run` reads, too.

    Where the folder has the same model already, what is missing of it is added.

    Args:
      model: With its trained parameters.
      folder: The run it comes from, or a folder written by this function.
      output: The new folder; created when absent.
      step: Of the checkpoint.
      tokens: That it was trained on, if that is known.
      dtype: One of `HALF` stores float32 arrays in half the space, rounded; they are float32 again
        when they are read.

    Raises:
      OutputError: If the folder cannot be written.
      RunError: If it holds a run or another model, or is the exported folder itself.
      ValueError: If `dtype` is another one, or an array has numbers too large for it.
    """
    target = RunFolder(Path(output))
    check_export(folder, target)
    arrays = _rounded(named(_tree(model.weights, model.variables)), dtype)
    about = _describe(model, step, tokens) | {"training": model_file.read(folder.model)["training"]}
    with open_output_folder(target.path, last=target.model.name) as path:
        new = RunFolder(path)
        _write_arrays(new.weights, arrays)
        for source, copy in ((folder.baselines, new.baselines), (folder.config, new.config)):
            if source.is_file():
                with open_output(copy) as file, open(source, "rb") as content:
                    shutil.copyfileobj(content, file)
        write_file(new.model, model_file.to_text(about))
        _keep_equal(path, target)
    return target


def save_model(model: BuiltModel, output: str | os.PathLike[str]) -> None:
    """Writes a model that was trained in Python, as `export_model` writes that of a run.

    Only this function replaces a model: in Python, one and the same is saved again and again.

    Args:
      model: Its predicting parameters are written, and not the state of its training.
      output: The folder; created when absent. A model that was saved there before is replaced.

    Raises:
      OutputError: If the folder cannot be written.
      RunError: If it holds a run, or the model of another program.
    """
    target = RunFolder(Path(output))
    check_export(None, target)
    if target.config.exists():
        raise RunError(f"{target.path} holds an exported run: give the model a folder of its own")
    if target.is_export() and not _is_own(target.weights):
        raise RunError(
            f"{target.weights} was written by another program, and would be overwritten: give the "
            "model a folder of its own"
        )
    with open_output_folder(target.path, last=target.model.name) as path:
        _write_model(path, model, _tree(model.weights, model.variables), model.step)


def _write_model(path: Path, model: BuiltModel, arrays: Any, step: int) -> None:
    new = RunFolder(path)
    _write_arrays(new.weights, named(arrays))
    write_file(new.model, model_file.to_text(_describe(model, step, None)))


def save_arrays(
    model: BuiltModel, parameters: Any, variables: Any, output: str | os.PathLike[str]
) -> None:
    """Writes a model with given arrays; its own state, an optimiser's included, is never made.

    Args:
      model: Describes the arrays.
      parameters: Nested dict, as `train_state.split_model` returns it.
      variables: Likewise.
      output: The new folder, as for `export_model`.

    Raises:
      OutputError, RunError: As `export_model`.
      ValueError: If the arrays are those of another model.
    """
    target = RunFolder(Path(output))
    check_export(None, target)
    arrays, abstract = _tree(parameters, variables), model.abstract_state
    found, expected = describe(arrays), describe(_tree(abstract.parameters, abstract.variables))
    if found != expected:
        wrong = sorted(name for name in found.keys() ^ expected.keys())
        wrong += [name for name in found if found[name] != expected.get(name, found[name])]
        raise ValueError(f"these arrays are not those of the model: {', '.join(wrong[:5])}")
    with open_output_folder(target.path, last=target.model.name) as path:
        _write_model(path, model, arrays, 0)
        _keep_equal(path, target)


def _keep_equal(new: Path, target: RunFolder) -> None:
    """Removes the new files that a folder has already.

    Raises:
      RunError: At a file that the folder has with another content.
    """
    for name in sorted(os.listdir(new)):
        there = inside(target.path, name)
        if not there.exists():
            continue
        if not filecmp.cmp(new / name, there, shallow=False):
            raise RunError(
                f"{target.path} holds another model ({name} differs): give another folder, or "
                "remove this one"
            )
        (new / name).unlink()


def _is_own(path: Path) -> bool:
    """Whether a file of arrays was written by this package."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == model_file.FORMAT
    except (OSError, safetensors.SafetensorError):
        return False


def _describe(model: BuiltModel, step: int, tokens: int | None) -> dict[str, Any]:
    parameters = model_description.count_parameters(model)
    exported = {"step": step, "tokens": tokens, "parameters": parameters}
    return model_file.describe(model) | {"exported": exported}


def check_export(folder: RunFolder | None, target: RunFolder) -> None:
    """Checks whether a run, or a model of no run, can be written to a folder, before any work.

    Raises:
      OutputError: If the folder cannot be created or filled.
      RunError: If it holds a run, or is the exported folder itself.
    """
    check_output_folder(target.path)
    same = (
        folder is not None
        and target.path.exists()
        and folder.path.exists()
        and target.path.samefile(folder.path)
    )
    held = content(target)
    if same or held not in ("", "an exported model"):
        raise RunError(f"{target.path} holds {held} already: give the export a folder of its own")
    files = (target.weights, target.model, target.baselines)
    check_free(target, [file.name for file in files])


def read_arrays(
    folder: RunFolder, about: dict[str, Any], abstract: TrainState
) -> tuple[int, Any, Any]:
    """Reads the arrays of an exported folder.

    Args:
      folder: Written by `export_model`.
      about: The content of its ``model.json``.
      abstract: A state of `jax.ShapeDtypeStruct`: what the model expects.

    Returns:
      The step, the parameters and the other variables.

    Raises:
      RunError: If the file is absent, damaged or of another model.
    """
    import safetensors

    path = folder.weights
    open_plain(path).close()
    expected = describe(_tree(abstract.parameters, abstract.variables))
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = file.keys()
            stored = {name: _describe_slice(file.get_slice(name)) for name in names}
            _check_shapes(folder, stored, expected)
            found = {}
            for name, wanted in expected.items():
                # NumPy converts without compiling a program for each shape.
                array = np.asarray(file.get_tensor(name)).astype(wanted.partition("[")[0])
                found[name] = jax.device_put(array)
    except (MemoryError, OSError, ValueError, safetensors.SafetensorError) as error:
        remedy = machine_failure(error) or "fetch the folder again, or export the run again"
        raise RunError(f"{path} cannot be read ({error}): {remedy}") from error
    structure = jax.tree.structure(_tree(abstract.parameters, abstract.variables))
    arrays = jax.tree.unflatten(structure, [found[name] for name in expected])
    return exported_step(folder, about), arrays["parameters"], arrays["variables"]


def _describe_slice(part: Any) -> str:
    """An array of a file as `array_records.describe` describes it."""
    dtype = part.get_dtype()
    return f"{_DTYPES.get(dtype, dtype)}{part.get_shape()}"


def _check_shapes(folder: RunFolder, stored: dict[str, str], expected: dict[str, str]) -> None:
    for name in [*expected, *stored]:
        there, wanted = (tree.get(name, "absent") for tree in (stored, expected))
        halves = [wanted.replace("float32", half) for half in HALF]
        if there not in (wanted, *halves):
            raise RunError(
                f"{folder.weights} does not fit {folder.model.name}: {name} is {there} there, and "
                f"the model expects {wanted}; export the run again"
            )


def exported_step(folder: RunFolder, about: dict[str, Any]) -> int:
    """The step that the model of an exported folder was trained for.

    Raises:
      RunError: If ``model.json`` does not say.
    """
    if about["exported"] is None:
        raise RunError(f"{folder.model}: exported is null, though {folder.weights.name} is there")
    return about["exported"]["step"]


def _rounded(arrays: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Arrays as an export of `dtype` stores them."""
    if dtype is None:
        return arrays
    if dtype not in HALF:
        raise ValueError(f"dtype must be one of {HALF} or None, got {dtype!r}")
    rounded = {
        name: array.astype(dtype) if array.dtype == "float32" else array
        for name, array in arrays.items()
    }
    for name, array in rounded.items():
        if bool(np.isinf(array).any()) and not bool(np.isinf(arrays[name]).any()):
            raise ValueError(f"{name} has numbers too large for {dtype}: export as bfloat16")
    return rounded


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    import safetensors.numpy

    host = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    with open_output(path, seekable=True) as file:
        safetensors.numpy.save_file(host, file.name, metadata={"format": model_file.FORMAT})


def _tree(parameters: Any, variables: Any) -> dict[str, Any]:
    return {"parameters": parameters, "variables": variables}
