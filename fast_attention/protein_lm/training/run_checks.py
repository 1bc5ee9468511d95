"""What a training run checks before it begins."""

from __future__ import annotations

from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.runs.run_folder import RunFolder
from fast_attention.protein_lm.training.experiment import Experiment
from fast_attention.softmax_attention import make_softmax_attention


def check_empty(folder: RunFolder) -> None:
    """Raises RunError if a run could be resumed in a folder."""
    if folder.newest_step() is not None:
        raise RunError(
            f"{folder.path} holds checkpoints, and experiment.restore_checkpoint = False asks not "
            "to resume: give another --work_dir, or leave restore_checkpoint out"
        )


def check_model(model: FlaxModel, experiment: Experiment) -> bool:
    """Checks a model against settings; returns whether its features have stored parameters."""
    length, calibration = experiment.max_train_length, experiment.calibration_batches
    if length > model.max_length:
        raise ValueError(
            f"experiment.max_train_length is {length}, more than the "
            f"{model.max_length} tokens of the model: lower it, or raise "
            "make_protein_domain.length (and FlaxModel.max_len, if that is set)"
        )
    function = as_attention_fn(model.attention_fn or make_softmax_attention())
    stored = function.calibration in ("stored", "trained")
    if calibration and not stored:
        raise ValueError(
            f"experiment.calibration_batches is {calibration}, but the attention function "
            "has no stored parameters to fit: use make_fast_softmax_attention with an estimator "
            "such as 'wderf_s' and unidirectional = True, or leave calibration_batches out"
        )
    return stored
