"""The trained model that comes with the package, as ``protein-lm export`` writes it."""

from pathlib import Path

FOLDER = Path(__file__).parent
"""What ``loading.load_run`` and ``FlaxLM.load`` read, and commands without ``--run_dir``."""
