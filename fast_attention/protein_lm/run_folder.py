"""The folder of one training run: what lies where, and how files get there whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from fast_attention.protein_lm.output_files import OutputError, explain, write_file

PREDICTOR_FILES = ("finetuned.json", "head.npz", "adapters.npz", "model.npz")
"""What the folder of a predictor may hold, see `finetuned.FineTuned.save`."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run.

    Attributes:
      path: The folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The gin configuration, every parameter that was used with its value.

        For people to read, and to give as ``--gin_file``: no command parses it of its own accord.
        """
        return self.path / "config.gin"

    @property
    def model(self) -> Path:
        """What the model is, see `model_file`."""
        return self.path / "model.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, one per step that was kept."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """Names the process that trains here, see `run_lock`."""
        return self.path / "train.lock"

    @property
    def data(self) -> Path:
        """What the run is trained on, see `data_record`."""
        return self.path / "data.json"

    @property
    def held_out(self) -> Path:
        """Training proteins that were held out for validation, where no other ones were given."""
        return self.path / "held_out.fasta"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: training and validation figures."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same figures for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def baselines(self) -> Path:
        """n-grams of the training proteins."""
        return self.path / "baselines.npz"

    @property
    def curve(self) -> Path:
        """The picture of the learning curve."""
        return self.path / "curve.png"

    @property
    def result(self) -> Path:
        """What a finished run reached; its presence says that the run is finished."""
        return self.path / "result.json"

    @property
    def evaluation(self) -> Path:
        """What ``protein-lm evaluate`` found."""
        return self.path / "evaluation.json"

    @property
    def weights(self) -> Path:
        """In an exported folder: the arrays."""
        return self.path / "model.safetensors"

    def is_export(self) -> bool:
        """Whether the folder holds an exported model, which training cannot go on from."""
        return self.weights.exists()


def files_read(path: Path) -> Iterator[Path]:
    """Yields the files in the folder of a run, an export or a predictor that commands read."""
    folder = RunFolder(path)
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    places = [getattr(folder, name) for name in names if name != "evaluation"]
    for place in [*places, *(path / name for name in PREDICTOR_FILES)]:
        if place.is_dir():
            yield from (file for file in place.rglob("*") if file.is_file())
        elif place.exists():
            yield place


class RunError(RuntimeError):
    """A run cannot be started, resumed or read; the message says why and what to do."""


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


def check_no_export(folder: RunFolder) -> None:
    """Raises RunError if the folder holds an exported model, which cannot be trained further."""
    if folder.is_export():
        raise RunError(
            f"{folder.path} holds an exported model, which has no checkpoint to resume from: give "
            "another --work_dir"
        )
