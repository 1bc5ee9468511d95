"""FlaxModel: a language model with any objective.

Shape letters: B batch, T length, V vocabulary.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, Self

import jax
import numpy as np

from fast_attention.protein_lm.distributed import process_arrays
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.inference import embedding, scoring
from fast_attention.protein_lm.modeling import (
    attention_exchange as exchange,
)
from fast_attention.protein_lm.modeling import (
    batches,
    fitting,
    metrics,
    train_state,
)
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.model_classes import register_model
from fast_attention.protein_lm.runs.exporting import save_model
from fast_attention.protein_lm.runs.saved_training import load_training, save_training
from fast_attention.protein_lm.runs.stored_models import load_stored


@register_model
class FlaxModel(BuiltModel):
    """A language model over the sequences of a domain; `FlaxLM` and `FlaxBERT` have an objective.

    A thin facade: the arrays are in `state`, and the work is done by the pure, jitted functions
    `initialize`, `train_step`, `eval_step`, `logits_step`, `residue_step` and `embedding_step`.
    Its constructor and its attributes are those of `BuiltModel`.
    """

    def calibrate(self, xs: Any, *, num_batches: int = 4, batch_size: int | None = None) -> None:
        """Fits random features with stored parameters to the queries and keys of some proteins.

        See `fast_attention.layers.calibrate`. The parameters of the model do not change.

        Args:
          xs: As for `fit`.
          num_batches: How many batches of `xs` to look at, all together.
          batch_size: Rows per batch; None takes the model's.

        Raises:
          ValueError: If the attention function has nothing to calibrate, or there is no batch.
        """
        found = self._training_batches(xs, batch_size)
        rows = batches.joined(itertools.islice(found, num_batches))
        batch = train_state.shard_batch(rows, self.mesh)
        state = exchange.calibrate_state(self.graphdef, self.state, batch)
        self.state = jax.tree.map(process_arrays.put, state, self._shardings)

    def fit(
        self,
        xs: Any,
        epochs: int = 1,
        batch_size: int | None = None,
        max_steps: int = 10**6,
        example_weights: Any = None,
    ) -> dict[str, Any]:
        """Trains on some sequences.

        Args:
          xs: Strings, rows of ids (see `batches.as_corpus`), ``(inputs, targets)`` or a dict of
            these (see `pairs.as_pairs`), or several batches, each in one of these forms or that of
            `data.make_dataset`.
          epochs: How often to go through `xs`; 1 for an iterator of batches.
          batch_size: Rows per batch; None takes the model's.
          max_steps: Steps after which to stop.
          example_weights: What each sequence counts, see `batches.weighted`; None counts all
            equally.

        Returns:
          ``last`` and ``average`` metrics of the batches, ``steps`` and ``seconds``.

        Raises:
          FloatingPointError: If the loss or the gradient is not finite.
          ValueError: If there is nothing to train on, or an iterator should be repeated.
        """
        found = self._training_batches(
            xs, batch_size, epochs=epochs, example_weights=example_weights
        )
        return fitting.take_steps(self, itertools.islice(found, max_steps))

    def evaluate(
        self,
        xs: Any,
        steps: int | None = None,
        *,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> dict[str, float]:
        """Mean loss, perplexity and accuracy.

        Args:
          xs: As for `fit`, or a `Corpus`.
          steps: Batches to look at; None looks at all.
          batch_size: Rows per batch; None takes the model's. It does not change the result.
          seed: Of what is hidden, where the objective hides residues.

        Raises:
          ValueError: If nothing is to be predicted.
        """
        found = batches.evaluation_batches(
            self, xs, batch_size=self.batch_size if batch_size is None else batch_size, seed=seed
        )
        return metrics.combine_metrics(self.batch_sums(itertools.islice(found, steps)))

    def fit_batch(self, batch: Any) -> dict[str, np.ndarray]:
        """Takes one training step.

        Args:
          batch: Sequences, pairs, or a batch of `data.make_dataset`, see `batches.one_batch`.

        Returns:
          ``loss``, ``accuracy`` and ``denominator``: the sums of losses and of hits over the batch,
          and of its weights, float32 [1]; `metrics.combine_metrics` makes means of several.

        Raises:
          FloatingPointError: If the loss or the gradient is not finite; parameters stay as they
            were.
        """
        seed = self.random_seed + int(self.state.step)
        (sums,) = fitting.take_each(self, [batches.one_batch(self, batch, seed)])
        return metrics.per_batch(sums)

    def evaluate_batch(self, batch: Any, *, seed: int = 0) -> dict[str, np.ndarray]:
        """The sums that `fit_batch` returns, without a step.

        Args:
          batch: As for `fit_batch`.
          seed: Of what is hidden, where the objective hides residues.
        """
        (sums,) = self.batch_sums([batches.one_batch(self, batch, seed)])
        return metrics.per_batch(sums)

    def batch_sums(self, found: Iterable[train_state.Batch]) -> list[metrics.Sums]:
        """`metrics.token_sums` of each batch, on the host."""
        return process_arrays.fetch([self.apply_step(self.eval_step, batch) for batch in found])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to a folder that `load` and ``protein-lm --run_dir`` read.

        The folder holds what ``protein-lm export`` writes: a description in JSON, and the arrays.
        For the state of the optimiser, see `save_checkpoint`.

        Args:
          path: The folder; created when absent. A model saved there before is replaced.

        Raises:
          OutputError: If the folder cannot be written.
          RunError: If it holds a run.
        """
        save_model(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: FlaxModel | None = None,
    ) -> Self:
        """Reads what `save` wrote, or the model of a run at its best checkpoint.

        Args:
          path: A folder written by `save`, `save_checkpoint`, ``protein-lm train`` or ``export``.
          model: One like it; needed where a part of the model is code of one's own, see
            `loading.open_run`.

        Raises:
          RunError: If the folder holds no model, or one of another class.
        """
        found = load_stored(path, model=model).model
        if not isinstance(found, cls):
            own, other = cls.__name__, type(found).__name__
            raise RunError(f"{path} is a run of {other}, not of {own}: read it with {other}.load")
        return found

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Writes the state of the training to a folder: `saved_training.save_training`."""
        save_training(self, path)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Takes up the state of a training: `saved_training.load_training`."""
        load_training(self, path)

    def score(
        self, sequences: Iterable[str], **options: Any
    ) -> list[scoring.SequenceScore | scoring.PseudoScore]:
        """How probable proteins are: `scoring.score_sequences` as a list."""
        return list(scoring.score_sequences(self, sequences, **options))

    def embed(self, sequences: Iterable[str], **options: Any) -> np.ndarray | list[np.ndarray]:
        """Vectors of proteins: `embedding.embed_sequences`.

        Returns:
          One array [N, M] of N proteins, [N, L, M] for several layers; with ``pool=None``
          a list of N arrays [n, M] or [L, n, M], a row for each residue.

        Raises:
          ValueError: As `embedding.embed_sequences`, or if there is no sequence.
        """
        found = list(embedding.embed_sequences(self, sequences, **options))
        if not found:
            raise ValueError("no sequence was given")
        return found if options.get("pool", embedding.POOL) is None else np.stack(found)

    def _training_batches(
        self, xs: Any, batch_size: int | None, **options: Any
    ) -> Iterator[train_state.Batch]:
        return batches.training_batches(
            self, xs, batch_size=self.batch_size if batch_size is None else batch_size, **options
        )
