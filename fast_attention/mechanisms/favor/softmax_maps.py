"""The feature maps of the softmax kernel, by the names that factories know."""

from __future__ import annotations

from fast_attention.arrays.types import Array
from fast_attention.feature_maps import (
    TUNED_ESTIMATORS,
    DarkformerFeatures,
    FeatureMap,
    HedgehogFeatures,
    HyperbolicFeatures,
    PositiveFeatures,
    TrigonometricFeatures,
    TunedFeatures,
)
from fast_attention.feature_maps.projections import ANTITHETIC

LEARNED_ESTIMATORS = ("hedgehog", "darkformer")
"""Names of the estimators whose parameters an optimiser changes, and nothing else."""

ESTIMATORS = (
    "favor+",
    "hyperbolic",
    "trigonometric",
    *TUNED_ESTIMATORS,
    *LEARNED_ESTIMATORS,
)
"""Names of the estimators of the softmax kernel; "trigonometric" alone takes both signs."""


def softmax_map(estimator: str, projection: str, nb_features: int, trained: bool) -> FeatureMap:
    """Returns the map of an estimator, with half the rows where both signs are used."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"Unknown estimator {estimator!r}; choose one of {', '.join(ESTIMATORS)}.")
    base = projection.removesuffix(ANTITHETIC)
    if estimator == "trigonometric":
        if base != projection:
            raise ValueError(
                f"projection={projection!r} uses rows with both signs, which give the same "
                f"trigonometric features twice: use {base!r} with estimator='trigonometric'."
            )
        return TrigonometricFeatures(nb_features, projection)
    both_signs = base != projection or estimator == "hyperbolic"
    if both_signs and nb_features % 2:
        raise ValueError(
            f"Features of both signs come in pairs (estimator={estimator!r}, projection="
            f"{projection!r}): nb_features must be even, got {nb_features}."
        )
    rows = nb_features // 2 if both_signs else nb_features
    if estimator in TUNED_ESTIMATORS:
        return TunedFeatures(estimator, rows, base, both_signs, trained)
    if estimator == "darkformer":
        return DarkformerFeatures(rows, base, both_signs)
    return (HyperbolicFeatures if both_signs else PositiveFeatures)(rows, base)


def hedgehog_map(
    nb_features: int, projection: str, projection_matrix: Array | None, beside_exact: bool
) -> HedgehogFeatures:
    """Returns the map of "hedgehog", whose scale counts beside exact softmax weights alone."""
    if projection != "orthogonal" or projection_matrix is not None:
        raise ValueError(
            "estimator='hedgehog' has no random projection: leave out projection, ortho_features, "
            "ortho_scaling and projection_matrix."
        )
    if nb_features % 2:
        raise ValueError(
            "Features of estimator='hedgehog' come in pairs of both signs: nb_features must be "
            f"even, got {nb_features}."
        )
    return HedgehogFeatures(nb_features // 2, scaled=beside_exact)
