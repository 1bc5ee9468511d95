"""The folder of a training run: the names of its files, and how they are written whole."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.output_files import write_file
from fast_attention.protein_lm.files.output_targets import OutputError, explain

PREDICTOR_FILES = ("finetuned.json", "head.npz", "adapters.npz", "model.npz")
"""What the folder of a predictor may hold, see `finetuned.FineTuned.save`."""


def inside(folder: Path, name: str) -> Path:
    """The path of a file or folder in a folder, to be read or written.

    Raises:
      RunError: If it is a link that leads out of the folder, a device or a pipe.
    """
    path = folder / name
    if os.path.islink(path):
        _check_link(folder, path)
    # Opening a pipe waits for its other end.
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RunError(f"{path} is not a plain file: remove it")
    return path


def check_links(folder: Path, root: Path) -> None:
    """Checks that no file or folder in a folder, however deep, is a link out of another one.

    Args:
      folder: Where to look.
      root: What links must not lead out of.

    Raises:
      RunError: At the first such link, or what is neither a file nor a folder.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink():
                _check_link(root, path)
            elif not (path.is_dir() or path.is_file()):
                raise RunError(f"{path} is not a plain file")


def _check_link(root: Path, path: Path) -> None:
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise RunError(
            f"{path} is a link that leads out of {root}: replace it by a copy of what it names"
        )


@dataclasses.dataclass(frozen=True)
class _Inside:
    """The path of a file or folder in a `RunFolder`, by its name there."""

    name: str

    def __get__(self, folder: RunFolder, _: Any = None) -> Path:
        return inside(folder.path, self.name)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run.

    A name that is a link leading out of the folder, a device or a pipe raises RunError: a folder
    from somebody else could otherwise name any file of this machine, to be read or overwritten.

    Attributes:
      path: The folder.
    """

    path: Path

    config = _Inside("config.gin")
    """The gin configuration, every parameter that was used with its value.

    For people to read, and to give as ``--gin_file``: no command parses it of its own accord.
    """

    model = _Inside("model.json")
    """What the model is, see `model_file`."""

    checkpoints = _Inside("checkpoints")
    """The folder of checkpoints, one per step that was kept."""

    lock = _Inside("train.lock")
    """Names the process that trains here, see `run_lock`."""

    data = _Inside("data.json")
    """What the run is trained on, see `data_record`."""

    held_out = _Inside("held_out.fasta")
    """Training proteins that were held out for validation, where no other ones were given."""

    metrics = _Inside("metrics.jsonl")
    """One JSON object per line: training and validation figures."""

    tensorboard = _Inside("tensorboard")
    """The same figures for TensorBoard."""

    baselines = _Inside("baselines.npz")
    """n-grams of the training proteins."""

    curve = _Inside("curve.png")
    """The picture of the learning curve."""

    result = _Inside("result.json")
    """The results of a finished run; its presence means that the run is finished."""

    evaluation = _Inside("evaluation.json")
    """What ``protein-lm evaluate`` found."""

    weights = _Inside("model.safetensors")
    """In an exported folder: the arrays."""

    def skipped(self, split: str) -> Path:
        """The table of records of a split's files that training left out."""
        return inside(self.path, f"skipped_{split}.tsv")

    def is_export(self) -> bool:
        """Whether the folder holds an exported model, which training cannot go on from."""
        return self.weights.exists()

    def steps_kept(self) -> list[int]:
        """Steps of the checkpoints, in ascending order, found without reading them."""
        names = (path.name for path in self.checkpoints.glob("*") if path.is_dir())
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))

    def newest_step(self) -> int | None:
        """Step of the newest checkpoint, found without reading it; None without one."""
        return max(self.steps_kept(), default=None)


def files_read(path: Path) -> Iterator[Path]:
    """Yields the files in the folder of a run, an export or a predictor that commands read."""
    folder = RunFolder(path)
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, _Inside)]
    places = [getattr(folder, name) for name in names if name != "evaluation"]
    for place in [*places, *(path / name for name in PREDICTOR_FILES)]:
        if place.is_dir():
            yield from (file for file in place.rglob("*") if file.is_file())
        elif place.exists():
            yield place


def content(folder: RunFolder) -> str:
    """What a folder holds: a run, an exported model or a predictor; empty if none of these."""
    if folder.checkpoints.exists():
        return "a run"
    if (folder.path / PREDICTOR_FILES[0]).exists():
        return "a predictor"
    if folder.is_export():
        return "an exported model"
    return "a run" if folder.config.exists() else ""


def check_free(folder: RunFolder, names: Iterable[str]) -> None:
    """Raises RunError if a folder that holds none of our results has files of these names."""
    if content(folder):
        return
    for name in names:
        if (folder.path / name).exists():
            raise RunError(
                f"{folder.path / name} would be overwritten: give the result a folder of its own, "
                "or remove the file"
            )


def check_predictor_folder(folder: RunFolder, *names: str) -> None:
    """Checks whether a predictor, and files of other names, can be written to a folder.

    Raises:
      RunError: If it holds something else, or files of these names that are not ours.
    """
    if (held := content(folder)) not in ("", "a predictor"):
        raise RunError(f"{folder.path} holds {held}: give the result its own folder")
    check_free(folder, (*PREDICTOR_FILES, folder.model.name, *names))


def claim(folder: RunFolder, config: str, model: str) -> None:
    """Writes the model's description and the configuration, which says that a run has begun.

    Args:
      folder: Of the run.
      config: The operative gin configuration of the run about to start.
      model: The text of ``model.json``.

    Raises:
      OutputError: If the folder cannot be written to.
    """
    try:
        write_file(folder.model, model)
        write_file(folder.config, config)
    except OSError as error:
        raise OutputError(f"{folder.path} cannot be written to: {explain(error)}") from error


def check_name(path: Path) -> None:
    """Raises RunError if the name of a folder is not UTF-8, which checkpoints need."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise RunError(
            f"{str(path)!r} is not UTF-8, as the names of folders with checkpoints must be: rename "
            "the folder, or give another one"
        ) from None


def check_trainable(folder: RunFolder) -> None:
    """Raises RunError if the folder holds something else than a run."""
    held = content(folder)
    if held not in ("", "a run"):
        raise RunError(
            f"{folder.path} holds {held}, which has no checkpoint to resume from: give another "
            "--work_dir"
        )
