"""A stage of training that can be interrupted at any step, and resumes from its saved state."""

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fast_attention.protein_lm import messages
from fast_attention.protein_lm.errors import RunError
from fast_attention.protein_lm.files.json_files import MAX_BYTES, check_fields
from fast_attention.protein_lm.files.npz_files import read_npz
from fast_attention.protein_lm.files.output_files import json_text, open_output
from fast_attention.protein_lm.linearize.report import check_figures
from fast_attention.protein_lm.linearize.steps import Step
from fast_attention.protein_lm.modeling.train_state import Batch

_ABOUT = "about"
_HINTS = {"asked": dict, "found": dict, "stage": str | None, "step": int}
_REMEDY = "remove it to begin again"
# Of an array in an archive: its header, with room.
_HEADER = 4096


class Saved(NamedTuple):
    """A state on disk.

    Attributes:
      stage: That is under way, or was finished last; None before the first.
      step: Steps taken in it.
      size: Bytes of the description in the file, beside arrays of what is trained and of the
        optimiser, called by their place in ``jax.tree.leaves``.
    """

    stage: str | None
    step: int
    size: int


class StateFile:
    """The saved state of an interrupted run.

    Attributes:
      path: Of the file.
      asked: What the state must be of.
      found: Figures of the stages that are finished.
    """

    def __init__(self, path: Path, asked: dict[str, Any], num_layers: int):
        """Reads the description in the file, if the file exists.

        Args:
          path: Of the file.
          asked: What the state must be of.
          num_layers: Of the model.

        Raises:
          RunError: If it is damaged, or of another run.
        """
        self.path, self.asked = path, asked
        self.found: dict[str, Any] = {}
        self._saved: Saved | None = None
        if not path.exists():
            return
        text = read_npz(path, _REMEDY, limit=MAX_BYTES, names=[_ABOUT])[_ABOUT]
        try:
            about = json.loads(text.tobytes().decode())
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path} is damaged: {_REMEDY}") from error
        about = check_fields(path, "", about, _HINTS)
        changed = [name for name in asked if about["asked"].get(name) != asked[name]]
        if changed:
            raise RunError(
                f"{path} was written by a run with another {', '.join(changed)}: give another "
                "folder, or remove the file to start from the beginning"
            )
        self.found = check_figures(path, about["found"], num_layers)
        self._saved = Saved(about["stage"], about["step"], text.nbytes)

    @property
    def stage(self) -> str | None:
        """The stage that is under way, or was finished last; None before the first."""
        return None if self._saved is None else self._saved.stage

    def resume(self, stage: str, tree: Any) -> tuple[int, Any]:
        """Returns the steps taken in a stage and its state; 0 and `tree` where it has not begun."""
        saved = self._saved
        if saved is None or saved.stage != stage:
            return 0, tree
        leaves, structure = jax.tree.flatten(tree)
        shapes = {str(i): np.shape(leaf) for i, leaf in enumerate(leaves)} | {_ABOUT: (saved.size,)}
        limit = saved.size + sum(leaf.nbytes + _HEADER for leaf in leaves) + _HEADER
        arrays = read_npz(self.path, _REMEDY, limit=limit, expected=shapes)
        for name, leaf in enumerate(leaves):
            if (there := arrays[str(name)].dtype) != leaf.dtype:
                raise RunError(
                    f"{self.path}: '{name}' is {there}, expected {leaf.dtype}: {_REMEDY}"
                )
        # NumPy's products would be rounded in another way.
        found = [jnp.asarray(arrays[str(i)]) for i in range(len(leaves))]
        return saved.step, jax.tree.unflatten(structure, found)

    def save(self, stage: str | None, step: int, tree: Any) -> None:
        """Writes the state whole, in place of the one before."""
        about = {"asked": self.asked, "found": self.found, "stage": stage, "step": step}
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))]
        text = np.frombuffer(json_text(about).encode(), np.uint8)
        arrays: dict[str, Any] = {str(i): leaf for i, leaf in enumerate(leaves)}
        arrays[_ABOUT] = text
        with open_output(self.path, seekable=True) as file:
            np.savez(file, **arrays)
        self._saved = Saved(stage, step, text.nbytes)

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
    mesh: Mesh,
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
      mesh: Of the model's arrays.
      steps: How many.
      save_every: How often to save the state; it is saved at the end, too.
      seed: Of dropout.

    Returns:
      What was trained.

    Raises:
      FloatingPointError: If the loss is not finite.
    """
    begun, state = file.resume(stage, (trainable, optimizer.init(trainable)))
    now, opt_state = _placed(state, mesh)
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
                        f"learning rate (--{stage}_rate)"
                    )
                bar.set_postfix({"loss": f"{value:.4g}"})
                file.save(stage, done, (now, opt_state))
    return now


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Places new arrays as the step returns them, or its second call would compile again."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if x.committed else jax.device_put(x, everywhere), tree)
