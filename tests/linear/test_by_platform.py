"""What serves a call is chosen for the platform that a program is made for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fast_attention
from fast_attention.linear.by_platform import either

LIKE = jax.ShapeDtypeStruct((1, 40, 2, 16), jnp.float32)


def attention(**options):
    return fast_attention.make_fast_softmax_attention(
        16,
        nb_features=32,
        unidirectional=True,
        redraw_features=False,
        **{"implementation": "by_platform"} | options,
    )


def lowered(function, platform):
    """Of outputs and gradients."""

    def both(*arrays):
        return jax.value_and_grad(lambda *x: function(*x).sum(), argnums=(0, 1, 2))(*arrays)

    return jax.jit(both).trace(LIKE, LIKE, LIKE).lower(lowering_platforms=(platform,)).as_text()


def test_a_program_holds_the_path_of_its_platform_alone():
    function = attention()
    tpu, cpu = lowered(function, "tpu"), lowered(function, "cpu")
    assert "tpu_custom_call" in tpu and "stablehlo.while" not in tpu
    assert "tpu_custom_call" not in cpu and "stablehlo.while" in cpu


def test_what_the_kernels_do_not_serve_is_computed_in_chunks():
    text = lowered(attention(renormalize_attention=False), "tpu")
    assert "tpu_custom_call" not in text and "stablehlo.while" in text


@pytest.mark.devices
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_partitioned_program_is_computed_in_chunks():
    """XLA cannot partition a kernel."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = jax.ShapeDtypeStruct((2, 40, 2, 16), jnp.float32, sharding=rows)
    traced = jax.jit(attention()).trace(like, like, like)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_either_is_its_default_under_every_transformation():
    def default(x, y):
        return {"sum": jnp.sin(x) + y, "product": x * y}

    def call(x, y):
        return either(default, lambda x, y: 1 / 0, x, y)

    x, y = jnp.arange(3.0), jnp.ones((4, 3))
    for transform in (
        lambda f: jax.vmap(f, in_axes=(None, 0)),
        lambda f: lambda x, y: jax.jvp(lambda x: f(x, y[0]), (x,), (x,)),
        lambda f: jax.hessian(lambda x, y: f(x, y[0])["sum"].sum()),
        lambda f: jax.jit(jax.vmap(jax.grad(lambda x, y: f(x, y)["product"].sum()), (None, 0))),
    ):
        jax.tree.map(np.testing.assert_array_equal, transform(call)(x, y), transform(default)(x, y))


@pytest.mark.parametrize(
    ("platform", "options", "words"),
    [
        ("tpu", {}, "TPU kernels, chunks of 128 in blocks of 128"),
        ("tpu", {"renormalize_attention": False}, "because: .*output='sum'"),
        ("tpu", {"implementation": "chunked"}, "chunked, as asked for"),
        ("tpu", {"implementation": None}, "; implementation='by_platform' takes the TPU kernels"),
        ("cpu", {"chunk_size": 8}, "chunks of 8 on XLA .as asked for."),
    ],
)
def test_explain(platform, options, words):
    text = fast_attention.explain(attention(**options), LIKE, LIKE, LIKE, platform=platform)
    assert text.startswith("causal PositiveFeatures, query float32[1x40x2x16]: ")
    assert re.search(words, text), text


def test_explain_refuses_unknown_platforms():
    with pytest.raises(ValueError, match="got 'npu'"):
        fast_attention.explain(attention(), LIKE, LIKE, LIKE, platform="npu")
