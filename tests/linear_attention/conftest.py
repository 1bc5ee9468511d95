import pytest


@pytest.fixture(autouse=True, scope="module")
def _as_users_run_it(optimized):
    """Rounding and memory are those of optimised programs."""
