"""The tokens, the arrays and the compiled functions of a protein language model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fast_attention.mesh.meshes import with_auto_axes
from fast_attention.models.transformer import Transformer
from fast_attention.protein_lm.data.domains import DiscreteDomain
from fast_attention.protein_lm.distributed import process_arrays
from fast_attention.protein_lm.modeling import attention_exchange as exchange
from fast_attention.protein_lm.modeling import (
    batches,
    inference_steps,
    optimizer,
    pairs,
    schedules,
    train_state,
)
from fast_attention.protein_lm.modeling.model_config import make_config, make_tokens
from fast_attention.protein_lm.modeling.model_options import ModelOptions, check_state, take_options
from fast_attention.protein_lm.modeling.model_structure import Build, describe_model
from fast_attention.protein_lm.modeling.objectives import Objective, get_objective


class BuiltModel:
    """The parts of a `FlaxModel`: its tokens, its arrays, and its compiled functions.

    Attributes:
      domain: Alphabet and maximum length.
      objective: The training objective.
      options: As given, see `ModelOptions`.
      sampling_kwargs: Default options of `sample`.
      tokens: Ids of special tokens, and the size of the model's vocabulary.
      config: Configuration of the Transformer.
      attention_fn: As given; None is exact attention.
      random_seed: As given.
      schedule: Learning rate of each step.
      optimizer_options: See `optimizer.OptimizerOptions`.
      model_cls: As given.
      ema_decay: As given.
      mesh: The devices; batches are sharded over them, and optionally parameters.
      graphdef: Structure of the Transformer.
      abstract_state: Shapes, dtypes and shardings of `state`.
      initialize: ``key -> TrainState``.
      train_step: ``(state, batch) -> (state, sums)``; donates the state.
      eval_step: ``(parameters, variables, batch, packed) -> sums``.
      logits_step: ``(parameters, variables, batch, packed) -> logits``.
      residue_step: Log-probabilities of residues, see `inference_steps.make_residue_step`.
      embedding_step: Representations, see `inference_steps.make_embedding_step`.
    """

    own_objective: Objective | None = None
    """The objective of a class of models; None where it is an argument."""

    def __init__(
        self,
        domain: DiscreteDomain,
        *,
        objective: Objective | str | None = None,
        attention_fn: Callable[..., Any] | None = None,
        model_cls: Callable[..., nnx.Module] = Transformer,
        random_seed: int = 0,
        batch_size: int = 32,
        learning_rate: float | schedules.Schedule = 1e-3,
        ema_decay: float | None = None,
        mesh: Mesh | None = None,
        **kwargs: Any,
    ):
        """Builds the model; its parameters are created when `state` is first read.

        Args:
          domain: The sequences to model.
          objective: The training objective: an object of `objectives`, or the name of one with
            default options. `FlaxLM` and `FlaxBERT` set it.
          attention_fn: Replaces exact attention in every layer, for instance the result of
            ``make_fast_softmax_attention()``; None is exact attention.
          model_cls: Called as ``model_cls(config, attention_fn, rngs=rngs)``.
          random_seed: Random seed of parameters, dropout, masks and, by default, samples.
          batch_size: Default number of rows per batch in `fit` and `evaluate`.
          learning_rate: A number, or a function from a step to a number.
          ema_decay: Decay of an exponential moving average of the parameters, in [0, 1), such as
            0.999. Validation, evaluation and sampling then use the average (see
            `train_state.make_train_step`). None keeps no average.
          mesh: Result of `make_mesh`; None shards batches over all devices and replicates
            parameters.
          **kwargs: Fields of `OptimizerOptions`, `ModelOptions` and `TransformerConfig`.
            ``max_len``, by default the domain's length, is the maximum number of residues with
            learned positions; there is one more position for the begin or the end token.

        Raises:
          TypeError: At a keyword that `TransformerConfig` does not have.
          ValueError: If `ema_decay` is out of range, or another value is not possible.
        """
        self.objective: Objective = _choose(type(self).__name__, self.own_objective, objective)
        self.objective.check(domain.vocab)
        self.options = take_options(ModelOptions, kwargs)
        self.optimizer_options = take_options(optimizer.OptimizerOptions, kwargs)
        with_bos = self.options.with_bos
        if with_bos is None:
            with_bos = self.objective.begins
        self.domain = domain
        self.tokens = make_tokens(
            domain.vocab, with_bos, self.options.with_mask, self.objective.num_sentinels
        )
        if self.objective.begins and self.tokens.bos is None:
            raise ValueError(
                f"{type(self).__name__} reads a begin token before every sequence: leave out "
                "with_bos=False, or make the domain with include_bos=True"
            )
        self.sampling_kwargs = self.options.sampling(self.objective.sampling_options)
        self.random_seed = random_seed
        self.batch_size = batch_size
        self.config = make_config(self.objective.causal, domain, self.tokens, kwargs)
        self.model_cls = model_cls
        self.ema_decay = ema_decay
        self.mesh = self.options.mesh(mesh)
        self._build(attention_fn, learning_rate)

    def _build(
        self, attention_fn: Callable[..., Any] | None, learning_rate: float | schedules.Schedule
    ) -> None:
        """Makes the structure around an attention function, and what is compiled of it."""
        self.attention_fn = attention_fn
        if not callable(learning_rate):
            learning_rate = schedules.create_learning_rate_scheduler("constant", learning_rate)
        self.schedule: schedules.Schedule = learning_rate
        self._optimizer = optimizer.create_optimizer(self.schedule, self.optimizer_options)

        # A protein of max_len residues is read with a begin or an end token, and sentinels.
        positions = int(self.objective.room(self.config.max_len + 1))
        config = dataclasses.replace(self.config, max_len=positions)

        build = Build(self.model_cls, config, attention_fn)
        averaged = self.ema_decay is not None
        # What dtypes of arrays depend on beside the model.
        settings = jax.dtypes.canonicalize_dtype(float), jax.eval_shape(jax.random.key, 0).dtype
        self.graphdef, self.abstract_state = describe_model(
            build, self._optimizer, self.mesh, averaged, settings
        )
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        self.initialize = train_state.make_initializer(
            build,
            self._optimizer,
            averaged=averaged,
            shardings=train_state.Shardings.of(self.abstract_state),
        )
        self._make_train_step()
        self.eval_step = train_state.make_eval_step(self.graphdef)
        self.logits_step = train_state.make_logits(self.graphdef)
        self.residue_step = inference_steps.make_residue_step(self.graphdef)
        self.embedding_step = inference_steps.make_embedding_step(self.graphdef, self.objective)
        self._state: train_state.TrainState | None = None
        self._predicting: tuple[Any, Any] | None = None

    def _make_train_step(self) -> None:
        self.train_step = train_state.make_train_step(
            self.graphdef,
            self._optimizer,
            ema_decay=self.ema_decay,
            shardings=train_state.Shardings.of(self.abstract_state),
        )

    def set_num_steps(self, number: int) -> None:
        """Sets the number of training steps, see `schedules.FactorSchedule.over`."""
        if isinstance(self.schedule, schedules.FactorSchedule):
            self.schedule = self.schedule.over(number)
            self._optimizer = optimizer.create_optimizer(self.schedule, self.optimizer_options)
            self._make_train_step()

    @property
    def length(self) -> int:
        """The maximum number of tokens of a sequence in the domain."""
        return self.domain.length

    @property
    def vocab_size(self) -> int:
        """Number of tokens of the domain, plus those that the model adds."""
        return self.tokens.vocab_size

    @property
    def bos_token(self) -> int | None:
        """Id of the begin token, or None."""
        return self.tokens.bos

    @property
    def eos_token(self) -> int | None:
        """Id of the end token, or None."""
        return self.tokens.eos

    @property
    def pad_token(self) -> int | None:
        """Id of the padding token, or None."""
        return self.tokens.pad

    @property
    def mask_token(self) -> int | None:
        """Id of the mask token, or None."""
        return self.tokens.mask

    @property
    def state(self) -> train_state.TrainState:
        """All arrays, those of the optimizer included.

        They are created when first read: from `random_seed`, or from the arrays that
        `set_parameters` was given. Predictions need only `weights` and `variables`.
        """
        if self._state is not None:
            return self._state
        key = jax.random.key(self.random_seed)
        if self._predicting is None:
            state = self.initialize(key)
        else:
            averaged = self.ema_decay is not None
            # A state is donated: copies of this model keep the arrays that they predict with.
            arrays = self._placed(*self._predicting, process_arrays.put_copy)
            state = train_state.make_state(*arrays, self._optimizer, key, averaged=averaged)
            state = jax.tree.map(process_arrays.put, state, self._shardings)
        self.state = state
        return state

    @state.setter
    def state(self, state: train_state.TrainState) -> None:
        self._state, self._predicting = state, None

    @property
    def weights(self) -> Any:
        """The parameters used for predictions: the moving average, if there is one."""
        if self._predicting is not None:
            return self._predicting[0]
        return train_state.weights(self.state)

    @property
    def variables(self) -> Any:
        """Nested dict of the model's other arrays, attention projections among them."""
        return self.state.variables if self._predicting is None else self._predicting[1]

    @property
    def step(self) -> int:
        """Number of training steps taken."""
        return 0 if self._predicting is not None else int(self.state.step)

    @property
    def max_length(self) -> int:
        """Maximum length in tokens: that of the domain, or less with learned positions."""
        learned = self.config.positions == "learned"
        return min(self.domain.length, self.config.max_len) if learned else self.domain.length

    def get_weights(self) -> train_state.TrainState:
        """A copy of `state`, for `set_weights`: parameters, optimiser, step and random key."""
        # The step donates its state: what a caller keeps must not share its buffers.
        return jax.tree.map(jnp.copy, self.state)

    def set_weights(self, state: train_state.TrainState) -> None:
        """Replaces `state` by a copy of what `get_weights` returned, of this or an equal model.

        Raises:
          TypeError: If it is not a state.
          ValueError: If its arrays are those of another model.
        """
        if not isinstance(state, train_state.TrainState):
            raise TypeError(
                f"expected the result of get_weights, but got a {type(state).__name__}; parameters "
                "alone are replaced by set_parameters"
            )
        check_state(state, self.abstract_state)
        self.state = jax.tree.map(
            lambda array, where: process_arrays.put(jnp.copy(array), where), state, self._shardings
        )

    @property
    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.parameters))

    def set_parameters(self, parameters: Any, variables: Any, *, share: bool = False) -> None:
        """Replaces the model's arrays; step, optimizer and random key are reset.

        Args:
          parameters: As in `state`.
          variables: As in `state`.
          share: Keep these arrays instead of copies, which saves memory. Nobody may donate them.
        """
        put = process_arrays.put if share else process_arrays.put_copy
        self._state, self._predicting = None, self._placed(parameters, variables, put)

    def _placed(self, parameters: Any, variables: Any, put: Callable[..., Any]) -> tuple[Any, Any]:
        """Arrays on the devices of the model."""
        where = self._shardings.parameters, self._shardings.variables
        return jax.tree.map(put, (parameters, variables), where)

    def with_attention(
        self,
        attention_fn: Callable[..., Any] | None,
        *,
        learning_rate: float | schedules.Schedule | None = None,
        exact_layers: Sequence[int] = (),
    ) -> Self:
        """Returns the model with the same parameters and another attention function.

        No weights are converted, see `fast_attention.layers.with_attention`. Projections are drawn
        from `random_seed`, stored parameters of features need `calibrate`, and the training state
        is reset.

        Args:
          attention_fn: As for the constructor; None is exact attention.
          learning_rate: Learning rate of the new model; None uses that of this model, from the
            first step on.
          exact_layers: Layers, counted from 1, that keep exact attention.
        """
        model = copy.copy(self)
        model.config = dataclasses.replace(self.config, exact_layers=tuple(exact_layers))
        model._build(attention_fn, self.schedule if learning_rate is None else learning_rate)
        model.set_parameters(*exchange.keep_features(model.state, self.weights))
        return model

    def with_mesh(self, mesh: Mesh) -> Self:
        """Returns the model with the same parameters and a new training state on other devices."""
        model = copy.copy(self)
        model.mesh = with_auto_axes(mesh)
        model._build(self.attention_fn, self.schedule)
        model.set_parameters(*process_arrays.fetch((self.weights, self.variables)))
        return model

    def logits(self, xs: Any) -> jax.Array:
        """Logits, float32 [B, T, V].

        Args:
          xs: One batch, pairs, or sequences as for `fit`. For sequences, T is the length of the
            longest including its end token, and nothing is masked. The logits of a causal model at
            t depend on the residues before t.
        """
        if pairs.is_pairs(xs):
            xs = pairs.pair_batch(pairs.as_pairs(xs, self.tokens), self.tokens)
        elif not batches.is_batch(xs):
            corpus = batches.as_corpus(xs, self.domain)
            xs = batches.in_order(corpus, self.domain, self.objective)
        return self.apply_step(self.logits_step, xs)

    def apply_step(self, step: Callable[..., Any], batch: train_state.Batch) -> Any:
        """Calls `eval_step` or `logits_step` on a batch, with the parameters that predict."""
        return step(
            self.weights,
            self.variables,
            train_state.shard_batch(batch, self.mesh),
            packed=train_state.is_packed(batch),
        )


def _choose(name: str, own: Objective | None, given: Objective | str | None) -> Objective:
    """The objective of a class of models, or else the one that is given."""
    if own is not None and given is not None:
        raise ValueError(
            f"{name} has the objective {own.name}, but got objective={given!r}: make a FlaxModel "
            "(experiment.model_cls = @FlaxModel), or leave it out"
        )
    if own is None and given is None:
        raise TypeError(
            "FlaxModel needs an objective, such as 'span_corruption': give one, or make a FlaxLM "
            "(causal) or a FlaxBERT (masked)"
        )
    return get_objective(own or given or "")
