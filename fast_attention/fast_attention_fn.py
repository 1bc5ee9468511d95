"""The attention function itself: linear attention with the signature Flax calls.

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

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.axes import attended_axes, fold_axes
from fast_attention.calibration import Calibration, parameters_of_call, without_unused
from fast_attention.call_arguments import check_heads, prepare_call, refuse_unsupported
from fast_attention.feature_maps import (
    FeatureMap,
    TrainedParameters,
    TunedFeatures,
    TunedParameters,
    begin_training,
    fold,
    fold_trained,
    untuned,
)
from fast_attention.feature_maps.base import Parameters
from fast_attention.linear_attention import (
    LinearAttentionState,
    empty_state,
    linear_attention,
    linear_attention_of_shard,
    prefill,
    step,
)
from fast_attention.linear_attention.inputs import SavedStates
from fast_attention.mesh_layout import AxisName, own_dropout_key
from fast_attention.near_field import NearFieldState, near_field_attention
from fast_attention.near_field import empty_state as empty_near_field_state
from fast_attention.near_field import prefill as near_field_prefill
from fast_attention.near_field import step as near_field_step

AnyProjection = TunedParameters | TrainedParameters | Float[Array, "..."] | None


@dataclasses.dataclass(frozen=True, eq=False)
class FastAttention:
    """Linear attention with the signature of Flax's ``dot_product_attention``.

    Immutable: nothing is kept between calls. Build it with :func:`make_fast_softmax_attention` or
    :func:`make_fast_generalized_attention`.

    Attributes:
      feature_map: how queries and keys become features.
      qkv_dim: head width D the projection is made for; None takes it from each call.
      unidirectional: causal by construction.
      renormalize: divide by the sum of weights.
      epsilon: denominators up to this size are inverted as ``den / epsilon^2``.
      redraw_features: draw a new projection from ``dropout_rng`` where a call passes one.
      seed: of the fixed projection.
      projection_matrix: an explicit fixed projection ``[M, D]``.
      chunk_size: positions handled at once, None for the default of the implementation.
      unroll: chunks unrolled in the compiled loop.
      implementation: of :func:`fast_attention.linear_attention`.
      saved_states: of the same.
      check_masks: check masks given under jit when the program runs.
      exact_window: positions near each one whose weights are those of softmax attention, see
        :func:`fast_attention.near_field.near_field_attention`; None for none.
      calibration: where parameters of a tuned estimator come from, see
        :mod:`fast_attention.calibration`; None for other maps.
      moment_decay: layers keep running averages of the moments of queries and keys in training,
        with this decay a call; None keeps none.
      sequence_axis: the mesh axis along which sequences lie where it is called inside
        ``jax.shard_map``, see :func:`fast_attention.sequence_parallel.along_mesh_axis`.
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
    unroll: int = 1
    implementation: str | None = None
    saved_states: SavedStates | None = None
    check_masks: bool = False
    exact_window: int | None = None
    calibration: Calibration | None = None
    moment_decay: float | None = None
    sequence_axis: AxisName | None = None

    def __call__(
        self,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B S K D"],
        value: Float[Array, "*B S K V"],
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: jax.lax.PrecisionLike = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Array | None = None,
        *,
        axis: int | tuple[int, ...] | None = None,
        key_mask: Bool[Array, ...] | None = None,
        segment_ids: Int[Array, ...] | None = None,
        query_mask: Bool[Array, ...] | None = None,
        projection: AnyProjection = None,
    ) -> Float[Array, "*B T H V"]:
        """Computes attention.

        Args:
          query: ``[*B, T, H, D]``, any number of batch axes.
          key: ``[*B, S, K, D]``, H a multiple of K.
          value: ``[*B, S, K, V]``.
          bias: broadcastable to ``[*B, H, T, S]`` and constant over queries: a factor
            ``exp(bias)`` on keys. A bias that depends on the query raises.
          mask: broadcastable to ``[*B, H, T, S]``, bool or 0/1: constant over queries (a key mask),
            or padding x padding, times causality if the function is causal. See
            :func:`fast_attention.masks.key_mask_from_mask`.
          broadcast_dropout: drop the same keys for all of batch and heads.
          dropout_rng: random key of dropout (and of a redrawn projection).
          dropout_rate: whole keys are dropped from the numerator at this rate, the others scaled
            by ``1 / (1 - rate)``: the column form of dropping attention weights.
          deterministic: no dropout.
          dtype: type of the computation's inputs and output; None promotes query, key and value.
            Exponents, sums and the state are float32 at least.
          precision: of products of features and values.
          module: not None asks for attention weights to be recorded: raises, there are none.
          is_causal: position t sees keys 0..t, as ``unidirectional``. Ignored for one query over
            several keys (a cache), where the mask decides.
          force_fp32_for_softmax: exponents are float32 at least, whether asked for or not.
          qk_attn_weights_einsum: must be None.
          attn_weights_value_einsum: must be None.
          input_positions: must be None.
          axis: attend over this axis, or over several at once, flattened in row-major order; other
            axes before the heads are batch. None is the last axis before the heads. With several
            axes, T and S in masks are the products of their lengths.
          key_mask: ``[*B, S]`` (the shape of key without heads and width) or ``[*B, S, K]``,
            True = visible.
          segment_ids: as ``key_mask``, integers: attention stays within runs of equal ids.
          query_mask: ``[*B, T]`` (the shape of query without heads and width), queries that are no
            padding. It decides only which queries count where parameters come from the call; None
            is `key_mask` where T = S, else all.
          projection: ``[M, D]``, or with leading head axes ``[K, M, D]``; used in place of the
            fixed one. Or parameters of a tuned estimator, calibrated or trained, used as they are.
            Layers that own their projection pass it here.

        Returns:
          ``[*B, T, H, V]``. Rows that see no key are 0.

        Raises:
          ValueError: for anything that cannot be honoured; the message says what to do instead.
        """
        del force_fp32_for_softmax  # Always so.
        refuse_unsupported(
            module, qk_attn_weights_einsum, attn_weights_value_einsum, input_positions
        )
        rng = None if deterministic else dropout_rng
        call = prepare_call(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=own_dropout_key(rng, self.sequence_axis),
            dropout_rate=0.0 if deterministic else dropout_rate,
            dtype=dtype,
            causal=self.unidirectional or is_causal,
            axis=axis,
            key_mask=key_mask,
            segment_ids=segment_ids,
            check_masks=self.check_masks,
        )
        parameters = self.resolve_parameters(projection, query.shape[-1], rng)
        if self._from_call(projection, self.unidirectional or is_causal):
            assert isinstance(self.feature_map, TunedFeatures)
            if query_mask is not None:
                axes = attended_axes(query.ndim, axis)
                query_mask = fold_axes(query_mask.astype(bool), axes, trailing=0)
            parameters = parameters_of_call(self.feature_map, parameters, call, query_mask)
        attend = linear_attention
        if self.sequence_axis is not None:
            attend = functools.partial(linear_attention_of_shard, axis_name=self.sequence_axis)
        if self.exact_window is not None:
            attend = functools.partial(near_field_attention, exact_window=self.exact_window)
        out = attend(
            call.query,
            call.key,
            call.value,
            feature_map=self.feature_map,
            parameters=self._read(parameters),
            causal=call.causal,
            key_mask=call.key_mask,
            key_bias=call.key_bias,
            segment_ids=call.segment_ids,
            normalize=self.renormalize,
            epsilon=self.epsilon,
            chunk_size=self.chunk_size,
            unroll=self.unroll,
            implementation=self.implementation,
            saved_states=self.saved_states,
            precision=precision,
        )
        return call.unfold(out)

    def draw_projection(self, key: Array, head_dim: int) -> AnyProjection:
        """Draws a projection ``[M, D]``, float32; None for a map without one.

        With stored or trained parameters these come with it, of FAVOR+ to start with.
        """
        drawn = self.feature_map.init(key, head_dim)
        if self.calibration == "trained":
            assert isinstance(self.feature_map, TunedFeatures)
            return begin_training(drawn.rows, drawn.tuning, self.feature_map.estimator)
        return drawn.rows if self.calibration == "call" else drawn

    def redraw_projection(
        self, key: Array, projection: TunedParameters | TrainedParameters
    ) -> TunedParameters | TrainedParameters:
        """Draws new rows for stored or trained parameters, which stay as they are."""
        assert isinstance(self.feature_map, TunedFeatures)
        if isinstance(projection, TrainedParameters):
            rows = self.feature_map.redraw_rows(key, projection.rows)
            return projection._replace(rows=rows)
        return self.feature_map.redraw(key, projection)

    def init_state(
        self,
        batch_shape: tuple[int, ...],
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        max_length: int | None = None,
    ) -> LinearAttentionState | NearFieldState:
        """Returns the state before the first token; its size does not depend on ``max_length``."""
        del max_length
        parameters = jax.eval_shape(lambda: self.resolve_parameters(None, head_dim))
        sizes = batch_shape, num_kv_heads, head_dim, value_dim
        if self.exact_window is not None:
            return empty_near_field_state(self.feature_map, parameters, self.exact_window, *sizes)
        return empty_state(self.feature_map, parameters, *sizes)

    def prefill(
        self,
        state: Any,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B T K D"],
        value: Float[Array, "*B T K V"],
        *,
        key_mask: Bool[Array, "*B T"] | None = None,
        projection: AnyProjection = None,
    ) -> tuple[Float[Array, "*B T H V"], Any]:
        """Reads T tokens causally, continuing ``state``; padding (False) may be on either side."""
        check_heads(query, key, value)
        read = prefill if self.exact_window is None else near_field_prefill
        return read(
            state,
            query,
            key,
            value,
            feature_map=self.feature_map,
            parameters=self._causal_parameters(projection, query.shape[-1]),
            key_mask=key_mask,
            normalize=self.renormalize,
            epsilon=self.epsilon,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )

    def step(
        self,
        state: Any,
        query: Float[Array, "*B H D"],
        key: Float[Array, "*B K D"],
        value: Float[Array, "*B K V"],
        *,
        projection: AnyProjection = None,
    ) -> tuple[Float[Array, "*B H V"], Any]:
        """Reads one token: constant time and memory, however many came before."""
        read = step if self.exact_window is None else near_field_step
        return read(
            state,
            query,
            key,
            value,
            feature_map=self.feature_map,
            parameters=self._causal_parameters(projection, query.shape[-1]),
            normalize=self.renormalize,
            epsilon=self.epsilon,
        )

    def resolve_parameters(
        self,
        projection: AnyProjection,
        head_dim: int,
        rng: Array | None = None,
    ) -> Any:
        """Returns the parameters of the feature map for a call.

        Args:
          projection: what the call was given.
          head_dim: D of its queries and keys.
          rng: a key for a redrawn projection, in training.

        Returns:
          Parameters: those given, else those drawn from `rng` if the function redraws, else the
          fixed ones. Rows given to a tuned estimator get the parameters of FAVOR+.
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
        if projection is None and self.redraw_features and rng is not None:
            # Independent of the dropout mask drawn from the same key.
            return self.feature_map.init(jax.random.fold_in(rng, 1), head_dim)
        given = self.projection_matrix if projection is None else projection
        if given is None:
            return jax.tree.map(
                jnp.asarray, _fixed_projection(self.feature_map, self.seed, head_dim)
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
                "queries and keys: they would know the future. Make the function with "
                "unidirectional=True or calibration='stored', and pass calibrate(...) as "
                "projection=; layers keep it (fast_attention.layers.calibrate)."
            )
        return True

    def _causal_parameters(self, projection: Any, head_dim: int) -> Any:
        self._from_call(projection, causal=True)
        parameters = self.resolve_parameters(projection, head_dim)
        return self._read(parameters)

    def _read(self, parameters: Any) -> Any:
        """The parameters that features read here."""
        return without_unused(parameters, not self.renormalize or self.exact_window is not None)


@functools.lru_cache(maxsize=64)
def _fixed_projection(feature_map: FeatureMap, seed: int, head_dim: int) -> Parameters:
    """Draws the parameters of a seed, once, as constants also where a trace is going on."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(np.asarray, feature_map.init(jax.random.key(seed), head_dim))
