"""The loop over training steps: metrics, validation and checkpoints at their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.distributed import processes
from fast_attention.protein_lm.distributed.process_arrays import Rows, Votes
from fast_attention.protein_lm.distributed.stopping import StopRequest, stopped
from fast_attention.protein_lm.flax_model import FlaxModel
from fast_attention.protein_lm.modeling import metrics, train_state
from fast_attention.protein_lm.modeling.divergence import Guard
from fast_attention.protein_lm.modeling.train_state import TrainState
from fast_attention.protein_lm.runs.checkpoints import Progress
from fast_attention.protein_lm.runs.metrics_log import MetricsLog, SilentLog
from fast_attention.protein_lm.training.experiment import TimeSettings

# The host runs this many steps ahead of the device: enough to hide its own work. With more,
# batches would take memory and the progress bar would run ahead.
_STEPS_AHEAD = 2


class _Interval:
    """Figures of the steps since the last row."""

    def __init__(self, earlier: list[metrics.Sums] | None = None, *, compiling: bool = False):
        self.sums: list[metrics.Sums] = list(earlier or [])
        self._earlier = len(self.sums)
        self._compiling = compiling
        self._began = self._rated_from = time.perf_counter()
        self._unrated = self._earlier
        self._waited = 0.0

    def add(self, sums: metrics.Sums) -> bool:
        """Takes the figures of a step; returns whether that step waited for the compiler."""
        self.sums.append(sums)
        if self._compiling:
            # The time of such a step is not that of a usual one.
            jax.block_until_ready(sums)
            self._compiling, self._rated_from = False, time.perf_counter()
            self._unrated = len(self.sums)
            return True
        if len(self.sums) > _STEPS_AHEAD:
            jax.block_until_ready(self.sums[-1 - _STEPS_AHEAD])
        return False

    def fetch(self, iterator: Iterator[Any]) -> Any:
        """The next batch, None after the last; the time that takes is noted."""
        began = time.perf_counter()
        batch = next(iterator, None)
        self._waited += time.perf_counter() - began
        return batch

    def fetch_sums(self) -> list[dict[str, float]]:
        """Waits for the device; returns the figures of each step."""
        self.sums = [
            {name: float(value) for name, value in row.items()} for row in jax.device_get(self.sums)
        ]
        return self.sums

    @property
    def tokens(self) -> int:
        """Tokens of the steps of this interval, once their figures are fetched."""
        return self._count(self._earlier)

    def _count(self, first: int) -> int:
        return int(sum(row["tokens"] for row in self.sums[first:]))

    @property
    def seconds(self) -> float:
        """Time since the interval began."""
        return time.perf_counter() - self._began

    def speed(self) -> dict[str, float]:
        """Tokens per second, and the share of the time in which the loop waited for data."""
        rated = time.perf_counter() - self._rated_from
        return {
            "tokens_per_second": self._count(self._unrated) / rated,
            "data_wait": min(self._waited / rated, 1.0),
        }


def train_loop(
    model: FlaxModel,
    state: TrainState,
    progress: Progress,
    iterator: grain.DatasetIterator,
    times: TimeSettings,
    log: MetricsLog | SilentLog,
    save: Callable[[TrainState, Progress], None],
    validate: Callable[[TrainState], dict[str, float]] | None,
    stop: StopRequest,
    rows: Rows | None = None,
) -> tuple[TrainState, Progress]:
    """Trains until `times.max_train_steps` are taken or validations no longer improve.

    Args:
      model: Gives the training step.
      state: Where to begin; donated.
      progress: What was done before.
      iterator: At the batch to be trained on next.
      times: When to do what.
      log: Takes the rows ``train`` and ``valid``.
      save: Takes the checkpoints, the last of them at the end.
      validate: From a state to metrics; None never validates.
      stop: Looked at after each step; the processes stop together, at most two steps later.
      rows: Which rows of the batches of all processes `iterator` gives; None stands for all.

    Returns:
      The last state and progress.

    Raises:
      FloatingPointError: If training diverged. The checkpoints from before are kept.
      Stopped: If that was requested, after the step then running was saved.
    """
    guard = Guard(model.schedule, model.vocab_size)
    votes = Votes()
    step = saved = int(state.step)
    postfix: dict[str, str] = {}
    interval = _Interval(progress.pending, compiling=True)
    more = step < times.max_train_steps and not times.stops_early(step, progress.best_step)
    batch = interval.fetch(iterator) if more else None
    show = processes.is_primary()
    with messages.progress("training", "steps", times.max_train_steps, step, show=show) as bar:
        while batch is not None:
            state, sums = model.train_step(state, train_state.shard_batch(batch, model.mesh, rows))
            step += 1
            if interval.add(sums):
                bar.unpause()
            bar.update()
            position = iterator.get_state()
            batch = interval.fetch(iterator) if step < times.max_train_steps else None
            # A request that comes later than here is for the next step.
            stopping = votes.cast(stop.signal)
            evaluate = batch is None or times.validates_at(step)
            checkpoint = batch is None or times.saves_at(step)
            logs = evaluate or checkpoint or step % times.train_summary_frequency == 0
            if logs or stopping:
                figures = interval.fetch_sums()
                guard.check_updates(figures, step, saved)
                progress = progress._replace(
                    iterator=position,
                    tokens=progress.tokens + interval.tokens,
                    seconds=progress.seconds + interval.seconds,
                    pending=figures,
                )
                if logs:
                    lowest = guard.check_loss(figures, step, saved, progress.lowest_loss)
                    progress = progress._replace(pending=None, lowest_loss=lowest)
                    values = _summarise(figures) | interval.speed()
                    values["learning_rate"] = float(model.schedule(step - 1))
                    values |= {"tokens": progress.tokens, "seconds": progress.seconds}
                    log.write(step, "train", values)
                    postfix["loss"] = f"{values['loss']:.3f}"
                    postfix["tokens/s"] = f"{values['tokens_per_second']:,.0f}"
                if evaluate and validate is not None:
                    found = validate(state)
                    guard.check_validation(found["loss"], figures, step, saved)
                    log.write(step, "valid", found)
                    postfix["valid"] = f"{found['loss']:.3f}"
                    if progress.best_loss is None or found["loss"] < progress.best_loss:
                        progress = progress._replace(best_step=step, best_loss=found["loss"])
                        checkpoint = True
            if times.stops_early(step, progress.best_step):
                batch, checkpoint = None, True
            if checkpoint or stopping:
                save(state, progress)
                saved = step
            if stopping:
                raise stopped(stopping, step)
            if logs:
                bar.set_postfix(postfix)
                interval = _Interval()
    return state, progress


def _summarise(rows: list[dict[str, float]]) -> dict[str, float]:
    norm = float(np.mean([row["gradient_norm"] for row in rows]))
    return metrics.combine_metrics(rows) | {"gradient_norm": norm}
