"""Low-rank adapters (LoRA, arXiv:2106.09685): a small trained change of every dense layer.

A kernel W ``[I, O]`` becomes W + (alpha / r) A B with A ``[I, r]`` random and B ``[r, O]`` zero, so
that nothing changes before the first step. Adapters are kept apart from the model, and added to
its kernels wherever it is used; there is no other forward pass.

Shape letters: I inputs, O outputs, r rank.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.protein_lm.runs.array_records import named

Adapters = dict[str, dict[str, Any]]


def init_adapters(parameters: Any, rank: int, key: jax.Array) -> Adapters:
    """Draws adapters for the dense layers of attention and feed-forward.

    Those are the kernels with two axes, except that of the logits.

    Args:
      parameters: Nested dict of a model.
      rank: r.
      key: Of A.

    Returns:
      By the dotted name of each kernel ``a``, normal of variance 1 / I, and ``b``, zero.

    Raises:
      ValueError: If the rank is not positive, or there is no such kernel.
    """
    if rank < 1:
        raise ValueError(f"the rank must be at least 1; got {rank}")
    kernels = adapted_kernels(parameters)
    if not kernels:
        raise ValueError("the model has no dense layers to adapt: train it in full")
    keys = jax.random.split(key, len(kernels))
    return {
        name: {
            "a": jax.random.normal(draw, (kernel.shape[0], rank)) * kernel.shape[0] ** -0.5,
            "b": jnp.zeros((rank, kernel.shape[1])),
        }
        for draw, (name, kernel) in zip(keys, sorted(kernels.items()), strict=True)
    }


def adapted_kernels(parameters: Any) -> dict[str, Any]:
    """The kernels that `init_adapters` adapts, arrays or their shapes, by dotted name."""
    return {
        name: leaf
        for name, leaf in named(parameters).items()
        if name.endswith(".kernel") and len(leaf.shape) == 2 and not name.startswith("head.")
    }


def merge_adapters(parameters: Any, adapters: Adapters, scale: Any) -> Any:
    """Adds ``scale * A B`` to the kernels that have an adapter.

    Args:
      parameters: Nested dict of a model.
      adapters: From `init_adapters`.
      scale: alpha / r.

    Returns:
      The same nest; parameters without an adapter are the same arrays.
    """
    leaves = named(parameters)
    missing = sorted(adapters.keys() - leaves.keys())
    if missing:
        raise ValueError(f"the adapters are for another model: this one has no {missing[0]!r}")

    for name, own in adapters.items():
        leaf = leaves[name]
        # NumPy's product, of adapters from a file, would be rounded in another way.
        product = jnp.matmul(own["a"], own["b"])
        leaves[name] = (leaf + scale * product).astype(leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(parameters), leaves.values())
