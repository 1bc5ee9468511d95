"""From a trained model with exact attention to a folder with one of linear attention."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.data.corpus import Corpus, join_rows, load_corpus
from fast_attention.protein_lm.data.skipped_records import SkippedRecords, tell
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.output_files import check_output_folder, write_json
from fast_attention.protein_lm.finetune import lora
from fast_attention.protein_lm.finetune.finetuned import fingerprint
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.linearize import measuring, steps
from fast_attention.protein_lm.linearize.config import LinearizeConfig
from fast_attention.protein_lm.linearize.report import (
    STAGES,
    draw_errors,
    format_report,
    read_report,
)
from fast_attention.protein_lm.linearize.training import StateFile, train
from fast_attention.protein_lm.loading import load_run
from fast_attention.protein_lm.modeling import pipeline
from fast_attention.protein_lm.modeling.train_state import Batch
from fast_attention.protein_lm.runs.exporting import save_model
from fast_attention.protein_lm.runs.run_folder import RunFolder, check_free, content, inside
from fast_attention.protein_lm.runs.run_lock import hold_run
from fast_attention.protein_lm.wording import place
from fast_attention.softmax_attention import SoftmaxAttention

RESULT, PICTURE, STATE = "linearize.json", "linearize.png", "linearize_state.npz"

_MEASURED = 4
"""Batches on which errors of layers are measured, and features are calibrated."""
_HELD_OUT = 10
"""Without validation files, one protein of so many is for validation."""


def run_linearize(
    run_dir: str | os.PathLike[str],
    work_dir: str | os.PathLike[str],
    fasta: Sequence[str],
    *,
    valid_fasta: Sequence[str] | None = None,
    on_error: str = "raise",
    gin_file: Sequence[str] = (),
    config: LinearizeConfig | None = None,
) -> dict[str, Any]:
    """Makes the attention of a trained model linear, in stages, and measures each.

    The folder holds the model as ``protein-lm export`` writes it, ``linearize.png`` and, written
    last, ``linearize.json``. Given the same arguments again, an interrupted run resumes from its
    last saved state, and a finished one is only reported.

    Args:
      run_dir: A run, an exported or an imported model, with exact attention.
      work_dir: The new folder.
      fasta: Proteins to train on.
      valid_fasta: Proteins to measure perplexity on; None holds out every tenth of `fasta`.
      on_error: What to do with a record that cannot be read, see `read_proteins`.
      gin_file: As for `loading.open_run`.
      config: Settings; None takes the defaults.

    Returns:
      The content of ``linearize.json``.

    Raises:
      FastaError: If a file cannot be read.
      FloatingPointError: If training diverges.
      RunError: If the model has no exact attention, or the folder holds something else.
    """
    config = config or LinearizeConfig()
    folder = RunFolder(Path(work_dir))
    result_file, picture, state = (inside(folder.path, name) for name in (RESULT, PICTURE, STATE))
    if content(folder) not in ("", "an exported model") or (
        folder.is_export() and not (result_file.exists() or state.exists())
    ):
        raise RunError(f"{work_dir} holds {content(folder)}: give the new model another folder")
    check_free(folder, (RESULT, PICTURE, folder.model.name))
    check_output_folder(folder.path)
    exact, *_ = load_run(run_dir, gin_file=gin_file)
    _check_exact(exact, run_dir, config)
    corpora = _read(exact, fasta, valid_fasta, on_error)
    asked = {
        "model": fingerprint(exact),
        "data": [_digest(corpus) for corpus in corpora],
        "settings": dataclasses.asdict(config),
    }
    if result_file.exists():
        report = read_report(result_file, exact.config.num_layers)
        if report["asked"] != asked:
            raise RunError(
                f"{work_dir} holds the result of another model, data or settings: give another "
                "folder"
            )
        # A process that was killed just before its end leaves it.
        state.unlink(missing_ok=True)
        print(f"{place(work_dir)} is finished\n\n{format_report(report)}")
        return report
    with hold_run(folder):
        file = StateFile(state, asked, exact.config.num_layers)
        linear, exact_layers = _linearize(_Data(*corpora, exact, config), file)
        report = {
            "asked": asked,
            "attention": measuring.describe_attention(linear),
            "exact_layers": list(exact_layers),
            "proteins": [len(corpus) for corpus in corpora],
            "found": file.found,
        }
        if file.stage is None:
            # Nothing was trained; without a state, the model alone could not be resumed.
            file.save(None, 0, ())
        save_model(linear, folder.path)
        draw_errors(picture, report)
        write_json(result_file, report)
        file.remove()
    print(f"{format_report(report)}\n\nwritten to {place(work_dir)}")
    return report


@dataclasses.dataclass(frozen=True)
class _Data:
    """Proteins, and how they are cut into batches."""

    training: Corpus
    valid: Corpus
    exact: FlaxModel
    config: LinearizeConfig

    def batches(self, seed: int) -> Iterable[Batch]:
        """Endless batches to train on; batch i is a function of the seed and of i."""
        return pipeline.make_dataset(
            self.training,
            self.exact.domain,
            length=self._length(self.training),
            batch_size=self.config.batch_size,
            seed=self.config.seed + seed,
            pack=False,
            objective=self.exact.objective,
        )

    def held(self) -> Iterable[Batch]:
        """The validation proteins once; what is hidden is the same each time."""
        return pipeline.eval_batches(
            self.valid,
            self.exact.domain,
            length=self._length(self.valid),
            batch_size=self.config.batch_size,
            objective=self.exact.objective,
        )

    def _length(self, corpus: Corpus) -> int:
        longest = min(self.config.max_length, self.exact.max_length)
        return min(longest, int(corpus.lengths.max()))


def _linearize(data: _Data, file: StateFile) -> tuple[FlaxModel, tuple[int, ...]]:
    """Takes the stages that are not taken yet; their figures go to `file.found`."""
    exact, config, found = data.exact, data.config, file.found
    function = config.attention_fn(exact.config.causal, exact.config.head_dim)
    some = list(itertools.islice(data.batches(0), _MEASURED))
    held = list(itertools.islice(data.held(), _MEASURED))

    def make(layers: tuple[int, ...]) -> FlaxModel:
        model = exact.with_attention(function, exact_layers=layers)
        if function.calibration is not None:
            model.calibrate(some, num_batches=_MEASURED)
        return model

    def measure(name: str, model: FlaxModel, *, errors: bool = True) -> None:
        if name in found:
            return
        messages.note(f"measuring: {STAGES[name]}")
        found[name] = {"perplexity": measuring.perplexity(model, data.held())}
        if errors:
            found[name]["errors"] = measuring.layer_errors(exact, model, held)

    measure("exact", exact, errors=False)
    linear = make(())
    if "ranking" not in found:
        found["ranking"] = {"errors": measuring.layer_errors(exact, linear, held)}
    layers = measuring.worst_layers(found["ranking"]["errors"], config.keep_exact)
    if layers:
        linear = make(layers)
    measure("before", linear)
    features = steps.features_of(linear.weights)
    if features and config.transfer_steps and file.stage != "finetune":
        optimizer = steps.make_optimizer(config.feature_rate, config.transfer_steps)
        trained = train(
            "transfer",
            steps.make_transfer_step(exact, linear, optimizer),
            {"features": features},
            optimizer,
            data.batches(1),
            file,
            mesh=exact.mesh,
            steps=config.transfer_steps,
            save_every=config.save_every,
            seed=config.seed,
        )
        _put(linear, trained)
        measure("transfer", linear)
    if config.finetune != "none" and config.finetune_steps:
        optimizer = steps.make_optimizer(config.rate, config.finetune_steps)
        trained = train(
            "finetune",
            steps.make_finetune_step(exact, linear, optimizer, config),
            _trainable(linear, config),
            optimizer,
            data.batches(2),
            file,
            mesh=exact.mesh,
            steps=config.finetune_steps,
            save_every=config.save_every,
            seed=config.seed,
        )
        _put(linear, trained)
        measure("finetune", linear)
    if config.exact_window is not None:
        measure("window_off", measuring.without_window(linear), errors=False)
        measure("features_off", measuring.without_features(linear), errors=False)
    return linear, layers


def _trainable(linear: FlaxModel, config: LinearizeConfig) -> dict[str, Any]:
    """What fine-tuning begins with."""
    if config.finetune == "full":
        return {"parameters": linear.weights}
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    adapters = lora.init_adapters(linear.weights, config.rank, key)
    return {"adapters": adapters, "features": steps.features_of(linear.weights)}


def _put(linear: FlaxModel, trainable: Any) -> None:
    """Puts what was trained into a model."""
    parameters = steps.parameters_of(trainable, linear.weights, 1.0)
    linear.set_parameters(parameters, linear.variables)


def _check_exact(
    exact: FlaxModel, run_dir: str | os.PathLike[str], config: LinearizeConfig
) -> None:
    function = exact.attention_fn
    if not (function is None or isinstance(function, SoftmaxAttention)):
        raise RunError(
            f"{run_dir} has the attention function {type(function).__name__}, not exact attention: "
            "give a run with exact attention (no FlaxModel.attention_fn)"
        )
    if config.keep_exact >= exact.config.num_layers:
        raise RunError(
            f"--keep_exact={config.keep_exact} leaves no layer to make linear: the model has "
            f"{exact.config.num_layers}"
        )


def _read(
    exact: FlaxModel, fasta: Sequence[str], valid_fasta: Sequence[str] | None, on_error: str
) -> tuple[Corpus, Corpus]:
    """Proteins to train on and to validate on."""

    def load(paths: Sequence[str]) -> Corpus:
        skipped = SkippedRecords()
        corpus = load_corpus(list(paths), exact.domain, on_error=on_error, skipped=skipped)
        tell(skipped)
        return corpus

    training = load(fasta)
    if valid_fasta:
        return training, load(valid_fasta)
    if len(training) < 2:
        raise RunError("got one protein; expected two or more, to train on and to validate on")
    rows = [training.tokens[a:b] for a, b in itertools.pairwise(training.offsets)]
    parts = [
        [row for number, row in enumerate(rows) if (number % _HELD_OUT == 0) == held]
        for held in (False, True)
    ]
    return join_rows(parts[0], training.vocab), join_rows(parts[1], training.vocab)


def _digest(corpus: Corpus) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(corpus.tokens).tobytes())
    digest.update(np.ascontiguousarray(corpus.offsets).tobytes())
    return digest.hexdigest()
