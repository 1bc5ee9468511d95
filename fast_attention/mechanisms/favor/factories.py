"""Attention functions that replace ``dot_product_attention`` in Flax.

:func:`make_fast_softmax_attention` and :func:`make_fast_generalized_attention` return a
:class:`FastAttention` that ``flax.nnx.MultiHeadAttention`` and
``flax.linen.MultiHeadDotProductAttention`` accept as ``attention_fn``. This file needs only jax and
numpy.

Shape letters: B batch, T queries, S keys, H heads, K key/value heads, D head width, V value width,
M features.

Reference: Choromanski et al., "Rethinking Attention with Performers", arXiv:2009.14794.
"""

from __future__ import annotations

import jax.numpy as jnp

from fast_attention.arrays.types import Array
from fast_attention.feature_maps import (
    PROJECTIONS,
    TRAINABLE_ESTIMATORS,
    TUNED_ESTIMATORS,
    FeatureMap,
    elementwise_map,
)
from fast_attention.feature_maps.elementwise import Kernel, is_known, relu, resolve_kernel
from fast_attention.feature_maps.projections import ANTITHETIC
from fast_attention.linear.devices import check_device_kind
from fast_attention.linear.implementations import implementation_names
from fast_attention.linear.types import Plan, SavedStates, check_saved_states
from fast_attention.mechanisms.checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_seed,
    mismatch,
)
from fast_attention.mechanisms.favor.calibration import Calibration
from fast_attention.mechanisms.favor.fn import FastAttention
from fast_attention.mechanisms.favor.near_field.near_and_far import (
    check_options as check_near_field,
)
from fast_attention.mechanisms.favor.softmax_maps import ESTIMATORS as ESTIMATORS
from fast_attention.mechanisms.favor.softmax_maps import hedgehog_map, softmax_map
from fast_attention.recipes import attention_factory

# Denominators of signed kernels can vanish; without a guard of the caller's this one is used.
SIGNED_GUARD = 1e-6


@attention_factory
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
    lax_scan_unroll: int | None = None,
    *,
    estimator: str | None = None,
    projection: str | None = None,
    calibration: Calibration | None = None,
    moment_decay: float | None = None,
    seed: int = 0,
    projection_matrix: Array | None = None,
    chunk_size: int | None = None,
    device_kind: str | None = None,
    implementation: str | None = None,
    saved_states: SavedStates | None = None,
    check_masks: bool = False,
    exact_window: int | None = None,
) -> FastAttention:
    """Returns an attention function that approximates softmax attention in linear time (FAVOR+).

    Args:
      qkv_dim: width D of one head's queries and keys; None takes it from each call.
      renormalize_attention: divide by the sum of weights; if False return
        ``sum_s phi(q_t) . phi(k_s) v_s`` at its true scale.
      numerical_stabilizer: for trigonometric features, denominators up to this size (in units of
        the largest key scale) are inverted as ``den / stabilizer^2``. Positive features need no
        such limit. Nothing is added to features.
      nb_features: number of rows of the projection ("hyperbolic", "hedgehog": number of features,
        even; the Hedgehog paper uses 2 D).
      ortho_features: orthogonal blocks of rows; if False independent rows.
      ortho_scaling: norms of rows: 0 for those of Gaussian vectors (unbiased), 1 for sqrt(D).
      redraw_features: if a call passes ``dropout_rng`` and is not deterministic (training), draw
        the projection from it; otherwise use the fixed one.
      unidirectional: causal attention.
      nonnegative_features: positive features; if False, trigonometric features, whose denominators
        can vanish.
      lax_scan_unroll: chunks (not tokens) unrolled in the compiled loop; None is the fastest
        measured value.
      estimator: a name in :data:`.softmax_maps.ESTIMATORS`; None is "favor+" or, without
        ``nonnegative_features``, "trigonometric". "hyperbolic" is "favor+" with both signs of each
        row. Those of :data:`fast_attention.feature_maps.TUNED_ESTIMATORS` have parameters from
        data, see :mod:`fast_attention.feature_maps.gaussian_family`: "wderf_s" has the smallest
        error on trained softmax attention, "wderf" the smallest of the unbiased ones. "hedgehog"
        (:mod:`fast_attention.feature_maps.hedgehog`, no random projection) and "darkformer"
        (:mod:`fast_attention.feature_maps.darkformer`) have a learned matrix per key head, which
        layers of this package hold as a trainable ``nnx.Param``. It is initialized as the identity.
        **In Flax's own layers it is not trained and stays the identity.** A call takes other values
        as ``projection=``.
      projection: coupling of rows: "iid", "orthogonal", "orthogonal_sqrt_d" (rows of equal norm;
        biased), "simplex", "hadamard"; each also with the suffix "_antithetic": half as many rows,
        used with both signs ("orthogonal_antithetic" has the smallest error of the unbiased ones
        and halves the product with W). None follows ``ortho_features`` and ``ortho_scaling``. Do
        not confuse it with ``projection=`` of a call, which takes arrays.
      calibration: source of the parameters of a tuned estimator. "call", the default of
        bidirectional attention: the moments of the queries and keys of each call, for each row,
        without padding and without gradients. "stored", the default of causal attention:
        ``projection=`` of the call, computed by :func:`fast_attention.layers.calibrate` for a
        model, and by :mod:`fast_attention.mechanisms.favor.calibration` for arrays. **Until
        calibrated it is plain FAVOR+.** "trained": parameters of "wderf" or "wderf_s" that layers
        hold as a trainable ``nnx.Param``, see :mod:`fast_attention.feature_maps.trained`.
      moment_decay: with "stored" calibration, decay of the running averages of moments that layers
        keep in training, for :func:`fast_attention.layers.recalibrate`.
      seed: of the fixed projection.
      projection_matrix: an explicit fixed projection ``[M, D]``.
      chunk_size: positions handled at once; None for the implementation's own.
      device_kind: whose chunks are taken, such as "TPU v5e"; see :class:`fast_attention.Plan`.
      implementation: see :func:`fast_attention.linear_attention`.
      saved_states: "all" or a "few" (less memory in the backward pass), see there.
      check_masks: check masks given under jit when the program runs (debugging).
      exact_window: W, number of nearby keys with exact softmax weights; the others are
        approximated. Causal: the last W keys including the position's own; bidirectional: all with
        ``|t - s| <= W``. Needs a positive estimator and implementation "chunked"; see
        :func:`fast_attention.mechanisms.favor.near_field.near_field_attention`.

    Raises:
      ValueError: for options that do not fit together or are out of range.
    """
    if estimator is None:
        estimator = "favor+" if nonnegative_features else "trigonometric"
    elif not nonnegative_features and estimator != "trigonometric":
        raise ValueError(
            f"nonnegative_features=False means trigonometric features, but estimator="
            f"{estimator!r} was requested; give only one of the two."
        )
    check_count("nb_features", nb_features)
    check_number("numerical_stabilizer", numerical_stabilizer, least=0.0)
    check_saved_states(saved_states)
    implementation_names(implementation)
    name = _coupling(projection, ortho_features, ortho_scaling)
    if estimator == "hedgehog":
        feature_map = hedgehog_map(nb_features, name, projection_matrix, exact_window is not None)
    else:
        feature_map = softmax_map(estimator, name, nb_features, calibration == "trained")
    if exact_window is not None:
        exact_window = check_count("exact_window", exact_window)
        check_near_field(exact_window, Plan(feature_map, implementation=implementation))
    return FastAttention(
        feature_map=feature_map,
        qkv_dim=_count("qkv_dim", qkv_dim),
        unidirectional=unidirectional,
        renormalize=renormalize_attention,
        epsilon=_guard(feature_map, numerical_stabilizer),
        redraw_features=redraw_features and estimator != "hedgehog",
        seed=check_seed(seed),
        projection_matrix=_check_projection(projection_matrix, qkv_dim),
        chunk_size=_count("chunk_size", chunk_size),
        unroll=_count("lax_scan_unroll", lax_scan_unroll),
        device_kind=check_device_kind(device_kind),
        implementation=implementation,
        saved_states=saved_states,
        check_masks=check_masks,
        exact_window=exact_window,
        calibration=_calibration(calibration, moment_decay, estimator, unidirectional),
        moment_decay=moment_decay,
    )


@attention_factory
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
    lax_scan_unroll: int | None = None,
    *,
    ortho_scaling: float = 0.0,
    normalize_data: bool = False,
    signed_kernel: bool | None = None,
    seed: int = 0,
    projection_matrix: Array | None = None,
    chunk_size: int | None = None,
    device_kind: str | None = None,
    implementation: str | None = None,
    saved_states: SavedStates | None = None,
    check_masks: bool = False,
) -> FastAttention:
    """Returns linear attention with the kernel ``phi(q) . phi(k)``, ``phi(x) = f(W x) + epsilon``.

    Args:
      qkv_dim: width D of one head's queries and keys; None takes it from each call.
      renormalize_attention: divide by the sum of weights.
      numerical_stabilizer: for signed kernels, denominators up to this size are inverted as
        ``den / stabilizer^2`` (0 means 1e-6); for kernels that are known to be nonnegative,
        division is exact.
      nb_features: number of rows of the projection; unused with "deterministic" features, which are
        D.
      features_type: "deterministic": f of the vectors; "iid", "ortho": f of their random
        projections.
      kernel_fn: the elementwise f, a function or a name of
        :data:`fast_attention.feature_maps.KERNELS`. gelu, tanh, cos, sin and identity take both
        signs, so denominators can vanish. A custom function is treated as signed, unless
        ``signed_kernel`` is False.
      kernel_epsilon: added to every feature.
      redraw_features: as in :func:`make_fast_softmax_attention`.
      unidirectional: causal attention.
      lax_scan_unroll: chunks unrolled in the compiled loop; None is the fastest measured value.
      ortho_scaling: norms of the rows of "ortho" projections, 0 or 1.
      normalize_data: scale queries and keys by ``D^(-1/4)``, as for softmax features.
      signed_kernel: whether a custom ``kernel_fn`` takes both signs; needed to set a
        ``numerical_stabilizer`` for it.
      seed: of the fixed projection.
      projection_matrix: an explicit fixed projection ``[M, D]``, for "iid" and "ortho".
      chunk_size: positions handled at once; None for the implementation's own.
      device_kind: whose chunks are taken, such as "TPU v5e"; see :class:`fast_attention.Plan`.
      implementation: see :func:`fast_attention.linear_attention`.
      saved_states: "all" or a "few" (less memory in the backward pass), see there.
      check_masks: check masks given under jit when the program runs (debugging).

    Raises:
      ValueError: for options that do not fit together or are out of range.
    """
    check_count("nb_features", nb_features)
    check_number("numerical_stabilizer", numerical_stabilizer, least=0.0)
    check_saved_states(saved_states)
    implementation_names(implementation)
    check_choice("features_type", features_type, ("deterministic", "iid", "ortho"))
    check_number("kernel_epsilon", kernel_epsilon, least=0.0)
    if signed_kernel is not None:
        check_flag("signed_kernel", signed_kernel)
    if signed_kernel is None and numerical_stabilizer and not is_known(resolve_kernel(kernel_fn)):
        raise mismatch(
            "signed_kernel",
            "True or False for a custom kernel with a numerical_stabilizer",
            None,
            "True if it takes both signs; nonnegative kernels are divided exactly and need none",
        )
    deterministic = features_type == "deterministic"
    if deterministic and projection_matrix is not None:
        raise ValueError(
            "features_type='deterministic' applies the kernel to the vectors and has no "
            "projection; use 'iid' or 'ortho' with projection_matrix."
        )
    feature_map = elementwise_map(
        kernel_fn,
        epsilon=kernel_epsilon,
        num_rows=None if deterministic else nb_features,
        projection=_projection_name(features_type == "ortho", ortho_scaling),
        normalize_data=normalize_data,
        signed=signed_kernel,
    )
    return FastAttention(
        feature_map=feature_map,
        qkv_dim=_count("qkv_dim", qkv_dim),
        unidirectional=unidirectional,
        renormalize=renormalize_attention,
        epsilon=_guard(feature_map, numerical_stabilizer),
        redraw_features=redraw_features and not deterministic,
        seed=check_seed(seed),
        projection_matrix=_check_projection(projection_matrix, qkv_dim),
        chunk_size=_count("chunk_size", chunk_size),
        unroll=_count("lax_scan_unroll", lax_scan_unroll),
        device_kind=check_device_kind(device_kind),
        implementation=implementation,
        saved_states=saved_states,
        check_masks=check_masks,
    )


def _guard(feature_map: FeatureMap, numerical_stabilizer: float) -> float:
    """Division is exact for nonnegative features; signed features may need a limit."""
    return (numerical_stabilizer or SIGNED_GUARD) if feature_map.signed else 0.0


def _calibration(
    calibration: Calibration | None,
    moment_decay: float | None,
    estimator: str,
    unidirectional: bool,
) -> Calibration | None:
    """Returns the source of parameters, None for estimators without parameters from data."""
    tuned = estimator in TUNED_ESTIMATORS
    check_choice("calibration", calibration, ("call", "stored", "trained", None))
    if not tuned and (calibration is not None or moment_decay is not None):
        raise ValueError(
            f"estimator={estimator!r} has no parameters from data, so calibration="
            f"{calibration!r} and moment_decay={moment_decay!r} have no effect; leave them out, or "
            f"choose one of {', '.join(TUNED_ESTIMATORS)}."
        )
    if calibration == "call" and unidirectional:
        raise ValueError(
            "calibration='call' would let causal attention depend on later tokens; use 'stored'."
        )
    if calibration == "trained" and estimator not in TRAINABLE_ESTIMATORS:
        raise ValueError(
            f"The parameters of estimator={estimator!r} cannot be trained: the estimators "
            f"{' and '.join(TRAINABLE_ESTIMATORS)} include this family, so choose one of these."
        )
    if calibration is None and tuned:
        calibration = "stored" if unidirectional else "call"
    if moment_decay is not None:
        check_number("moment_decay", moment_decay)
    if moment_decay is not None and (calibration != "stored" or not 0 <= moment_decay < 1):
        raise ValueError(
            f"moment_decay, in [0, 1), is for calibration='stored', got {moment_decay} with "
            f"calibration={calibration!r}."
        )
    return calibration


def _coupling(projection: str | None, orthogonal: bool, scaling: float) -> str:
    """Returns the name of a coupling of rows, given by it or by the original's two options."""
    implied = _projection_name(orthogonal, scaling)
    if projection is None:
        return implied
    names = [name + suffix for name in PROJECTIONS for suffix in ("", ANTITHETIC)]
    if projection not in names:
        raise ValueError(f"Unknown projection {projection!r}; choose one of {', '.join(names)}.")
    # "orthogonal" is what the two options say where they were left alone.
    if implied != "orthogonal" and projection.removesuffix(ANTITHETIC) != implied:
        raise ValueError(
            f"projection={projection!r} contradicts ortho_features={orthogonal} with "
            f"ortho_scaling={scaling}, which mean {implied!r}; leave out one of them."
        )
    return projection


def _projection_name(orthogonal: bool, scaling: float) -> str:
    if scaling not in (0, 1):
        raise ValueError(
            "ortho_scaling must be 0 (row norms of Gaussian vectors) or 1 (sqrt of the head "
            f"width), got {scaling!r}."
        )
    if not orthogonal:
        return "iid"
    return "orthogonal_sqrt_d" if scaling == 1 else "orthogonal"


def _count(name: str, number: int | None) -> int | None:
    return None if number is None else check_count(name, number)


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
