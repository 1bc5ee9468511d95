"""The chunk is that of the nearest measured shape."""

import pytest

from fast_attention.linear.chunked.chunk_choice import ChunkChoice, chunk_choice
from fast_attention.linear.chunked.chunk_table import CHUNKS, MEASURED

TABLE = {
    ("cpu", True, 64, 64): (128, 2),
    ("cpu", True, 64, 256): (64, 1),
    ("cpu", True, 128, 256): (32, 1),
    ("cpu", False, 64, 64): (256, 1),
    ("gpu", True, 64, 256): (512, 1),
}


@pytest.mark.parametrize(
    "platform, causal, head_dim, num_features, expected",
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
    ],
)
def test_nearest_row(platform, causal, head_dim, num_features, expected):
    assert chunk_choice(platform, causal, head_dim, num_features, TABLE) == ChunkChoice(*expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_table_of_the_package_serves_every_platform(platform, causal):
    choice = chunk_choice(platform, causal, 64, 256)
    assert choice.chunk_size >= 1 and choice.unroll >= 1


def test_every_platform_says_how_its_rows_came_about():
    assert {platform for platform, *_ in CHUNKS} == set(MEASURED)


def test_errors():
    with pytest.raises(ValueError, match="at least 1"):
        chunk_choice("cpu", True, 64, 0)
    with pytest.raises(ValueError, match="no row"):
        chunk_choice("tpu", False, 8, 8, {("gpu", True, 8, 8): (8, 1)})
