"""Tests marked `devices`. A file of its own, so that another worker has those of eight devices."""

import pytest

from tests.devices.processes import run_marked


@pytest.mark.slow
def test_on_four_devices():
    run_marked("devices", 4)
