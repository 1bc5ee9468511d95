"""A feature map in a file of its own: ``softplus(W x)``.

Shape letters: B batch, T length, M features, D head width.
"""

import dataclasses

import jax

from fast_attention.feature_maps.base import FeatureMap, Features, project


@dataclasses.dataclass(frozen=True)
class SoftplusFeatures(FeatureMap):
    """Features ``log(1 + exp(W x))`` with Gaussian rows W ``[M, D]``."""

    rows: int = 16

    log_kind = "none"

    def init(self, key, head_dim):
        """Draws W."""
        return jax.random.normal(key, (self.rows, head_dim))

    def num_features(self, parameters, head_dim):
        """M."""
        return parameters.shape[-2]

    def apply(self, x, parameters, *, is_query, exact_scale):
        """Features ``[*B, T, M]``."""
        return Features(jax.nn.softplus(project(x, parameters)), None)
