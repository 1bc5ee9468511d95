"""The trained model that comes with the package, as ``protein-lm export`` writes it."""

import os
from pathlib import Path

FOLDER = Path(__file__).parent
"""What ``loading.load_run`` and ``FlaxLM.load`` read, and commands without ``--run_dir``."""


def is_pretrained(run_dir: str | os.PathLike[str]) -> bool:
    """Whether a folder is that of the model, however its path is written."""
    return os.path.realpath(run_dir) == os.path.realpath(FOLDER)
