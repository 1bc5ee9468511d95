"""How many states the backward pass finds saved changes its memory, not its result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fast_attention.feature_maps import PositiveFeatures
from fast_attention.linear import LinearAttentionState
from tests.linear import cases
from tests.linear.test_memory import temporary_bytes


@pytest.mark.parametrize("implementation", ["chunked", "time_minor_chunks"])
def test_a_few_give_the_gradients_of_all(implementation):
    length = 12  # Two groups of two chunks: one loop body to compile.
    q, k, v = cases.qkv(1, length=length)
    states = cases.draw(2, cases.B, cases.K, cases.V, cases.M)
    smooth = {
        "query": q,
        "key": k,
        "value": v,
        "parameters": cases.parameters_of("positive"),
        "kv": jnp.asarray(states, jnp.float32),
        "k_sum": jnp.asarray(np.abs(states[..., 0, :]) + 1, jnp.float32),
    }
    fixed = {
        "initial_state": LinearAttentionState(
            smooth["kv"], smooth["k_sum"], jnp.zeros_like(smooth["k_sum"])
        ),
        "feature_map": cases.MAPS["positive"],
        "key_mask": jnp.asarray(cases.draw(3, cases.B, length) > -1),
        "causal": True,
        "chunk_size": 3,
        "implementation": implementation,
    }
    if implementation == "chunked":
        fixed["segment_ids"] = jnp.asarray(np.arange(length) // 5)[None]
    few, all_ = (
        cases.compiled(lambda smooth, kind=kind: cases.gradients(smooth, fixed, saved_states=kind))
        for kind in ("few", "all")
    )
    cases.assert_close(few(smooth), all_(smooth), 1e-6)


def test_a_map_without_log_features():
    """Seven chunks of 2 and a rest: the last group of chunks is shorter."""
    q, k, v = cases.qkv(1, length=15)
    smooth = {"query": q, "key": k, "value": v, "parameters": cases.parameters_of("relu")}
    fixed = {"feature_map": cases.MAPS["relu"], "causal": True, "chunk_size": 2}
    few, all_ = (
        cases.compiled(lambda smooth, kind=kind: cases.gradients(smooth, fixed, saved_states=kind))
        for kind in ("few", "all")
    )
    cases.assert_close(few(smooth), all_(smooth), 1e-6)


def test_an_unknown_choice_is_an_error():
    q, k, v = cases.qkv()
    with pytest.raises(ValueError, match="'all', 'few' or None, got 'none'"):
        cases.attend(
            q,
            k,
            v,
            feature_map=cases.MAPS["relu"],
            parameters=cases.parameters_of("relu"),
            causal=True,
            saved_states="none",
        )


def attend(q, k, v, projection):
    return cases.attend(
        q, k, v, feature_map=PositiveFeatures(256), parameters=projection, causal=True
    )


PROJECTION = jax.ShapeDtypeStruct((256, 64), jnp.float32)


@pytest.mark.usefixtures("optimized")
def test_gradients_of_16384_tokens_take_four_times_the_inputs_width():
    """The gradients of q, k and v, the output, and states that do not weigh."""

    def loss(*arguments):
        return jnp.sum(attend(*arguments) ** 2)

    x = jax.ShapeDtypeStruct((1, 16384, 8, 64), jnp.float32)
    tensor = 16384 * 8 * 64 * 4
    program = jax.value_and_grad(loss, argnums=(0, 1, 2))
    assert temporary_bytes(program, x, x, x, PROJECTION) < tensor


@pytest.mark.usefixtures("optimized")
def test_a_million_tokens_need_no_memory_beside_the_output():
    x = jax.ShapeDtypeStruct((1, 2**20, 8, 64), jnp.float32)
    assert temporary_bytes(attend, x, x, x, PROJECTION) < 8 * 2**20
