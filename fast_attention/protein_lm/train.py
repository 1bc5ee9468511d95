"""A training run: from FASTA files to a folder with a trained model and what it reached."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import jax

from fast_attention.meshes import make_mesh, row_shards
from fast_attention.protein_lm import (
    baselines,
    batches,
    checkpoints,
    data,
    evaluation,
    exchange,
    metrics,
    metrics_log,
    model_file,
    output_files,
    plots,
    process_arrays,
    processes,
    report,
    run_folder,
    sampling,
    stopping,
    training_loop,
)
from fast_attention.protein_lm.corpus import Corpus, bundled_corpus, load_corpus
from fast_attention.protein_lm.domains import DiscreteDomain
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.initial_run import check_initial_run, read_initial_run
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.run_folder import RunFolder
from fast_attention.protein_lm.skipped_records import SkippedRecords
from fast_attention.protein_lm.train_state import TrainState

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
    eval_frequency: int = 500,
    num_eval_steps: int | None = None,
    early_stopping: int | None = None,
    checkpoint_frequency: int = 10000,
    checkpoints_to_keep: int = 3,
    num_samples: int = 3,
    max_sample_length: int | None = None,
    initial_run: str | None = None,
    calibration_batches: int | None = None,
) -> dict[str, Any]:
    """Trains a model, or resumes its training, and reports what it reached.

    A run that was stopped, by whatever means, goes on from its last checkpoint when it is started
    again on the same folder, and takes the same steps as if it had not been stopped. SIGTERM and
    the first SIGINT let the running step end, and save it. A finished run only tells again what it
    reached.

    What is evaluated and sampled from at the end is what `loading.load_run` gives: the model at
    its lowest validation loss, or at the last step of a run that does not validate.

    Args:
      work_dir: The run's folder, see `run_folder.RunFolder`.
      model_cls: Makes the model.
      train_files: FASTA files to train on; a dict from files to weights mixes them, see
        `data.make_dataset`. None takes the bundled corpus.
      valid_files: FASTA files of the validations during training. None takes the bundled ones
        where training uses the bundled corpus, and otherwise does not validate.
      test_files: FASTA files of the evaluation at the end; None takes the bundled ones where
        training uses the bundled corpus, and otherwise `valid_files`.
      batch_size_per_device: Rows of a batch for each of the devices among which rows are divided
        (``data`` times ``fsdp`` of `meshes.make_mesh`), unless `batch_size` is given.
      batch_size: Rows of a batch over all devices; None is what `batch_size_per_device` makes. A
        resumed run has the batches that it began with, whatever the devices.
      max_train_steps: Steps after which training ends.
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
      eval_frequency: Steps between validations.
      num_eval_steps: Batches of a validation, of proteins spread evenly over the files; None
        takes all proteins.
      early_stopping: Successive validations without improvement after which training ends; None
        is no such end.
      checkpoint_frequency: Steps between checkpoints; there is also one at each validation that is
        better than all before.
      checkpoints_to_keep: The newest so many are kept, and that of the best validation.
      num_samples: Proteins to sample at the end, by a causal model.
      max_sample_length: Most residues of those; None is what the model has room for.
      initial_run: Folder of a run whose parameters this one begins with; None draws them. The
        attention function may be another one than there: it has no parameters, and what it draws
        is drawn anew.
      calibration_batches: Batches of training data to which random features with stored parameters
        are fitted before the first step, see `FlaxModel.calibrate`. None takes 4 where such
        features begin in a trained model (`initial_run`), and otherwise none: queries and keys of
        an untrained model say little.

    Returns:
      The content of ``result.json``.

    Raises:
      FastaError: If a file cannot be read.
      FloatingPointError: If training diverges.
      RunError: If the folder holds another run, or cannot be written to.
      Stopped: If that was requested by a signal; all is saved.
      ValueError: If a number is out of its range.
    """
    settings = model_file.training_settings(locals())
    folder = RunFolder(Path(work_dir))
    run_folder.check_no_export(folder)
    times = training_loop.Times(
        max_train_steps,
        train_summary_frequency,
        eval_frequency,
        checkpoint_frequency,
        early_stopping,
    )
    if checkpoints_to_keep < 1:
        raise ValueError(f"checkpoints_to_keep must be at least 1; got {checkpoints_to_keep}")
    if train_files is None:
        train_files = str(bundled_corpus("train"))
        valid_files = valid_files or str(bundled_corpus("valid"))
        test_files = test_files or str(bundled_corpus("test"))
    test_files = test_files or valid_files

    model = model_cls()
    if max_train_length > model.max_length:
        raise ValueError(
            f"experiment.max_train_length is {max_train_length}, more than the "
            f"{model.max_length} tokens of the model: lower it, or raise "
            "make_protein_domain.length (and FlaxModel.max_len, if that is set)"
        )
    if batch_size is None:
        batch_size = batch_size_per_device * row_shards(model.mesh)
    skipped = {name: SkippedRecords(keep=None) for name in ("train", "valid", "test")}
    make_dataset = functools.partial(
        data.make_dataset,
        train_files,
        model.domain,
        length=max_train_length,
        seed=data_seed,
        pack=pack_sequences,
        num_epochs=epochs,
        objective=model.objective,
        crop=crop,
        masking=model.masking,
        on_error=on_error,
    )
    rows = process_arrays.own_rows(model.mesh, batch_size)
    dataset = make_dataset(batch_size=batch_size, skipped=skipped["train"], rows=rows[:2])
    validate = None
    if valid_files is not None:
        corpus = load_corpus(valid_files, model.domain, on_error=on_error, skipped=skipped["valid"])
        validate = _make_validation(model, corpus, max_eval_length, num_eval_steps)

    if early_stopping is not None and validate is None:
        _warn("early_stopping needs valid_files, and there are none")
    stored = getattr(model.attention_fn, "calibration", None) in ("stored", "trained")
    if calibration_batches and not stored:
        raise ValueError(
            f"experiment.calibration_batches is {calibration_batches}, but the attention function "
            "has no stored parameters to fit: use make_fast_softmax_attention with an estimator "
            "such as 'wderf_s' and unidirectional = True, or leave calibration_batches out"
        )
    asked, used = gin.config_str(), gin.operative_config_str()
    if initial_run is not None and not folder.config.exists():
        # Before anything is written: what is refused can then be asked for again, put right.
        check_initial_run(Path(initial_run), model)
    about = model_file.to_text(model_file.describe(model) | {"training": settings})
    processes.in_turn(lambda: run_folder.claim(folder, used, about, asked=asked))
    for name in sorted(run_folder.settings(asked).keys() - run_folder.settings(used).keys()):
        _warn(f"nothing uses the setting {name}")
    if process_arrays.any_process(folder.result.exists()):
        result = json.loads(folder.result.read_text(encoding="utf-8"))
        _tell(f"the run in {folder.path} is finished\n\n{report.format_report(result, folder)}")
        return result
    for name in ("train", "valid"):
        _tell_skipped(folder, name, skipped[name])
    ngrams = _baselines(folder, train_files, valid_files, on_error, model.domain)

    iterator = iter(dataset)
    with checkpoints.open_checkpoints(folder.checkpoints) as manager:
        found = checkpoints.restore(manager, model.abstract_state)
        if found is None:
            drawn = initial_run is None or _begin_from(model, Path(initial_run))
            number = calibration_batches
            if number is None:
                number = _CALIBRATION_BATCHES if stored and drawn and initial_run else 0
            if number:
                model.calibrate(iter(make_dataset(batch_size=batch_size)), num_batches=number)
            state = model.state
            progress = checkpoints.Progress(iterator.get_state(), batch_size, 0, 0.0)
        else:
            state, progress = found
            if progress.batch_size != batch_size:
                # Begun on other devices: the same batches are divided among those that are here.
                rows = process_arrays.own_rows(model.mesh, progress.batch_size)
                iterator = iter(make_dataset(batch_size=progress.batch_size, rows=rows[:2]))
            iterator.set_state(progress.iterator)
            _tell(f"resuming the run in {folder.path} after step {int(state.step)}")
        save = functools.partial(checkpoints.save, manager, keep=checkpoints_to_keep)
        with (
            metrics_log.open_metrics_log(folder, int(state.step)) as log,
            stopping.catch_stop_requests() as stop,
        ):
            state, progress = training_loop.train_loop(
                model, state, progress, iterator, times, log, save, validate, stop, rows
            )

    steps = int(state.step)
    step, parameters, variables = checkpoints.restore_model(
        folder.checkpoints, model.abstract_state
    )
    model.set_parameters(parameters, variables)
    result = {
        "model": type(model).__name__,
        "parameters": model.num_parameters,
        "steps": steps,
        "evaluated_step": step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "evaluation": test_files
        and evaluation.evaluate_on(
            model, test_files, ngrams, on_error=on_error, skipped=skipped["test"]
        ),
        "samples": _sample(model, num_samples, max_sample_length),
    }
    _tell_skipped(folder, "test", skipped["test"])
    if processes.is_primary():
        _draw(folder, result)
        output_files.write_json(folder.result, result)
    _tell(report.format_report(result, folder))
    return result


def _tell(text: str) -> None:
    if processes.is_primary():
        print(text)


def _warn(text: str) -> None:
    if processes.is_primary():
        print(f"warning: {text}", file=sys.stderr)


def _begin_from(model: FlaxModel, path: Path) -> bool:
    """Takes what there is to take of a run; tells whether the attention function drew its own."""
    parameters, variables = read_initial_run(path, model)
    drawn = variables is None
    if drawn:
        parameters, variables = exchange.keep_features(model.state, parameters)
    model.set_parameters(parameters, variables)
    return drawn


def _baselines(
    folder: RunFolder,
    train_files: str | Sequence[str] | Mapping[str, float],
    valid_files: str | Sequence[str] | None,
    on_error: str,
    domain: DiscreteDomain,
) -> Sequence[baselines.NGram]:
    """Those of the run; a resumed run need not count again."""
    # What is there is there for all processes; what is not, each counts rather than waits.
    if not process_arrays.any_process(folder.baselines.exists()):
        files = [train_files] if isinstance(train_files, str) else list(train_files)
        found = evaluation.fit_baselines(files, domain, valid=valid_files, on_error=on_error)
        if processes.is_primary():
            evaluation.save_baselines(folder.baselines, found)
        process_arrays.any_process(False)
    return evaluation.load_baselines(folder.baselines)


def _make_validation(
    model: FlaxModel, corpus: Corpus, length: int | None, num_steps: int | None
) -> Callable[[TrainState], dict[str, float]]:
    number = None if num_steps is None else num_steps * model.batch_size
    found = list(
        data.eval_batches(
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


def _tell_skipped(folder: RunFolder, name: str, skipped: SkippedRecords) -> None:
    if skipped.count and processes.is_primary():
        print(skipped.summary(), file=sys.stderr)
        skipped.save(folder.path / f"skipped_{name}.tsv")


def _sample(model: FlaxModel, number: int, max_length: int | None) -> list[str]:
    if not isinstance(model, FlaxLM) or not number:
        return []
    if processes.count() > 1:
        # Each process samples on its own devices.
        model = model.with_mesh(make_mesh(devices=jax.local_devices()))
    records = sampling.sample_proteins(model, number, max_length=max_length)
    return [record.sequence for record in records]


def _draw(folder: RunFolder, result: dict[str, Any]) -> None:
    scores = result["evaluation"]["scores"][1:] if result["evaluation"] else []
    references = {row["name"]: row["perplexity"] for row in scores}
    plots.plot_learning_curve(folder.curve, metrics_log.read_metrics(folder.metrics), references)
