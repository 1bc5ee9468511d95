"""Continued training of a run on other proteins, such as one family: a new run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gin

from fast_attention.mesh.meshes import row_shards
from fast_attention.protein_lm import gin_registry
from fast_attention.protein_lm.data.corpus import load_corpus
from fast_attention.protein_lm.data.packing import EpochPlanner
from fast_attention.protein_lm.data.skipped_records import SkippedRecords
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.output_files import check_output_folder
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.runs import model_file, model_gin
from fast_attention.protein_lm.training import train


def continue_training(
    run_dir: str | os.PathLike[str],
    work_dir: str | os.PathLike[str],
    fasta: Sequence[str],
    *,
    valid_fasta: Sequence[str] | None = None,
    epochs: int = 10,
    learning_rate: float = 1e-4,
    batch_size: int | None = None,
    seed: int = 0,
    on_error: str = "raise",
    gin_file: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains the model of a run further, with its own objective, on other proteins.

    The result is a run of its own, which every command takes; the first run stays as it is.
    Optimiser and schedule start again: the rate rises over a tenth of the steps and falls as a
    cosine. Given the same arguments again, a stopped run resumes, and a finished one reports what
    it reached.

    Args:
      run_dir: The run, or the exported model, to begin from.
      work_dir: The folder of the new run.
      fasta: FASTA files to train on, or folders of them.
      valid_fasta: FASTA files to validate on after every epoch, and to evaluate on at the end;
        None does neither.
      epochs: Passes through the proteins.
      learning_rate: The highest.
      batch_size: Rows of a batch on each device; None takes the run's, or as many as an epoch has
        where those are fewer.
      seed: Of order, crops and masks.
      on_error: What to do with a record that cannot be read, see `read_proteins`.
      gin_file: As for `loading.open_run`.

    Returns:
      The content of the new ``result.json``.

    Raises:
      FastaError: If a file cannot be read.
      RunError: If a folder is not what it should be.
      ValueError: If a number is out of its range.
    """
    if epochs < 1 or learning_rate < 0 or (batch_size is not None and batch_size < 1):
        raise ValueError(
            "epochs and batch_size must be at least 1, and learning_rate not negative; got "
            f"{epochs}, {batch_size} and {learning_rate}"
        )
    check_output_folder(work_dir)
    before = load_run(run_dir, gin_file=gin_file)
    if Path(work_dir).exists() and Path(work_dir).samefile(before.folder.path):
        raise RunError(f"{work_dir} is the run to begin from: give the new run another folder")
    corpus = load_corpus(
        list(fasta), before.model.domain, on_error=on_error, skipped=SkippedRecords()
    )
    about = model_file.read(before.folder.model)
    settings = about["training"] or {}
    # A model that was not trained by a run has no settings.
    length = settings.get("max_train_length", min(512, before.model.domain.length))
    planner = EpochPlanner(
        corpus,
        length,
        seed=seed,
        pack=settings.get("pack_sequences", True),
        shuffle=True,
        random_crop=True,
    )
    shards = row_shards(before.model.mesh)
    whole = settings.get("batch_size")
    before_rows = settings.get("batch_size_per_device", 128) if whole is None else whole // shards
    rows = batch_size or min(max(before_rows, 1), -(-planner.num_rows // shards))
    per_epoch = math.ceil(planner.num_rows / (rows * shards))
    steps = epochs * per_epoch
    bindings = {
        "experiment.initial_run": str(before.folder.path.absolute()),
        "experiment.train_files": list(fasta),
        "experiment.valid_files": None if valid_fasta is None else list(valid_fasta),
        "experiment.test_files": None if valid_fasta is None else list(valid_fasta),
        # Without other proteins to validate on, the family is used whole.
        "experiment.valid_fraction": 0.0,
        "experiment.epochs": epochs,
        "experiment.max_train_steps": steps,
        "experiment.max_train_length": length,
        "experiment.batch_size": None,
        "experiment.batch_size_per_device": rows,
        "experiment.train_summary_frequency": per_epoch,
        "experiment.eval_frequency": per_epoch,
        "experiment.checkpoint_frequency": per_epoch,
        "experiment.data_seed": seed,
        "experiment.on_error": on_error,
        "create_learning_rate_scheduler.factors": "constant * linear_warmup * cosine_decay",
        "create_learning_rate_scheduler.base_learning_rate": learning_rate,
        "create_learning_rate_scheduler.warmup_steps": steps // 10,
        "create_learning_rate_scheduler.steps_per_cycle": None,
    }
    lines = [f"{name} = {value!r}" for name, value in bindings.items()]
    # What is bound to the class itself wins over what is bound to FlaxModel.
    try:
        if gin_file:
            gin_registry.configure(gin_file)
        else:
            # On the mesh that the model was opened on, which may not be that of the run.
            about["mesh"] = model_file.describe(before.model)["mesh"]
            lines = [*model_gin.gin_lines(before.folder.model, about), *lines]
        own = type(before.model).__name__
        bound = gin_file and "learning_rate" in gin.get_bindings(own)
        lines.append(
            f"{own if bound else 'FlaxModel'}.learning_rate = @create_learning_rate_scheduler()"
        )
        gin_registry.configure(gin_file, lines)
        return train.run_experiment(str(work_dir), gin.get_configurable("experiment")())
    finally:
        gin.clear_config()
