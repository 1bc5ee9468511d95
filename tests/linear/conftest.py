import pytest

from fast_attention.linear.pallas_gpu import segments
from fast_attention.linear.parallel_chunks import block_sizes


@pytest.fixture(autouse=True, scope="package")
def _short_blocks():
    """Short sequences have several blocks of several chunks, and several segments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes, "MOST_CHUNKS", 2)
        patch.setattr(segments, "SHORTEST", 60)
        yield
