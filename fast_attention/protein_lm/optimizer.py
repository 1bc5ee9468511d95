"""AdamW with a decay mask, global-norm clipping, and learning rates written as factor strings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fast_attention.recipes import recorded

Schedule = Callable[[Any], Any]

_FACTORS = (
    "constant",
    "linear_warmup",
    "rsqrt_decay",
    "rsqrt_normalized_decay",
    "decay_every",
    "cosine_decay",
)


@recorded
def create_learning_rate_scheduler(
    factors: str = "constant * linear_warmup * rsqrt_decay",
    base_learning_rate: float = 0.5,
    warmup_steps: int = 8000,
    decay_factor: float = 0.5,
    steps_per_decay: int = 20000,
    steps_per_cycle: int = 100000,
) -> Schedule:
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
      warmup_steps: Steps of the warm-up; 0 is none.
      decay_factor: Base of ``decay_every``.
      steps_per_decay: Steps between two decays of ``decay_every``.
      steps_per_cycle: Steps of one cosine cycle.

    Returns:
      A function from a step (Python or traced integer) to the rate, a float32 scalar.

    Raises:
      ValueError: If a factor is unknown or a number of steps is out of range.
    """
    names = [name.strip() for name in factors.split("*")]
    unknown = [name for name in names if name not in _FACTORS]
    if unknown:
        raise ValueError(
            f"unknown learning-rate factor {unknown[0]!r} in {factors!r}; "
            f"the factors are {', '.join(_FACTORS)}, joined by '*'"
        )
    if warmup_steps < 0 or steps_per_decay < 1 or steps_per_cycle < 1:
        raise ValueError(
            "warmup_steps must be at least 0, steps_per_decay and steps_per_cycle at least 1; "
            f"got {warmup_steps}, {steps_per_decay}, {steps_per_cycle}"
        )
    warmup = max(1, warmup_steps)

    def factor(name: str, step: jax.Array) -> Any:
        if name == "constant":
            return base_learning_rate
        if name == "linear_warmup":
            return jnp.minimum(1.0, step / warmup) if warmup_steps else 1.0
        if name == "rsqrt_decay":
            return 1.0 / jnp.sqrt(jnp.maximum(step, warmup))
        if name == "rsqrt_normalized_decay":
            return jnp.sqrt(warmup / jnp.maximum(step, warmup))
        if name == "decay_every":
            return decay_factor ** jnp.floor(step / steps_per_decay)
        cycles = jnp.maximum(0.0, (step - warmup_steps) / steps_per_cycle)
        return 0.5 * (1.0 + jnp.cos(jnp.pi * (cycles % 1.0)))

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rate = jnp.ones((), jnp.float32)
        for name in names:
            rate = rate * factor(name, step)
        return rate

    return schedule


def decay_mask(parameters: Any) -> Any:
    """Says which parameters weight decay may shrink: matrices, and no embedding.

    Norms and biases have their natural value elsewhere than at zero, and the rows of an embedding
    are mostly absent from a batch, so that decay would erase the rare ones. Trained parameters of
    random features (within ``projections``) belong to the estimate of attention, not to the model.

    Args:
      parameters: Nested dict of arrays.

    Returns:
      The same nest of bools.
    """

    def decays(path: tuple[Any, ...], parameter: Any) -> bool:
        names = [str(getattr(entry, "key", entry)).lower() for entry in path]
        excluded = names[-1] in ("bias", "scale") or any(
            word in name for name in names for word in ("embed", "position", "norm", "projections")
        )
        return jnp.ndim(parameter) >= 2 and not excluded

    return jax.tree_util.tree_map_with_path(decays, parameters)


def create_optimizer(
    learning_rate: float | Schedule,
    *,
    weight_decay: float = 0.1,
    grad_clip: float | None = None,
    beta1: float = 0.9,
    beta2: float = 0.98,
    epsilon: float = 1e-9,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), its decay limited by `decay_mask`.

    Args:
      learning_rate: A number, or a function from a step to a number.
      weight_decay: Decoupled decay, multiplied by the learning rate.
      grad_clip: Largest global norm of the gradient; None does not clip.
      beta1: Decay of the first moment.
      beta2: Decay of the second moment.
      epsilon: Added to the root of the second moment.

    Raises:
      ValueError: If `grad_clip` is not positive.
    """
    if grad_clip is not None and grad_clip <= 0:
        raise ValueError(f"grad_clip must be positive, or None for no clipping; got {grad_clip}")
    adamw = optax.adamw(
        learning_rate,
        b1=beta1,
        b2=beta2,
        eps=epsilon,
        weight_decay=weight_decay,
        mask=decay_mask,
    )
    if grad_clip is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(grad_clip), adamw)
