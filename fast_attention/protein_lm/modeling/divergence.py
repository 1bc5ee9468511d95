"""Whether training has diverged, and the error for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from fast_attention.protein_lm.modeling import metrics

# Nats above the loss of a blind guess, and multiples of it; see `Guard`.
_ABOVE_UNIFORM = 1.0
_TIMES_UNIFORM = 10.0


@dataclasses.dataclass(frozen=True)
class Guard:
    """Looks at the figures of successive steps.

    Training has diverged when a loss or a gradient is infinite or not a number; when the mean loss
    of a summary interval is above log V + 1, and that of an earlier one was below log V, the loss
    of a blind guess; or when that of an interval or of a validation is above 10 log V. (Overfitting
    may bring a validation above a blind guess, but not that far.)

    ``sums`` are `metrics.token_sums` with ``gradient_norm``, on the host; ``last_step`` is the
    number of the last of them, counted from 1; ``saved`` the step of the last checkpoint, 0 where
    there is none. The error names the step where training diverged, and what to try.

    Attributes:
      schedule: From a step, counted from 0, to its learning rate.
      vocab_size: V, outcomes of a blind guess.
    """

    schedule: Callable[[Any], Any]
    vocab_size: int

    def check_updates(self, sums: Sequence[metrics.Sums], last_step: int, saved: int) -> None:
        """Asks that every loss and every gradient was finite.

        The training step has left the updates of others out, so that the parameters are sound.

        Raises:
          FloatingPointError: If one was not.
        """
        unsound = [
            index
            for index, row in enumerate(sums)
            if not (math.isfinite(row["loss"]) and math.isfinite(row["gradient_norm"]))
        ]
        if unsound:
            which = "it was" if len(unsound) == 1 else f"{len(unsound)} of {len(sums)} updates were"
            reason = f"the loss or the gradient is not finite ({which} left out)"
            raise self._explain(sums, unsound[0], last_step, saved, reason)

    def check_loss(
        self, sums: Sequence[metrics.Sums], last_step: int, saved: int, lowest: float | None
    ) -> float:
        """Asks that the mean loss is not hopeless.

        Args:
          sums: See `Guard`.
          last_step: See `Guard`.
          saved: See `Guard`.
          lowest: The lowest result of this function so far; None at the first call.

        Returns:
          The lowest mean loss, that of `sums` included.

        Raises:
          FloatingPointError: If it is.
        """
        loss = metrics.combine_metrics(sums)["loss"]
        uniform = math.log(self.vocab_size)
        learnt = lowest is not None and lowest < uniform
        if not loss <= (uniform + _ABOVE_UNIFORM if learnt else _TIMES_UNIFORM * uniform):
            worst = max(range(len(sums)), key=lambda index: _mean_loss(sums[index]))
            reason = (
                f"the mean loss of {len(sums)} steps is {loss:.4g}, far above that of a blind guess"
            )
            raise self._explain(sums, worst, last_step, saved, reason)
        return loss if lowest is None else min(lowest, loss)

    def check_validation(
        self, loss: float, sums: Sequence[metrics.Sums], last_step: int, saved: int
    ) -> None:
        """Asks that a validation loss is not hopeless, as it may be after one bad update.

        Raises:
          FloatingPointError: If it is.
        """
        if not loss <= _TIMES_UNIFORM * math.log(self.vocab_size):
            reason = f"the validation loss is {loss:.4g}, far above that of a blind guess"
            raise self._explain(sums, len(sums) - 1, last_step, saved, reason)

    def _explain(
        self, sums: Sequence[metrics.Sums], index: int, last_step: int, saved: int, reason: str
    ) -> FloatingPointError:
        step = last_step - len(sums) + 1 + index
        kept = f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"
        return FloatingPointError(
            f"training has diverged at step {step} (batch {step - 1}): {reason}. Loss "
            f"{_mean_loss(sums[index]):.4g}, gradient norm {sums[index]['gradient_norm']:.4g}, "
            f"learning rate {float(self.schedule(step - 1)):.4g}; {kept}. {REMEDY}"
        )


REMEDY = (
    "Train again in another --work_dir with a lower learning rate, a longer warm-up, or "
    "FlaxModel.grad_clip = 1.0"
)
"""What to try after a divergence."""


def _mean_loss(sums: metrics.Sums) -> float:
    return float(sums["loss"]) / max(float(sums["denominator"]), 1.0)
