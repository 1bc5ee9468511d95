"""A large memory instead of the feed-forward part: each position reads a few of its vectors.

Shape letters: B batch and length, M features, H heads, D width of a query, N keys per half,
K vectors read per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from fast_attention.arrays.dtypes import at_least_float32
from fast_attention.arrays.types import Array, Bool, Float, Int
from fast_attention.layers.explicit_axes import modules_run_on_auto_axes
from fast_attention.layers.inputs import Inputs
from fast_attention.layers.linear import xavier_linear
from fast_attention.layers.masked_batch_norm import MaskedBatchNorm
from fast_attention.layers.sublayer_part import SublayerPart
from fast_attention.mechanisms.checks import check_choice


def is_memory_value(path: Sequence[Any]) -> bool:
    """Returns whether a parameter path is that of the vectors of a memory.

    Each vector is rarely read, so they need a larger learning rate than the rest (often 1e-2)::

        labels = jax.tree.map_with_path(
            lambda path, _: "memory" if is_memory_value(path) else "rest", parameters
        )
        optax.multi_transform({"memory": optax.adam(1e-2), "rest": optax.adam(3e-4)}, labels)

    Args:
      path: A path of `jax.tree_util.tree_map_with_path` in the state of a model.
    """
    names = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
    return "memory_values" in names


class ProductKeyMemory(nnx.Module, SublayerPart):
    """``sum_k softmax(scores)_k value_k`` over the K best of N^2 values, summed over heads.

    A query has two halves, each compared with its own N keys; the score of value ``N i + j`` is
    ``query_1 . key_1i + query_2 . key_2j``. The K largest of the N^2 scores are among the sums of
    the K largest of each half, so the search costs 2 N + K^2 instead of N^2.

    Attributes:
      to_queries: Dense layer without bias, M to H D; its first half holds the first halves of all
        heads.
      norm: Norm of the queries: `nnx.LayerNorm` of each half of each head, or `MaskedBatchNorm` of
        all channels.
      keys: Parameter ``[H, N, 2, D / 2]``.
      memory_values: Parameter ``[N^2, M]``, shared by the heads; see `is_memory_value`.

    References:
      Lample et al. Large memory layers with product keys. arXiv:1907.05242.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int = 4,
        num_keys: int = 128,
        top_k: int = 32,
        head_dim: int = 256,
        norm: Literal["layer", "batch"] = "layer",
        input_dropout: float = 0.0,
        query_dropout: float = 0.0,
        value_dropout: float = 0.0,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        """Draws the parameters.

        Args:
          features: M.
          num_heads: H.
          num_keys: N.
          top_k: K; if there are fewer than K values, all are read.
          head_dim: D, even.
          norm: "layer" normalises each half of a query; "batch" normalises each channel over the
            visible positions of the batch, and uses running averages in evaluation.
          input_dropout: Dropout rate of the inputs.
          query_dropout: Dropout rate of the normalised queries.
          value_dropout: Dropout rate of the output.
          dtype: Dtype of queries and outputs; None is that of inputs and parameters. Scores and
            their softmax are computed in at least float32.
          rngs: Source of the parameters.

        Raises:
          ValueError: If `head_dim` is odd, `top_k` is not positive, or `norm` is unknown.
        """
        if head_dim % 2:
            raise ValueError(f"A query has two halves: head_dim must be even, got {head_dim}.")
        if min(num_heads, num_keys, top_k) < 1:
            raise ValueError(
                f"num_heads, num_keys and top_k must be >= 1, got {num_heads}, {num_keys}, {top_k}."
            )
        check_choice("norm", norm, ("layer", "batch"))
        self.num_heads = num_heads
        self.top_k = top_k
        self.dtype = dtype
        width = num_heads * head_dim
        self.to_queries = xavier_linear(features, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm: nnx.Module = MaskedBatchNorm(width)
        if norm == "layer":
            self.norm = nnx.LayerNorm(head_dim // 2, epsilon=1e-5, dtype=dtype, rngs=rngs)
        shape = num_heads, num_keys, 2, head_dim // 2
        self.keys = nnx.Param(_draw(rngs.params(), shape))
        self.memory_values = nnx.Param(_draw(rngs.params(), (num_keys**2, features)))
        self.input_dropout = nnx.Dropout(input_dropout)
        self.query_dropout = nnx.Dropout(query_dropout)
        self.value_dropout = nnx.Dropout(value_dropout)

    @modules_run_on_auto_axes
    def __call__(
        self,
        x: Float[Array, "*B M"],
        *,
        key_mask: Bool[Array, "*B"] | None = None,
        chosen: Int[Array, "*B H K"] | None = None,
        return_chosen: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Any:
        """Reads the memory at each position; in training, a batch norm uses batch statistics.

        Args:
          x: ``[*B, M]``.
          key_mask: ``[*B]``, False where `x` is padding, which a batch norm ignores.
          chosen: ``[*B, H, K]``, indices of the values to read, from an earlier call. Used if
            inputs are known only up to rounding, as in the backward pass of reversible layers.
          return_chosen: Also return the indices of the values.
          deterministic: No dropout, and a batch norm uses running averages.
          rngs: Source of dropout, needed unless `deterministic` or without dropout.

        Returns:
          ``[*B, M]``, and with `return_chosen` a pair of that and ``[*B, H, K]``.
        """
        x = self.input_dropout(x, deterministic=deterministic, rngs=rngs)
        queries = self.to_queries(x)
        dtype = queries.dtype
        if isinstance(self.norm, MaskedBatchNorm):
            queries = self.norm(queries, key_mask=key_mask, use_running_average=deterministic)
        halves = queries.reshape(*x.shape[:-1], 2, *self.keys.shape[::3])
        if isinstance(self.norm, nnx.LayerNorm):
            halves = self.norm(halves)
        halves = self.query_dropout(halves, deterministic=deterministic, rngs=rngs)
        keys = self.keys[...]
        working = at_least_float32(queries.dtype)
        scores = jnp.einsum("...phd,hnpd->...hpn", halves, keys, preferred_element_type=working)
        if chosen is None:
            chosen = self._choose(jax.lax.stop_gradient(scores))
        first, second = jnp.divmod(chosen, keys.shape[1])
        picked = _pick(scores[..., 0, :], first) + _pick(scores[..., 1, :], second)
        out = self._read(chosen, jax.nn.softmax(picked)).astype(dtype)
        out = self.value_dropout(out, deterministic=deterministic, rngs=rngs)
        return (out, chosen) if return_chosen else out

    def _choose(self, scores: Float[Array, "*B H 2 N"]) -> Int[Array, "*B H K"]:
        count = scores.shape[-1]
        best, where = jax.lax.top_k(scores, min(self.top_k, count))
        sums = best[..., 0, :, None] + best[..., 1, None, :]
        values = where[..., 0, :, None] * count + where[..., 1, None, :]
        sums, values = (jax.lax.collapse(x, -2) for x in (sums, values))
        return _pick(values, jax.lax.top_k(sums, min(self.top_k, sums.shape[-1]))[1])

    def _read(self, chosen: Int[Array, "*B H K"], weights: Float[Array, "*B H K"]) -> Array:
        values = self.memory_values[...]

        # Head by head, and again for gradients: the vectors read are H K times as many as inputs.
        @partial(jax.checkpoint, prevent_cse=False)
        def add_head(total: Array, head: tuple[Array, Array]) -> tuple[Array, None]:
            index, weight = head
            return total + jnp.sum(weight[..., None] * values[index], axis=-2), None

        dtype = jnp.promote_types(weights.dtype, values.dtype)
        total = jnp.zeros((*chosen.shape[:-2], values.shape[-1]), dtype)
        heads = jnp.moveaxis(chosen, -2, 0), jnp.moveaxis(weights, -2, 0)
        return jax.lax.scan(add_head, total, heads)[0]

    def add(
        self, x: Float[Array, "B T M"], inputs: Inputs, *, choices: Any = None, **options: Any
    ) -> tuple[Float[Array, "B T M"], Int[Array, "B T H K"]]:
        """Reads the memory; the choices are the indices, see `SublayerPart.add`."""
        return self(x, key_mask=inputs.key_mask, chosen=choices, return_chosen=True, **options)


def _draw(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape) * shape[-1] ** -0.5


def _pick(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index, axis=-1)
