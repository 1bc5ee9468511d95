"""Hashed attention at the shape of a case: queries stand for keys too, keys are not read."""

from __future__ import annotations

import importlib
from typing import Any

import jax

from benchmarks import torch_peers
from benchmarks.programs import Program, compile_jax
from benchmarks.settings import Inputs
from fast_attention.mechanisms.lsh.hashed import lsh_attention

BUCKET_SIZE = 64
N_HASHES = 8


def compile_ours(inputs: Inputs, measure: str, *, causal: bool) -> Program:
    """Ours, the rotations drawn anew in every call as the peer does."""
    key = jax.random.key(0)

    def function(query: Any, _: Any, value: Any) -> Any:
        options: Any = {"bucket_size": BUCKET_SIZE, "n_hashes": N_HASHES}
        return lsh_attention(query, value, key, causal=causal, **options)

    return compile_jax(function, inputs.qkv, inputs, measure)


def compile_peer(inputs: Inputs, measure: str, *, causal: bool) -> Program:
    """``reformer_pytorch.LSHAttention``, which wants an even number of whole buckets.

    Raises:
      NotImplementedError: for any other length.
    """
    if inputs.setting.length % (2 * BUCKET_SIZE):
        raise NotImplementedError(f"the length must be a multiple of {2 * BUCKET_SIZE}.")
    peer = importlib.import_module("reformer_pytorch")
    attention = peer.LSHAttention(bucket_size=BUCKET_SIZE, n_hashes=N_HASHES, causal=causal).eval()

    def function(query: Any, value: Any) -> Any:
        batch, heads = query.shape[:2]
        out = attention(query.flatten(0, 1), value.flatten(0, 1))[0]
        return out.unflatten(0, (batch, heads))

    query, _, value = inputs.qkv
    return torch_peers.compile_function(function, (query, value), inputs, measure, heads_first=True)
