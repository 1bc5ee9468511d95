r"""Hedgehog features: a learned linear layer for each head, then a softmax over both signs.

With the layer W of queries or of keys (both initialized as the identity) and ``u = W x``::

    phi(x) = softmax([u, -u])        log phi = [u, -u] - logsumexp([u, -u])

Nothing is random. The kernel ``phi(q) . phi(k)`` is not an estimate of another kernel: how well it
approximates softmax attention depends on training.

Reference: Zhang et al., "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax
Mimicry", arXiv:2402.04347.

Shape letters: B batch (key heads), T length, D head width, R rows of the layer, M = 2 R features.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fast_attention.arrays.types import Array, Float
from fast_attention.feature_maps.base import Features, Parameters, as_row, project
from fast_attention.feature_maps.learned import LearnedFeatures
from fast_attention.feature_maps.projections import haar_orthogonal


class HedgehogParameters(NamedTuple):
    """Learned parameters; all may differ by head.

    Attributes:
      query_weight: W of queries, ``[*B, R, D]``.
      key_weight: W of keys, ``[*B, R, D]``.
      log_scale: ``[*B]``, logarithm of a factor on ``phi(q) . phi(k)``, used together with exact
        softmax weights; None if it would cancel.
    """

    query_weight: Float[Array, "*B R D"]
    key_weight: Float[Array, "*B R D"]
    log_scale: Float[Array, "*B"] | None = None


@dataclasses.dataclass(frozen=True)
class HedgehogFeatures(LearnedFeatures):
    """Features ``softmax([W x, -W x])`` with a learned W, see the module.

    Attributes:
      num_rows: R; the paper uses D. Row i is initialized as the i-th unit vector, rows beyond D as
        random orthonormal ones.
      scaled: also learn ``log_scale``. It is initialized as ``log(M)``: equal features then have
        weight 1, like a key with logit 0 in softmax attention.
    """

    num_rows: int
    scaled: bool = False

    parameters_type: ClassVar[type[HedgehogParameters]] = HedgehogParameters

    def init(self, key: Array, head_dim: int) -> HedgehogParameters:
        """Returns initial parameters of one head; `key` is for rows beyond D only."""
        blocks = -(-self.num_rows // head_dim)
        weight = jnp.eye(head_dim, dtype=jnp.float32)
        if blocks > 1:
            drawn = haar_orthogonal(key, blocks - 1, head_dim).reshape(-1, head_dim)
            weight = jnp.concatenate([weight, drawn.astype(jnp.float32)])
        weight = weight[: self.num_rows]
        scale = jnp.float32(math.log(2 * self.num_rows)) if self.scaled else None
        return HedgehogParameters(weight, weight, scale)

    def head_dim(self, parameters: HedgehogParameters) -> int:
        """Returns D."""
        return parameters.key_weight.shape[-1]

    def num_features(self, parameters: Parameters, head_dim: int) -> int:
        """Returns M."""
        del head_dim
        return 2 * parameters.key_weight.shape[-2]

    def apply(
        self,
        x: Float[Array, "*B T D"],
        parameters: HedgehogParameters,
        *,
        is_query: bool,
        exact_scale: bool,
    ) -> Features:
        """Returns M log-features per position; see the class."""
        half = project(x, parameters.query_weight if is_query else parameters.key_weight)
        log = jnp.concatenate([half, -half], axis=-1)
        # The sum over a query's features is common to all of them and cancels in the ratio.
        if exact_scale or not is_query:
            log = log - jax.nn.logsumexp(log, axis=-1, keepdims=True)
        if exact_scale and parameters.log_scale is not None:
            log = log + as_row(0.5 * parameters.log_scale[..., None], x)
        return Features(None, log)
