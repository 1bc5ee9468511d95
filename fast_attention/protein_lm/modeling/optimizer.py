"""AdamW with a decay mask and global-norm clipping."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fast_attention.protein_lm.modeling.schedules import Schedule


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
