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
from fast_attention.protein_lm.modeling import attention_exchange as exchange
from fast_attention.protein_lm.modeling import batches, fitting, metrics, train_state
from fast_attention.protein_lm.modeling.built_model import BuiltModel
from fast_attention.protein_lm.modeling.model_classes import register_model
from fast_attention.protein_lm.runs.exporting import save_model
from fast_attention.protein_lm.runs.stored_models import load_stored


@register_model
class FlaxModel(BuiltModel):
    """A language model with any objective; `FlaxLM` and `FlaxBERT` have a fixed one.

    The arrays are in `state`. The pure, jitted functions `initialize`, `train_step`, `eval_step`,
    `logits_step`, `residue_step` and `embedding_step` do the work. The constructor and the
    attributes are those of `BuiltModel`.
    """

    def calibrate(self, xs: Any, *, num_batches: int = 4, batch_size: int | None = None) -> None:
        """Calibrates random features with stored parameters on the queries and keys of proteins.

        See `fast_attention.layers.calibrate`. The parameters of the model do not change.

        Args:
          xs: As for `fit`.
          num_batches: Number of batches of `xs` to use, all at once.
          batch_size: Rows per batch; None uses the model's.

        Raises:
          ValueError: If the attention function has no stored parameters, or there is no batch.
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
          epochs: Number of passes through `xs`; 1 for an iterator of batches.
          batch_size: Rows per batch; None takes the model's.
          max_steps: Steps after which to stop.
          example_weights: Weight of each sequence, see `batches.weighted`; None weights all
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
          steps: Number of batches to use; None uses all.
          batch_size: Rows per batch; None takes the model's. It does not change the result.
          seed: Random seed of the masking, if the objective masks residues.

        Raises:
          ValueError: If there is nothing to predict.
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
          and of its weights, float32 [1]; `metrics.combine_metrics` averages several.

        Raises:
          FloatingPointError: If the loss or the gradient is not finite; the parameters are then
            unchanged.
        """
        seed = self.random_seed + self.step
        (sums,) = fitting.take_each(self, [batches.one_batch(self, batch, seed)])
        return metrics.per_batch(sums)

    def evaluate_batch(self, batch: Any, *, seed: int = 0) -> dict[str, np.ndarray]:
        """The sums that `fit_batch` returns, without a step.

        Args:
          batch: As for `fit_batch`.
          seed: Random seed of the masking, if the objective masks residues.
        """
        (sums,) = self.batch_sums([batches.one_batch(self, batch, seed)])
        return metrics.per_batch(sums)

    def batch_sums(self, found: Iterable[train_state.Batch]) -> list[metrics.Sums]:
        """`metrics.token_sums` of each batch, on the host."""
        return process_arrays.fetch([self.apply_step(self.eval_step, batch) for batch in found])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to a folder that `load` and ``protein-lm --run_dir`` read.

        The folder has the content of ``protein-lm export``: a description in JSON, and the arrays.
        To save the optimizer state too, see `save_checkpoint`.

        Args:
          path: The folder; created if it does not exist. A model saved there before is replaced.

        Raises:
          OutputError: If the folder cannot be written.
          RunError: If the folder contains a run.
        """
        save_model(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        model: FlaxModel | None = None,
    ) -> Self:
        """Loads a model written by `save`, or the best checkpoint of a run.

        Args:
          path: A folder written by `save`, `save_checkpoint`, ``protein-lm train`` or ``export``.
          model: A model of the same structure; needed if a part of the model is code of your own,
            see `loading.open_run`.

        Raises:
          RunError: If the folder has no model, or a model of another class.
        """
        found = load_stored(path, model=model).model
        if not isinstance(found, cls):
            own, other = cls.__name__, type(found).__name__
            raise RunError(f"{path} is a run of {other}, not of {own}: read it with {other}.load")
        return found

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Saves the training state to a folder, see `saved_training.save_training`."""
        # Orbax takes long to import.
        from fast_attention.protein_lm.runs.saved_training import save_training

        save_training(self, path)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Loads a training state, see `saved_training.load_training`."""
        from fast_attention.protein_lm.runs.saved_training import load_training

        load_training(self, path)

    def score(
        self, sequences: Iterable[str], **options: Any
    ) -> list[scoring.SequenceScore | scoring.PseudoScore]:
        """Log-likelihoods of proteins: `scoring.score_sequences` as a list."""
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
