"""What tests do with processes that train: start, signal, wait for and read them."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def starting():
    """A function that starts trainings of `tests.training`; at the end all are killed.

    ``start(folder, *arguments, module=..., devices=..., **environment)``.
    """
    processes = []

    def start(folder, *arguments, module="tiny_game", devices=1, **environment):
        # Without optimisation, because most of such a process is compilation; of flags
        # that the tests themselves have, the later one counts.
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 "
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

    try:
        yield start
    finally:
        for process in processes:
            process.kill()


def start_together(start, folders, steps, *arguments, **kind):
    """One process per folder; they train together. Most often it is one folder."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    return [
        start(folder, steps, port, str(index), *arguments, **kind)
        for index, folder in enumerate(folders)
    ]


def start_two(start, folder, steps, *arguments, **environment):
    """Two processes of `tests.training.two_processes` that train together."""
    kind = {"module": "two_processes", "devices": 2} | environment
    return start_together(start, [folder, folder], steps, *arguments, **kind)


def wait_until_ready(process):
    """Until it says so; distributed processes talk about other things, too."""
    assert "ready\n" in iter(process.stdout.readline, "")


def error_line(process, timeout=60):
    """The line of an error, while the process goes on; in vain it is killed."""
    patience = threading.Timer(timeout, process.kill)
    patience.start()
    try:
        return next((x for x in process.stderr if x.startswith("error: ")), "")
    finally:
        patience.cancel()


def finish(process, timeout=120):
    """(exit status, standard error)."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


def finish_all(processes, timeout=120):
    """`finish` each; whatever is left when the time is up is killed."""
    end = time.monotonic() + timeout
    try:
        return [finish(process, end - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def outcome(folder):
    """Final state, data position and log of a finished run."""
    with np.load(folder / "final.npz") as file:
        state = dict(file)
    position = json.loads((folder / "position.json").read_text())
    return state, position, (folder / "metrics.jsonl").read_bytes()


def assert_same_outcome(found, expected):
    """Bit for bit."""
    state, position, log = found
    assert state.keys() == expected[0].keys()
    for name, value in expected[0].items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert position == expected[1]
    assert log == expected[2]
