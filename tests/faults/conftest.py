"""Processes that train, are stopped or killed, and are looked at afterwards."""

import pytest

from tests.faults.processes import starting


@pytest.fixture(scope="module")
def start():
    """Starts a training of `tests.training` in a process of its own."""
    with starting() as start:
        yield start
