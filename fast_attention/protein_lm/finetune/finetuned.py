"""A model with a head for a property of proteins, and its folder.

Shape letters: N proteins, K classes.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from scipy.special import softmax

from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import check_fields, read_json, shown
from fast_attention.protein_lm.files.npz_files import read_npz
from fast_attention.protein_lm.files.output_files import open_output_folder, write_file, write_json
from fast_attention.protein_lm.finetune import lora
from fast_attention.protein_lm.finetune.linear_head import LinearHead, Units
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.inference import embedding
from fast_attention.protein_lm.loading import load_run, open_model
from fast_attention.protein_lm.modeling.token_batches import Shape
from fast_attention.protein_lm.runs import model_file
from fast_attention.protein_lm.runs.array_records import named
from fast_attention.protein_lm.runs.run_folder import (
    PREDICTOR_FILES,
    RunFolder,
    check_predictor_folder,
    inside,
)

_ABOUT, _HEAD, _ADAPTERS, _MODEL = PREDICTOR_FILES
_REMEDY = "fetch the folder again, or fine-tune again"
# Room for the headers of an archive.
_ROOM = 2**20
_HINTS = {
    "method": Literal["frozen", "lora", "full"],
    "classes": list[str] | None,
    "max_length": int | None,
    "trunk": str,
    "whole": bool,
    "adapter_scale": float | None,
    "run_dir": str | None,
}


class Fit(NamedTuple):
    """What fine-tuning went by and reached.

    Attributes:
      parts: ``[N]`` strings, train, valid or test.
      outputs: Of `FineTuned.outputs` for all proteins.
      metrics: By part, of `property_metrics`.
      history: Rows with ``epoch``, ``step``, ``split`` and ``loss``.
    """

    parts: np.ndarray
    outputs: np.ndarray
    metrics: dict[str, dict[str, Any]]
    history: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class FineTuned:
    """Predicts a property of proteins.

    Attributes:
      model: The trunk, adapters added to its kernels: it can embed, score and sample.
      classes: Names of the classes, or None of a regression.
      head: On the mean of the vectors of residues.
      method: ``"frozen"``, ``"lora"`` or ``"full"``.
      max_length: Longer proteins are cropped to this many residues; None crops none.
      trunk: Fingerprint of the model that was fine-tuned.
      adapters: Of ``"lora"``, and the scale they are added with.
      fit: How it was trained; None when read from a folder.
    """

    model: FlaxModel
    classes: tuple[str, ...] | None
    head: LinearHead
    method: str
    max_length: int | None
    trunk: str
    adapters: tuple[lora.Adapters, float] | None = None
    fit: Fit | None = None

    def outputs(self, sequences: Iterable[str]) -> np.ndarray:
        """Predictions as numbers.

        Args:
          sequences: Residues, in upper case.

        Returns:
          float64 ``[N]`` of a regression, otherwise probabilities float64 ``[N, K]``.

        Raises:
          ValueError: At a sequence that the model cannot read, see `embedding.embed_sequences`.
        """
        return head_outputs(self.head, embed(self.model, sequences, self.max_length))

    def predict(self, sequences: Iterable[str]) -> np.ndarray | list[str]:
        """The number of each protein, float64 ``[N]``, or the name of its most probable class."""
        outputs = self.outputs(sequences)
        if self.classes is None:
            return outputs
        return [self.classes[number] for number in outputs.argmax(-1)]

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        run_dir: str | os.PathLike[str] | None = None,
        whole: bool = False,
    ) -> None:
        """Writes what `load` reads.

        A frozen trunk and adapters refer to the run they belong to, by the way from this folder to
        that one, and are small: both can be moved together. With
        ``"full"``, or where `whole` asks for it, the folder holds the whole model, adapters added,
        and needs no other.

        Args:
          folder: Made when absent. A predictor that was saved there before is replaced.
          run_dir: The run whose model was fine-tuned; without it, `load` has to be given
            a model.
          whole: Whether to store the whole model.

        Raises:
          OutputError: If the folder cannot be written.
          RunError: If it holds something else, or the result of ``protein-lm fine-tune``.
        """
        target = RunFolder(Path(folder))
        check_predictor_folder(target)
        if target.result.exists():
            # It would be reported as that of this predictor.
            raise RunError(f"{folder} holds the result of a command: give another folder")
        with open_output_folder(folder, last=_ABOUT) as path:
            self._write(path, run_dir, whole or self.method == "full")

    def _write(self, folder: Path, run_dir: str | os.PathLike[str] | None, whole: bool) -> None:
        _write_arrays(folder / _HEAD, self.head._asdict())
        if whole:
            arrays = {"parameters": self.model.weights, "variables": self.model.variables}
            _write_arrays(folder / _MODEL, _flat(arrays))
            about = model_file.to_text(model_file.describe(self.model))
            write_file(RunFolder(folder).model, about)
        elif self.adapters is not None:
            _write_arrays(folder / _ADAPTERS, _flat(self.adapters[0]))
        about = {
            "method": self.method,
            "classes": self.classes,
            "max_length": self.max_length,
            "trunk": self.trunk,
            "whole": whole,
            "adapter_scale": None if self.adapters is None else self.adapters[1],
            "run_dir": None
            if run_dir is None
            else os.path.relpath(os.path.realpath(run_dir), os.path.realpath(folder)),
        }
        write_json(folder / _ABOUT, about)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        model: FlaxModel | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        gin_file: Sequence[str] = (),
    ) -> FineTuned:
        """Reads a folder that `save` or ``protein-lm fine-tune`` wrote.

        Args:
          folder: The folder.
          model: The model that was fine-tuned; None reads it from its run.
          run_dir: Where that run is now; None takes the place noted in the folder.
          gin_file: As for `loading.open_run`.

        Raises:
          RunError: If the folder is no such one, or the model is not the one that was fine-tuned.
        """
        folder = Path(folder)
        about = read_about(folder)
        if about["whole"] and run_dir is not None:
            raise RunError(
                f"{folder} holds the whole model, and --run_dir is not read: leave it out"
            )
        if model is None:
            model = _stored_trunk(folder, about, run_dir, gin_file)
        adapters = None
        if about["whole"]:
            model = _read_whole(inside(folder, _MODEL), model)
        elif fingerprint(model) != about["trunk"]:
            raise RunError(
                f"{folder} was fine-tuned from another model than that of its run: give --run_dir "
                "and the run as it was then, or fine-tune again"
            )
        elif about["method"] == "lora":
            path = inside(folder, _ADAPTERS)
            adapters = (_read_adapters(path, model), about["adapter_scale"])
            parameters = lora.merge_adapters(model.weights, *adapters)
            model = with_parameters(model, parameters, model.variables)
        return cls(
            model=model,
            classes=None if about["classes"] is None else tuple(about["classes"]),
            head=_read_head(inside(folder, _HEAD), model, about["classes"]),
            method=about["method"],
            max_length=about["max_length"],
            trunk=about["trunk"],
            adapters=adapters,
        )


def read_about(folder: Path) -> dict[str, Any]:
    """What the folder of a predictor says of it: see `FineTuned`, and ``run_dir``.

    Raises:
      RunError: If the folder is no such one, or damaged.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; check the path")
    if not (folder / _ABOUT).is_file():
        raise RunError(
            f"{folder} has no {_ABOUT}: give the --output of a finished 'protein-lm fine-tune'"
        )
    path = inside(folder, _ABOUT)
    about = check_fields(path, "", read_json(path), _HINTS)
    adapted = about["method"] == "lora" and not about["whole"]
    for name, right, expected in (
        ("classes", _are_classes(about["classes"]), "two or more names, each once, or null"),
        (
            "max_length",
            about["max_length"] is None or ranges.LENGTH.holds(about["max_length"]),
            f"{ranges.LENGTH}, or null",
        ),
        (
            "adapter_scale",
            ranges.NORM.holds(about["adapter_scale"]) if adapted else True,
            str(ranges.NORM),
        ),
        ("run_dir", "\0" not in (about["run_dir"] or ""), "the way to a folder"),
    ):
        if not right:
            raise RunError(f"{path}: {name} is {shown(about[name])}; expected {expected}")
    return about


def _are_classes(names: list[str] | None) -> bool:
    # Each is the name of a column; half a character, which JSON can hold, is none.
    plain = not any("\ud800" <= letter <= "\udfff" for name in names or () for letter in name)
    return names is None or (plain and len(names) == len(set(names)) > 1)


def _stored_trunk(
    folder: Path,
    about: dict[str, Any],
    run_dir: str | os.PathLike[str] | None,
    gin_file: Sequence[str],
) -> FlaxModel:
    """Reads the model that was fine-tuned, or its structure where the folder has its arrays."""
    if about["whole"]:
        return open_model(RunFolder(folder), gin_file=gin_file).model
    found = _find_run(folder, about["run_dir"]) if run_dir is None else Path(run_dir)
    return load_run(found, gin_file=gin_file).model


def _find_run(folder: Path, noted: str | None) -> Path:
    """Where the run of a fine-tuned folder is, by the way that the folder notes."""
    if noted is None:
        raise RunError(
            f"{folder} does not say which run it came from: give --run_dir, or FineTuned.load the "
            "model"
        )
    if Path(noted).is_absolute():
        raise RunError(
            f"{folder / _ABOUT}: run_dir is {shown(noted)}; expected the way from {folder} to the "
            "run: give --run_dir"
        )
    found = Path(os.path.realpath(folder / noted))
    if not RunFolder(found).model.is_file():
        raise RunError(
            f"{folder} needs the run that was fine-tuned, and {found} is not its folder: give "
            "--run_dir, where the run is now"
        )
    return found


def embed(
    model: FlaxModel,
    sequences: Iterable[str],
    max_length: int | None,
    shapes: set[Shape] | None = None,
) -> np.ndarray:
    """Mean vectors of proteins, float32 ``[N, M]``.

    Args:
      model: The model.
      sequences: N proteins.
      max_length: Crops them to this many residues.
      shapes: Of programs that exist, see `embedding.embed_sequences`.
    """
    found = list(embedding.embed_sequences(model, sequences, max_length=max_length, shapes=shapes))
    if not found:
        return np.zeros((0, model.config.emb_dim), np.float32)
    return np.stack(found)


def head_outputs(head: LinearHead, vectors: np.ndarray) -> np.ndarray:
    """From vectors ``[N, M]`` to numbers ``[N]`` or probabilities ``[N, K]``, float64."""
    outputs = np.asarray(head(vectors))
    if outputs.shape[1] > 1:
        return softmax(outputs.astype(np.float64), -1)
    return Units(*head.units).restore(outputs[:, 0])


def with_parameters(model: FlaxModel, parameters: Any, variables: Any) -> FlaxModel:
    """Another model of the same structure, sharing no array with the given one."""
    other = copy.copy(model)
    other.set_parameters(parameters, variables)
    return other


def fingerprint(model: FlaxModel) -> str:
    """SHA-256 of all arrays of a model."""
    digest = hashlib.sha256()
    for name, leaf in sorted(_flat({"p": model.weights, "v": model.variables}).items()):
        digest.update(f"{name} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _read_head(path: Path, model: FlaxModel, classes: list[str] | None) -> LinearHead:
    width, outputs = model.config.emb_dim, 1 if classes is None else len(classes)
    shapes = {
        "mean": (width,),
        "scale": (width,),
        "kernel": (width, outputs),
        "bias": (outputs,),
        "units": (2,),
    }
    limit = _ROOM + 16 * (width + 1) * (outputs + 2)
    arrays = _numbers(path, read_npz(path, _REMEDY, limit=limit, expected=shapes))
    if not (arrays["scale"] > 0).all():
        raise RunError(f"{path}: 'scale' has numbers that are not above 0: {_REMEDY}")
    return LinearHead(**arrays)


def _read_whole(path: Path, model: FlaxModel) -> FlaxModel:
    abstract = model.abstract_state
    trees = {"parameters": abstract.parameters, "variables": abstract.variables}
    leaves = named(trees)
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    limit = _ROOM + 4096 * len(shapes) + 2 * sum(8 * math.prod(shape) for shape in shapes.values())
    found = _numbers(path, read_npz(path, _REMEDY, limit=limit, expected=shapes))
    arrays = [found[name].astype(leaf.dtype) for name, leaf in leaves.items()]
    stored = jax.tree.unflatten(jax.tree.structure(trees), arrays)
    return with_parameters(model, stored["parameters"], stored["variables"])


def _read_adapters(path: Path, model: FlaxModel) -> lora.Adapters:
    kernels = lora.adapted_kernels(model.abstract_state.parameters)
    first, kernel = next(iter(kernels.items()))
    limit = _ROOM + 8 * int(ranges.RANK.high) * kernel.shape[0]
    one = f"{first}.a"
    rank = max((1, *read_npz(path, _REMEDY, limit=limit, names=[one])[one].shape[-1:]))
    shapes = {f"{name}.a": (kernel.shape[0], rank) for name, kernel in kernels.items()}
    shapes |= {f"{name}.b": (rank, kernel.shape[1]) for name, kernel in kernels.items()}
    limit = _ROOM + 4096 * len(shapes) + sum(8 * math.prod(shape) for shape in shapes.values())
    found = _numbers(path, read_npz(path, _REMEDY, limit=limit, expected=shapes))
    return {name: {part: found[f"{name}.{part}"] for part in ("a", "b")} for name in kernels}


def _numbers(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise RunError(f"{path}: {name!r:.80} is of the type {array.dtype}, not of numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RunError(f"{path}: {name!r:.80} has numbers that are not finite: {_REMEDY}")
    return arrays


def _flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in named(jax.device_get(tree)).items()}


def _write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    archive = io.BytesIO()
    np.savez(archive, allow_pickle=False, **arrays)
    write_file(path, archive.getvalue())
