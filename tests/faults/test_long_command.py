"""A whole experiment that is killed twenty times, at random, as by its command line.

Not part of `make test`; `make test-long` runs it and shows where the kills fell.
"""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("compiled_programs")]

ROOT = Path(__file__).parents[2]
SEED, KILLS, EXPERIMENT = 21, 20, "pbkd"
# What says when, where and how fast; nothing else may differ.
ELSEWHERE = {"created", "command", "out", "timings", "seconds_per_step"}


@pytest.fixture
def start():
    """The command in a folder, a checkpoint after every step; killed at the end."""
    processes = []

    def start(folder):
        command = f"-m experiments.{EXPERIMENT} --tiny --checkpoint-every 1 --out"
        process = subprocess.Popen(
            [sys.executable, *command.split(), str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()


def without(node, names):
    """JSON without the named fields, at any depth."""
    if isinstance(node, dict):
        return {k: without(v, names) for k, v in node.items() if k not in names}
    return [without(x, names) for x in node] if isinstance(node, list) else node


def outcome(folder):
    """Everything a run leaves that has no clock in it, by file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or re.search("checkpoints/|tensorboard/|cost.json", name):
            continue
        if path.suffix == ".html":  # the report's numbers are in its JSON
            continue
        found[name] = path.read_bytes()
        if path.suffix == ".json":
            found[name] = without(json.loads(found[name]), ELSEWHERE)
    return found


def states(folder):
    """The last state of every stage that trains, by stage."""
    found = {}
    for stage in sorted(folder.glob("*/checkpoints")):
        steps = [int(path.name) for path in stage.iterdir() if path.name.isdigit()]
        last = stage / str(max(steps)) / "state"
        state = ocp.StandardCheckpointer().restore(last)
        found[stage.parent.name] = jax.tree.map(numbers, state)
    return found


def numbers(array):
    """Of a key too."""
    key = jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(array) if key else array)


def finish(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def stage(folder):
    """The newest of its stages, by its first file."""
    there = list(folder.glob("[0-9]-*"))
    return max(there, key=lambda path: path.stat().st_ctime_ns, default=folder).name


def test_twenty_kills_leave_no_trace(start, tmp_path):
    whole = tmp_path / "whole"
    finish(start(tmp_path / "compiles"))
    began = time.monotonic()
    finish(start(whole))
    seconds = time.monotonic() - began
    expected, trained = outcome(whole), states(whole)
    assert len(trained) == 9
    assert len([name for name in expected if name.endswith("metrics.jsonl")]) == 9

    random, kills, runs = np.random.default_rng(SEED), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        while kills < KILLS:
            process = start(folder)
            delay = random.uniform(0, 0.75 * seconds)
            try:
                said, _ = process.communicate(timeout=delay)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
                assert process.returncode == -signal.SIGKILL, said
                assert "Traceback" not in said, said
                kills += 1
                place = stage(folder) if folder.exists() else "start-up"
                print(f"run {runs}: after {delay:.1f} s, last begun {place}")
                continue
            assert process.returncode == 0, said
            break
        finish(start(folder))
        found = outcome(folder)
        assert found.keys() == expected.keys()
        for name, content in expected.items():
            assert found[name] == content, name
        equal = jax.tree.map(np.array_equal, states(folder), trained)
        assert all(jax.tree.leaves(equal))
        runs += 1
    print(f"{kills} kills of {runs} runs, each of {seconds:.0f} s when left alone")
