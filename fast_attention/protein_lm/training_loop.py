"""The loop over training steps: metrics, validation and checkpoints at their times."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from fast_attention.protein_lm import checkpoints, metrics, train_state
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.metrics_log import MetricsLog
from fast_attention.protein_lm.train_state import TrainState

# The host runs this many steps ahead of the device: enough to hide its own work, and not so many
# that batches pile up or the progress bar shows the future.
_STEPS_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Times:
    """When something happens during training, in steps.

    What happens is a function of the step alone, so that a resumed run writes the same record as
    one that was never stopped.

    Attributes:
      total: Steps of the run; the data may end before.
      summary: Steps between rows of training metrics.
      evaluation: Steps between validations.
      checkpoint: Steps between checkpoints.

    Raises:
      ValueError: If a number is not positive.
    """

    total: int
    summary: int
    evaluation: int
    checkpoint: int

    def __post_init__(self):
        """Checks the numbers."""
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise ValueError(f"the number of steps of {name!r} must be positive; got {value}")


class _Interval:
    """Figures of the steps since the last row."""

    def __init__(self, compiling: bool):
        self.sums: list[metrics.Sums] = []
        self.tokens = 0
        self._compiling = compiling
        self._began = self._rated_from = time.perf_counter()
        self._rated_tokens = 0

    def add(self, sums: metrics.Sums, tokens: int) -> bool:
        """Takes the figures of a step; returns whether that step waited for the compiler."""
        self.sums.append(sums)
        self.tokens += tokens
        self._rated_tokens += tokens
        if self._compiling:
            # Such a step says nothing of the speed.
            jax.block_until_ready(sums)
            self._compiling, self._rated_from, self._rated_tokens = False, time.perf_counter(), 0
            return True
        if len(self.sums) > _STEPS_AHEAD:
            jax.block_until_ready(self.sums[-1 - _STEPS_AHEAD])
        return False

    def close(self) -> tuple[dict[str, float], float]:
        """Waits for the device; returns mean metrics and seconds."""
        sums = jax.device_get(self.sums)
        now = time.perf_counter()
        metrics.check_finite(sums)
        values = metrics.combine_metrics(sums)
        values["gradient_norm"] = float(np.mean([row["gradient_norm"] for row in sums]))
        values["tokens_per_second"] = self._rated_tokens / (now - self._rated_from)
        return values, now - self._began


def train_loop(
    model: FlaxModel,
    state: TrainState,
    progress: checkpoints.Progress,
    iterator: grain.DatasetIterator,
    times: Times,
    log: MetricsLog,
    manager: ocp.CheckpointManager,
    validate: Callable[[TrainState], dict[str, float]] | None,
) -> tuple[TrainState, checkpoints.Progress]:
    """Trains until `times.total` steps are taken or the data ends.

    Args:
      model: Gives the training step.
      state: Where to begin; donated.
      progress: What was done before.
      iterator: At the batch to be trained on next.
      times: When to do what.
      log: Takes the rows ``train`` and ``valid``.
      manager: Takes the checkpoints, the last of them at the end.
      validate: From a state to metrics; None never validates.

    Returns:
      The last state and progress.

    Raises:
      FloatingPointError: If training diverged. The checkpoints from before are kept.
    """
    step = evaluated = saved = int(state.step)
    postfix: dict[str, str] = {}
    with _progress_bar(step, times) as bar:
        interval = _Interval(compiling=True)
        while True:
            batch = next(iterator, None) if step < times.total else None
            if batch is not None:
                tokens = int(np.count_nonzero(batch["segment_ids"]))
                state, sums = model.train_step(state, train_state.shard_batch(batch, model.mesh))
                step += 1
                if interval.add(sums, tokens):
                    bar.unpause()
                bar.update()
            last = batch is None or step == times.total
            evaluate = step > evaluated and (last or step % times.evaluation == 0)
            save = step > saved and (last or step % times.checkpoint == 0)
            if interval.sums and (evaluate or save or step % times.summary == 0):
                values, seconds = interval.close()
                progress = progress._replace(
                    iterator=iterator.get_state(),
                    tokens=progress.tokens + interval.tokens,
                    seconds=progress.seconds + seconds,
                )
                values["learning_rate"] = float(model.schedule(step - 1))
                values |= {"tokens": progress.tokens, "seconds": progress.seconds}
                log.write(step, "train", values)
                postfix["loss"] = f"{values['loss']:.3f}"
                postfix["tokens/s"] = f"{values['tokens_per_second']:,.0f}"
            if evaluate:
                evaluated = step
                if validate is not None:
                    found = validate(state)
                    log.write(step, "valid", found)
                    postfix["valid"] = f"{found['loss']:.3f}"
            if save:
                saved = step
                checkpoints.save(manager, state, progress)
            if last:
                return state, progress
            if evaluate or save or step % times.summary == 0:
                bar.set_postfix(postfix)
                interval = _Interval(compiling=False)


def _progress_bar(step: int, times: Times) -> tqdm:
    return tqdm(
        total=times.total,
        initial=step,
        unit="step",
        desc="training",
        dynamic_ncols=True,
        smoothing=0,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )
