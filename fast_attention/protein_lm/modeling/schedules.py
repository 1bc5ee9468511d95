"""Learning rates: a product of named factors, with a length that can follow that of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fast_attention.recipes import recorded

Schedule = Callable[[Any], Any]
"""From a step, counted from 0, to its learning rate."""

_FACTORS = (
    "constant",
    "linear_warmup",
    "rsqrt_decay",
    "rsqrt_normalized_decay",
    "decay_every",
    "cosine_decay",
)
_CYCLE = 100000
"""Steps of a cosine cycle where neither a setting nor a run says how long it is."""


@dataclasses.dataclass(frozen=True)
class FactorSchedule:
    """A learning rate made of factors; see `create_learning_rate_scheduler`.

    Attributes:
      factors: Names of the factors.
      base_learning_rate: Value of ``constant``.
      warmup_steps: Steps of the warm-up.
      decay_factor: Base of ``decay_every``.
      steps_per_decay: Steps between two decays of ``decay_every``.
      steps_per_cycle: Steps of one cosine cycle; None means that `over` sets it.
    """

    factors: tuple[str, ...]
    base_learning_rate: float
    warmup_steps: int
    decay_factor: float
    steps_per_decay: int
    steps_per_cycle: int | None

    def __call__(self, step: Any) -> jax.Array:
        """The rate of a step (Python or traced integer), a float32 scalar."""
        step = jnp.asarray(step, jnp.float32)
        rate = jnp.ones((), jnp.float32)
        for name in self.factors:
            rate = rate * self._factor(name, step)
        return rate

    def _factor(self, name: str, step: jax.Array) -> Any:
        warmup = max(1, self.warmup_steps)
        if name == "constant":
            return self.base_learning_rate
        if name == "linear_warmup":
            return jnp.minimum(1.0, step / warmup) if self.warmup_steps else 1.0
        if name == "rsqrt_decay":
            return 1.0 / jnp.sqrt(jnp.maximum(step, warmup))
        if name == "rsqrt_normalized_decay":
            return jnp.sqrt(warmup / jnp.maximum(step, warmup))
        if name == "decay_every":
            return self.decay_factor ** jnp.floor(step / self.steps_per_decay)
        cycles = jnp.maximum(0.0, (step - self.warmup_steps) / (self.steps_per_cycle or _CYCLE))
        return 0.5 * (1.0 + jnp.cos(jnp.pi * (cycles % 1.0)))

    def over(self, num_steps: int) -> FactorSchedule:
        """The schedule of a run: a cosine cycle without a given length ends with the run.

        Args:
          num_steps: Steps of the run, the warm-up included.
        """
        if self.steps_per_cycle is not None:
            return self
        return create_learning_rate_scheduler(
            " * ".join(self.factors),
            self.base_learning_rate,
            self.warmup_steps,
            self.decay_factor,
            self.steps_per_decay,
            max(1, num_steps - self.warmup_steps),
        )

    def describe_length(self, num_steps: int) -> str:
        """Describes in one sentence how the lengths of the schedule and a run differ.

        Args:
          num_steps: Steps of the run.

        Returns:
          An empty text if they agree, or if no factor has a length.
        """
        last = f"{float(self(num_steps - 1)):.3g}"
        if "linear_warmup" in self.factors and self.warmup_steps >= num_steps:
            return (
                f"the warm-up (create_learning_rate_scheduler.warmup_steps = {self.warmup_steps}) "
                f"lasts as long as this run of {num_steps} steps: the learning rate only rises, to "
                f"{last}"
            )
        end = self.warmup_steps + (self.steps_per_cycle or _CYCLE)
        if "cosine_decay" not in self.factors or end == num_steps:
            return ""
        outcome = (
            "rises to its maximum again after each cycle"
            if end < num_steps
            else f"is still {last} at the last step"
        )
        return (
            f"the cosine of the learning rate ends at step {end} "
            f"(create_learning_rate_scheduler.steps_per_cycle = {self.steps_per_cycle} after "
            f"{self.warmup_steps} steps of warm-up), but this run has {num_steps} steps: the rate "
            f"{outcome}. Without steps_per_cycle the cosine ends with the run"
        )


@recorded
def create_learning_rate_scheduler(
    factors: str = "constant * linear_warmup * rsqrt_decay",
    base_learning_rate: float = 0.5,
    warmup_steps: int = 8000,
    decay_factor: float = 0.5,
    steps_per_decay: int = 20000,
    steps_per_cycle: int | None = None,
) -> FactorSchedule:
    """Makes a learning rate from a product of named factors.

    With step s, warm-up w, the factors are

    - ``constant``: ``base_learning_rate``
    - ``linear_warmup``: min(1, s / w)
    - ``rsqrt_decay``: 1 / sqrt(max(s, w))
    - ``rsqrt_normalized_decay``: sqrt(w / max(s, w)), 1 at the end of the warm-up
    - ``decay_every``: ``decay_factor`` to the power of floor(s / ``steps_per_decay``)
    - ``cosine_decay``: (1 + cos(pi * p)) / 2, where p is the fraction of the current cycle of
      ``steps_per_cycle`` steps that is over; the first cycle starts after the warm-up

    Args:
      factors: Names joined by ``*``.
      base_learning_rate: Value of ``constant``.
      warmup_steps: Steps of the warm-up; 0 means no warm-up.
      decay_factor: Base of ``decay_every``.
      steps_per_decay: Steps between two decays of ``decay_every``.
      steps_per_cycle: Steps of one cosine cycle. None ends the cycle with the run: training with
        `train.run_experiment` sets it to the steps of the run without the warm-up; otherwise it is
        100,000.

    Returns:
      A function from a step (Python or traced integer) to the rate, a float32 scalar.

    Raises:
      ValueError: If a factor is unknown or a number of steps is out of range.
    """
    names = tuple(name.strip() for name in factors.split("*"))
    unknown = [name for name in names if name not in _FACTORS]
    if unknown:
        raise ValueError(
            f"unknown learning-rate factor {unknown[0]!r} in {factors!r}; "
            f"the factors are {', '.join(_FACTORS)}, joined by '*'"
        )
    if (
        warmup_steps < 0
        or steps_per_decay < 1
        or (steps_per_cycle is not None and steps_per_cycle < 1)
    ):
        raise ValueError(
            "warmup_steps must be at least 0, steps_per_decay and steps_per_cycle at least 1; "
            f"got {warmup_steps}, {steps_per_decay}, {steps_per_cycle}"
        )
    return FactorSchedule(
        names, base_learning_rate, warmup_steps, decay_factor, steps_per_decay, steps_per_cycle
    )
