"""Checkpoints: all that a run needs to resume as if it had never stopped.

A checkpoint is written under a temporary name and renamed when it is whole, so that a run killed
at any moment leaves whole checkpoints only under their proper names. Each holds a checksum of
every array, so that one that was damaged later is recognised, and the one before it is read.

Of a run of several processes, all call these functions together: each writes and reads the parts of
the arrays that its devices hold, in one folder that all of them see, and the first process
gives the checkpoint its name when all parts are there. A checkpoint does not say how the arrays
were divided, so that any number of processes and devices can read it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from fast_attention.protein_lm.distributed import process_arrays, processes
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import one_line
from fast_attention.protein_lm.machine_failures import machine_failure
from fast_attention.protein_lm.modeling.divergence import REMEDY
from fast_attention.protein_lm.modeling.train_state import TrainState
from fast_attention.protein_lm.runs import checkpoint_files
from fast_attention.protein_lm.runs.array_records import (
    checksums,
    describe,
    differences,
    find_unsound,
    seal,
)
from fast_attention.protein_lm.runs.run_folder import check_name

# Room for what a checkpoint has beside its arrays, generously.
_METADATA_BYTES = 2**20
_NO_OTHER = (
    "fetch the folder again from where it was copied, take another checkpoint where there is one, "
    "or train in another --work_dir"
)

Found = TypeVar("Found")


class Progress(NamedTuple):
    """Where a run stood, beside its arrays.

    Attributes:
      iterator: State of the data iterator after the batch of the last step.
      batch_size: Rows of a batch, over all devices.
      tokens: Tokens trained on.
      seconds: Time spent training, over all resumptions.
      pending: `metrics.token_sums` and gradient norms of the steps that are in no row of metrics
        yet; None where there are none.
      lowest_loss: The lowest training loss of a row so far; None before the first.
      best_step: Step of the validation of the lowest loss; None before the first.
      best_loss: That loss.
    """

    iterator: Any
    batch_size: int
    tokens: int
    seconds: float
    pending: list[dict[str, float]] | None = None
    lowest_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None


class Restored(NamedTuple):
    """The model of a checkpoint, without what only training needs.

    Attributes:
      step: Steps it was trained for.
      parameters: Nested dict of arrays: the averaged parameters, where an average was kept.
      variables: Nested dict of the other arrays.
    """

    step: int
    parameters: Any
    variables: Any


class _Damaged(RunError):
    """A checkpoint cannot be read, though it is there."""


def open_checkpoints(directory: Path) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints for writing, and removes what a killed run left half-written.

    Args:
      directory: Created when absent.

    Raises:
      RunError: If its name is not UTF-8.
    """
    check_name(directory)
    return ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False, cleanup_tmp_directories=True
        ),
    )


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    progress: Progress,
    *,
    keep: int | None = None,
) -> None:
    """Writes the checkpoint of ``state.step``, unless it is there already.

    Args:
      manager: From `open_checkpoints`.
      state: What to write.
      progress: What to write beside it.
      keep: How many of the newest to keep, besides that of ``progress.best_step``; None keeps all.
        The others are removed once the new one is whole.

    Raises:
      FloatingPointError: If a parameter is infinite or not a number.
      RunError: If it cannot be written; earlier checkpoints are as they were.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    model, training = _model_arrays(state), _training_arrays(state)
    unsound = find_unsound(model["parameters"])
    if unsound is not None:
        raise FloatingPointError(
            f"training has diverged before step {step}: the parameter {unsound} is not finite. "
            f"Earlier checkpoints are kept. {REMEDY}"
        )
    needed = _METADATA_BYTES + sum(leaf.nbytes for leaf in jax.tree.leaves((model, training)))
    free = shutil.disk_usage(manager.directory).free
    # A disk is not equally full at all times, but all must save, or none.
    if process_arrays.any_process(free < needed):
        raise _unwritten(manager, step, f"{free:,} bytes are free, {needed:,} needed")
    about = {
        "progress": progress._asdict(),
        "arrays": describe(model),
        "sums": checksums(model | training),
    }
    about["seal"] = seal(about)
    try:
        manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model),
                training=ocp.args.StandardSave(training),
                about=ocp.args.JsonSave(about),
            ),
        )
    except Exception as error:  # Orbax raises anything, a bare Exception included.
        if processes.is_lost_process(error):
            raise
        raise _unwritten(manager, step, error) from error
    if keep is not None:
        for old in sorted(manager.all_steps())[:-keep]:
            if old != progress.best_step:
                manager.delete(old)


def restore(
    manager: ocp.CheckpointManager, abstract: TrainState
) -> tuple[TrainState, Progress] | None:
    """Reads the newest checkpoint that is not damaged.

    Damaged ones are reported on stderr and renamed: they get the ending ``.damaged``.

    Args:
      manager: From `open_checkpoints`.
      abstract: A state of `jax.ShapeDtypeStruct`, with shardings: what the model expects.

    Returns:
      State and progress, or None where there is no checkpoint.

    Raises:
      RunError: If the checkpoint belongs to a model of other shapes, or all are damaged, or one
        cannot be read for lack of memory or a failure of the disk, which is no damage.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if not steps:
        return None

    def read(step: int) -> tuple[TrainState, Progress]:
        about = _about(manager, step, abstract)
        found = _read(
            manager,
            step,
            about,
            model=_model_arrays(abstract),
            training=_training_arrays(abstract),
        )
        parts = found["model"] | found["training"]
        return TrainState(**parts), Progress(**about["progress"])

    step, found = _first_sound(manager, steps, read)
    for damaged in steps[: steps.index(step)]:
        path = Path(manager.directory) / str(damaged)
        aside = path.with_name(f"{damaged}.damaged")
        if processes.is_primary():
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    process_arrays.any_process(False)
    manager.reload()
    return found


def tokens_seen(directory: Path, step: int) -> int | None:
    """Tokens trained on up to a checkpoint; None where that cannot be read."""
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        try:
            return _restore_about(manager, step)["progress"]["tokens"]
        except RunError:
            return None


def restore_model(
    directory: Path, abstract: TrainState, *, checkpoint: str | int = "best"
) -> Restored:
    """Reads the model alone from a checkpoint of a folder.

    Args:
      directory: Folder of checkpoints.
      abstract: As in `restore`; only ``parameters``, ``variables`` and ``average`` matter.
      checkpoint: ``"best"`` takes the checkpoint of the lowest validation loss, and the newest
        where there was no validation; ``"last"`` takes the newest; a number that of this step.
        Where the best or the newest is damaged, stderr says so and the next newest is taken.

    Raises:
      RunError: If there is no such checkpoint, or it belongs to a model of other shapes, or is
        damaged, or cannot be read for lack of memory or a failure of the disk.
      ValueError: If `checkpoint` is none of these.
    """
    if checkpoint not in ("best", "last") and not isinstance(checkpoint, int):
        raise ValueError(
            f"checkpoint must be 'best', 'last' or the number of a step; got {checkpoint!r}"
        )
    check_name(directory)
    nothing = f"no checkpoint in {directory}: the run has not reached its first one yet"
    if not directory.is_dir():
        raise RunError(nothing)
    with ocp.CheckpointManager(
        directory.absolute(), options=ocp.CheckpointManagerOptions(create=False)
    ) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise RunError(nothing)
        if isinstance(checkpoint, int):
            if checkpoint not in steps:
                there = ", ".join(map(str, reversed(steps)))
                raise RunError(
                    f"no checkpoint of step {checkpoint} in {directory}; there are those of the "
                    f"steps {there}"
                )
            steps = [checkpoint]

        def read_best(step: int) -> Restored:
            best = _about(manager, step, abstract)["progress"]["best_step"]
            if best != step and best in steps:
                try:
                    return read(best)
                except _Damaged as error:
                    _warn(error, step)
            return read(step)

        def read(step: int) -> Restored:
            about = _about(manager, step, abstract)
            found = _read(manager, step, about, model=_model_arrays(abstract))["model"]
            average = found.get("average")
            return Restored(
                step, found["parameters"] if average is None else average, found["variables"]
            )

        return _first_sound(manager, steps, read_best if checkpoint == "best" else read)[1]


def _first_sound(
    manager: ocp.CheckpointManager, steps: Sequence[int], read: Callable[[int], Found]
) -> tuple[int, Found]:
    """The first of the steps whose checkpoint is not damaged, and what `read` makes of it."""
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        try:
            return step, read(step)
        except _Damaged as error:
            if after is not None:
                _warn(error, after)
            elif len(steps) == 1:
                raise RunError(f"{error}; {_NO_OTHER}") from error
    raise RunError(f"all {len(steps)} checkpoints in {manager.directory} are damaged; {_NO_OTHER}")


def _warn(error: Exception, instead: int) -> None:
    if processes.is_primary():
        print(f"warning: {error}; that of step {instead} is taken instead", file=sys.stderr)


def _about(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> dict[str, Any]:
    """What stands beside the arrays, which are checked to be those that the model expects."""
    about = _restore_about(manager, step, _model_arrays(abstract))
    if found := differences(about["arrays"], describe(_model_arrays(abstract))):
        raise RunError(
            f"the checkpoint {manager.directory / str(step)} does not fit the model of this "
            f"configuration: {found}; use the configuration it was written with"
        )
    return about


def _restore_about(manager: ocp.CheckpointManager, step: int, arrays: Any = None) -> dict[str, Any]:
    try:
        checkpoint_files.check(Path(manager.directory) / str(step), arrays)
    except ValueError as error:
        raise _damage(manager, step, error) from error
    about = _restore(manager, step, about=ocp.args.JsonRestore())["about"]
    try:
        checkpoint_files.check_about(Path(manager.directory) / str(step), about)
    except RunError as error:
        raise _damage(manager, step, error) from error
    if about.pop("seal") != seal(about):
        raise _damage(manager, step, "what stands beside the arrays is not what was written")
    return about


def _read(
    manager: ocp.CheckpointManager, step: int, about: dict[str, Any], **abstract: Any
) -> dict[str, Any]:
    items = {name: ocp.args.StandardRestore(arrays) for name, arrays in abstract.items()}
    found = _restore(manager, step, **items)
    for arrays in found.values():
        for name, checksum in checksums(arrays).items():
            if about["sums"].get(name) != checksum:
                raise _damage(manager, step, f"{name} is not what was written")
    return found


def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        for name, args in items.items():
            if isinstance(args, ocp.args.StandardRestore):
                checkpoint_files.check_chunks(Path(manager.directory) / str(step) / name)
        return manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax raises anything, a bare Exception included.
        if processes.is_lost_process(error):
            raise
        if (reason := machine_failure(error)) is not None:
            # The files may be intact: nothing is put aside, and no older checkpoint is taken.
            raise RunError(
                f"the checkpoint {manager.directory / str(step)} cannot be read now: {reason} "
                f"({one_line(error)})"
            ) from error
        raise _damage(manager, step, error) from error


def _damage(manager: ocp.CheckpointManager, step: int, reason: Any) -> _Damaged:
    return _Damaged(
        f"the checkpoint {manager.directory / str(step)} is damaged ({one_line(reason)})"
    )


def _unwritten(manager: ocp.CheckpointManager, step: int, reason: Any) -> RunError:
    found = machine_failure(reason) if isinstance(reason, Exception) else None
    remedy = found or "check that the disk has space and that the folder may be written to"
    return RunError(
        f"the checkpoint of step {step} cannot be written to {manager.directory} "
        f"({one_line(reason)}): {remedy}. "
        "Earlier checkpoints are unchanged, and the same command resumes from the last one"
    )


def _model_arrays(state: TrainState) -> dict[str, Any]:
    arrays = {"parameters": state.parameters, "variables": state.variables}
    return arrays if state.average is None else arrays | {"average": state.average}


def _training_arrays(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}
