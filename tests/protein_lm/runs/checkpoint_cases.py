"""Checkpoints of tiny models for the tests of this folder."""

from pathlib import Path

import jax
import numpy as np

from fast_attention.protein_lm import make_protein_domain
from fast_attention.protein_lm.models import FlaxLM
from fast_attention.protein_lm.runs import checkpoints

SIZES = {"emb_dim": 8, "num_heads": 1, "num_layers": 1, "qkv_dim": 8, "mlp_dim": 8}


def make(**options):
    return FlaxLM(make_protein_domain(length=8), **(SIZES | options))


def at_step(model, step: int):
    return checkpoints.TrainState(
        **{name: getattr(model.state, name) for name in ("parameters", "variables", "opt_state")},
        step=jax.numpy.int32(step),
        key=jax.random.key(step),
    )


def read(folder, model, checkpoint: str | int = "best") -> int:
    found = checkpoints.restore_model(folder, model.abstract_state, checkpoint=checkpoint)
    jax.tree.map(np.testing.assert_array_equal, found.parameters, model.state.parameters)
    return found.step


def resume(folder, model) -> int | None:
    with checkpoints.open_checkpoints(folder) as manager:
        found = checkpoints.restore(manager, model.abstract_state)
        return None if found is None else int(found[0].step)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
