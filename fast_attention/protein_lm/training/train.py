"""A training run: from FASTA files to a folder with a trained model and what it reached."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fast_attention.mesh.meshes import row_shards
from fast_attention.protein_lm import messages
from fast_attention.protein_lm.data.corpus import Corpus
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.distributed import process_arrays, processes, stopping
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation import baselines, evaluation, report
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.modeling import attention_exchange as exchange
from fast_attention.protein_lm.modeling import batches, metrics, pipeline
from fast_attention.protein_lm.modeling.schedules import FactorSchedule
from fast_attention.protein_lm.modeling.train_state import TrainState
from fast_attention.protein_lm.runs import checkpoints, metrics_log, model_file
from fast_attention.protein_lm.runs.data_record import SPLITS, Entry
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.runs.run_lock import hold_run
from fast_attention.protein_lm.training import resuming, run_result, training_loop
from fast_attention.protein_lm.training.experiment import (
    EvaluationSettings,
    Experiment,
    TimeSettings,
    choose_files,
    find_files,
)
from fast_attention.protein_lm.training.initial_run import check_initial_run, read_initial_run
from fast_attention.protein_lm.training.training_data import TrainingData, load_training_data

if TYPE_CHECKING:
    import grain

# Thousands of positions for each head of a small model, which says enough of means and covariances.
_CALIBRATION_BATCHES = 4


def run_experiment(work_dir: str, experiment: Experiment | None = None) -> dict[str, Any]:
    """Trains a model, or resumes its training, and reports what it reached.

    A run that was stopped, by whatever means, resumes from its last checkpoint when it is started
    again on the same folder, and takes the same steps as if it had not been stopped. The first
    SIGINT, SIGTERM or SIGHUP lets the running step end, and saves it. A finished run only reports
    its result again, unless it is given more steps or epochs: then it is trained further.

    A cosine schedule without a length of its own ends with the run, see
    `schedules.FactorSchedule.over`. One process at a time trains in a folder (`run_lock`), and a
    run resumes with the data that it began with (`data_record`).

    What is evaluated and sampled from at the end is what `loading.load_run` gives: the model at
    its lowest validation loss, or at the last step of a run that does not validate.

    Args:
      work_dir: The run's folder, see `run_folder.RunFolder`.
      experiment: The settings; None takes the defaults.

    Returns:
      The content of ``result.json``.

    Raises:
      FastaError: If a file cannot be read.
      FloatingPointError: If training diverges.
      RunError: If the folder holds something else, or a run with other settings or data; if
        another process trains there; or if it cannot be written to.
      Stopped: If that was requested by a signal; all is saved.
      ValueError: If two settings, or a setting and the model, contradict each other.
    """
    experiment = find_files(experiment or Experiment())
    if experiment.xid is not None:
        work_dir = os.path.join(work_dir, f"{experiment.xid}_l{experiment.max_train_length}")
    settings = model_file.training_settings(experiment)
    experiment = choose_files(experiment)
    folder = RunFolder(Path(work_dir))
    if not experiment.restore_checkpoint and folder.newest_step() is not None:
        raise RunError(
            f"{folder.path} holds checkpoints, and experiment.restore_checkpoint = False asks not "
            "to resume: give another --work_dir, or leave restore_checkpoint out"
        )
    experiment.check_early_stopping(experiment.valid_files is not None or experiment.holds_out)

    with contextlib.ExitStack() as held:
        model = experiment.model_cls()
        stored = experiment.check_model(model)
        about = model_file.to_text(model_file.describe(model) | {"training": settings})
        run = resuming.open_folder(folder, about)
        resuming.check_lengths(run)
        for name in resuming.unused_settings(run):
            processes.note(f"the setting {name} is not used", "warning")
        if process_arrays.any_process(folder.result.exists() and not run.longer):
            return run_result.report_finished(run, experiment)
        if experiment.initial_run is not None and not run.resumed:
            # Before anything is written: what is refused can then be corrected.
            check_initial_run(Path(experiment.initial_run), model)
        processes.in_turn(
            lambda: held.enter_context(hold_run(folder)) if processes.is_primary() else None
        )

        skipped = {name: SkippedRecords(keep=None) for name in ("train", "valid")}
        digests = resuming.check_data(run, experiment)
        found = load_training_data(experiment, model.domain, skipped)
        resuming.check_unchanged(run, experiment, digests, SPLITS)
        experiment.check_early_stopping(found.valid is not None)
        validate = None
        if found.valid is not None:
            validate = _make_validation(model, found.valid, experiment)
        if not run.resumed:
            processes.in_turn(lambda: resuming.begin(run, found, digests))
        for note in found.notes:
            processes.note(note)
        for name in ("train", "valid"):
            run_result.report_skipped(folder, name, skipped[name])

        step, progress, ngrams = _train(experiment, model, stored, run, found, digests, validate)
        resuming.check_unchanged(run, experiment, digests, ("test",))
        evaluated = experiment.test_files if found.held_out is None else str(folder.held_out)
        result = run_result.finish(
            folder,
            model,
            step,
            progress,
            experiment,
            evaluated=evaluated,
            ngrams=ngrams,
        )
    processes.report(report.format_report(result, folder))
    return result


def _train(
    experiment: Experiment,
    model: FlaxModel,
    stored: bool,
    run: resuming.Opened,
    found: TrainingData,
    digests: Entry,
    validate: Callable[[TrainState], dict[str, float]] | None,
) -> tuple[int, checkpoints.Progress, Sequence[baselines.NGram]]:
    """Trains from the newest checkpoint, or the beginning, to the end.

    Returns:
      The last step, what was reached there, and the n-grams of the training data.

    Raises:
      Stopped: If that was requested by a signal.
    """
    batches_of = functools.partial(_batches, experiment, model, found)
    with checkpoints.open_checkpoints(run.folder.checkpoints) as manager:
        restored = checkpoints.restore(manager, model.abstract_state)
        size = experiment.batch_size
        if size is None:
            size = experiment.batch_size_per_device * row_shards(model.mesh)
        if restored is not None:
            # A run begun on other devices keeps its batches, divided among the devices here.
            size = restored[1].batch_size
        rows = process_arrays.own_rows(model.mesh, size)
        iterator = iter(batches_of(size, rows[:2]))
        if restored is None:
            _initialize(model, experiment, stored, lambda: iter(batches_of(size)))
            state = model.state
            progress = checkpoints.Progress(iterator.get_state(), size, 0, 0.0)
        else:
            state, progress = restored
            resuming.set_position(iterator, progress.iterator, run.folder)
            if not messages.is_quiet():
                told = f"resuming the run in {run.folder.path} after step {int(state.step)}"
                processes.report(told)
        times = _limit_steps(experiment, model, found.train, size)
        _set_length(model, run, times, progress, int(state.step))
        if run.resumed:
            other = processes.is_primary() and resuming.update(run, found, digests, int(state.step))
            if process_arrays.any_process(other):
                # A loss on other proteins is not to be compared with.
                progress = progress._replace(best_step=None, best_loss=None)
        ngrams = _baselines(run.folder, found)
        save = functools.partial(checkpoints.save, manager, keep=experiment.checkpoints_to_keep)
        with (
            metrics_log.open_metrics_log(run.folder, int(state.step)) as log,
            stopping.catch_stop_requests() as stop,
        ):
            state, progress = training_loop.train_loop(
                model, state, progress, iterator, times, log, save, validate, stop, rows
            )
        if process_arrays.any_process(stop.signal is not None):
            # It came after the last step had begun.
            raise stopping.stopped(stop.signal or signal.SIGTERM, int(state.step))
    return int(state.step), progress, ngrams


def _batches(
    experiment: Experiment,
    model: FlaxModel,
    found: TrainingData,
    batch_size: int,
    rows: tuple[int, int] | None = None,
) -> grain.IterDataset[pipeline.Batch]:
    """The batches to train on, or `rows` of each."""
    return pipeline.make_dataset(
        found.train,
        model.domain,
        length=experiment.max_train_length,
        row_length=experiment.pack_length,
        batch_size=batch_size,
        seed=experiment.data_seed,
        pack=experiment.pack_sequences,
        num_epochs=experiment.epochs,
        objective=model.objective,
        crop=experiment.crop,
        rows=rows,
    )


def _initialize(
    model: FlaxModel,
    experiment: Experiment,
    stored: bool,
    make_batches: Callable[[], Iterator[pipeline.Batch]],
) -> None:
    """Sets the parameters that a new run begins with; `stored` is from `check_model`."""
    initial = experiment.initial_run
    drawn = initial is None or _begin_from(model, Path(initial))
    number = experiment.calibration_batches
    if number is None:
        number = _CALIBRATION_BATCHES if stored and drawn and initial else 0
    if number:
        model.calibrate(make_batches(), num_batches=number)


def _limit_steps(
    experiment: Experiment, model: FlaxModel, source: pipeline.Source, batch_size: int
) -> TimeSettings:
    """The settings with the steps that `epochs` make, where those are fewer."""
    if experiment.epochs is None:
        return experiment
    most = experiment.max_train_steps
    steps = pipeline.num_batches(
        source,
        length=experiment.max_train_length,
        row_length=experiment.pack_length,
        batch_size=batch_size,
        num_epochs=experiment.epochs,
        pack=experiment.pack_sequences,
        objective=model.objective,
    )
    if most < steps:
        processes.note(
            f"experiment.max_train_steps = {most} (--steps) ends the run before its epochs do, "
            f"which take {steps} steps"
        )
    return dataclasses.replace(experiment, max_train_steps=min(steps, most))


def _set_length(
    model: FlaxModel,
    run: resuming.Opened,
    times: TimeSettings,
    progress: checkpoints.Progress,
    step: int,
) -> None:
    """Sets the length of the schedule, and reports what a user may not expect."""
    total = times.max_train_steps
    model.set_num_steps(total)
    schedule = model.schedule
    if isinstance(schedule, FactorSchedule) and (note := schedule.describe_length(total)):
        processes.note(note)
    if not run.longer or step == 0:
        return
    if times.stops_early(step, progress.best_step):
        raise RunError(
            f"early stopping has ended the run in {run.folder.path} at step {step}: it cannot be "
            "continued; start a new run in another --work_dir with "
            f"experiment.initial_run = {str(run.folder.path)!r}"
        )
    if step >= total:
        processes.note(f"the run is not longer than before: its data ends after {step} steps")
        return
    rates = [f"{float(model.schedule(number)):.3g}" for number in (step, total - 1)]
    processes.note(
        f"the run is trained further, from step {step} to step {total}: the learning rate "
        f"is {rates[0]} at step {step + 1} and {rates[1]} at step {total}"
    )


def _begin_from(model: FlaxModel, path: Path) -> bool:
    """Copies arrays of a run; returns whether the attention function drew new projections."""
    parameters, variables, drawn = read_initial_run(path, model)
    if variables is None:
        parameters, variables = exchange.keep_features(model.state, parameters)
    model.set_parameters(parameters, variables)
    return drawn


def _baselines(folder: RunFolder, found: TrainingData) -> Sequence[baselines.NGram]:
    """Those of the run; a resumed run need not count again."""
    # What is there is there for all processes; what is not, each counts rather than waits.
    if not process_arrays.any_process(folder.baselines.exists()):
        held_out = None if found.held_out is None else str(folder.held_out)
        ngrams = evaluation.fit_baselines(
            found.files.train_paths,
            found.domain,
            valid=held_out or found.files.valid_files,
            on_error=found.files.on_error,
            held_out=held_out,
        )
        if processes.is_primary():
            evaluation.save_baselines(folder.baselines, ngrams)
        process_arrays.any_process(False)
    return evaluation.load_baselines(folder.baselines)


def _make_validation(
    model: FlaxModel, corpus: Corpus, experiment: EvaluationSettings
) -> Callable[[TrainState], dict[str, float]]:
    steps, length = experiment.num_eval_steps, experiment.max_eval_length
    number = None if steps is None else steps * model.batch_size
    found = list(
        pipeline.eval_batches(
            batches.spread(corpus, number),
            model.domain,
            length=min(length or model.max_length, model.max_length),
            batch_size=model.batch_size,
            objective=model.objective,
        )
    )

    def validate(state: TrainState) -> dict[str, float]:
        model.state = state
        return metrics.combine_metrics(model.batch_sums(found))

    return validate
