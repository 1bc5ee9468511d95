"""A CPU that stands for several devices has threads for all of them."""

import os
import subprocess
import sys

import pytest

from fast_attention.protein_lm.distributed import host_threads

pytestmark = pytest.mark.slow

# Parts of what a device computes wait for a thread, of which the devices themselves hold some.
PROGRAM = """
from fast_attention.protein_lm.distributed.host_threads import provide_threads
provide_threads()
import jax
from fast_attention import make_fast_softmax_attention
from fast_attention.protein_lm import FlaxLM, make_protein_domain
sizes = {"num_layers": 4, "emb_dim": 16, "qkv_dim": 32, "num_heads": 1, "mlp_dim": 16}
attention_fn = make_fast_softmax_attention(64, unidirectional=True)
model = FlaxLM(make_protein_domain(length=64), attention_fn=attention_fn, **sizes)
jax.block_until_ready(model.state)
print(jax.device_count(), model.mesh.size)
"""


@pytest.mark.parametrize(
    ("variables", "devices", "pool"),
    [
        ({}, 1, None),
        ({"JAX_NUM_CPU_DEVICES": "4"}, 4, str(8 + (os.cpu_count() or 1))),
        ({"XLA_FLAGS": "--a=1 --xla_force_host_platform_device_count=2", "NPROC": "3"}, 2, "3"),
    ],
)
def test_the_pool_follows_from_the_devices(monkeypatch, variables, devices, pool):
    for name in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    host_threads.provide_threads()
    assert host_threads.simulated_devices() == devices
    assert os.environ.get("NPROC") == pool


def test_as_many_devices_as_processors_do_not_wait_forever():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(max(2, os.cpu_count() or 1))}
    environment.pop("NPROC", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [environment["JAX_NUM_CPU_DEVICES"]] * 2
