"""A training run: from FASTA files to a folder with a trained model and what it reached."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fast_attention.mesh.meshes import row_shards
from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.data import pipeline
from fast_attention.protein_lm.data.corpus import Corpus, bundled_corpus
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.distributed import process_arrays, processes, stopping
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation import baselines, evaluation, report
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.modeling import (
    attention_exchange as exchange,
)
from fast_attention.protein_lm.modeling import (
    batches,
    metrics,
)
from fast_attention.protein_lm.modeling.schedules import FactorSchedule
from fast_attention.protein_lm.modeling.train_state import TrainState
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.runs import checkpoints, metrics_log, model_file
from fast_attention.protein_lm.runs.data_record import SPLITS
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.runs.run_lock import hold_run
from fast_attention.protein_lm.training import (
    resuming,
    run_checks,
    run_result,
    training_loop,
)
from fast_attention.protein_lm.training.dataset import get_train_valid_files
from fast_attention.protein_lm.training.initial_run import (
    check_initial_run,
    read_initial_run,
)
from fast_attention.protein_lm.training.training_data import (
    DataFiles,
    TrainingData,
    load_training_data,
)

SplitFiles = Callable[[str], tuple[list[str], list[str]]]

# Thousands of positions for each head of a small model, which says enough of means and covariances.
_CALIBRATION_BATCHES = 4


def run_experiment(
    work_dir: str,
    *,
    model_cls: Callable[[], FlaxModel] = FlaxLM,
    train_files: str | Sequence[str] | Mapping[str, float] | None = None,
    valid_files: str | Sequence[str] | None = None,
    test_files: str | Sequence[str] | None = None,
    batch_size_per_device: int = 128,
    batch_size: int | None = None,
    max_train_steps: int = 10**6,
    epochs: int | None = None,
    max_train_length: int = 512,
    max_eval_length: int | None = None,
    pack_sequences: bool = True,
    crop: str = "random",
    data_seed: int = 0,
    on_error: str = "raise",
    train_summary_frequency: int = 100,
    eval_frequency: int | None = 500,
    num_eval_steps: int | None = None,
    early_stopping: int | None = None,
    checkpoint_frequency: int | None = 10000,
    checkpoints_to_keep: int = 3,
    num_samples: int = 3,
    max_sample_length: int | None = None,
    initial_run: str | None = None,
    calibration_batches: int | None = None,
    valid_fraction: float = 0.05,
    new_data: bool = False,
    data_dir: str | None = None,
    split_files: SplitFiles = get_train_valid_files,
    pack_length: int | None = None,
    xid: int | str | None = None,
    save_checkpoints: bool = True,
    restore_checkpoint: bool = True,
) -> dict[str, Any]:
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
      model_cls: Makes the model.
      train_files: FASTA files to train on; a dict from files to weights mixes them, see
        `data.make_dataset`. None takes the bundled corpus.
      valid_files: FASTA files of the validations during training. None takes the bundled ones
        where training uses the bundled corpus, and otherwise those that `valid_fraction` holds out.
      test_files: FASTA files of the evaluation at the end; None takes the bundled ones where
        training uses the bundled corpus, and otherwise those of the validations.
      batch_size_per_device: Rows of a batch for each of the devices among which rows are divided
        (``data`` times ``fsdp`` of `meshes.make_mesh`), unless `batch_size` is given.
      batch_size: Rows of a batch over all devices; None is what `batch_size_per_device` makes. A
        resumed run has the batches that it began with, whatever the devices.
      max_train_steps: Steps after which training ends, of which a run can be given more later.
      epochs: Passes through the training data after which training ends; None is no such end.
      max_train_length: Tokens of a row.
      max_eval_length: Tokens of a protein that a validation looks at; None is all that the model
        has room for.
      pack_sequences: Whether several proteins share a row.
      crop: Whether proteins longer than a row are cropped at ``"random"`` places, which differ
        from epoch to epoch, or at their ``"start"``.
      data_seed: Of order, crops and masks.
      on_error: What to do with a record that cannot be read: ``"raise"``, ``"skip"`` (the run's
        folder lists those) or ``"replace"``, see `fasta_files.read_proteins`.
      train_summary_frequency: Steps between rows of training metrics.
      eval_frequency: Steps between validations; None validates at the last step only.
      num_eval_steps: Batches of a validation, of proteins spread evenly over the files; None
        takes all proteins.
      early_stopping: Successive validations without improvement after which training ends; None
        is no such end.
      checkpoint_frequency: Steps between checkpoints; None takes none between. There is also one
        at each validation that is better than all before, and one at the end.
      checkpoints_to_keep: The newest so many are kept, and that of the best validation.
      num_samples: Proteins to sample at the end, by a causal model.
      max_sample_length: Most residues of those, where the model has room for more.
      initial_run: Folder of a run whose parameters this one begins with; None draws them. The
        attention function may be another one than there: it has no parameters, and what it draws
        is drawn anew.
      calibration_batches: Batches of training data to which random features with stored parameters
        are fitted before the first step, see `FlaxModel.calibrate`. None takes 4 where such
        features begin in a trained model (`initial_run`), and otherwise none: queries and keys of
        an untrained model say little.
      valid_fraction: Share of the sequences of `train_files` that are held out for validation and
        for the evaluation at the end, where neither `valid_files` nor `test_files` are given; see
        `held_out.choose_held_out`. 0 holds out none.
      new_data: Whether a run may be resumed with other data than it began with.
      data_dir: A folder of FASTA files in place of `train_files`; `split_files` says which of them
        are for training and for validation.
      split_files: See `dataset.get_train_valid_files`.
      pack_length: Tokens of a row that several proteins share, each of at most `max_train_length`
        tokens; None is `max_train_length`.
      xid: Names a folder in `work_dir`, ``{xid}_l{max_train_length}``, for this run; None takes
        `work_dir` itself.
      save_checkpoints: False is the same as None for `checkpoint_frequency`.
      restore_checkpoint: False refuses to resume: the folder must hold no checkpoint.

    Returns:
      The content of ``result.json``.

    Raises:
      FastaError: If a file cannot be read.
      FloatingPointError: If training diverges.
      RunError: If the folder holds something else, or a run with other settings or data; if
        another process trains there; or if it cannot be written to.
      Stopped: If that was requested by a signal; all is saved.
      ValueError: If a number is out of its range, or `early_stopping` has no validation.
    """
    if data_dir is not None:
        run_checks.check_data_dir(train_files)
        train_files, found_valid = split_files(data_dir)
        valid_files = valid_files or found_valid or None
    run_checks.check_packing(pack_length, pack_sequences)
    if xid is not None:
        work_dir = os.path.join(work_dir, f"{xid}_l{max_train_length}")
    settings = model_file.training_settings(locals())
    folder = RunFolder(Path(work_dir))
    times = training_loop.Times(
        max_train_steps,
        train_summary_frequency,
        eval_frequency or max_train_steps,
        checkpoint_frequency if checkpoint_frequency and save_checkpoints else max_train_steps,
        early_stopping,
    )
    if not restore_checkpoint:
        run_checks.check_empty(folder)
    ranges.check("experiment.checkpoints_to_keep", checkpoints_to_keep, ranges.COUNT)
    if epochs is not None:
        ranges.check("experiment.epochs", epochs, ranges.EPOCHS)
    if train_files is None:
        train_files = str(bundled_corpus("train"))
        valid_files = valid_files or str(bundled_corpus("valid"))
        test_files = test_files or str(bundled_corpus("test"))
    files = DataFiles(train_files, valid_files, test_files or valid_files, valid_fraction)
    run_checks.check_early_stopping(early_stopping, valid_files is not None or files.holds_out)

    with contextlib.ExitStack() as held:
        model = model_cls()
        stored = run_checks.check_model(model, max_train_length, calibration_batches)
        if batch_size is None:
            batch_size = batch_size_per_device * row_shards(model.mesh)
        rows = process_arrays.own_rows(model.mesh, batch_size)
        about = model_file.to_text(model_file.describe(model) | {"training": settings})
        run = resuming.open_folder(folder, about)
        for name in resuming.unused_settings(run):
            processes.note(f"nothing uses the setting {name}", "warning")
        if process_arrays.any_process(folder.result.exists() and not run.longer):
            return run_result.tell_finished(run, files, new_data=new_data)
        if initial_run is not None and not run.resumed:
            # Before anything is written: what is refused can then be corrected.
            check_initial_run(Path(initial_run), model)
        processes.in_turn(
            lambda: held.enter_context(hold_run(folder)) if processes.is_primary() else None
        )

        skipped = {name: SkippedRecords(keep=None) for name in ("train", "valid")}
        digests = resuming.check_data(run, files, new_data=new_data)
        found = load_training_data(files, model.domain, on_error=on_error, skipped=skipped)
        resuming.check_unchanged(run, files, digests, SPLITS)
        run_checks.check_early_stopping(early_stopping, found.valid is not None)
        make_dataset = functools.partial(
            pipeline.make_dataset,
            found.train,
            model.domain,
            length=max_train_length,
            row_length=pack_length,
            seed=data_seed,
            pack=pack_sequences,
            num_epochs=epochs,
            objective=model.objective,
            crop=crop,
            masking=model.masking,
        )
        iterator = iter(make_dataset(batch_size=batch_size, rows=rows[:2]))
        validate = None
        if found.valid is not None:
            validate = _make_validation(model, found.valid, max_eval_length, num_eval_steps)
        if not run.resumed:
            processes.in_turn(lambda: resuming.begin(run, model.domain, files, found, digests))
        for note in found.notes:
            processes.note(note)
        for name in ("train", "valid"):
            run_result.tell_skipped(folder, name, skipped[name])

        with checkpoints.open_checkpoints(folder.checkpoints) as manager:
            restored = checkpoints.restore(manager, model.abstract_state)
            if restored is None:
                drawn = initial_run is None or _begin_from(model, Path(initial_run))
                number = calibration_batches
                if number is None:
                    number = _CALIBRATION_BATCHES if stored and drawn and initial_run else 0
                if number:
                    model.calibrate(iter(make_dataset(batch_size=batch_size)), num_batches=number)
                state = model.state
                progress = checkpoints.Progress(iterator.get_state(), batch_size, 0, 0.0)
            else:
                state, progress = restored
                if progress.batch_size != batch_size:
                    # Begun on other devices: the same batches are divided among those here.
                    rows = process_arrays.own_rows(model.mesh, progress.batch_size)
                    iterator = iter(make_dataset(batch_size=progress.batch_size, rows=rows[:2]))
                resuming.set_position(iterator, progress.iterator, folder)
                processes.tell(f"resuming the run in {folder.path} after step {int(state.step)}")
            if epochs is not None:
                steps = pipeline.num_batches(
                    found.train,
                    length=max_train_length,
                    row_length=pack_length,
                    batch_size=progress.batch_size,
                    num_epochs=epochs,
                    pack=pack_sequences,
                )
                if max_train_steps < steps:
                    processes.note(
                        f"experiment.max_train_steps = {max_train_steps} (--steps) ends the run "
                        f"before its epochs do, which take {steps} steps"
                    )
                times = dataclasses.replace(times, total=min(steps, max_train_steps))
            _set_length(model, run, times, progress, int(state.step))
            if run.resumed:
                other = processes.is_primary() and resuming.update(
                    run, model.domain, files, found, digests, int(state.step)
                )
                if process_arrays.any_process(other):
                    # A loss on other proteins is not to be compared with.
                    progress = progress._replace(best_step=None, best_loss=None)
            ngrams = _baselines(folder, files, found, model.domain)
            save = functools.partial(checkpoints.save, manager, keep=checkpoints_to_keep)
            with (
                metrics_log.open_metrics_log(folder, int(state.step)) as log,
                stopping.catch_stop_requests() as stop,
            ):
                state, progress = training_loop.train_loop(
                    model, state, progress, iterator, times, log, save, validate, stop, rows
                )
            if process_arrays.any_process(stop.signal is not None):
                # It came after the last step had begun.
                raise stopping.stopped(stop.signal or signal.SIGTERM, int(state.step))

        resuming.check_unchanged(run, files, digests, ("test",))
        reached = run_result.Reached(int(state.step), progress.tokens, progress.seconds)
        result = run_result.finish(
            folder,
            model,
            reached,
            evaluated=files.test if found.held_out is None else str(folder.held_out),
            ngrams=ngrams,
            on_error=on_error,
            num_samples=num_samples,
            max_sample_length=max_sample_length,
        )
    processes.tell(report.format_report(result, folder))
    return result


def _set_length(
    model: FlaxModel,
    run: resuming.Opened,
    times: training_loop.Times,
    progress: checkpoints.Progress,
    step: int,
) -> None:
    """Sets the length of the schedule, and tells what is not as one might expect."""
    model.set_num_steps(times.total)
    schedule = model.schedule
    if isinstance(schedule, FactorSchedule) and (note := schedule.describe_length(times.total)):
        processes.note(note)
    if not run.longer or step == 0:
        return
    if training_loop.is_tired(progress, step, times):
        raise RunError(
            f"early stopping has ended the run in {run.folder.path} at step {step}, so that more "
            "steps change nothing: begin a new run in another --work_dir with "
            f"experiment.initial_run = {str(run.folder.path)!r}"
        )
    if step >= times.total:
        processes.note(f"the run is not longer than before: its data ends after {step} steps")
        return
    rates = [f"{float(model.schedule(number)):.3g}" for number in (step, times.total - 1)]
    processes.note(
        f"the run is trained further, from step {step} to step {times.total}: the learning rate "
        f"is {rates[0]} at step {step + 1} and {rates[1]} at step {times.total}"
    )


def _begin_from(model: FlaxModel, path: Path) -> bool:
    """Takes what there is to take of a run; tells whether the attention function drew its own."""
    parameters, variables = read_initial_run(path, model)
    drawn = variables is None
    if drawn:
        parameters, variables = exchange.keep_features(model.state, parameters)
    model.set_parameters(parameters, variables)
    return drawn


def _baselines(
    folder: RunFolder, files: DataFiles, found: TrainingData, domain: DiscreteDomain
) -> Sequence[baselines.NGram]:
    """Those of the run; a resumed run need not count again."""
    # What is there is there for all processes; what is not, each counts rather than waits.
    if not process_arrays.any_process(folder.baselines.exists()):
        held_out = None if found.held_out is None else str(folder.held_out)
        ngrams = evaluation.fit_baselines(
            files.train_paths,
            domain,
            valid=held_out or files.valid,
            on_error=found.on_error,
            held_out=held_out,
        )
        if processes.is_primary():
            evaluation.save_baselines(folder.baselines, ngrams)
        process_arrays.any_process(False)
    return evaluation.load_baselines(folder.baselines)


def _make_validation(
    model: FlaxModel, corpus: Corpus, length: int | None, num_steps: int | None
) -> Callable[[TrainState], dict[str, float]]:
    number = None if num_steps is None else num_steps * model.batch_size
    found = list(
        pipeline.eval_batches(
            batches.spread(corpus, number),
            model.domain,
            length=min(length or model.max_length, model.max_length),
            batch_size=model.batch_size,
            objective=model.objective,
            masking=model.masking,
        )
    )

    def validate(state: TrainState) -> dict[str, float]:
        model.state = state
        return metrics.combine_metrics(model.batch_sums(found))

    return validate
