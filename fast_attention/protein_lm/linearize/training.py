"""A stage of training that can be interrupted at any step, and goes on where it was saved."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.npz_files import read_npz
from fast_attention.protein_lm.files.output_files import open_output
from fast_attention.protein_lm.linearize.steps import Step
from fast_attention.protein_lm.modeling.train_state import Batch

_ABOUT = "about"
_LIMIT = 2**37
"""The most bytes of a saved state."""


class Saved(NamedTuple):
    """A state on disk.

    Attributes:
      about: What was asked for, the figures found so far, the stage and the steps taken in it.
      leaves: Arrays of what is trained and of the optimiser, in the order of ``jax.tree.leaves``.
    """

    about: dict[str, Any]
    leaves: list[np.ndarray]


class StateFile:
    """Where an interrupted run goes on.

    Attributes:
      path: Of the file.
      asked: What the state must be of.
      found: Figures of the stages that are finished.
    """

    def __init__(self, path: Path, asked: dict[str, Any]):
        """Reads the file, if it is there.

        Raises:
          RunError: If it is damaged, or of another run.
        """
        self.path, self.asked = path, asked
        self.found: dict[str, Any] = {}
        self._saved: Saved | None = None
        if not path.exists():
            return
        arrays = read_npz(path, "remove it to begin again", limit=_LIMIT)
        try:
            about = json.loads(arrays.pop(_ABOUT).tobytes().decode())
            self.found = dict(about["found"])
            leaves = [arrays[str(i)] for i in range(len(arrays))]
        except (KeyError, ValueError, TypeError) as error:
            raise RunError(f"{path} is damaged: remove it to begin again") from error
        changed = [name for name in asked if about["asked"].get(name) != asked[name]]
        if changed:
            raise RunError(
                f"{path} is of a run with another {', '.join(changed)}: give another folder, or "
                "remove the file to begin again"
            )
        self._saved = Saved(about, leaves)

    @property
    def stage(self) -> str | None:
        """The stage that is under way, or was finished last; None before the first."""
        return None if self._saved is None else self._saved.about["stage"]

    def resume(self, stage: str, tree: Any) -> tuple[int, Any]:
        """Returns the steps taken in a stage and its state; 0 and `tree` where it has not begun."""
        saved = self._saved
        if saved is None or saved.about["stage"] != stage:
            return 0, tree
        leaves, structure = jax.tree.flatten(tree)
        shapes = [np.shape(leaf) for leaf in leaves]
        if [leaf.shape for leaf in saved.leaves] != shapes:
            raise RunError(f"{self.path} fits another model: remove it to begin again")
        # NumPy's products would be rounded in another way.
        return saved.about["step"], jax.tree.unflatten(structure, map(jnp.asarray, saved.leaves))

    def save(self, stage: str, step: int, tree: Any) -> None:
        """Writes the state whole, in place of the one before."""
        about = {"asked": self.asked, "found": self.found, "stage": stage, "step": step}
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))]
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        arrays: dict[str, Any] = {str(i): leaf for i, leaf in enumerate(leaves)}
        arrays[_ABOUT] = text
        with open_output(self.path, seekable=True) as file:
            np.savez(file, **arrays)
        self._saved = Saved(about, leaves)

    def remove(self) -> None:
        """Removes the file of a run that is finished."""
        self.path.unlink(missing_ok=True)


def train(
    stage: str,
    step: Step,
    trainable: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    batches: Iterable[Batch],
    file: StateFile,
    *,
    steps: int,
    save_every: int,
    seed: int,
) -> Mapping[str, Any]:
    """Takes the steps of a stage, those that an earlier process took left out.

    Args:
      stage: Its name.
      step: From `steps`.
      trainable: Where it begins.
      optimizer: Of the step.
      batches: Batch i is a function of i alone.
      file: Of the state.
      steps: How many.
      save_every: How often to save the state; it is saved at the end, too.
      seed: Of dropout.

    Returns:
      What was trained.

    Raises:
      FloatingPointError: If the loss is not finite.
    """
    begun, state = file.resume(stage, (trainable, optimizer.init(trainable)))
    now, opt_state = state
    with messages.progress(stage, "steps", steps, begun) as bar:
        for number, batch in enumerate(itertools.islice(batches, begun, steps), begun):
            key = jax.random.fold_in(jax.random.key(seed), number)
            now, opt_state, loss = step(now, opt_state, batch, key)
            bar.update(1)
            done = number + 1
            if done % save_every == 0 or done == steps:
                value = float(loss)
                if not np.isfinite(value):
                    raise FloatingPointError(
                        f"{stage} diverged at step {done}: the loss is {value}; give a lower "
                        "learning rate"
                    )
                bar.set_postfix({"loss": f"{value:.4g}"})
                file.save(stage, done, (now, opt_state))
    return now
