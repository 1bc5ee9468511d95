"""Two processes, each with two devices, hold arrays together."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.distributed import process_arrays
from fast_attention.protein_lm.models import FlaxLM
from tests.protein_lm.killing import free_port

SIZES: dict[str, Any] = {
    "emb_dim": 8,
    "num_heads": 1,
    "num_layers": 1,
    "qkv_dim": 8,
    "mlp_dim": 8,
}
PROTEINS = ["ACDEF", "ACD", "MKTAYIAKQR", "AC", "K"]

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from fast_attention.mesh.meshes import make_mesh
from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.distributed import process_arrays, processes
from fast_attention.protein_lm.models import FlaxLM
from tests.protein_lm.distributed.test_process_arrays import PROTEINS, SIZES

def places(array):
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}

with processes.joined(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]), timeout=60):
    mesh, values = make_mesh(fsdp=4), np.arange(4096, dtype=np.float32)
    whole, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("fsdp",)))
    for target in (whole, cut):
        for given in (jnp.array(values), process_arrays.put(values, whole),
                      process_arrays.put(values, cut)):
            copy = process_arrays.put_copy(given, target)
            assert copy.sharding == target and not places(copy) & places(given)
            np.testing.assert_array_equal(process_arrays.fetch(copy), values)
    key = process_arrays.put_copy(jax.random.key(3), whole)
    assert key.sharding == whole and key.dtype == jax.random.key(3).dtype
    model = FlaxLM(make_protein_domain(length=16), mesh=make_mesh(), **SIZES)
    print("scores", *[score.perplexity for score in model.score(PROTEINS)])
    print("vectors", *model.embed(PROTEINS).ravel())
"""


@pytest.mark.slow
def test_arrays_of_several_processes():
    """Copies share no memory; scores and vectors are those of one process."""
    port = str(free_port())
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(index)],
            cwd=Path(__file__).parents[3],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    told = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    model: Any = FlaxLM(make_protein_domain(length=16), **SIZES)
    expected = {
        "scores": [score.perplexity for score in model.score(PROTEINS)],
        "vectors": np.ravel(model.embed(PROTEINS)),
    }
    for out, _ in told:
        rows = [line.split() for line in out.splitlines()]
        found = {row[0]: np.array(row[1:], float) for row in rows if row and row[0] in expected}
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5)


def test_sums_that_would_lose_bits_are_refused():
    with pytest.raises(ValueError, match="at most 32 bits, but got int64"):
        process_arrays.add_up(np.array([2**40]))
