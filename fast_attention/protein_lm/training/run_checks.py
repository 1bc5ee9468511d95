"""What a training run checks before it begins."""

from __future__ import annotations

from typing import Any

from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.runs import checkpoints
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.softmax_attention import make_softmax_attention


def check_data_dir(train_files: Any) -> None:
    """Raises ValueError if there are files to train on beside a folder of them."""
    if train_files is not None:
        raise ValueError(
            "experiment.data_dir and experiment.train_files (--fasta) both say what to train on: "
            "give one of them"
        )


def check_packing(pack_length: int | None, pack_sequences: bool) -> None:
    """Raises ValueError if rows are to be shared, and not to be shared."""
    if pack_length is not None and not pack_sequences:
        raise ValueError(
            f"experiment.pack_length (batch_ds.pack_length) is {pack_length}, but "
            "experiment.pack_sequences = False gives each protein a row of its own: leave one out"
        )


def check_empty(folder: RunFolder) -> None:
    """Raises RunError if a run could be resumed in a folder."""
    if checkpoints.newest_step(folder.checkpoints) is not None:
        raise RunError(
            f"{folder.path} holds checkpoints, and experiment.restore_checkpoint = False asks not "
            "to resume: give another --work_dir, or leave restore_checkpoint out"
        )


def check_early_stopping(early_stopping: int | None, validates: bool) -> None:
    """Raises ValueError if early stopping has no validation to go by."""
    if early_stopping is not None and not validates:
        raise ValueError(
            f"experiment.early_stopping is {early_stopping}, but the run has no proteins to "
            "validate on: give --valid_fasta, or leave early_stopping out"
        )


def check_model(model: FlaxModel, max_train_length: int, calibration_batches: int | None) -> bool:
    """Checks a model against settings; returns whether its features have stored parameters."""
    if max_train_length > model.max_length:
        raise ValueError(
            f"experiment.max_train_length is {max_train_length}, more than the "
            f"{model.max_length} tokens of the model: lower it, or raise "
            "make_protein_domain.length (and FlaxModel.max_len, if that is set)"
        )
    function = as_attention_fn(model.attention_fn or make_softmax_attention())
    stored = function.calibration in ("stored", "trained")
    if calibration_batches and not stored:
        raise ValueError(
            f"experiment.calibration_batches is {calibration_batches}, but the attention function "
            "has no stored parameters to fit: use make_fast_softmax_attention with an estimator "
            "such as 'wderf_s' and unidirectional = True, or leave calibration_batches out"
        )
    return stored
