"""The folder of one training run: what lies where, and how files get there whole."""

from __future__ import annotations

import dataclasses
import re
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


def claim(folder: RunFolder, config: str, model: str, *, asked: str) -> None:
    """Writes the configuration and the model's description, or checks that a resumed run fits.

    Args:
      folder: Created when absent.
      config: The operative gin configuration of the run about to start.
      model: The text of ``model.json``.
      asked: The part of `config` that was asked for, without defaults. A default of which the
        run in the folder knows nothing came with a later version of this package, and changes
        nothing.

    Raises:
      RunError: If the folder holds a run of another configuration or an exported model, or cannot
        be written to.
    """
    check_no_export(folder)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.config.exists():
            write_file(folder.model, model)
            write_file(folder.config, config)
            return
    except (FileExistsError, NotADirectoryError):
        raise RunError(f"{folder.path} is not a folder: give the run a folder of its own") from None
    except OSError as error:
        raise OutputError(f"{folder.path} cannot be written to: {explain(error)}") from error
    before, now = settings(folder.config.read_text(encoding="utf-8")), settings(config)
    wanted = settings(asked)
    changes = []
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) == now.get(name) or (name not in before and name not in wanted):
            continue
        if name.startswith("make_mesh.") or name.endswith(".mesh"):
            # A matter of the machine: a run may go on on other devices.
            continue
        changes += [f"-{before[name]}"] if name in before else []
        changes += [f"+{now[name]}"] if name in now else []
    if changes:
        raise RunError(
            f"{folder.path} holds a run with other settings (- there, + asked for now):\n  "
            + "\n  ".join(changes)
            + "\ngive another --work_dir, or the settings of that run to resume it"
        )
    # The settings make the model: where the folder's description says other things, it is replaced.
    there = folder.model
    if not there.is_file() or there.stat().st_size != len(model) or there.read_text() != model:
        write_file(there, model)


def check_no_export(folder: RunFolder) -> None:
    """Raises RunError if the folder holds an exported model, which cannot be trained further."""
    if folder.is_export():
        raise RunError(
            f"{folder.path} holds an exported model, which has no checkpoint to resume from: give "
            "another --work_dir"
        )


def settings(config: str) -> dict[str, str]:
    """The settings of a gin configuration as gin writes it, by name: the text of each."""
    found: dict[str, str] = {}
    name = ""
    for line in config.splitlines():
        start = re.match(r"([\w./]+) = ", line)
        if start:
            name = start[1]
            found[name] = line
        elif name and line[:1].isspace():
            found[name] = f"{found[name].removesuffix(chr(92))}{line.strip()}"
        else:
            name = ""
    return found
