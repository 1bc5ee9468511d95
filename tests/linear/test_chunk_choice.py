"""The chunk is that of the nearest measured shape."""

import functools

import jax
import pytest

from fast_attention import make_fast_generalized_attention, make_fast_softmax_attention
from fast_attention.linear.chunked.chunk_choice import nearest_row
from fast_attention.linear.chunked.chunk_table import CHUNKS, ORIGINS
from fast_attention.linear.devices import device_of_process

TABLE = {
    ("cpu", True, 64, 64): (128, 2, "measured"),
    ("cpu", True, 64, 256): (64, 1, "measured"),
    ("cpu", True, 128, 256): (32, 1, "measured"),
    ("cpu", False, 64, 64): (256, 1, "measured"),
    ("gpu", True, 64, 256): (512, 1, "guess"),
    ("TPU v5e", True, 64, 256): (256, 1, "estimated"),
    ("NVIDIA H100", True, 64, 256): (16, 1, "measured"),
    ("NVIDIA H100 NVL", True, 64, 256): (8, 1, "measured"),
}


@pytest.mark.parametrize(
    "device, causal, head_dim, num_features, expected",
    [
        ("cpu", True, 64, 64, (128, 2)),
        ("cpu", True, 64, 1, (128, 2)),
        ("cpu", True, 64, 128, (128, 2)),
        ("cpu", True, 64, 129, (64, 1)),
        ("cpu", True, 64, 4096, (64, 1)),
        ("cpu", False, 64, 256, (256, 1)),
        ("gpu", True, 64, 64, (512, 1)),
        ("gpu", False, 64, 64, (256, 1)),
        ("tpu", True, 64, 256, (64, 1)),
        ("cpu", True, 128, 256, (32, 1)),
        ("cpu", True, 120, 300, (32, 1)),
        ("cpu", True, 32, 256, (64, 1)),
        ("TPU v5 lite", True, 64, 256, (256, 1)),
        ("TPU v5e", True, 64, 64, (256, 1)),
        ("TPU v6e", True, 64, 256, (64, 1)),
        ("TPU v5 lite", False, 64, 256, (256, 1)),
        ("NVIDIA H100 80GB HBM3", True, 64, 256, (16, 1)),
        ("NVIDIA H100 NVL", True, 64, 256, (8, 1)),
        ("NVIDIA H1000", True, 64, 256, (512, 1)),
        ("NVIDIA H100", False, 64, 256, (256, 1)),
        ("Tesla V100-SXM2-16GB", True, 64, 64, (512, 1)),
        ("something new", True, 64, 64, (128, 2)),
    ],
)
def test_nearest_row(device, causal, head_dim, num_features, expected):
    row = nearest_row(device, causal, head_dim, num_features, TABLE)
    assert TABLE[row][:2] == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu", "TPU v6 lite", "NVIDIA H100 80GB HBM3"])
def test_the_table_of_the_package_serves_every_device(device, causal):
    chunk_size, unroll, _ = CHUNKS[nearest_row(device, causal, 64, 256)]
    assert chunk_size >= 1 and unroll >= 1


def test_every_row_says_how_it_came_about():
    told = {(device, how) for (device, *_), (*_, how) in CHUNKS.items()}
    assert {how for _, how in told} <= {"measured", "estimated", "guess"}
    assert {row for row in told if row[1] != "guess"} == set(ORIGINS)


def lowered(function, like):
    return jax.jit(function).lower(like, like, like).as_text()


def test_a_named_kind_of_device_takes_its_row(monkeypatch):
    monkeypatch.setitem(CHUNKS, ("TPU v9", True, 64, 256), (24, 1, "guess"))
    like = jax.ShapeDtypeStruct((1, 96, 1, 8), "float32")
    make = functools.partial(
        make_fast_softmax_attention,
        nb_features=16,
        unidirectional=True,
        redraw_features=False,
        implementation="chunked",
    )
    named = lowered(make(device_kind="TPU v9 lite"), like)
    assert named == lowered(make(chunk_size=24), like)
    assert named != lowered(make(), like)
    assert lowered(make(), like) == lowered(make(device_kind=device_of_process()), like)


@pytest.mark.parametrize("make", [make_fast_softmax_attention, make_fast_generalized_attention])
def test_a_kind_of_no_platform_is_an_error(make):
    with pytest.raises(ValueError, match="must begin with one of cpu, .*got 'abacus'"):
        make(8, device_kind="abacus")
    with pytest.raises(ValueError, match="must be a string"):
        make(8, device_kind=8)


def test_errors():
    with pytest.raises(ValueError, match="at least 1"):
        nearest_row("cpu", True, 64, 0)
    with pytest.raises(ValueError, match="no row"):
        nearest_row("tpu", False, 8, 8, {("gpu", True, 8, 8): (8, 1, "guess")})
