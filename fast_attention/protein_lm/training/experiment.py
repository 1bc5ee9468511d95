"""The settings of a training run, under the names that gin files of Google's protein_lm use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fast_attention.mechanisms.wrapped import as_attention_fn
from fast_attention.protein_lm import ranges
from fast_attention.protein_lm.data.corpus import bundled_corpus
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.training.dataset import get_train_valid_files
from fast_attention.softmax_attention import make_softmax_attention

Files = str | Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Files with the proteins of a run.

    Attributes:
      train_files: FASTA files to train on; a dict from files to weights mixes them, see
        `data.make_dataset`. None uses the bundled corpus.
      valid_files: FASTA files for validation during training. None uses the bundled ones if
        training uses the bundled corpus, and otherwise the proteins held out by `valid_fraction`.
      test_files: FASTA files for evaluation at the end. None uses the bundled ones if training uses
        the bundled corpus, and otherwise the validation proteins.
      valid_fraction: Share of the sequences of `train_files` that is held out for validation and
        evaluation, if neither `valid_files` nor `test_files` is given; see
        `held_out.choose_held_out`. 0 holds out none.
      data_dir: A folder of FASTA files instead of `train_files`; `split_files` splits them.
      split_files: Function from a folder to its training files and validation files, see
        `dataset.get_train_valid_files`.
      on_error: What to do with a record that cannot be read: ``"raise"``, ``"skip"`` (the run's
        folder lists the skipped records) or ``"replace"``, see `fasta.read_proteins`.
      new_data: Whether a run may be resumed with other data.
    """

    train_files: Files | Mapping[str, float] | None = None
    valid_files: Files | None = None
    test_files: Files | None = None
    valid_fraction: float = 0.05
    data_dir: str | None = None
    split_files: Callable[[str], tuple[list[str], list[str]]] = get_train_valid_files
    on_error: str = "raise"
    new_data: bool = False

    @property
    def holds_out(self) -> bool:
        """Whether a part of `train_files` is held out for validation."""
        return self.valid_files is None and self.test_files is None and self.valid_fraction > 0

    @property
    def by_split(self) -> dict[str, Any]:
        """The files of ``train``, ``valid`` and ``test``."""
        return {"train": self.train_files, "valid": self.valid_files, "test": self.test_files}

    @property
    def train_paths(self) -> list[str]:
        """The files to train on, without weights."""
        files = self.train_files
        return [files] if isinstance(files, str) else list(files or ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """Content of training batches.

    Attributes:
      batch_size_per_device: Rows of a batch for each device that shares the batch (``data`` times
        ``fsdp`` of `meshes.make_mesh`), unless `batch_size` is given.
      batch_size: Rows of a batch over all devices; None computes it from `batch_size_per_device`. A
        resumed run keeps its batches, also with other devices.
      max_train_length: Maximum number of tokens of a protein, and of a row unless `pack_length` is
        given.
      pack_sequences: Whether several proteins share a row.
      pack_length: Tokens of a row with several proteins; None is `max_train_length`.
      crop: Whether proteins longer than a row are cropped at ``"random"`` places, which differ
        from epoch to epoch, or at their ``"start"``.
      data_seed: Random seed of order, crops and masks.
    """

    batch_size_per_device: int = 128
    batch_size: int | None = None
    max_train_length: int = 512
    pack_sequences: bool = True
    pack_length: int | None = None
    crop: str = "random"
    data_seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimeSettings:
    """When a run ends, validates, logs and saves, counted in steps.

    All of these depend on the step only, so a resumed run writes the same record as an
    uninterrupted one.

    Attributes:
      max_train_steps: Steps after which training ends. It can be increased later.
      epochs: Passes through the training data after which training ends; None means no limit.
      train_summary_frequency: Steps between rows of training metrics.
      eval_frequency: Steps between validations; None validates at the last step only.
      early_stopping: Successive validations without improvement after which training ends; None
        turns it off.
      checkpoint_frequency: Steps between checkpoints; None saves no intermediate ones. A checkpoint
        is also saved at each validation that is better than all before, and at the end.
      checkpoints_to_keep: Number of latest checkpoints to keep, in addition to that of the best
        validation.
      save_checkpoints: False is the same as None for `checkpoint_frequency`.
      restore_checkpoint: False does not resume: it is an error if the folder has a checkpoint.
    """

    max_train_steps: int = 10**6
    epochs: int | None = None
    train_summary_frequency: int = 100
    eval_frequency: int | None = 500
    early_stopping: int | None = None
    checkpoint_frequency: int | None = 10000
    checkpoints_to_keep: int = 3
    save_checkpoints: bool = True
    restore_checkpoint: bool = True

    def validates_at(self, step: int) -> bool:
        """Whether there is a validation after `step` steps."""
        return _is_multiple(step, self.eval_frequency)

    def saves_at(self, step: int) -> bool:
        """Whether there is a checkpoint after `step` steps."""
        return self.save_checkpoints and _is_multiple(step, self.checkpoint_frequency)

    def stops_early(self, step: int, best_step: int | None) -> bool:
        """Whether early stopping ends a run at `step`, after the best validation at `best_step`."""
        if self.early_stopping is None or self.eval_frequency is None or best_step is None:
            return False
        return step - best_step >= self.early_stopping * self.eval_frequency

    def check_early_stopping(self, validates: bool) -> None:
        """Raises ValueError if early stopping has no validation to go by."""
        if self.early_stopping is not None and not validates:
            raise ValueError(
                f"experiment.early_stopping is {self.early_stopping}, but the run has no "
                "validation proteins: give --valid_fasta, or remove early_stopping"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Validation during training, and evaluation at the end.

    Attributes:
      max_eval_length: Maximum number of tokens of a protein in validation; None is the maximum
        length of the model.
      num_eval_steps: Batches per validation, with proteins spread evenly over the files; None uses
        all proteins.
      num_samples: Number of proteins to sample at the end (causal models).
      max_sample_length: Maximum length of these samples in residues; None is the maximum of the
        model.
    """

    max_eval_length: int | None = None
    num_eval_steps: int | None = None
    num_samples: int = 3
    max_sample_length: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(DataSettings, BatchSettings, TimeSettings, EvaluationSettings):
    """All settings of a training run, see `train.run_experiment`; its base classes are the parts.

    Its gin name is ``experiment``.

    Attributes:
      model_cls: Class of the model.
      initial_run: Folder of a run with the initial parameters; None draws them at random. The
        attention function may differ: it has no parameters, and its projections are drawn again.
        The model may have more layers: copies of the last one that contribute nothing at first.
      calibration_batches: Number of training batches for calibrating random features with stored
        parameters before the first step, see `FlaxModel.calibrate`. None uses 4 if the model is
        initialized from a trained one (`initial_run`), and otherwise 0, because calibration on an
        untrained model is of little use.
      xid: Id of the run: its folder is ``{xid}_l{max_train_length}`` in the given folder. None uses
        the given folder itself.

    Raises:
      ValueError: If a number is out of its range, or two settings contradict each other.
    """

    model_cls: Callable[..., FlaxModel] = FlaxLM
    initial_run: str | None = None
    calibration_batches: int | None = None
    xid: int | str | None = None

    def __post_init__(self):
        """Checks each setting, and those that go together."""
        optional = {field.name for field in dataclasses.fields(self) if "None" in str(field.type)}
        for name, allowed in ranges.SETTINGS["experiment"].items():
            value = getattr(self, name)
            if value is not None or name not in optional:
                ranges.check(f"experiment.{name}", value, allowed)
        if self.data_dir is not None and self.train_files is not None:
            raise ValueError(
                "experiment.data_dir and experiment.train_files (--fasta) are both given: give "
                "one of them"
            )
        if self.pack_length is not None and not self.pack_sequences:
            raise ValueError(
                f"experiment.pack_length (batch_ds.pack_length) is {self.pack_length}, but "
                "experiment.pack_sequences = False gives each protein its own row: give one of "
                "them"
            )

    def check_model(self, model: FlaxModel) -> bool:
        """Checks these settings against a model; returns whether its features are stored.

        Raises:
          ValueError: If the model is too short, or has nothing to calibrate.
        """
        length, calibration = self.max_train_length, self.calibration_batches
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
                f"experiment.calibration_batches is {calibration}, but the attention function has "
                "no stored parameters to fit: use make_fast_softmax_attention with an estimator "
                "such as 'wderf_s' and unidirectional = True, or remove calibration_batches"
            )
        return stored


Data = TypeVar("Data", bound=DataSettings)


def find_files(settings: Data) -> Data:
    """The settings with the files of `data_dir` by name.

    Raises:
      FastaError: If the folder cannot be read.
      ValueError: As `split_files`.
    """
    if settings.data_dir is None:
        return settings
    train, valid = settings.split_files(settings.data_dir)
    valid = settings.valid_files or valid or None
    return dataclasses.replace(settings, data_dir=None, train_files=train, valid_files=valid)


def choose_files(settings: Data) -> Data:
    """The settings with the bundled files, where no others are given, and with test files."""
    train, valid, test = settings.train_files, settings.valid_files, settings.test_files
    if train is None:
        train, valid, test = (
            given or str(bundled_corpus(split))
            for given, split in ((None, "train"), (valid, "valid"), (test, "test"))
        )
    return dataclasses.replace(
        settings, train_files=train, valid_files=valid, test_files=test or valid
    )


def _is_multiple(step: int, frequency: int | None) -> bool:
    return frequency is not None and step % frequency == 0
