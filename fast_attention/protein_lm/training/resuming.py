"""The folder of a training run when it starts: empty, a run to resume, or something else.

The order of writes holds for a process that is killed between any two of them: ``config.gin``,
whose presence says that a run has begun, is the last file of a new run; and what no longer holds
of a resumed run is removed before its new settings or data are written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import gin
import grain

from fast_attention.protein_lm.distributed import process_arrays, processes
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import read_text
from fast_attention.protein_lm.files.output_files import write_file
from fast_attention.protein_lm.files.text_source import FastaError
from fast_attention.protein_lm.runs import data_record, run_folder
from fast_attention.protein_lm.runs.data_record import SPLITS, Entry
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.runs.run_settings import compare_settings, lengths, settings
from fast_attention.protein_lm.training.experiment import DataSettings
from fast_attention.protein_lm.training.training_data import TrainingData, held_out_fasta


@dataclasses.dataclass(frozen=True)
class Opened:
    """The folder of a run that is about to start.

    Attributes:
      folder: The folder.
      asked: The gin configuration without defaults.
      used: The operative gin configuration.
      model: The text of ``model.json``.
      resumed: Whether the folder holds this run already.
      longer: Whether it is given more steps or epochs than before.
      record: What it was trained on so far, see `data_record`; None where it is new.
    """

    folder: RunFolder
    asked: str
    used: str
    model: str
    resumed: bool
    longer: bool
    record: Entry | None


def open_folder(folder: RunFolder, model: str) -> Opened:
    """Looks into a folder, without changing it; the model must have been made.

    Args:
      folder: The folder.
      model: The text of ``model.json``.

    Raises:
      RunError: If the folder holds something else, or a run that cannot be resumed with the current
        configuration of gin.
    """
    asked, used = gin.config_str(), gin.operative_config_str()
    run_folder.check_trainable(folder)
    run_folder.check_name(folder.path)
    if not folder.config.is_file():
        for other in (folder.result, folder.checkpoints):
            if other.exists():
                raise RunError(
                    f"{folder.path} holds the result of something else ({other.name} without "
                    f"{folder.config.name}): give another --work_dir"
                )
        return Opened(folder, asked, used, model, resumed=False, longer=False, record=None)
    longer = compare_settings(folder.path, read_text(folder.config), used, asked)
    record = data_record.read_record(folder)
    return Opened(folder, asked, used, model, resumed=True, longer=longer, record=record)


def check_lengths(run: Opened) -> None:
    """Checks that all processes train equally long; they would wait for each other without end.

    All other settings are compared with those in the folder. All processes must call this together.

    Args:
      run: From `open_folder`.

    Raises:
      RunError: In every process, if they were given different numbers of steps or epochs.
    """
    own = lengths(run.used)
    if not process_arrays.all_alike(repr(own)):
        raise RunError(
            f"the processes of this run were given different lengths, this one "
            f"{', '.join(own.values()) or 'the default'}: give all of them the same --steps and "
            "--epochs"
        )


def unused_settings(run: Opened) -> list[str]:
    """Names of settings that were given and that nothing has read."""
    return sorted(settings(run.asked).keys() - settings(run.used).keys())


def check_data(run: Opened, files: DataSettings) -> Entry:
    """Checks that a run is resumed with the data that it began with.

    Args:
      run: From `open_folder`.
      files: The data of now.

    Returns:
      The digests of now.

    Raises:
      FastaError: If a file cannot be read.
      RunError: If the data is another one, and the settings do not allow new data.
    """
    now = {split: data_record.describe_files(files.by_split[split]) for split in SPLITS}
    if run.resumed and run.record is None:
        processes.note(
            f"{run.folder.data} is missing, so it cannot be checked whether the run started with "
            "this data",
            "warning",
        )
    if run.record is not None and not files.new_data:
        _refuse(run.folder, run.record, now, _OTHER_DATA)
    return now


def check_unchanged(run: Opened, files: DataSettings, before: Entry, splits: Sequence[str]) -> None:
    """Checks that files have the content of before, when they have been or are to be read again.

    Args:
      run: From `open_folder`.
      files: The data.
      before: From `check_data`.
      splits: Which files to compare.

    Raises:
      FastaError: If a file cannot be read.
      RunError: If one was changed.
    """
    now = before | {split: data_record.describe_files(files.by_split[split]) for split in splits}
    if found := data_record.differences(before, now):
        raise RunError(
            f"data of the run in {run.folder.path} was changed while the run was being trained "
            f"({'; '.join(found)}): restore the files, and give the same command again"
        )


def check_finished(run: Opened, files: DataSettings) -> list[str]:
    """Compares the data of a finished run with that of now, without reading what has its name.

    Args:
      run: From `open_folder`.
      files: The data of now.

    Returns:
      Sentences that a user should read.

    Raises:
      RunError: If files of other names have another content.
    """
    if run.record is None:
        return []
    try:
        listed = {split: data_record.list_files(files.by_split[split]) for split in SPLITS}
        now = [(str(path), weight) for split in SPLITS for path, weight in listed[split]]
        then = [(entry["file"], entry["weight"]) for split in SPLITS for entry in run.record[split]]
        if now != then:
            _refuse(
                run.folder,
                run.record,
                {split: data_record.describe_files(files.by_split[split]) for split in SPLITS},
                "the run is finished: give a larger --steps or --epochs to train it on these"
                if files.new_data
                else _OTHER_DATA,
            )
            return []
        sizes = [path.stat().st_size for split in SPLITS for path, _ in listed[split]]
    except (OSError, FastaError) as error:
        return [f"the data of the run cannot be read now ({error})"]
    changed = [
        entry["file"]
        for entry, size in zip(
            (entry for split in SPLITS for entry in run.record[split]), sizes, strict=True
        )
        if entry["bytes"] != size
    ]
    if not changed:
        return []
    return [
        f"{', '.join(dict.fromkeys(changed))}: changed since the run was trained; give more "
        "--steps and --new_data to train it further with the new content"
    ]


def begin(run: Opened, found: TrainingData, now: Entry) -> None:
    """Writes the first files of a new run, or checks those that process 0 wrote.

    Args:
      run: From `open_folder`.
      found: The data.
      now: From `check_data`.

    Raises:
      OutputError: If the folder cannot be written to.
      RunError: In a process other than the first, if its settings or data are not those of process
        0.
    """
    if processes.is_primary():
        _write_data(run, found, now, step=0)
        run_folder.claim(run.folder, run.used, run.model)
        return
    if not run.folder.config.is_file():
        raise RunError(
            f"{run.folder.config} is missing, which process 0 has just written: give all processes "
            "the same --work_dir, on a file system that they share"
        )
    compare_settings(run.folder.path, read_text(run.folder.config), run.used, run.asked)
    _refuse(run.folder, data_record.read_record(run.folder) or now, now, _OTHER_DATA)


def update(
    run: Opened,
    found: TrainingData,
    now: Entry,
    step: int,
) -> bool:
    """Writes what is new of a resumed run: its length, and its data.

    Args:
      run: From `open_folder`.
      found: The data.
      now: From `check_data`.
      step: Steps that were taken.

    Returns:
      Whether validations are on other proteins than before.
    """
    # The settings make the model: where its description says other things, it is replaced.
    model, text = run.folder.model, run.model.encode()
    if not (model.is_file() and model.stat().st_size == len(text) and model.read_bytes() == text):
        write_file(model, run.model)
    if run.longer:
        run.folder.result.unlink(missing_ok=True)
        write_file(run.folder.config, run.used)
    if run.record is None:
        _write_data(run, found, now, step=0)
        return False
    if not data_record.differences(run.record, now):
        if found.held_out is not None and not run.folder.held_out.exists():
            _write_held_out(run, found)
        return False
    run.folder.baselines.unlink(missing_ok=True)
    write_file(run.folder.config, run.used)
    _write_data(run, found, now, step=step)
    own = found.held_out is not None
    return own or bool(data_record.differences(run.record, now | {"train": run.record["train"]}))


def set_position(iterator: grain.DatasetIterator, state: Any, folder: RunFolder) -> None:
    """Sets a data iterator to where a checkpoint was saved.

    Args:
      iterator: Of the run's data, at any position.
      state: ``Progress.iterator``.
      folder: Of the run.

    Raises:
      RunError: If the state is not one of such an iterator.
    """
    try:
        found = {name: state[name] >= 0 for name in iterator.get_state()}
        if not all(found.values()) or found.keys() != state.keys():
            raise ValueError
        iterator.set_state(state)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise RunError(
            f"{folder.checkpoints}: the newest checkpoint has {str(state)[:80]!r} as the position "
            "in the data, which is damaged: remove this checkpoint to resume from the one before"
        ) from error


_OTHER_DATA = (
    "give the files that it began with, --new_data to train further on these, or another --work_dir"
)


def _refuse(folder: RunFolder, before: Entry, now: Entry, remedy: str) -> None:
    found = data_record.differences(before, now)
    if found:
        raise RunError(f"{folder.path} holds a run on other data ({'; '.join(found)}): {remedy}")


def _write_data(
    run: Opened,
    found: TrainingData,
    now: Entry,
    step: int,
) -> None:
    held_out = None
    if found.held_out is not None:
        held_out = {"fraction": found.files.valid_fraction, "proteins": len(found.held_out)}
        _write_held_out(run, found)
    counts = {
        "proteins": found.proteins,
        "residues": found.residues,
        "identical_to_training": found.shared,
    }
    record = now | {"held_out": held_out} | counts
    data_record.write_record(run.folder, record, step=step, before=run.record)


def _write_held_out(run: Opened, found: TrainingData) -> None:
    write_file(run.folder.held_out, held_out_fasta(found))
