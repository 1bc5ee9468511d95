"""What cannot be computed is refused, with what was given in the message."""

import jax
import jax.numpy as jnp
import pytest

from fast_attention.feature_maps import PositiveFeatures
from fast_attention.linear import IMPLEMENTATIONS, empty_state
from tests.linear import cases


def call(q=(2, 5, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 6), **options):
    return jax.eval_shape(
        lambda q, k, v: cases.attend(
            q,
            k,
            v,
            feature_map=cases.MAPS["positive"],
            parameters=cases.parameters_of("positive"),
            **options,
        ),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q, k, v)),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": (5, 4, 8)}, "same number of axes"),
        ({"k": (3, 5, 2, 8), "v": (3, 5, 2, 6)}, "batch axes"),
        ({"v": (2, 6, 2, 6)}, "all axes but the last"),
        ({"k": (2, 5, 2, 7)}, "same width"),
        ({"v": (2, 5, 2, 0)}, "heads and widths of 1 or more"),
        ({"k": (2, 5, 3, 8), "v": (2, 5, 3, 6)}, "multiple of that of key heads, got 4 and 3"),
        ({"k": (2, 7, 3, 8), "v": (2, 7, 3, 6)}, "are not swapped"),
        ({"k": (2, 7, 2, 8), "v": (2, 7, 2, 6), "causal": True}, "as many keys as queries, got 7"),
        (
            {
                "k": (2, 7, 2, 8),
                "v": (2, 7, 2, 6),
                "segment_ids": jnp.zeros((2, 7), jnp.int32),
            },
            "self-attention",
        ),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"unroll": 0}, "unroll must be at least 1, got 0"),
        ({"implementation": "cuda"}, "Unknown implementation"),
        ({"implementation": ()}, "choose from"),
        ({"key_mask": jnp.ones((2, 4), bool)}, "key_mask"),
        ({"key_mask": jnp.ones((2, 5, 4), bool)}, "key_mask must have shape"),
        ({"key_bias": jnp.ones((5,))}, "key_bias must have shape"),
        (
            {
                "initial_state": empty_state(
                    PositiveFeatures(16), cases.numpy_parameters("positive"), (3,), 2, 8, 6
                )
            },
            "initial_state.kv must have shape",
        ),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_unknown_keyword_is_a_type_error():
    with pytest.raises(TypeError, match="causl"):
        call(causl=True)


def test_falls_back_when_an_implementation_cannot_serve(monkeypatch):
    def cannot(plan, inputs):
        raise NotImplementedError("no such machine")

    monkeypatch.setitem(IMPLEMENTATIONS, "cannot", cannot)
    assert call(implementation=("cannot", "quadratic")).shape == (2, 5, 4, 6)
    with pytest.raises(NotImplementedError, match="no such machine"):
        call(implementation="cannot")
    with pytest.raises(ExceptionGroup, match="supports this call"):
        call(implementation=("cannot", "cannot"))
