"""Decoding, one token after the other: time per token after few tokens and after many.

A state that has seen many tokens is made by reading random ones in blocks. The same for a cache of
keys and values, which a step of exact attention must read as a whole, as the baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.programs import Program, jitted
from benchmarks.results import DECODE, CaseInfo, Row
from benchmarks.settings import Setting
from benchmarks.suite import Limits
from benchmarks.timing import interleave
from fast_attention.feature_maps import PositiveFeatures
from fast_attention.linear import LinearAttentionState, Plan, empty_state, prefill, step

SCAN = CaseInfo("decode/scan", "state, within a scan", ours=True)
CALL = CaseInfo("decode/call", "state, one jitted call", ours=True)
CACHE = CaseInfo("decode/kv-cache", "exact attention over a cache (jax.nn, reads it only)")
DECODE_CASES = (SCAN, CALL, CACHE)

SCANNED = 2048
"""Tokens of one scan."""

BLOCK = 2048
"""Tokens read at once on the way to a long past."""


def measure_decoding(
    shape: Setting,
    batches: Sequence[int],
    pasts: Sequence[int],
    cached: Sequence[int],
    limits: Limits,
) -> list[Row]:
    """Measures steps of linear attention and, beside them, of exact attention with a cache.

    Args:
      shape: heads, widths and type; batch and length are ignored.
      batches: sequences decoded at once.
      pasts: numbers of tokens that a state has seen.
      cached: numbers of tokens in a cache.
      limits: time and memory.

    Returns:
      Rows of the measure ``decode``, in seconds per token of all sequences together.
    """
    rows: list[Row] = []
    for batch in batches:
        planned: dict[str, tuple[Row, int]] = {}
        programs: dict[str, Program] = {}

        def add(
            case: CaseInfo,
            setting: Setting,
            program: Program,
            tokens: int = 1,
            planned=planned,
            programs=programs,
        ) -> None:
            name = f"{case.name} {setting.length}"
            programs[name] = program
            planned[name] = (Row(case.name, DECODE, setting, memory=program.memory), tokens)

        for past in pasts:
            setting = dataclasses.replace(shape, batch=batch, length=past)
            decoder = _Decoder(setting)
            state = decoder.state_after(past)
            add(SCAN, setting, decoder.scan(state), SCANNED)
            add(CALL, setting, decoder.call(state))
        for past in cached:
            setting = dataclasses.replace(shape, batch=batch, length=past)
            if 2 * setting.tensor_bytes < limits.memory:
                add(CACHE, setting, _read_cache(setting))
        samples = interleave(programs, limits.clock, limits.effort)
        for name, (row, tokens) in planned.items():
            row = dataclasses.replace(row, samples=tuple(s / tokens for s in samples[name]))
            assert row.seconds is not None
            print(f"batch {batch}  {name:26s} {row.seconds * 1e6:10.1f} us per token")
            rows.append(row)
    return rows


class _Decoder:
    """The map, its projection and random tokens of one shape."""

    def __init__(self, setting: Setting):
        self.setting = setting
        feature_map = PositiveFeatures(setting.features)
        projection = feature_map.init(jax.random.key(4), setting.head_dim)
        self.plan, self.parameters = Plan(feature_map), projection

    def tokens(self, count: int, seed: int) -> tuple[jax.Array, ...]:
        """Returns ``count`` random queries, keys and values ``[B, count, H, D]``."""
        s = self.setting
        shape = (3, s.batch, count, s.heads, s.head_dim)
        return tuple(jax.random.normal(jax.random.key(seed), shape, s.dtype))

    def state_after(self, past: int) -> LinearAttentionState:
        """Returns a state that has seen ``past`` tokens."""
        s = self.setting
        state = empty_state(
            self.plan.feature_map,
            self.parameters,
            (s.batch,),
            s.heads,
            s.head_dim,
            s.head_dim,
        )
        seen = 0
        while seen < past:
            block = self.tokens(min(BLOCK, past - seen), seed=seen)
            state = prefill(state, *block, plan=self.plan, parameters=self.parameters)[1]
            seen += block[0].shape[1]
        return state

    def scan(self, state: LinearAttentionState) -> Program:
        """Returns a program of :data:`SCANNED` steps."""

        def body(state, token):
            out, state = step(state, *token, plan=self.plan, parameters=self.parameters)
            return state, out

        def function(state, *tokens):
            return lax.scan(body, state, tuple(jnp.moveaxis(x, 1, 0) for x in tokens))

        return jitted(function, state, *self.tokens(SCANNED, seed=1))

    def call(self, state: LinearAttentionState) -> Program:
        """Returns a program of one step, whose state goes on to the next call."""
        token = tuple(x[:, 0] for x in self.tokens(1, seed=1))

        def function(state, *token):
            return step(state, *token, plan=self.plan, parameters=self.parameters)

        # The state is given away, as in a server: it is updated in place.
        compiled = jax.jit(function, donate_argnums=0).lower(state, *token).compile()
        states = [jax.tree.map(jnp.copy, state)]

        def call():
            out, states[0] = compiled(states[0], *token)
            return out

        return Program(call, jax.block_until_ready)


def _read_cache(setting: Setting) -> Program:
    shape = (setting.batch, setting.length, setting.heads, setting.head_dim)
    key, value = jax.random.normal(jax.random.key(0), (2, *shape), setting.dtype)
    return jitted(jax.nn.dot_product_attention, key[:, :1], key, value)
