"""What tests do with the processes that their fixture ``start`` gives them."""

import json
import socket

import numpy as np


def start_two(start, folder, steps, *arguments):
    """Two processes of `tests.training.two_processes` that train together."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    return [
        start(folder, steps, port, index, *arguments, module="two_processes", devices=2)
        for index in ("0", "1")
    ]


def wait_until_ready(process):
    """Until it says so; distributed processes talk about other things, too."""
    assert "ready\n" in iter(process.stdout.readline, "")


def finish(process, timeout=120):
    """(exit status, standard error)."""
    _, errors = process.communicate(timeout=timeout)
    return process.returncode, errors


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
