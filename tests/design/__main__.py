"""Runs the five changes of the design and reports each: ``python -m tests.design``."""

import sys
from pathlib import Path

import pytest

sys.exit(pytest.main([str(Path(__file__).parent), "--numprocesses=0", "-v"]))
