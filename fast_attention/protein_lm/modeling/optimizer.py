"""AdamW and Muon, with a decay mask and global-norm clipping."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from fast_attention.protein_lm.modeling.made_once import made_once
from fast_attention.protein_lm.modeling.schedules import Schedule

Name = Literal["adamw", "muon"]

# Root mean square of Muon's updates, about that of AdamW's, so that both take the same learning
# rates (arXiv:2502.16982).
_MUON_RMS = 0.2


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


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Options of `create_optimizer`.

    Attributes:
      optimizer: "adamw" or "muon".
      weight_decay: Decoupled decay, multiplied by the learning rate.
      grad_clip: Largest global norm of the gradient; None does not clip.
      beta1: Decay of the first moment.
      beta2: Decay of the second moment.
      epsilon: Added to the root of the second moment.

    Raises:
      ValueError: If `grad_clip` is not positive, or there is no such optimizer.
    """

    optimizer: Name = "adamw"
    weight_decay: float = 0.1
    grad_clip: float | None = None
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-9

    def __post_init__(self):
        """Checks the options."""
        if self.optimizer not in get_args(Name):
            raise ValueError(
                f"optimizer must be one of {', '.join(get_args(Name))}; got {self.optimizer!r}"
            )
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise ValueError(
                f"grad_clip must be positive, or None for no clipping; got {self.grad_clip}"
            )


@made_once
def create_optimizer(
    learning_rate: float | Schedule, options: OptimizerOptions | None = None
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) or Muon, with decay limited by `decay_mask`.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalizes the updates
    of the matrices that decay; everything else is updated by AdamW with Nesterov momentum.

    Args:
      learning_rate: A number, or a function from a step to a number.
      options: None takes the defaults.
    """
    options = options or OptimizerOptions()
    if options.optimizer == "adamw":
        update = optax.adamw(
            learning_rate,
            b1=options.beta1,
            b2=options.beta2,
            eps=options.epsilon,
            weight_decay=options.weight_decay,
            mask=decay_mask,
        )
    else:
        update = optax.contrib.muon(
            learning_rate,
            weight_decay=options.weight_decay,
            adam_b1=options.beta1,
            adam_b2=options.beta2,
            eps=options.epsilon,
            muon_weight_dimension_numbers=_orthogonalized,
            consistent_rms=_MUON_RMS,
        )
    if options.grad_clip is None:
        return update
    return optax.chain(optax.clip_by_global_norm(options.grad_clip), update)


def _orthogonalized(parameters: Any) -> Any:
    """For matrices that decay, which axes Muon takes for rows and columns; None for the others."""
    return jax.tree.map(
        lambda parameter, decays: (
            optax.contrib.MuonDimensionNumbers() if decays and jnp.ndim(parameter) == 2 else None
        ),
        parameters,
        decay_mask(parameters),
    )
