"""Attention functions that take the place of ``dot_product_attention`` in Flax.

:func:`make_fast_softmax_attention` and :func:`make_fast_generalized_attention` return a
:class:`FastAttention` that ``flax.nnx.MultiHeadAttention`` and
``flax.linen.MultiHeadDotProductAttention`` accept as ``attention_fn``. This file needs jax and
numpy alone.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
M features.

Reference: Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fast_attention.array_types import Array, Bool, Float, Int
from fast_attention.axes import attended_axes, fold_axes, unfold_axes
from fast_attention.feature_maps import (
    FeatureMap,
    HyperbolicFeatures,
    PositiveFeatures,
    TrigonometricFeatures,
    elementwise_map,
)
from fast_attention.feature_maps.elementwise import Kernel, relu
from fast_attention.linear_attention import (
    LinearAttentionState,
    empty_state,
    linear_attention,
    prefill,
    step,
)
from fast_attention.masks import key_mask_from_mask, split_bias

Estimator = Literal["favor+", "hyperbolic", "trigonometric"]

# Denominators of signed kernels can vanish; without a guard of the caller's this one is used.
SIGNED_GUARD = 1e-6


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
      epsilon: denominators are inverted as ``den / (den^2 + epsilon^2)``.
      redraw_features: draw a new projection from ``dropout_rng`` where a call passes one.
      seed: of the fixed projection.
      projection_matrix: an explicit fixed projection ``[M, D]``.
      chunk_size: positions handled at once, None for the default of the implementation.
      unroll: chunks unrolled in the compiled loop.
      implementation: of :func:`fast_attention.linear_attention`.
      check_masks: check masks given under jit when the program runs.
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
    check_masks: bool = False

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
        key_mask: Bool[Array, "..."] | None = None,
        segment_ids: Int[Array, "..."] | None = None,
        projection: Float[Array, "..."] | None = None,
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
          key_mask: ``[*B, S]`` (the shape of key without heads and width), True = visible.
          segment_ids: as ``key_mask``, integers: attention stays within runs of equal ids.
          projection: ``[M, D]``, or with leading head axes ``[K, M, D]``; used in place of the
            fixed one. Layers that own their projection pass it here.

        Returns:
          ``[*B, T, H, V]``. Rows that see no key are 0.

        Raises:
          ValueError: for anything that cannot be honoured; the message says what to do instead.
        """
        del force_fp32_for_softmax  # Always so.
        _refuse_unsupported(
            module=module,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
        )
        dtype = dtype or jnp.result_type(query, key, value)
        query, key, value = (x.astype(dtype) for x in (query, key, value))
        axes = attended_axes(query.ndim, axis)
        unfolded = query.shape
        query, key, value = (fold_axes(x, axes, trailing=2) for x in (query, key, value))
        if key_mask is not None:
            key_mask = fold_axes(key_mask, axes, trailing=0)
        if segment_ids is not None:
            segment_ids = fold_axes(segment_ids, axes, trailing=0)

        _check_heads(query, key, value)
        one_of_cache = query.shape[-3] == 1 < key.shape[-3]
        causal = (self.unidirectional or is_causal) and not one_of_cache
        key_mask, key_bias = self._key_mask_and_bias(query, key, mask, bias, key_mask, causal)
        rng = None if deterministic else dropout_rng
        if dropout_rate > 0 and not deterministic:
            value = _drop_keys(value, rng, dropout_rate, broadcast_dropout)
        out = linear_attention(
            query,
            key,
            value,
            feature_map=self.feature_map,
            parameters=self._parameters(projection, rng, query.shape[-1]),
            causal=causal,
            key_mask=key_mask,
            key_bias=key_bias,
            segment_ids=segment_ids,
            normalize=self.renormalize,
            epsilon=self.epsilon,
            chunk_size=self.chunk_size,
            unroll=self.unroll,
            implementation=self.implementation,
            precision=precision,
        )
        return unfold_axes(out, axes, unfolded)

    def draw_projection(self, key: Array, head_dim: int) -> Float[Array, "M D"] | None:
        """Draws a projection ``[M, D]``, float32; None for a map without one."""
        return self.feature_map.init(key, head_dim)

    def init_state(
        self,
        batch_shape: tuple[int, ...],
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        max_length: int | None = None,
    ) -> LinearAttentionState:
        """Returns the state before the first token; its size does not depend on ``max_length``."""
        del max_length
        parameters = jax.eval_shape(lambda: self._parameters(None, None, head_dim))
        return empty_state(
            self.feature_map, parameters, batch_shape, num_kv_heads, head_dim, value_dim
        )

    def prefill(
        self,
        state: LinearAttentionState,
        query: Float[Array, "*B T H D"],
        key: Float[Array, "*B T K D"],
        value: Float[Array, "*B T K V"],
        *,
        key_mask: Bool[Array, "*B T"] | None = None,
        projection: Float[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "*B T H V"], LinearAttentionState]:
        """Reads T tokens causally, continuing ``state``; padding (False) may be on either side."""
        _check_heads(query, key, value)
        return prefill(
            state,
            query,
            key,
            value,
            feature_map=self.feature_map,
            parameters=self._parameters(projection, None, query.shape[-1]),
            key_mask=key_mask,
            normalize=self.renormalize,
            epsilon=self.epsilon,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )

    def step(
        self,
        state: LinearAttentionState,
        query: Float[Array, "*B H D"],
        key: Float[Array, "*B K D"],
        value: Float[Array, "*B K V"],
        *,
        projection: Float[Array, "..."] | None = None,
    ) -> tuple[Float[Array, "*B H V"], LinearAttentionState]:
        """Reads one token: constant time and memory, however many came before."""
        return step(
            state,
            query,
            key,
            value,
            feature_map=self.feature_map,
            parameters=self._parameters(projection, None, query.shape[-1]),
            normalize=self.renormalize,
            epsilon=self.epsilon,
        )

    def _key_mask_and_bias(
        self,
        query: Array,
        key: Array,
        mask: Array | None,
        bias: Array | None,
        key_mask: Array | None,
        causal: bool,
    ) -> tuple[Array | None, Array | None]:
        sizes: dict[str, Any] = {
            "batch_shape": query.shape[:-3],
            "num_queries": query.shape[-3],
            "num_keys": key.shape[-3],
            "num_heads": query.shape[-2],
            "num_kv_heads": key.shape[-2],
        }
        masks, key_bias = [], None
        if key_mask is not None:
            masks.append(key_mask[..., None].astype(bool))
        if mask is not None:
            masks.append(
                key_mask_from_mask(
                    jnp.asarray(mask), **sizes, causal=causal, check_traced=self.check_masks
                )
            )
        if bias is not None:
            key_bias, visible = split_bias(jnp.asarray(bias), **sizes)
            masks.append(visible)
        return (functools.reduce(jnp.logical_and, masks) if masks else None), key_bias

    def _parameters(
        self, projection: Array | None, rng: Array | None, head_dim: int
    ) -> Array | None:
        if self.qkv_dim is not None and head_dim != self.qkv_dim:
            raise ValueError(
                f"This attention function was made for heads of width qkv_dim={self.qkv_dim}, but "
                f"queries and keys have width {head_dim}; qkv_dim is the width of one head, not "
                "of all heads together. Build it with the right one, or with qkv_dim=None."
            )
        if projection is not None:
            return projection
        if self.redraw_features and rng is not None:
            # Independent of the dropout mask drawn from the same key.
            return self.feature_map.init(jax.random.fold_in(rng, 1), head_dim)
        if self.projection_matrix is not None:
            return self.projection_matrix
        fixed = _fixed_projection(self.feature_map, self.seed, head_dim)
        return None if fixed is None else jnp.asarray(fixed)


@functools.lru_cache(maxsize=64)
def _fixed_projection(feature_map: FeatureMap, seed: int, head_dim: int) -> np.ndarray | None:
    """Draws the projection of a seed, once, as a constant also where a trace is going on."""
    with jax.ensure_compile_time_eval():
        drawn = feature_map.init(jax.random.key(seed), head_dim)
        return None if drawn is None else np.asarray(drawn)


def make_fast_softmax_attention(
    qkv_dim: int | None = None,
    renormalize_attention: bool = True,
    numerical_stabilizer: float = 1e-6,
    nb_features: int = 256,
    ortho_features: bool = True,
    ortho_scaling: float = 0.0,
    redraw_features: bool = True,
    unidirectional: bool = False,
    nonnegative_features: bool = True,
    lax_scan_unroll: int = 1,
    *,
    estimator: Estimator | None = None,
    seed: int = 0,
    projection_matrix: Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    check_masks: bool = False,
) -> FastAttention:
    """Returns an attention function that estimates softmax attention in linear time (FAVOR+).

    Args:
      qkv_dim: width D of one head's queries and keys; None takes it from each call.
      renormalize_attention: divide by the sum of weights; if False return
        ``sum_s phi(q_t) . phi(k_s) v_s`` at its true scale.
      numerical_stabilizer: guard of the denominator, in units of its largest term; nothing is added
        to features, as positive denominators are at least 1 in these units.
      nb_features: rows of the projection, any positive number ("hyperbolic": features, even).
      ortho_features: orthogonal blocks of rows; else independent rows.
      ortho_scaling: row lengths, 0: of Gaussian vectors (unbiased), 1: sqrt(D).
      redraw_features: where a call passes ``dropout_rng`` and is not deterministic (training), draw
        the projection from it; otherwise it is the fixed one. Never drawn from data.
      unidirectional: causal attention.
      nonnegative_features: positive features; if False trigonometric ones, whose denominators can
        vanish.
      lax_scan_unroll: chunks (not tokens) unrolled in the compiled loop.
      estimator: "favor+" (positive), "hyperbolic" or "trigonometric"; None follows
        ``nonnegative_features``.
      seed: of the fixed projection.
      projection_matrix: an explicit fixed projection ``[M, D]``.
      chunk_size: positions handled at once; None for the implementation's own.
      implementation: see :func:`fast_attention.linear_attention`.
      check_masks: check masks given under jit when the program runs (debugging).

    Raises:
      ValueError: for options that do not fit together or are out of range.
    """
    if estimator is None:
        estimator = "favor+" if nonnegative_features else "trigonometric"
    elif not nonnegative_features and estimator != "trigonometric":
        raise ValueError(
            f"nonnegative_features=False means trigonometric features, but estimator="
            f"{estimator!r} was asked for; give only one of the two."
        )
    _check_options(nb_features, numerical_stabilizer, lax_scan_unroll, chunk_size, qkv_dim)
    projection = _projection_name(ortho_features, ortho_scaling)
    if estimator == "favor+":
        feature_map: FeatureMap = PositiveFeatures(nb_features, projection)
    elif estimator == "hyperbolic":
        if nb_features % 2:
            raise ValueError(
                f"Hyperbolic features come in pairs: nb_features must be even, got {nb_features}."
            )
        feature_map = HyperbolicFeatures(nb_features // 2, projection)
    elif estimator == "trigonometric":
        feature_map = TrigonometricFeatures(nb_features, projection)
    else:
        raise ValueError(
            f"Unknown estimator {estimator!r}; choose 'favor+', 'hyperbolic' or 'trigonometric'."
        )
    return FastAttention(
        feature_map=feature_map,
        qkv_dim=qkv_dim,
        unidirectional=unidirectional,
        renormalize=renormalize_attention,
        epsilon=numerical_stabilizer or (SIGNED_GUARD if feature_map.signed else 0.0),
        redraw_features=redraw_features,
        seed=seed,
        projection_matrix=_check_projection(projection_matrix, qkv_dim),
        chunk_size=chunk_size,
        unroll=lax_scan_unroll,
        implementation=implementation,
        check_masks=check_masks,
    )


def make_fast_generalized_attention(
    qkv_dim: int | None = None,
    renormalize_attention: bool = True,
    numerical_stabilizer: float = 0.0,
    nb_features: int = 256,
    features_type: str = "deterministic",
    kernel_fn: str | Kernel = relu,
    kernel_epsilon: float = 0.001,
    redraw_features: bool = False,
    unidirectional: bool = False,
    lax_scan_unroll: int = 1,
    *,
    ortho_scaling: float = 0.0,
    normalize_data: bool = False,
    seed: int = 0,
    projection_matrix: Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
    check_masks: bool = False,
) -> FastAttention:
    """Returns linear attention with the kernel ``phi(q) . phi(k)``, ``phi(x) = f(W x) + epsilon``.

    Args:
      qkv_dim: width D of one head's queries and keys; None takes it from each call.
      renormalize_attention: divide by the sum of weights.
      numerical_stabilizer: guard of the denominator; signed kernels have one of 1e-6 where 0 is
        given.
      nb_features: rows of the projection; unused by "deterministic" features, which have D.
      features_type: "deterministic": f on the vectors themselves; "iid", "ortho": f on their
        projections.
      kernel_fn: the elementwise f, a function or a name of
        :data:`fast_attention.feature_maps.KERNELS`. gelu, tanh, cos, sin and identity take both
        signs: denominators can vanish.
      kernel_epsilon: added to every feature.
      redraw_features: as in :func:`make_fast_softmax_attention`.
      unidirectional: causal attention.
      lax_scan_unroll: chunks unrolled in the compiled loop.
      ortho_scaling: row lengths of "ortho" projections, 0 or 1.
      normalize_data: scale queries and keys by ``D^(-1/4)``, as softmax features do.
      seed: of the fixed projection.
      projection_matrix: an explicit fixed projection ``[M, D]``, for "iid" and "ortho".
      chunk_size: positions handled at once; None for the implementation's own.
      implementation: see :func:`fast_attention.linear_attention`.
      check_masks: check masks given under jit when the program runs (debugging).

    Raises:
      ValueError: for options that do not fit together or are out of range.
    """
    _check_options(nb_features, numerical_stabilizer, lax_scan_unroll, chunk_size, qkv_dim)
    if features_type not in ("deterministic", "iid", "ortho"):
        raise ValueError(
            f"features_type must be 'deterministic', 'iid' or 'ortho', got {features_type!r}."
        )
    deterministic = features_type == "deterministic"
    if deterministic and projection_matrix is not None:
        raise ValueError(
            "features_type='deterministic' applies the kernel to the vectors themselves and has no "
            "projection; use 'iid' or 'ortho' with projection_matrix."
        )
    feature_map = elementwise_map(
        kernel_fn,
        epsilon=kernel_epsilon,
        num_rows=None if deterministic else nb_features,
        projection=_projection_name(features_type == "ortho", ortho_scaling),
        normalize_data=normalize_data,
    )
    return FastAttention(
        feature_map=feature_map,
        qkv_dim=qkv_dim,
        unidirectional=unidirectional,
        renormalize=renormalize_attention,
        epsilon=numerical_stabilizer or (SIGNED_GUARD if feature_map.signed else 0.0),
        redraw_features=redraw_features and not deterministic,
        seed=seed,
        projection_matrix=_check_projection(projection_matrix, qkv_dim),
        chunk_size=chunk_size,
        unroll=lax_scan_unroll,
        implementation=implementation,
        check_masks=check_masks,
    )


def _projection_name(orthogonal: bool, scaling: float) -> str:
    if scaling not in (0, 1):
        raise ValueError(
            f"ortho_scaling must be 0 (row lengths of Gaussian vectors) or 1 (sqrt of the head "
            f"width), got {scaling!r}."
        )
    if not orthogonal:
        return "iid"
    return "orthogonal_sqrt_d" if scaling == 1 else "orthogonal"


def _check_options(
    nb_features: int,
    numerical_stabilizer: float,
    unroll: int,
    chunk_size: int | None,
    qkv_dim: int | None,
) -> None:
    for name, number in (
        ("nb_features", nb_features),
        ("lax_scan_unroll", unroll),
        ("chunk_size", chunk_size),
        ("qkv_dim", qkv_dim),
    ):
        if number is not None and (not isinstance(number, (int, np.integer)) or number < 1):
            raise ValueError(f"{name} must be a positive whole number, got {number!r}.")
    if numerical_stabilizer < 0:
        raise ValueError(f"numerical_stabilizer must be at least 0, got {numerical_stabilizer}.")


def _check_projection(projection: Array | None, qkv_dim: int | None) -> Array | None:
    if projection is None:
        return None
    projection = jnp.asarray(projection)
    if projection.ndim < 2 or (qkv_dim is not None and projection.shape[-1] != qkv_dim):
        raise ValueError(
            f"projection_matrix must be [features, head width] = [M, {qkv_dim or 'D'}], got shape "
            f"{projection.shape}."
        )
    return projection


def _check_heads(query: Array, key: Array, value: Array) -> None:
    if query.ndim < 3:
        raise ValueError(
            f"query must be [*batch, length, heads, width], got shape {query.shape}."
        )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if heads % kv_heads or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "Length comes before heads, [*batch, length, heads, width], and the number of query "
            f"heads is a multiple of that of key heads; got query {query.shape}, key {key.shape}, "
            f"value {value.shape}. Are length and heads swapped?"
        )


def _refuse_unsupported(
    module: Any,
    qk_attn_weights_einsum: Any,
    attn_weights_value_einsum: Any,
    input_positions: Any,
) -> None:
    if module is not None:
        raise ValueError(
            "Recording attention weights (sow_weights=True) was asked for, but linear attention "
            "never forms them. Use sow_weights=False."
        )
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise ValueError(
            "Custom einsums for attention weights cannot be used: linear attention has no weight "
            "matrix. Leave qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls unset."
        )
    if input_positions is not None:
        raise ValueError(
            "input_positions cannot be used here. Rotate queries and keys before attention, for "
            "example with fast_attention.layers.MultiHeadAttention(rotary=True)."
        )


def _drop_keys(value: Array, rng: Array | None, rate: float, broadcast: bool) -> Array:
    if rng is None:
        raise ValueError(
            f"dropout_rate={rate} needs dropout_rng, a JAX random key; or pass deterministic=True."
        )
    if rate >= 1:
        return jnp.zeros_like(value)
    leading = (1,) * (value.ndim - 3) if broadcast else value.shape[:-3]
    heads = 1 if broadcast else value.shape[-2]
    keep = jax.random.bernoulli(rng, 1 - rate, (*leading, value.shape[-3], heads, 1))
    return jnp.where(keep, value / (1 - rate), 0).astype(value.dtype)
