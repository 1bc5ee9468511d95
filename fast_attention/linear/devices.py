"""Names of devices: the kind that JAX reports, the usual name of a kind, and its platform."""

from __future__ import annotations

import jax

USUAL_NAMES = {"TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e"}
"""Usual names of kinds for which ``jax.Device.device_kind`` has another one."""

_PLATFORMS = {
    "cpu": ("cpu",),
    "gpu": ("gpu", "cuda", "rocm", "nvidia", "amd", "tesla", "quadro"),
    "tpu": ("tpu",),
}
"""Beginnings of the kinds of a platform, in lower case."""


def platform_of(device_kind: str) -> str:
    """Returns "cpu", "gpu" or "tpu" for a kind such as "NVIDIA H100", or for a platform.

    Raises:
      ValueError: if the name belongs to none of them.
    """
    if not isinstance(device_kind, str):
        raise ValueError(f"device_kind must be a string such as 'TPU v5e', got {device_kind!r}.")
    for platform, beginnings in _PLATFORMS.items():
        if device_kind.lower().startswith(beginnings):
            return platform
    known = ", ".join(name for beginnings in _PLATFORMS.values() for name in beginnings)
    raise ValueError(
        f"device_kind must begin with one of {known} (in any case), such as 'TPU v5e' or 'NVIDIA "
        f"H100', got {device_kind!r}."
    )


def usual_name(device_kind: str) -> str:
    """Returns the name under which a kind is known: "TPU v5e" for "TPU v5 lite"."""
    return USUAL_NAMES.get(device_kind, device_kind)


def device_of_process() -> str:
    """Returns the kind of this process's devices, or their platform if they are not all alike."""
    kinds = {device.device_kind for device in jax.local_devices()}
    return kinds.pop() if len(kinds) == 1 else jax.default_backend()


def check_device_kind(device_kind: str | None) -> str | None:
    """Returns a kind of device as given.

    Raises:
      ValueError: unless it is None or belongs to a known platform.
    """
    if device_kind is not None:
        platform_of(device_kind)
    return device_kind
