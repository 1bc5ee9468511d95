"""Checkpoints: all that a run needs to go on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from fast_attention.protein_lm.run_folder import RunError
from fast_attention.protein_lm.train_state import TrainState


class Progress(NamedTuple):
    """Where a run stood, beside its arrays.

    Attributes:
      iterator: State of the data iterator after the batch of the last step.
      batch_size: Rows of a batch, over all devices.
      tokens: Tokens trained on.
      seconds: Time spent training, over all resumptions.
    """

    iterator: Any
    batch_size: int
    tokens: int
    seconds: float


def open_checkpoints(directory: Path, *, keep: int | None = None) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints for writing, and removes what a killed run left half-written.

    A checkpoint is written under a temporary name and renamed when it is whole, so that a run
    killed at any moment leaves whole checkpoints only under their proper names.

    Args:
      directory: Created when absent.
      keep: How many of the newest to keep; None keeps all.
    """
    return ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        ),
    )


def save(manager: ocp.CheckpointManager, state: TrainState, progress: Progress) -> None:
    """Writes the checkpoint of ``state.step``, unless it is there already."""
    step = int(state.step)
    if step in manager.all_steps():
        return
    about = {"progress": progress._asdict(), "arrays": _describe(_model_arrays(state))}
    manager.save(
        step,
        args=ocp.args.Composite(
            model=ocp.args.StandardSave(_model_arrays(state)),
            training=ocp.args.StandardSave(_training_arrays(state)),
            about=ocp.args.JsonSave(about),
        ),
    )


def restore(
    manager: ocp.CheckpointManager, abstract: TrainState
) -> tuple[TrainState, Progress] | None:
    """Reads the newest checkpoint.

    Args:
      manager: From `open_checkpoints`.
      abstract: A state of `jax.ShapeDtypeStruct`, with shardings: what the model expects.

    Returns:
      State and progress, or None where there is no checkpoint.

    Raises:
      RunError: If the checkpoint belongs to a model of other shapes, or is damaged.
    """
    step = manager.latest_step()
    if step is None:
        return None
    about = _check(manager, step, abstract)
    found = _read(
        manager,
        step,
        model=ocp.args.StandardRestore(_model_arrays(abstract)),
        training=ocp.args.StandardRestore(_training_arrays(abstract)),
    )
    return TrainState(**found["model"], **found["training"]), Progress(**about["progress"])


def restore_model(directory: Path, abstract: TrainState) -> tuple[int, Any, Any]:
    """Reads the model alone from the newest checkpoint of a folder.

    Args:
      directory: Folder of checkpoints.
      abstract: As in `restore`; only ``parameters`` and ``variables`` matter.

    Returns:
      The step, the parameters and the other variables.

    Raises:
      RunError: If there is no checkpoint, or it belongs to a model of other shapes, or is
        damaged.
    """
    nothing = f"no checkpoint in {directory}: the run has not reached its first one yet"
    if not directory.is_dir():
        raise RunError(nothing)
    with ocp.CheckpointManager(
        directory.absolute(), options=ocp.CheckpointManagerOptions(create=False)
    ) as manager:
        step = manager.latest_step()
        if step is None:
            raise RunError(nothing)
        _check(manager, step, abstract)
        arguments = ocp.args.StandardRestore(_model_arrays(abstract))
        found = _read(manager, step, model=arguments)["model"]
    return step, found["parameters"], found["variables"]


def _check(manager: ocp.CheckpointManager, step: int, abstract: TrainState) -> dict[str, Any]:
    about = _read(manager, step, about=ocp.args.JsonRestore())["about"]
    stored, expected = about["arrays"], _describe(_model_arrays(abstract))
    names = [name for name in stored | expected if stored.get(name) != expected.get(name)]
    if names:
        name = names[0]
        raise RunError(
            f"the checkpoint {manager.directory / str(step)} does not fit the model of this "
            f"configuration: {name} is {stored.get(name, 'absent')} there, and the model expects "
            f"{expected.get(name, 'none')} ({len(names)} such differences); use the configuration "
            "it was written with"
        )
    return about


def _read(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(
            f"the checkpoint {manager.directory / str(step)} is damaged ({error}); remove it to "
            "go back to the one before"
        ) from error


def _describe(arrays: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _model_arrays(state: TrainState) -> dict[str, Any]:
    return {"parameters": state.parameters, "variables": state.variables}


def _training_arrays(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "key": state.key}


def abstract_like(state: TrainState, sharding: jax.sharding.Sharding) -> TrainState:
    """Shapes and dtypes of `state`, to be placed by `sharding`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )
