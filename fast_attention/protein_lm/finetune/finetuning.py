"""Fine-tuning: a property of proteins, learned from examples on top of a language model.

Three methods, from cheap to costly. ``"frozen"``: a linear model on the vectors of the untouched
trunk, solved exactly. ``"lora"``: that, and low-rank adapters of every dense layer
(arXiv:2106.09685). ``"full"``: that, and all parameters.

Shape letters: N proteins, M width, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.finetune import tuning_loop
from fast_attention.protein_lm.finetune.finetuned import FineTuned as FineTuned
from fast_attention.protein_lm.finetune.finetuned import (
    Fit,
    embed,
    fingerprint,
    head_outputs,
    with_parameters,
)
from fast_attention.protein_lm.finetune.labelled import (
    PARTS,
    TASKS,
    as_names,
    as_numbers,
    choose_parts,
)
from fast_attention.protein_lm.finetune.linear_head import (
    LinearHead,
    Units,
    cross_entropy,
    fit_classification,
    fit_regression,
)
from fast_attention.protein_lm.finetune.property_metrics import (
    classification_metrics,
    regression_metrics,
    spearman,
)
from fast_attention.protein_lm.finetune.tuning_config import TuningConfig
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.modeling.encoding import encode_sequences
from fast_attention.protein_lm.modeling.token_batches import Shape
from fast_attention.protein_lm.ranges import check_choice


def fine_tune(
    model: FlaxModel,
    sequences: Sequence[str],
    labels: Sequence[Any],
    *,
    task: str,
    parts: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> FineTuned:
    """Learns a property of proteins; equal arguments give equal results on one machine.

    Args:
      model: The language model; it is not changed.
      sequences: N proteins, in upper case.
      labels: Numbers, or names of classes.
      task: ``"regression"`` or ``"classification"``.
      parts: ``"train"``, ``"valid"`` or ``"test"`` for each; None draws them.
      groups: Proteins of one group (relatives) are not separated when parts are drawn.
      log: Takes a row of figures for each epoch of gradient steps.
      **options: Fields of `TuningConfig`.

    Returns:
      The predictor, whose ``fit`` has its figures on each part.

    Raises:
      FloatingPointError: If training diverges.
      RunError: If there are too few proteins or classes, a label is missing or no number, or a
        group is missing.
      ValueError: At an option out of its range, or a sequence that the model cannot read.
    """
    config = TuningConfig(**options)
    check_choice("task", task, TASKS)
    if isinstance(sequences, str) or len(sequences) != len(labels):
        raise ValueError(
            f"expected as many labels as sequences; got {len(labels)} and {len(sequences)}"
        )
    chosen = choose_parts(
        len(sequences),
        parts,
        groups,
        test_share=config.test_share,
        valid_share=config.valid_share,
        seed=config.seed,
    )
    sequences = list(sequences)
    rows = {part: np.flatnonzero(chosen == part) for part in PARTS}
    classes, targets = _targets(task, labels, rows["train"])
    shapes: set[Shape] = set()
    vectors = embed(model, sequences, config.max_length, shapes)
    history: list[dict[str, Any]] = []

    def record(row: dict[str, Any]) -> None:
        history.append(row)
        if log is not None:
            log(row)

    class_weights = np.ones(1 if classes is None else len(classes))
    numbers, units = targets, None
    if classes is None:
        units = Units.of(numbers[rows["train"]])
        targets = units.standardise(numbers)
    elif config.balanced:
        counts = np.bincount(targets[rows["train"]], minlength=len(classes))
        # A class that is nowhere in training cannot be learned, and must not outweigh the others
        # where the validation part has it.
        some = counts > 0
        class_weights[some] = len(rows["train"]) / (some.sum() * counts[some])
    fitted, held = ((vectors[rows[part]], targets[rows[part]]) for part in ("train", "valid"))
    if classes is None:
        head, penalty = fit_regression(fitted, held)
    else:
        head, penalty = fit_classification(fitted, held, class_weights)
    values = _valid_metrics(head, *held, class_weights)
    record({"epoch": 0, "step": 0, "split": "frozen", "penalty": penalty, **values})

    trunk, adapters = fingerprint(model), None
    if config.method != "frozen":
        model, head, adapters = _tune_trunk(
            model, sequences, targets, rows, head, class_weights, config, shapes, record
        )
        vectors = embed(model, sequences, config.max_length, shapes)
    if units is not None:
        # In float64 beside the float32 kernel, which has too few digits for them.
        head = head._replace(units=np.array(units))
    outputs = head_outputs(head, vectors)
    measure = regression_metrics if classes is None else classification_metrics
    trained = {sequences[row] for row in rows["train"]}
    measured = {
        part: {
            "proteins": len(found),
            "shared": 0 if part == "train" else sum(sequences[row] in trained for row in found),
        }
        | measure(numbers[found], outputs[found])
        for part, found in rows.items()
        if len(found)
    }
    fit = Fit(chosen, outputs, measured, history)
    return FineTuned(model, classes, head, config.method, config.max_length, trunk, adapters, fit)


def _targets(
    task: str, labels: Sequence[Any], train: np.ndarray
) -> tuple[tuple[str, ...] | None, np.ndarray]:
    if task == "regression":
        numbers = as_numbers(labels)
        some = numbers[train]
        if some.min() == some.max() or Units.of(some).spread == 0:
            raise RunError(
                f"all {len(train)} training labels are {numbers[train[0]]:g}: there is nothing to "
                "learn; check the column of labels (--label_column)"
            )
        return None, numbers
    classes, targets = np.unique(as_names(labels, "label"), return_inverse=True)
    present = classes[np.unique(targets[train])]
    if len(present) < 2:
        raise RunError(
            f"all {len(train)} training proteins are of the class {str(present[0])!r}: there is "
            "nothing to classify; check the column of labels (--label_column) and the split "
            "(--split_column)"
        )
    if len(classes) == len(labels):
        raise RunError(
            f"each of the {len(labels)} proteins has its own class: choose --task=regression "
            "for numbers (task='regression' in Python), or another column of labels "
            "(--label_column)"
        )
    return tuple(classes.tolist()), targets


def _valid_metrics(
    head: LinearHead, vectors: np.ndarray, targets: np.ndarray, class_weights: np.ndarray
) -> dict[str, float]:
    """The loss that is trained on, and the figure that people look at."""
    outputs = head_outputs(head, vectors)
    about = {"proteins": len(targets)}
    if outputs.ndim == 1:
        loss = float(((outputs - targets) ** 2).mean())
        return about | {"loss": loss, "spearman": spearman(targets, outputs)}
    accuracy = float((outputs.argmax(-1) == targets).mean())
    loss = cross_entropy(head(vectors), targets, class_weights)
    return about | {"loss": loss, "accuracy": accuracy}


def _tune_trunk(
    model: FlaxModel,
    sequences: list[str],
    targets: np.ndarray,
    rows: dict[str, np.ndarray],
    head: LinearHead,
    class_weights: np.ndarray,
    config: TuningConfig,
    shapes: set[Shape],
    record: Callable[[dict[str, Any]], None],
) -> tuple[FlaxModel, LinearHead, Any]:
    held = [sequences[row] for row in rows["valid"]]

    def validate(parameters: Any, head: LinearHead) -> dict[str, float]:
        # Never trained, so that it may share arrays with the model.
        tuned = copy.copy(model)
        tuned.set_parameters(parameters, model.variables, share=True)
        vectors = embed(tuned, held, config.max_length, shapes)
        return _valid_metrics(head, vectors, targets[rows["valid"]], class_weights)

    proteins = list(
        encode_sequences(
            model,
            [sequences[row] for row in rows["train"]],
            max_length=config.max_length,
        )
    )
    wanted = targets[rows["train"]]
    classify = len(class_weights) > 1
    weights = class_weights[wanted] if classify else np.ones(len(wanted))
    trainable, head = tuning_loop.tune(
        model,
        proteins,
        wanted.astype(np.int32 if classify else np.float32),
        weights,
        head,
        tuning_loop.make_trunk(model, config),
        config,
        validate,
        record,
    )
    parameters = tuning_loop.trunk_parameters(model, trainable, config.scale)
    tuned = with_parameters(model, parameters, model.variables)
    return tuned, head, (trainable["adapters"], config.scale) if config.adapter_rank else None
