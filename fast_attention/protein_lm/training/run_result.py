"""What a run has reached: figures, samples and a picture; reported again when it is finished."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import jax

from fast_attention.mesh.meshes import make_mesh
from fast_attention.protein_lm.data.fasta import FastaPaths
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.distributed import processes
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.evaluation import evaluation, report
from fast_attention.protein_lm.evaluation.ngrams import NGram
from fast_attention.protein_lm.files import output_files
from fast_attention.protein_lm.files.json_files import read_json
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.inference import sampling
from fast_attention.protein_lm.runs import checkpoints, metrics_log
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.training import plots, resuming
from fast_attention.protein_lm.training.experiment import DataSettings, Experiment
from fast_attention.protein_lm.wording import place


def finish(
    folder: RunFolder,
    model: FlaxModel,
    steps: int,
    progress: checkpoints.Progress,
    experiment: Experiment,
    *,
    evaluated: FastaPaths | None,
    ngrams: Sequence[NGram],
) -> dict[str, Any]:
    """Evaluates the best checkpoint of a run, samples from it, and writes ``result.json``.

    Args:
      folder: Of the run.
      model: Takes the parameters of that checkpoint.
      steps: Steps taken.
      progress: Where training ended.
      experiment: How records are read, and what is sampled.
      evaluated: FASTA files to evaluate on; None does not evaluate.
      ngrams: Baselines.

    Returns:
      The content of ``result.json``.

    Raises:
      FastaError: If a file cannot be read.
      RunError: If there is no checkpoint.
    """
    step, parameters, variables = checkpoints.restore_model(
        folder.checkpoints, model.abstract_state
    )
    model.set_parameters(parameters, variables)
    skipped = SkippedRecords(keep=None)
    result = {
        "model": type(model).__name__,
        "parameters": model.num_parameters,
        "steps": steps,
        "evaluated_step": step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "evaluation": evaluated
        and evaluation.evaluate_on(
            model, evaluated, ngrams, on_error=experiment.on_error, skipped=skipped
        ).result,
        "samples": _sample(model, experiment.num_samples, experiment.max_sample_length),
    }
    report_skipped(folder, "test", skipped)
    if processes.is_primary():
        _draw(folder, result)
        output_files.write_json(folder.result, result)
    return result


def report_finished(run: resuming.Opened, files: DataSettings) -> dict[str, Any]:
    """Reports the result of a finished run.

    Args:
      run: The run.
      files: The data that the command names now, see `resuming.check_finished`.

    Returns:
      The content of ``result.json``.

    Raises:
      RunError: If that file is damaged, or files of other names have another content.
    """
    folder = run.folder
    for text in resuming.check_finished(run, files):
        processes.note(text)
    try:
        result = read_json(folder.result)
        told = report.format_report(result, folder)
    except (RunError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder.result} is damaged: remove it, and the same command evaluates the run again"
        ) from error
    processes.report(f"the run in {place(folder.path)} is finished\n\n{told}")
    return result


def report_skipped(folder: RunFolder, name: str, skipped: SkippedRecords) -> None:
    """Reports records that were left out, and lists them in the folder of the run.

    Args:
      folder: Of the run.
      name: Of the split.
      skipped: The records.
    """
    if skipped.count and processes.is_primary():
        print(skipped.summary(), file=sys.stderr)
        skipped.save(folder.skipped(name))


def _sample(model: FlaxModel, number: int, max_length: int | None) -> list[str]:
    if not model.objective.samples or not number:
        return []
    if processes.count() > 1:
        # Each process samples on its own devices.
        model = model.with_mesh(make_mesh(devices=jax.local_devices()))
    if max_length is not None:
        max_length = min(max_length, model.max_length)
    records = sampling.sample_proteins(model, number, max_length=max_length)
    return [record.sequence for record in records]


def _draw(folder: RunFolder, result: dict[str, Any]) -> None:
    scores = result["evaluation"]["scores"][1:] if result["evaluation"] else []
    references = {row["name"]: row["perplexity"] for row in scores}
    plots.plot_learning_curve(folder.curve, metrics_log.read_metrics(folder.metrics), references)
