"""What becomes of random features between training steps: new draws, and parameters that follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fast_attention.layers.attention.calibration import recalibrate
from fast_attention.layers.attention.redrawing import redraw
from fast_attention.layers.stack.stack import Stack

# Folded into the key of a step, which dropout is drawn from, too.
_REDRAW = 0x5EED


def keep_up_features(
    graphdef: Any, parameters: Any, variables: Any, key: jax.Array, step: jax.Array
) -> Any:
    """Redraws and recalibrates what is due after so many steps, within a jitted training step.

    As `fast_attention.layers.redraw_due` does it between steps.

    Args:
      graphdef: Structure of the model, whose stacks have the intervals.
      parameters: Nested dict of what the optimiser changes.
      variables: Nested dict of the model's other arrays, attention projections among them.
      key: Of the training step.
      step: Steps taken, int32.

    Returns:
      The variables; the same where nothing is due.

    Raises:
      ValueError: If features are to be recalibrated that keep no running averages.
    """

    def redraw_stack(stack: Stack) -> None:
        redraw(stack, nnx.Rngs(jax.random.fold_in(key, _REDRAW)))

    def change(act: Callable[[Stack], Any], field: str, interval: int) -> Callable[[Any], Any]:
        def apply(variables: Any) -> Any:
            model = nnx.merge(graphdef, parameters, variables)
            for stack in _stacks(model):
                if getattr(stack.config, field) == interval:
                    act(stack)
            _, _, changed = nnx.split(model, nnx.Param, ...)
            return nnx.to_pure_dict(changed)

        return apply

    actions = {"recalibrate_interval": recalibrate, "redraw_interval": redraw_stack}
    configs = [stack.config for stack in _stacks(nnx.merge(graphdef, parameters, variables))]
    for field, act in actions.items():
        for interval in sorted({getattr(config, field) or 0 for config in configs} - {0}):
            variables = jax.lax.cond(
                step % interval == 0, change(act, field, interval), lambda same: same, variables
            )
    return variables


def _stacks(model: nnx.Module) -> list[Stack]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]
