r"""Hedgehog features: a learned linear layer of each head, then a softmax over both signs.

With W the layer of queries or of keys, both identity at the start, and ``u = W x``::

    phi(x) = softmax([u, -u])        log phi = [u, -u] - logsumexp([u, -u])

Nothing is random. The kernel ``phi(q) . phi(k)`` estimates no other one: it is close to softmax
attention as far as training has made it so.

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
    """What is learned; heads may differ in all of it.

    Attributes:
      query_weight: W of queries, ``[*B, R, D]``.
      key_weight: W of keys, ``[*B, R, D]``.
      log_scale: ``[*B]``, logarithm of a factor on ``phi(q) . phi(k)`` where it stands beside exact
        softmax weights; None where it would cancel.
    """

    query_weight: Float[Array, "*B R D"]
    key_weight: Float[Array, "*B R D"]
    log_scale: Float[Array, "*B"] | None = None


@dataclasses.dataclass(frozen=True)
class HedgehogFeatures(LearnedFeatures):
    """Features ``softmax([W x, -W x])`` with a learned W, see the module.

    Attributes:
      num_rows: R; the paper has D. Row i begins as the i-th unit vector, those beyond D as random
        orthonormal ones.
      scaled: learn ``log_scale``, too. It begins as ``log(M)``: equal features then weigh 1, as a
        key does in softmax attention whose logit is 0.
    """

    num_rows: int
    scaled: bool = False

    parameters_type: ClassVar[type[HedgehogParameters]] = HedgehogParameters

    def init(self, key: Array, head_dim: int) -> HedgehogParameters:
        """Returns the start, for one head; `key` is for rows beyond the head width alone."""
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
        """Returns M log-features a position; see the class."""
        half = project(x, parameters.query_weight if is_query else parameters.key_weight)
        log = jnp.concatenate([half, -half], axis=-1)
        # The sum over a query's features is common to all of them and cancels in the ratio.
        if exact_scale or not is_query:
            log = log - jax.nn.logsumexp(log, axis=-1, keepdims=True)
        if exact_scale and parameters.log_scale is not None:
            log = log + as_row(0.5 * parameters.log_scale[..., None], x)
        return Features(None, log)
