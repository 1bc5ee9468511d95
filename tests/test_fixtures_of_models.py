"""Golden cases of whole models: outputs and gradients with the originals' weights."""

from pathlib import Path

import pytest

from tests.fixtures.__main__ import fixture_files
from tests.fixtures.registry import PASSED, run_file

FOLDER = Path(__file__).parent / "data" / "fixtures"
FILES = fixture_files(FOLDER)
MODELS = ("lat_lm_", "lat_transformer_", "performer_", "performerlm_", "reformer")


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name.startswith(MODELS)], ids=lambda path: path.stem
)
def test_agrees_with_the_original(path):
    outcome = run_file(path)
    assert outcome.status == PASSED, str(outcome)
