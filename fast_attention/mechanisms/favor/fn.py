"""Linear attention as an ``attention_fn``.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
M features.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps import (
    FeatureMap,
    LearnedFeatures,
    TrainedParameters,
    TunedFeatures,
    TunedParameters,
    begin_training,
    fold,
    fold_trained,
    untuned,
)
from fast_attention.feature_maps.base import Parameters
from fast_attention.linear import (
    LinearAttentionState,
    Plan,
    empty_state,
    linear_attention,
    prefill,
    step,
)
from fast_attention.linear.types import SavedStates
from fast_attention.mechanisms.attention_fn import AttentionFn
from fast_attention.mechanisms.call import Call, Takes
from fast_attention.mechanisms.checks import mismatch
from fast_attention.mechanisms.decoding import StateSizes
from fast_attention.mechanisms.favor.calibration import (
    Calibration,
    parameters_of_call,
    without_unused,
)
from fast_attention.mechanisms.favor.near_field import NearFieldState, near_field_attention
from fast_attention.mechanisms.favor.near_field import empty_state as empty_near_field_state
from fast_attention.mechanisms.favor.near_field import prefill as near_field_prefill
from fast_attention.mechanisms.favor.near_field import step as near_field_step
from fast_attention.mechanisms.favor.near_field.cached import attend_from_one
from fast_attention.mesh.layout import AxisName, own_dropout_key


@dataclasses.dataclass(frozen=True, eq=False)
class FastAttention(AttentionFn):
    """Linear attention with the signature of Flax's ``dot_product_attention``.

    Immutable and without state. Build it with :func:`make_fast_softmax_attention` or
    :func:`make_fast_generalized_attention`.

    Attributes:
      feature_map: maps queries and keys to features.
      qkv_dim: head width D of the projection; None takes it from each call.
      unidirectional: causal by construction.
      renormalize: divide by the sum of weights.
      epsilon: denominators up to this size are inverted as ``den / epsilon^2``.
      redraw_features: draw a new projection from ``dropout_rng`` if a call passes one.
      seed: random seed of the fixed projection.
      projection_matrix: an explicit fixed projection ``[M, D]``.
      chunk_size: positions per chunk, None for the default of the implementation.
      unroll: chunks unrolled in the compiled loop.
      device_kind: kind of device for the default chunk size, see :class:`fast_attention.Plan`.
      implementation: of :func:`fast_attention.linear_attention`.
      saved_states: option of :func:`fast_attention.linear_attention`.
      check_masks: check masks given under jit when the program runs.
      exact_window: number of nearby positions with exact softmax weights, see
        :func:`fast_attention.mechanisms.favor.near_field.near_field_attention`; None for none.
      calibration: source of the parameters of a tuned estimator, see
        :mod:`fast_attention.mechanisms.favor.calibration`; None for other maps.
      moment_decay: decay per call of the running averages of query and key moments that layers keep
        in training; None keeps none.
      sequence_axis: the mesh axis along which sequences are sharded, for calls inside
        ``jax.shard_map``, see :meth:`along_axis`.
    """

    feature_map: FeatureMap
    qkv_dim: int | None = None
    unidirectional: bool = False
    renormalize: bool = True
    epsilon: float = 0.0
    redraw_features: bool = False
    seed: int = 0
    projection_matrix: Array | None = None
    chunk_size: int | None = None
    unroll: int | None = None
    device_kind: str | None = None
    implementation: str | None = None
    saved_states: SavedStates | None = None
    check_masks: bool = False
    exact_window: int | None = None
    calibration: Calibration | None = None
    moment_decay: float | None = None
    sequence_axis: AxisName | None = None

    mechanism = "Linear attention"
    forward_mode = "make it with implementation='reference', which supports it"

    @property
    def takes(self) -> Takes:
        """Masks and biases of keys, dropout of keys, and given random features."""
        return Takes(
            projection=True,
            decay=True,
            other_keys=self.exact_window is None,
            symbolic_lengths=self.exact_window is None,
        )

    @property
    def redraws(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """An explicit projection is never redrawn."""
        return self.redraw_features and self.projection_matrix is None

    @property
    def tuned_map(self) -> TunedFeatures | None:
        """The feature map, if its parameters are fitted to data."""
        return self.feature_map if isinstance(self.feature_map, TunedFeatures) else None

    def attend(self, call: Call) -> Float[Array, "*B T H V"]:
        """Attends in linear time; dropout drops whole keys."""
        if call.dropout is not None:
            own = own_dropout_key(call.dropout.key, self.sequence_axis)
            call = dataclasses.replace(call, dropout=call.dropout._replace(key=own))
        parameters = self.resolve_parameters(
            call.projection, call.query.shape[-1], call.training_key
        )
        if self._from_call(call.projection, call.causal):
            assert isinstance(self.feature_map, TunedFeatures)
            parameters = parameters_of_call(self.feature_map, parameters, call)
        attend = linear_attention
        plan = dataclasses.replace(self.plan(call), axis_name=self.sequence_axis)
        options: dict[str, Any] = {"segment_ids": call.segment_ids}
        if call.log_decay is not None:
            if call.over_cache:
                raise mismatch(
                    "log_decay",
                    "None for one query over a cache",
                    f"an array of shape {call.log_decay.shape}",
                    "decode with init_state, prefill and step",
                )
            options["log_decay"] = call.log_decay
        if self.exact_window is not None:
            attend = functools.partial(near_field_attention, exact_window=self.exact_window)
            if call.over_cache:
                # Of causal attention, the window counts the query's own position.
                reach = self.exact_window - 1 if call.steps else self.exact_window
                attend, options = functools.partial(attend_from_one, reach=reach), {}
        return attend(
            call.query,
            call.key,
            call.drop_keys(),
            plan,
            parameters=self._read(parameters),
            key_mask=call.key_mask,
            key_bias=call.key_bias,
            **options,
        )

    def plan(self, call: Call) -> Plan:
        """The static choices of a call of linear attention."""
        return Plan(
            feature_map=self.feature_map,
            causal=call.causal,
            output="mean" if self.renormalize else "sum",
            epsilon=self.epsilon,
            chunk_size=self.chunk_size,
            unroll=self.unroll,
            device_kind=self.device_kind,
            saved_states=self.saved_states,
            implementation=self.implementation,
            precision=call.precision,
        )

    def start(self, sizes: StateSizes) -> LinearAttentionState | NearFieldState:
        """The state before the first token; its size does not depend on ``max_length``."""
        parameters = jax.eval_shape(lambda: self.resolve_parameters(None, sizes.head_dim))
        shape = sizes.batch_shape, sizes.num_kv_heads, sizes.head_dim, sizes.value_dim, sizes.dtype
        if self.exact_window is not None:
            return empty_near_field_state(
                self.feature_map, parameters, self.exact_window, *shape, sizes.decays
            )
        return empty_state(self.feature_map, parameters, *shape)

    def read(self, state: Any, call: Call) -> tuple[Float[Array, "*B T H V"], Any]:
        """Reads T tokens; the state has its true scale, whatever ``renormalize`` is."""
        read = prefill if self.exact_window is None else near_field_prefill
        return read(
            state,
            call.query,
            call.key,
            call.value,
            self.plan(call),
            parameters=self._causal_parameters(call),
            key_mask=None if call.key_mask is None else call.key_mask[..., 0],
            **({} if call.log_decay is None else {"log_decay": call.log_decay}),
        )

    def read_one(self, state: Any, call: Call) -> tuple[Float[Array, "*B 1 H V"], Any]:
        """Reads one token, in constant time and memory."""
        read = step if self.exact_window is None else near_field_step
        decay = {}
        if call.log_decay is not None:
            each = call.log_decay.ndim > 1
            decay["log_decay"] = jnp.squeeze(call.log_decay, -2) if each else call.log_decay
        out, state = read(
            state,
            *(jnp.squeeze(x, -3) for x in (call.query, call.key, call.value)),
            plan=self.plan(call),
            parameters=self._causal_parameters(call),
            **decay,
        )
        return jnp.expand_dims(out, -3), state

    def draw_projection(self, key: Array, head_dim: int) -> Any:
        """Draws a projection ``[M, D]``, float32; None for a map without one.

        If parameters are stored, trained or learned, also returns their initial values.
        """
        drawn = self.feature_map.init(key, head_dim)
        if self.calibration == "trained":
            assert isinstance(self.feature_map, TunedFeatures)
            return begin_training(drawn.rows, drawn.tuning, self.feature_map.estimator)
        return drawn.rows if self.calibration == "call" else drawn

    def redraw_projection(self, key: Array, projection: Any) -> Any:
        """Draws new rows; stored, trained or learned parameters do not change."""
        if isinstance(self.feature_map, LearnedFeatures):
            return self.feature_map.redraw(key, projection)
        assert isinstance(self.feature_map, TunedFeatures)
        if isinstance(projection, TrainedParameters):
            rows = self.feature_map.redraw_rows(key, projection.rows)
            return projection._replace(rows=rows)
        return self.feature_map.redraw(key, projection)

    def resolve_parameters(
        self,
        projection: Any,
        head_dim: int,
        rng: Array | None = None,
    ) -> Any:
        """Returns the parameters of the feature map for a call.

        Args:
          projection: the argument of the call.
          head_dim: D of its queries and keys.
          rng: a key for a redrawn projection, in training.

        Returns:
          The given parameters; otherwise those drawn from `rng` if the function redraws; otherwise
          the fixed ones. A tuned or learned estimator that is given only rows uses the parameters
          of FAVOR+.
        """
        if self.qkv_dim is not None and head_dim != self.qkv_dim:
            raise ValueError(
                f"This attention function was made for heads of width qkv_dim={self.qkv_dim}, but "
                f"queries and keys have width {head_dim}; qkv_dim is the width of one head, not "
                "of all heads together. Build it with the right one, or with qkv_dim=None."
            )
        tuned = isinstance(self.feature_map, TunedFeatures)
        if isinstance(projection, TunedParameters | TrainedParameters):
            trained = isinstance(projection, TrainedParameters)
            fits = self.calibration == "trained" or not trained
            if not tuned or not fits or projection.rows.shape[-1] != head_dim:
                raise ValueError(
                    f"projection holds {'trained' if trained else 'calibrated'} parameters for "
                    f"heads of width {projection.rows.shape[-1]}, but this function has "
                    f"{type(self.feature_map).__name__} with calibration={self.calibration!r} and "
                    f"is called with heads of width {head_dim}; draw_projection(...) and "
                    "calibrate(...) make parameters for one function."
                )
            return fold_trained(projection) if trained else projection
        if projection is None and self.redraws and rng is not None:
            # Independent of the dropout mask drawn from the same key.
            return self.feature_map.init(jax.random.fold_in(rng, 1), head_dim)
        given = self.projection_matrix if projection is None else projection
        if given is None:
            return jax.tree.map(
                jnp.asarray, _fixed_projection(self.feature_map, self.seed, head_dim)
            )
        if isinstance(self.feature_map, LearnedFeatures):
            return self.feature_map.resolve(given, head_dim)
        if isinstance(given, tuple):
            raise ValueError(
                f"projection holds {type(given).__name__}, but this function has "
                f"{type(self.feature_map).__name__}; draw_projection(...) makes parameters for one "
                "function."
            )
        if given.shape[-1] != head_dim:
            raise ValueError(
                f"projection must be [features, head width] = [M, {head_dim}], got shape "
                f"{given.shape}."
            )
        return fold(given, untuned(head_dim)) if tuned else given

    def _from_call(self, projection: Any, causal: bool) -> bool:
        """Whether parameters come from the queries and keys of the call."""
        if self.calibration != "call" or isinstance(projection, TunedParameters):
            return False
        if causal:
            raise ValueError(
                f"Causal attention cannot take the parameters of {self.feature_map} from its own "
                "queries and keys, which would make it depend on later tokens. Make the function "
                "with "
                "unidirectional=True or calibration='stored', and pass calibrate(...) as "
                "projection=; layers keep it (fast_attention.layers.calibrate)."
            )
        return True

    def along_axis(self, axis: AxisName) -> AttentionFn:
        """The function for a shard of the sequence on each device."""
        if self.exact_window is not None:
            raise ValueError(
                f"exact_window={self.exact_window} cannot be used along a mesh axis: leave it out, "
                "or give some heads to make_local_attention."
            )
        if self.calibration == "call":
            raise ValueError(
                "Parameters from each call would depend on the shard of one device only: make the "
                'function with calibration="stored", and calibrate it.'
            )
        return dataclasses.replace(self, sequence_axis=axis)

    @property
    def divides(self) -> bool:
        """Rows and heads are independent, unless parameters are computed from the whole call."""
        return self.exact_window is None and self.calibration != "call"

    def _causal_parameters(self, call: Call) -> Any:
        self._from_call(call.projection, causal=True)
        parameters = self.resolve_parameters(call.projection, call.query.shape[-1])
        return without_unused(parameters, exact_scale=True)

    def _read(self, parameters: Any) -> Any:
        """The parameters that the features use here."""
        return without_unused(parameters, not self.renormalize or self.exact_window is not None)


@functools.lru_cache(maxsize=64)
def _fixed_projection(feature_map: FeatureMap, seed: int, head_dim: int) -> Parameters:
    """Draws the parameters of a seed once, as constants also during tracing."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, feature_map.init(jax.random.key(seed), head_dim))
