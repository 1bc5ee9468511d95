"""Redrawing the random features of a model."""

from __future__ import annotations

import dataclasses

from flax import nnx

from fast_attention.layers.attention.calibration import recalibrate
from fast_attention.layers.attention.multi_axis import MultiAxisAttention
from fast_attention.layers.attention.multi_head import MultiHeadAttention
from fast_attention.layers.stack.stack import Stack


def redraw(model: nnx.Module, rngs: nnx.Rngs) -> None:
    """Draws new random projections for every attention layer of a model, in place.

    With a projection that is redrawn every few steps, a model does not adapt to its errors (FAVOR+,
    arXiv:2009.14794, section 4.2). Redraw during training, never during evaluation. The rotations
    of LSH attention are redrawn in the same way.

    Args:
      model: Any module with `MultiHeadAttention` or `MultiAxisAttention` layers somewhere inside.
      rngs: Source of the new projections.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MultiHeadAttention | MultiAxisAttention):
            module.redraw(rngs)


def redraw_every(model: nnx.Module, interval: int | None, step: int, rngs: nnx.Rngs) -> bool:
    """Redraws after every `interval` optimiser steps.

    Args:
      model: As for `redraw`.
      interval: Steps between two redraws; None never redraws (the originals'
        ``fix_projection_matrices_``).
      step: Optimiser steps done so far, not counting micro-batches.
      rngs: Source of the new projections.

    Returns:
      Whether it redrew.

    Raises:
      ValueError: If `interval` is not positive.
    """
    if not _due(interval, step):
        return False
    redraw(model, rngs)
    return True


def redraw_due(model: nnx.Module, step: int, rngs: nnx.Rngs) -> bool:
    """Redraws every stack whose ``redraw_interval`` has passed, see `redraw_every`.

    If the ``recalibrate_interval`` has passed, features are fitted to the running averages, see
    `recalibrate`.

    Args:
      model: Any module with `Stack` modules somewhere inside.
      step: Optimiser steps done so far, not counting micro-batches.
      rngs: Source of the new projections.

    Returns:
      Whether it redrew any.
    """
    stacks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]
    for stack in stacks:
        if _due(stack.config.recalibrate_interval, step):
            recalibrate(stack)
    return any([redraw_every(s, s.config.redraw_interval, step, rngs) for s in stacks])


def fix_projections(model: nnx.Module) -> None:
    """Fixes the random features of a model: `redraw_due` has no effect from then on.

    They are neither redrawn nor fitted to running moments. Trained ones are still parameters.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Stack):
            module.config = dataclasses.replace(
                module.config, redraw_interval=None, recalibrate_interval=None
            )


def _due(interval: int | None, step: int) -> bool:
    if interval is None:
        return False
    if interval < 1:
        raise ValueError(f"interval must be at least 1, or None for never, got {interval}.")
    return step != 0 and step % interval == 0
