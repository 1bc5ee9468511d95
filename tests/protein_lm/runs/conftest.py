"""A tiny model and its checkpoints."""

import shutil
from pathlib import Path

import pytest

from fast_attention.protein_lm.runs import checkpoints
from fast_attention.protein_lm.runs.checkpoints import Progress
from tests.protein_lm.runs.checkpoint_cases import at_step, make


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def three_checkpoints(model, tmp_path_factory):
    """Checkpoints of the steps 3, 6 and 9, the best of them 6."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with checkpoints.open_checkpoints(folder) as manager:
        for step in (3, 6, 9):
            progress = Progress(None, 8, step, 0.0, best_step=min(step, 6), best_loss=1.0)
            checkpoints.save(manager, at_step(model, step), progress)
    return folder


@pytest.fixture
def stored(three_checkpoints, tmp_path):
    return Path(shutil.copytree(three_checkpoints, tmp_path / "checkpoints"))
