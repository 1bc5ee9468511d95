"""FlaxModel: what the causal and the masked language model have in common.

Shape letters: B batch, T length, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from fast_attention.meshes import make_mesh
from fast_attention.models.on_mesh import lay_on_mesh
from fast_attention.models.transformer import Transformer
from fast_attention.protein_lm import (
    batches,
    data,
    embedding,
    exchange,
    fitting,
    metrics,
    optimizer,
    process_arrays,
    schedules,
    scoring,
    train_state,
)
from fast_attention.protein_lm.corpus import Corpus
from fast_attention.protein_lm.domains import DiscreteDomain
from fast_attention.protein_lm.masking import MaskingConfig
from fast_attention.protein_lm.model_config import make_config
from fast_attention.protein_lm.run_folder import RunError


class FlaxModel:
    """A language model over the sequences of a domain; make a `FlaxLM` or a `FlaxBERT`.

    A thin facade: the arrays are in `state`, and the work is done by the pure, jitted functions
    `initialize`, `train_step`, `eval_step`, `logits_step`, `residue_step` and `embedding_step`.

    Attributes:
      domain: Vocabulary and greatest length.
      config: Of the Transformer.
      attention_fn: As given; None is exact attention.
      masking: How residues are corrupted; None for a causal model.
      random_seed: As given.
      schedule: Learning rate of each step.
      optimizer_options: Keywords of `optimizer.create_optimizer`.
      model_cls: As given.
      ema_decay: As given.
      mesh: The devices; batches are divided over them, and so may be parameters.
      graphdef: Structure of the Transformer.
      abstract_state: Shapes, dtypes and shardings of `state`.
      initialize: ``key -> TrainState``.
      train_step: ``(state, batch) -> (state, sums)``; donates the state.
      eval_step: ``(parameters, variables, batch, packed) -> sums``.
      logits_step: ``(parameters, variables, batch, packed) -> logits``.
      residue_step: Log-probabilities of residues, see `scoring.make_residue_step`.
      embedding_step: Representations, see `embedding.make_embedding_step`.
    """

    objective: ClassVar[str]

    def __init__(
        self,
        domain: DiscreteDomain,
        *,
        attention_fn: Callable[..., Any] | None = None,
        model_cls: Callable[..., nnx.Module] = Transformer,
        random_seed: int = 0,
        batch_size: int = 32,
        learning_rate: float | schedules.Schedule = 1e-3,
        weight_decay: float = 0.1,
        grad_clip: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.98,
        epsilon: float = 1e-9,
        ema_decay: float | None = None,
        mesh: Mesh | None = None,
        **model_kwargs: Any,
    ):
        """Builds the model; its parameters are made when `state` is first read.

        Args:
          domain: What is modelled.
          attention_fn: Replaces exact attention in every layer, for instance the result of
            ``make_fast_softmax_attention()``; None is exact attention.
          model_cls: Called as ``model_cls(config, attention_fn, rngs=rngs)``.
          random_seed: Of parameters, dropout, masks and, by default, samples.
          batch_size: Rows per batch in `fit` and `evaluate`, unless they are told.
          learning_rate: A number, or a function from a step to a number.
          weight_decay: AdamW's, on matrices other than embeddings.
          grad_clip: Largest global norm of a gradient; None does not clip.
          beta1: AdamW's.
          beta2: AdamW's.
          epsilon: AdamW's.
          ema_decay: Of a moving average of the parameters, in [0, 1), such as 0.999; validation,
            evaluation and samples are then those of the average (see
            `train_state.make_train_step`). None keeps no average.
          mesh: From `make_mesh`; None divides batches over all devices, which hold the same
            parameters.
          **model_kwargs: Fields of `TransformerConfig`, ``max_len`` among them (by default the
            domain's length).

        Raises:
          TypeError: At a keyword that `TransformerConfig` does not have.
          ValueError: If `ema_decay` is out of its range.
        """
        if not hasattr(self, "objective"):
            raise TypeError("FlaxModel is what FlaxLM and FlaxBERT share: make one of them")
        self.domain = domain
        self.masking: MaskingConfig | None = None
        self.random_seed = random_seed
        self.batch_size = batch_size
        self.config = make_config(self.objective == "causal", domain, model_kwargs)
        self.optimizer_options = {
            "weight_decay": weight_decay,
            "grad_clip": grad_clip,
            "beta1": beta1,
            "beta2": beta2,
            "epsilon": epsilon,
        }
        self.model_cls = model_cls
        self.ema_decay = ema_decay
        self.mesh = make_mesh() if mesh is None else mesh
        self._build(attention_fn, learning_rate)

    def _build(
        self, attention_fn: Callable[..., Any] | None, learning_rate: float | schedules.Schedule
    ) -> None:
        """Makes the structure around an attention function, and what is compiled of it."""
        self.attention_fn = attention_fn
        if not callable(learning_rate):
            learning_rate = schedules.create_learning_rate_scheduler("constant", learning_rate)
        self.schedule: schedules.Schedule = learning_rate
        self._optimizer = optimizer.create_optimizer(self.schedule, **self.optimizer_options)

        def build(rngs: nnx.Rngs) -> nnx.Module:
            return self.model_cls(self.config, attention_fn, rngs=rngs)

        abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        lay_on_mesh(abstract, self.mesh)
        self.graphdef, parameters, variables = train_state.split_model(abstract)
        averaged = self.ema_decay is not None
        self.abstract_state = train_state.abstract_state(
            parameters, variables, self._optimizer, self.mesh, averaged=averaged
        )
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self.initialize = train_state.make_initializer(
            build, self._optimizer, averaged=averaged, shardings=self._shardings
        )
        self._make_train_step()
        self.eval_step = train_state.make_eval_step(self.graphdef)
        self.logits_step = train_state.make_logits(self.graphdef)
        self.residue_step = scoring.make_residue_step(self.graphdef, self.objective)
        self.embedding_step = embedding.make_embedding_step(self.graphdef, self.objective)
        self._state: train_state.TrainState | None = None

    def _make_train_step(self) -> None:
        self.train_step = train_state.make_train_step(
            self.graphdef, self._optimizer, ema_decay=self.ema_decay, shardings=self._shardings
        )

    def set_num_steps(self, number: int) -> None:
        """Says how long training takes: see `schedules.FactorSchedule.over`."""
        if isinstance(self.schedule, schedules.FactorSchedule):
            self.schedule = self.schedule.over(number)
            self._optimizer = optimizer.create_optimizer(self.schedule, **self.optimizer_options)
            self._make_train_step()

    @property
    def state(self) -> train_state.TrainState:
        """All arrays; made from `random_seed` when first read."""
        if self._state is None:
            self._state = self.initialize(jax.random.key(self.random_seed))
        return self._state

    @state.setter
    def state(self, state: train_state.TrainState) -> None:
        self._state = state

    @property
    def weights(self) -> Any:
        """The parameters that predictions are made with: their average, where one is kept."""
        return train_state.weights(self.state)

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence: the domain's length, or fewer learned positions."""
        learned = self.config.positions == "learned"
        return min(self.domain.length, self.config.max_len) if learned else self.domain.length

    @property
    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.parameters))

    def set_parameters(self, parameters: Any, variables: Any) -> None:
        """Replaces the model's arrays; step, optimiser and randomness start anew."""
        key = jax.random.key(self.random_seed)
        state = train_state.make_state(
            parameters, variables, self._optimizer, key, averaged=self.ema_decay is not None
        )
        self.state = jax.tree.map(process_arrays.put, state, self._shardings)

    def with_attention(
        self,
        attention_fn: Callable[..., Any] | None,
        *,
        learning_rate: float | schedules.Schedule | None = None,
    ) -> Self:
        """The same model, with the same parameters, around another attention function.

        Nothing is converted, see `fast_attention.layers.with_attention`. Projections are drawn from
        `random_seed`, stored parameters of features wait for `calibrate`, training starts anew.

        Args:
          attention_fn: As for the constructor; None is exact attention.
          learning_rate: Of its training; None is that of this model, from the first step on.
        """
        model = copy.copy(self)
        model._state = None
        model._build(attention_fn, self.schedule if learning_rate is None else learning_rate)
        # A state is donated: no buffer may belong to two.
        parameters = jax.tree.map(jnp.copy, self.weights)
        model.set_parameters(*exchange.keep_features(model.state, parameters))
        return model

    def with_mesh(self, mesh: Mesh) -> Self:
        """The same model, with the same parameters, on other devices; training starts anew."""
        model = copy.copy(self)
        model._state, model.mesh = None, mesh
        model._build(self.attention_fn, self.schedule)
        model.set_parameters(*process_arrays.fetch((self.weights, self.state.variables)))
        return model

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
          xs: Strings, rows of ids (see `batches.as_corpus`), or batches of the form of
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
        self, xs: Any, *, batch_size: int | None = None, seed: int = 0
    ) -> dict[str, float]:
        """Mean loss, perplexity and accuracy.

        Args:
          xs: As for `fit`, or a `Corpus`.
          batch_size: Rows per batch; None takes the model's. It does not change the result.
          seed: Of the masks of a masked model.

        Raises:
          ValueError: If nothing is to be predicted.
        """
        found = batches.as_batches(xs)
        if found is None:
            corpus = xs if isinstance(xs, Corpus) else batches.as_corpus(xs, self.domain)
            found = data.eval_batches(
                corpus,
                self.domain,
                length=int(corpus.lengths.max()),
                batch_size=self.batch_size if batch_size is None else batch_size,
                objective=self.objective,
                seed=seed,
                masking=self.masking,
            )
        return metrics.combine_metrics(self.batch_sums(found))

    def batch_sums(self, found: Iterable[train_state.Batch]) -> list[metrics.Sums]:
        """`metrics.token_sums` of each batch, on the host."""
        return process_arrays.fetch([self._apply(self.eval_step, batch) for batch in found])

    @classmethod
    def load(cls, run_dir: str | os.PathLike[str]) -> Self:
        """Reads the model of a trained run, with the parameters of its best checkpoint.

        Args:
          run_dir: A folder written by ``protein-lm train`` or ``export``.

        Raises:
          RunError: If the folder is no run's, or its model is of another class.
        """
        # The description of a run names the models, whose modules import this one.
        from fast_attention.protein_lm.loading import load_run

        model = load_run(os.fspath(run_dir)).model
        if not isinstance(model, cls):
            own, other = cls.__name__, type(model).__name__
            raise RunError(
                f"{run_dir} is a run of {other}, not of {own}: read it with {other}.load"
            )
        return model

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

    def logits(self, xs: Any) -> jax.Array:
        """Logits, float32 [B, T, V].

        Args:
          xs: One batch, or sequences as for `fit`: then T is the length of the longest, its end
            token included, and nothing is masked. Those of a causal model at t come from
            the residues before t.
        """
        if not batches.is_batch(xs):
            corpus = batches.as_corpus(xs, self.domain)
            xs = batches.in_order(corpus, self.domain, self.objective)
        return self._apply(self.logits_step, xs)

    def _apply(self, step: Callable[..., Any], batch: train_state.Batch) -> Any:
        return step(
            self.weights,
            self.state.variables,
            train_state.shard_batch(batch, self.mesh),
            packed=train_state.is_packed(batch),
        )

    def _training_batches(
        self, xs: Any, batch_size: int | None, **options: Any
    ) -> Iterator[train_state.Batch]:
        return batches.training_batches(
            xs,
            self.domain,
            objective=self.objective,
            masking=self.masking,
            batch_size=self.batch_size if batch_size is None else batch_size,
            seed=self.random_seed + int(self.state.step),
            **options,
        )
