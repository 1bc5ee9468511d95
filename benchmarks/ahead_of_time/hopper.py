"""An H100 as XLA's GPU compiler knows one, on a machine without a GPU.

Needs the packages jax-cuda13-plugin, jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm,
nvidia-cuda-runtime and nvidia-nvjitlink.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import topologies

MULTIPROCESSORS = 132

# What the compiler asks of a device: NVIDIA's figures of an H100 SXM, as a GpuTargetConfigProto.
TARGET = f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: {MULTIPROCESSORS}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def hopper() -> Any:
    """Returns a sharding on one H100 that is not there, to compile for.

    Raises:
      RuntimeError: if the packages are missing.
    """
    try:
        description = topologies.get_topology_desc(
            "", platform="cuda", target_config=TARGET, topology="1x1x1"
        )
    except Exception as error:
        raise RuntimeError(
            "JAX cannot compile for CUDA here; install jax-cuda13-plugin, jax-cuda13-pjrt, "
            "nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-runtime and nvidia-nvjitlink."
        ) from error
    return jax.sharding.SingleDeviceSharding(description.devices[0])
