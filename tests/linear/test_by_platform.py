"""What serves a call is chosen for the platform that a program is made for."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fast_attention
from fast_attention.linear import Plan, best
from fast_attention.linear.by_platform import by_platform
from fast_attention.linear.chunked.chunk_table import CHUNKS
from fast_attention.linear.prepare import prepare
from tests.linear import cases

LIKE = jax.ShapeDtypeStruct((1, 40, 2, 16), jnp.float32)


def attention(**options):
    return fast_attention.make_fast_softmax_attention(
        16,
        nb_features=32,
        redraw_features=False,
        **{"unidirectional": True} | options,
    )


def lowered(function, platform):
    """Of outputs and gradients."""

    def both(*arrays):
        return jax.value_and_grad(lambda *x: function(*x).sum(), argnums=(0, 1, 2))(*arrays)

    return jax.jit(both).trace(LIKE, LIKE, LIKE).lower(lowering_platforms=(platform,)).as_text()


def mesh_of(**axes):
    automatic = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=automatic)


def operations(text):
    """Counts of products and loops: helpers such as ``jnp.where`` are shared now and then."""
    return collections.Counter(re.findall(r"stablehlo\.dot_general|stablehlo\.while", text))


@pytest.mark.parametrize("log_decay", [None, np.array([-0.5, 0.0], np.float32)])
def test_a_program_holds_the_path_of_its_platform_alone(log_decay):
    def function(*arrays, **options):
        return attention(**options)(*arrays, log_decay=log_decay)

    tpu, cpu = lowered(function, "tpu"), lowered(function, "cpu")
    assert "tpu_custom_call" in tpu and "stablehlo.while" not in tpu
    assert "TPU kernels" in fast_attention.explain(function, LIKE, LIKE, LIKE, platform="tpu")
    chunks = functools.partial(function, implementation="chunked")
    assert operations(cpu) == operations(lowered(chunks, "cpu"))


@pytest.mark.parametrize("causal", [True, False])
def test_a_gpu_takes_parallel_chunks_for_causal_attention(causal):
    def forward(name):
        chosen = {"implementation": name} if name else {}
        function = attention(unidirectional=causal, device_kind="NVIDIA H100", **chosen)
        traced = jax.jit(function).trace(LIKE, LIKE, LIKE)
        return operations(traced.lower(lowering_platforms=("cuda",)).as_text())

    assert forward(None) == forward("parallel_chunks" if causal else "chunked")


@pytest.mark.parametrize("causal", [True, False])
def test_the_devices_of_the_process_do_not_choose(causal, monkeypatch):
    """A program for a CPU is the same where it is made on the host of a GPU."""
    plan = Plan(cases.MAPS["positive"], causal=causal, complete=True)
    plan, inputs = prepare(plan, *cases.qkv(), parameters=cases.parameters_of("positive"))
    loss = lambda inputs: cases.weighted_sum(best.attend(plan, inputs))  # noqa: E731
    expected = cases.compiled(jax.grad(loss))(inputs)
    monkeypatch.setattr(best, "device_of_process", lambda: "NVIDIA H100 80GB HBM3")
    differentiated = cases.compiled(jax.grad(lambda inputs: loss(inputs)))
    assert "while" in differentiated.trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    jax.tree.map(np.testing.assert_array_equal, differentiated(inputs), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", [{"implementation": "chunked"}, {"saved_states": "all"}])
def test_a_tpu_takes_chunks_in_lanes(causal, options):
    """If chunks are asked for, and where a kernel does not serve the call."""

    def forward(platform, **more):
        function = attention(unidirectional=causal, **{**options, **more})
        traced = jax.jit(function).trace(LIKE, LIKE, LIKE)
        return operations(traced.lower(lowering_platforms=(platform,)).as_text())

    expected = forward("tpu", implementation="time_minor_chunks")
    assert forward("tpu") == expected != forward("cpu")


def test_what_the_kernels_do_not_serve_is_computed_in_chunks():
    text = lowered(attention(renormalize_attention=False), "tpu")
    assert "tpu_custom_call" not in text and "stablehlo.while" in text


def test_one_program_for_two_platforms_holds_both_paths():
    exported = jax.export.export(jax.jit(attention()), platforms=("cpu", "tpu"))(LIKE, LIKE, LIKE)
    text = exported.mlir_module()
    assert "tpu_custom_call" in text and "stablehlo.while" in text


@pytest.mark.parametrize("causal", [True, False])
def test_forms_without_kernels_agree_with_chunks_of_a_cpu(causal, monkeypatch):
    """Values, states and gradients, with masks and biases, and with segments if causal."""
    for device, chunk in (("cpu", 4), ("gpu", 8), ("TPU v9", 16)):
        monkeypatch.setitem(CHUNKS, (device, causal, 64, 64), (chunk, 1, "guess"))
    plan = Plan(cases.MAPS["positive"], causal=causal, complete=True, device_kind="TPU v9")
    q, k, v = cases.qkv(length=16)
    ids = jnp.array([[0] * 5 + [1] * 11, [0] * 16]) if causal else None
    plan, inputs = prepare(
        plan,
        q,
        k,
        v,
        parameters=cases.parameters_of("positive"),
        key_mask=jnp.asarray(np.arange(16) != 4)[None],
        key_bias=jnp.asarray(cases.draw(3, 2, 16), jnp.float32),
        segment_ids=ids,
        initial_state=None,
    )

    def run(inputs):
        def loss(smooth):
            inexact = smooth._replace(key_mask=inputs.key_mask, segment_ids=ids)
            out, state = best.attend(plan, inexact)
            result = out, *cases.true_state(state)
            return cases.weighted_sum(result), result

        smooth = inputs._replace(key_mask=None, segment_ids=None)
        return cases.compiled(jax.grad(loss, has_aux=True))(smooth)

    expected = run(inputs)
    for name in ("cuda", "tpu"):
        taken = []

        def form(default, forms, *operands, name=name, taken=taken):
            taken.append(name)
            return forms[name](*operands)

        monkeypatch.setattr(best, "by_platform", form)
        cases.assert_close(run(inputs), expected, 1e-5)
        assert taken == [name] * 2


@pytest.mark.devices
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_partitioned_program_is_computed_in_chunks():
    """XLA cannot partition a kernel."""
    mesh = mesh_of(data=2)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = jax.ShapeDtypeStruct((2, 40, 2, 16), jnp.float32, sharding=rows)
    traced = jax.jit(attention()).trace(like, like, like)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.devices
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
@pytest.mark.parametrize(
    ("manual", "check_vma", "kernels"),
    [({"data", "model"}, True, True), ({"data", "model"}, False, True), ({"data"}, True, False)],
)
@pytest.mark.parametrize(("causal", "decays"), [(True, True), (False, False)])
def test_each_device_has_kernels_if_all_axes_are_manual(manual, check_vma, kernels, causal, decays):
    """Forward and backward, also for what all devices share. JAX refuses kernels otherwise."""
    mesh = mesh_of(data=2, model=1)
    rows, shared = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def attend(q, k, v, projection, log_decay):
        found = attention(unidirectional=causal)
        return found(q, k, v, projection=projection, log_decay=log_decay if decays else None)

    mapped = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(rows, rows, rows, shared, shared),
        out_specs=rows,
        axis_names=manual,
        check_vma=check_vma,
    )

    def both(*arrays):
        return jax.value_and_grad(lambda *x: mapped(*x).sum(), argnums=(0, 1, 2, 3, 4))(*arrays)

    like = jax.ShapeDtypeStruct((2, 40, 2, 16), jnp.float32)
    others = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32, 16), (2,)))
    traced = jax.jit(both).trace(like, like, like, *others)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == kernels != ("stablehlo.while" in text)


def test_an_operation_is_its_default_under_every_transformation():
    def default(x, y):
        return {"sum": jnp.sin(x) + y, "product": x * y}

    def call(x, y):
        return by_platform(default, {"tpu": lambda x, y: 1 / 0}, x, y)

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
        ("tpu", {"implementation": "chunked"}, "chunked, as requested.*256.* positions in lanes$"),
        ("tpu", {"saved_states": "all"}, "positions in lanes, because: .*saved_states='all'"),
        ("tpu", {"renormalize_attention": False}, "in the form for CPUs .*output='sum'.*because"),
        ("gpu", {"implementation": "chunked"}, "chunked, as requested: .* guess for gpu.$"),
        ("gpu", {}, "chunks of 40 on XLA, those of 40 positions in parallel"),
        ("gpu", {"saved_states": "all"}, "chunks of 256 on XLA .from the table: guess for gpu."),
        ("cpu", {"chunk_size": 8}, "chunks of 8 on XLA .as asked for."),
        ("cpu", {"device_kind": "TPU v5e"}, "chunks of 64 on XLA .* measured for cpu"),
    ],
)
def test_explain(platform, options, words):
    text = fast_attention.explain(attention(**options), LIKE, LIKE, LIKE, platform=platform)
    assert text.startswith("causal PositiveFeatures, query float32[1x40x2x16]: ")
    assert re.search(words, text), text


@pytest.mark.parametrize(
    ("causal", "decay", "words"),
    [
        (True, None, "TPU kernels, .*, and states of all keys in chunks of 512 .* lanes; chunks"),
        (
            True,
            np.zeros(2, np.float32),
            "TPU kernels, chunks of 128 in blocks of [^;]*operands;",
        ),
        (False, None, "positions in lanes, because the sequence is sharded along data$"),
    ],
)
def test_explain_a_sequence_along_an_axis(causal, decay, words):
    automatic = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=automatic)
    rows = jax.sharding.PartitionSpec(None, "data")
    along = attention(unidirectional=causal).along_axis("data")
    mapped = jax.shard_map(
        lambda *x: along(*x, log_decay=decay), mesh=mesh, in_specs=rows, out_specs=rows
    )
    assert re.search(words, fast_attention.explain(mapped, LIKE, LIKE, LIKE, platform="tpu"))


def test_explain_refuses_unknown_platforms():
    with pytest.raises(ValueError, match="got 'npu'"):
        fast_attention.explain(attention(), LIKE, LIKE, LIKE, platform="npu")
