"""An experiment that is killed at random, stage after stage, and ends as if not.

Not part of `make test`; `make test-long` runs it and shows where the kills fell.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("compiled_programs")]

ROOT = Path(__file__).parents[2]
SEED, KILLS = 6, 6
# Everything that a run leaves behind but its checkpoints and what it took.
KEPT = ("*/*.jsonl", "*/done.json", "6-evaluation/*.json", "student/*")
FREE = ("created", "timings", "versions", "command", "settings")


def command(folder):
    """One start of the same command; a checkpoint after every update."""
    options = ["--tiny", "--checkpoint-every", "1", "--out", str(folder)]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.quickstart", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder):
    process = command(folder)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def results(folder):
    """Name -> content of what has to be the same."""
    files = {path for pattern in KEPT for path in folder.glob(pattern)}
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    report = json.loads((folder / "report/report.json").read_text("utf-8"))
    return found | {key: report[key] for key in report if key not in FREE}


def test_a_killed_experiment_ends_as_an_uninterrupted_one(tmp_path):
    random = np.random.default_rng(SEED)
    began = time.monotonic()
    finish(tmp_path / "whole")
    longest = 0.5 * (time.monotonic() - began)  # programs are compiled from now on
    expected = results(tmp_path / "whole")
    kills, number = 0, 0
    while kills < KILLS:
        folder = tmp_path / str(number)
        process = command(folder)
        try:
            process.wait(timeout=random.uniform(0, longest))
        except subprocess.TimeoutExpired:
            process.kill()
        errors = process.stderr.read()
        if process.wait() == 0:  # it was done before; there is another run to kill
            number += 1
            continue
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
        last = errors.splitlines()[-1:] or ["start-up"]
        print(f"run {number}: killed after {last[0]!r}")
    for done in range(number + 1):
        finish(tmp_path / str(done))
        found = results(tmp_path / str(done))
        assert found.keys() == expected.keys()
        for name, content in expected.items():
            assert found[name] == content, name
