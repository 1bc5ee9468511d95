"""The registry of cases: what is measured on which platform."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from benchmarks import baselines, lsh, per_token, torch_peers
from benchmarks.programs import FORWARD, MEASURES, Program, compile_jax
from benchmarks.results import CaseInfo
from benchmarks.settings import Inputs
from fast_attention.feature_maps import IdentityFeatures, PositiveFeatures, elementwise_map
from fast_attention.linear import IMPLEMENTATIONS, Plan, linear_attention
from fast_attention.mechanisms.local.fn import make_local_attention

Attention = Literal["causal", "bidirectional"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
      info: its names, as they are kept with the results.
      compile: makes the program of one shape and measure; raises NotImplementedError if it cannot.
      order: power of the length that its time grows with, to predict what would take too long.
      max_length: longest input it is good for.
      measures: what is measured of it.
    """

    info: CaseInfo
    compile: Callable[[Inputs, str], Program]
    order: int = 1
    max_length: int | None = None
    measures: tuple[str, ...] = MEASURES


def attention_cases(platform: str) -> tuple[Case, ...]:
    """Returns all cases of a platform (``cpu``, or anything else for an accelerator)."""
    kinds: tuple[Attention, ...] = ("causal", "bidirectional")
    per_kind = [
        case for kind in kinds for case in (*_ours(kind, platform), *_baselines(kind, platform))
    ]
    shared = [Case(CaseInfo("identity", "identity (v x 1)"), _compile_identity)]
    if platform == "cpu":
        # A loop over chunks that stay in the cache is the least on a CPU, not on an accelerator.
        shared.append(
            Case(
                CaseInfo("floor", "floor (4 matmuls, forward)"), _compile_floor, measures=(FORWARD,)
            )
        )
    return (*per_kind, *shared)


def _ours(kind: Attention, platform: str) -> list[Case]:
    cases = []
    for name in IMPLEMENTATIONS:
        if name.endswith("interpret") or name == "by_platform":
            continue  # For tests: its speed says nothing; the same as another one.
        if name == "pallas_tpu" and platform != "tpu":
            continue
        quadratic = name == "quadratic"
        cases.append(
            Case(
                CaseInfo(f"{kind}/favor-{name}", f"FAVOR+ ({name})", kind, ours=True),
                lambda inputs, measure, name=name: _compile_favor(inputs, measure, kind, name),
                order=2 if quadratic else 1,
                # It writes out every product of two features: [T, T, M].
                max_length=256 if quadratic else None,
                measures=(FORWARD,) if quadratic else MEASURES,
            )
        )
    cases.append(
        Case(
            CaseInfo(f"{kind}/relu", "ReLU features", kind, ours=True),
            lambda inputs, measure: _compile_relu(inputs, measure, kind),
        )
    )
    cases.append(
        Case(
            CaseInfo(f"{kind}/local", f"local (window {LOCAL_WINDOW})", kind, ours=True),
            lambda inputs, measure: _compile_local(inputs, measure, kind),
        )
    )
    cases.append(
        Case(
            CaseInfo(f"{kind}/lsh", "LSH, 8 rounds", kind, ours=True),
            lambda inputs, measure: lsh.compile_ours(inputs, measure, causal=kind == "causal"),
        )
    )
    if platform != "cpu":
        cases.append(
            Case(
                CaseInfo(f"{kind}/given", "features given", kind, ours=True),
                lambda inputs, measure: _compile_given(inputs, measure, kind),
                max_length=MOST_GIVEN,
            )
        )
    return cases


LOCAL_WINDOW = 128
"""Positions in a block of local attention, which also sees the neighbouring blocks."""

MOST_GIVEN = 2**16
"""Longest input of cases whose features are arrays ``[B, T, H, M]``."""


def _baselines(kind: Attention, platform: str) -> list[Case]:
    causal = kind == "causal"
    return (_cpu_baselines if platform == "cpu" else _gpu_baselines)(kind, causal)


def _cpu_baselines(kind: Attention, causal: bool) -> list[Case]:
    if causal:
        name, label, function = "per-token", "scan over tokens", per_token.attention
    else:
        name, label, function = "whole-sequence", "two einsums", baselines.whole_sequence
    cases = [
        Case(
            CaseInfo(f"{kind}/{name}", f"FAVOR+ ({label})", kind),
            lambda inputs, measure: compile_jax(
                lambda q, k, v: function(q, k, v, inputs.projection), inputs.qkv, inputs, measure
            ),
        ),
        Case(
            CaseInfo(f"{kind}/exact", "exact (jax.nn)", kind),
            lambda inputs, measure: _compile_exact(inputs, measure, causal=causal),
            order=2,
        ),
    ]
    if torch_peers.installed("torch"):
        cases.append(_torch_sdpa(kind, causal))
    if torch_peers.installed("torch", "performer_pytorch"):
        cases.append(
            Case(
                CaseInfo(f"{kind}/performer-pytorch", "performer-pytorch", kind),
                lambda inputs, measure: torch_peers.compile_performer(
                    inputs, measure, causal=causal
                ),
                # Without its CUDA extension the causal form holds an array [B, H, T, M, D].
                max_length=2048 if causal else None,
            )
        )
    if torch_peers.installed("torch", "reformer_pytorch"):
        cases.append(
            Case(
                CaseInfo(f"{kind}/reformer-pytorch", "LSH (reformer-pytorch)", kind),
                lambda inputs, measure: lsh.compile_peer(inputs, measure, causal=causal),
            )
        )
    return cases


def _gpu_baselines(kind: Attention, causal: bool) -> list[Case]:
    cases = [
        Case(
            CaseInfo(f"{kind}/exact", "exact (cuDNN flash)", kind),
            lambda inputs, measure: _compile_exact(inputs, measure, causal=causal, cudnn=True),
            order=2,
        )
    ]
    if torch_peers.installed("torch"):
        cases.append(_torch_sdpa(kind, causal))
    if causal and torch_peers.installed("torch", "fla"):
        cases.append(
            Case(
                CaseInfo(f"{kind}/fla", "flash-linear-attention, features given", kind),
                lambda inputs, measure: torch_peers.compile_fla(
                    _given_features(inputs), inputs, measure, causal=causal
                ),
                max_length=MOST_GIVEN,
            )
        )
    return cases


def _torch_sdpa(kind: Attention, causal: bool) -> Case:
    return Case(
        CaseInfo(f"{kind}/torch-sdpa", "exact (torch SDPA)", kind),
        lambda inputs, measure: torch_peers.compile_sdpa(inputs, measure, causal=causal),
        order=2,
    )


def _compile_favor(inputs: Inputs, measure: str, kind: Attention, name: str) -> Program:
    def function(q, k, v):
        return linear_attention(
            q,
            k,
            v,
            Plan(
                PositiveFeatures(inputs.setting.features),
                causal=kind == "causal",
                implementation=name,
            ),
            parameters=inputs.projection,
        )

    return compile_jax(function, inputs.qkv, inputs, measure)


def _compile_relu(inputs: Inputs, measure: str, kind: Attention) -> Program:
    feature_map = elementwise_map("relu", num_rows=inputs.setting.features, normalize_data=True)

    def function(q, k, v):
        return linear_attention(
            q,
            k,
            v,
            Plan(feature_map, causal=kind == "causal"),
            parameters=inputs.projection,
        )

    return compile_jax(function, inputs.qkv, inputs, measure)


def _compile_local(inputs: Inputs, measure: str, kind: Attention) -> Program:
    function = make_local_attention(LOCAL_WINDOW, unidirectional=kind == "causal")
    return compile_jax(function, inputs.qkv, inputs, measure)


def _compile_given(inputs: Inputs, measure: str, kind: Attention) -> Program:
    def function(q, k, v):
        return linear_attention(
            q,
            k,
            v,
            Plan(IdentityFeatures(), causal=kind == "causal"),
            parameters=None,
        )

    return compile_jax(function, _given_features(inputs), inputs, measure)


def _given_features(inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value = inputs.qkv

    def features(x):
        return (jax.nn.relu(jnp.einsum("bthd,md->bthm", x, inputs.projection)) + 1e-3).astype(
            x.dtype
        )

    return features(query), features(key), value


def _compile_exact(inputs: Inputs, measure: str, *, causal: bool, cudnn: bool = False) -> Program:
    return compile_jax(
        lambda q, k, v: baselines.exact(q, k, v, causal=causal, cudnn=cudnn),
        inputs.qkv,
        inputs,
        measure,
    )


def _compile_identity(inputs: Inputs, measure: str) -> Program:
    return compile_jax(baselines.identity, inputs.qkv, inputs, measure)


def _compile_floor(inputs: Inputs, measure: str) -> Program:
    return compile_jax(
        lambda q, k, v: baselines.matmul_floor(q, k, v, inputs.projection),
        inputs.qkv,
        inputs,
        measure,
    )
