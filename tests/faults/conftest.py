"""Processes that train, are stopped or killed, and are looked at afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def start():
    """Starts a training of `tests.training` in a process of its own."""
    processes = []

    def start(folder, *arguments, module="tiny_game", devices=1, **environment):
        # Without optimisation, because most of such a process is compilation.
        flags = (
            "--xla_backend_optimization_level=0 "
            f"--xla_force_host_platform_device_count={devices}"
        )
        process = subprocess.Popen(
            [sys.executable, "-m", f"tests.training.{module}", str(folder), *arguments],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
