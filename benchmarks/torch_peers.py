"""Peers in torch, when they are installed: ``pip install -e ".[benchmarks]"``.

Torch is imported by name, when a case is compiled: nothing here needs it otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import usable_cores
from benchmarks.programs import FORWARD, Program
from benchmarks.settings import Inputs


def installed(*modules: str) -> bool:
    """Tells whether all these packages can be imported."""
    return all(importlib.util.find_spec(module) is not None for module in modules)


def compile_sdpa(inputs: Inputs, measure: str, *, causal: bool) -> Program:
    """Exact attention by ``torch.nn.functional.scaled_dot_product_attention``."""
    attention = importlib.import_module("torch.nn.functional").scaled_dot_product_attention

    def function(query, key, value):
        return attention(query, key, value, is_causal=causal)

    return compile_function(function, inputs.qkv, inputs, measure, heads_first=True)


def compile_performer(inputs: Inputs, measure: str, *, causal: bool) -> Program:
    """FAVOR+ by ``performer_pytorch.FastAttention``, with a projection of its own."""
    torch = importlib.import_module("torch")
    peer = importlib.import_module("performer_pytorch")
    setting = inputs.setting
    attention = peer.FastAttention(
        dim_heads=setting.head_dim,
        nb_features=setting.features,
        causal=causal,
    ).to(_device(), getattr(torch, setting.dtype))
    return compile_function(attention, inputs.qkv, inputs, measure, heads_first=True)


def compile_fla(
    arrays: Sequence[jax.Array], inputs: Inputs, measure: str, *, causal: bool
) -> Program:
    """Linear attention of given features by flash-linear-attention, ``[B, T, H, *]``."""
    if not causal:
        raise NotImplementedError("chunk_linear_attn is causal.")
    operation = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn

    def function(query, key, value):
        return operation(query, key, value, scale=1.0)[0]

    return compile_function(function, arrays, inputs, measure, heads_first=False)


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def compile_function(
    function: Callable[..., Any],
    arrays: Sequence[jax.Array],
    inputs: Inputs,
    measure: str,
    *,
    heads_first: bool,
) -> Program:
    """Makes the program of a function of tensors.

    Args:
      function: what is measured; a tensor for each array.
      arrays: its arguments, ``[B, T, H, *]``.
      inputs: where the type and the cotangent of the output come from.
      measure: one of :data:`benchmarks.programs.MEASURES`.
      heads_first: the function wants, and returns, ``[B, H, T, *]``.
    """
    torch = importlib.import_module("torch")
    device = _device()
    if device == "cpu":
        torch.set_num_threads(usable_cores())

    def convert(x: jax.Array) -> Any:
        x = jnp.swapaxes(x, 1, 2) if heads_first else x
        # Through float32, as numpy's bfloat16 is none that torch knows.
        tensor = torch.tensor(np.asarray(x.astype(jnp.float32)))
        return tensor.to(device, getattr(torch, inputs.setting.dtype))

    tensors = [convert(x) for x in arrays]
    wait = (lambda _: torch.cuda.synchronize()) if device == "cuda" else (lambda _: None)
    if measure == FORWARD:

        def forward():
            with torch.inference_mode():
                return function(*tensors)

        return Program(forward, wait)

    cotangent = convert(inputs.cotangent)
    for tensor in tensors:
        tensor.requires_grad_()

    def both():
        out = function(*tensors)
        return out, *torch.autograd.grad(out, tensors, cotangent)

    return Program(both, wait)
