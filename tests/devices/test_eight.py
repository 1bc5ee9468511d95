"""Tests marked `eight_devices`. A file of its own, so that another worker has those of four."""

import pytest

from tests.devices.processes import run_marked


@pytest.mark.slow
def test_on_eight_devices():
    run_marked("eight_devices", 8)
