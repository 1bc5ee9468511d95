"""What layers with dropout have in common: their checks, and the options of an attention call."""

from __future__ import annotations

from typing import Any

from flax import nnx


def check_rate(rate: float, name: str = "dropout_rate") -> None:
    """Raises ValueError if a dropout rate is outside [0, 1)."""
    if not 0 <= rate < 1:
        raise ValueError(f"{name} must be in [0, 1), got {rate}.")


def check_rngs(
    rate: float, deterministic: bool, rngs: nnx.Rngs | None, name: str = "dropout_rate"
) -> None:
    """Raises ValueError if there is dropout and no source of random numbers."""
    if rate > 0 and not deterministic and rngs is None:
        raise ValueError(f"{name}={rate} needs rngs=nnx.Rngs(...), or pass deterministic=True.")


def dropout_options(rate: float, deterministic: bool, rngs: nnx.Rngs | None) -> dict[str, Any]:
    """Returns the arguments of an attention function that drop attention weights, if any.

    Raises:
      ValueError: If there is dropout and no source of random numbers.
    """
    check_rngs(rate, deterministic, rngs)
    if deterministic or not rate or rngs is None:
        return {}
    return {"dropout_rng": rngs.dropout(), "dropout_rate": rate, "broadcast_dropout": False}
