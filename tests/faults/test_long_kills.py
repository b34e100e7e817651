"""A run that is killed twenty times, at random, and then is as if it never had been.

Not part of `make test`; `make test-long` runs it and shows where the kills fell.
"""

import json
import signal
import time
from collections import Counter

import numpy as np
import pytest

from tests.faults.processes import assert_same_outcome, finish, outcome
from tests.training.long_run import BATCH, RECORDS

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("compiled_programs")]

SEED = 20
RUNS = 4  # each is killed once during every kind of work
KINDS = ("rollout", "step", "checkpoint")  # after the start-up and the cache
STEPS, EVERY = 48, 2


@pytest.fixture(scope="module")
def command(start):
    """One start of the run in a folder."""

    def command(folder):
        return start(
            folder,
            str(STEPS),
            str(EVERY),
            module="long_run",
            # Even the smallest program takes longer to compile than to read.
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )

    return command


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, command):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, errors = finish(command(folder))
    assert status == 0, errors
    return folder


def moments(random):
    """(kind of work, which time in this start, seconds after it began), in order."""
    kinds = ["cache", *random.permutation(KINDS).tolist()]
    kinds.insert(random.integers(len(kinds) + 1), "start-up")
    for kind in kinds:
        times = {"cache": 4, "checkpoint": 4}.get(kind, 8)
        yield kind, int(random.integers(1, times + 1)), float(random.uniform(0, 0.05))


def kill(process, kind, count, delay):
    """Kill it then; what it was at, by its own last word."""
    with process.stdout, process.stderr:
        said = []
        while said.count(kind) < count and kind != "start-up":
            word = process.stdout.readline()
            assert word, process.stderr.read()
            said.append(word.strip())
        time.sleep(delay)
        process.kill()
        said += process.stdout.read().split()
        errors = process.stderr.read()
    assert process.wait() == -signal.SIGKILL, errors
    assert "Traceback" not in errors, errors
    return ["start-up", *said][-1]


def half_written(folder):
    """Files and folders that do not have their name yet."""
    found = [*folder.glob("checkpoints/*.orbax-checkpoint-tmp*")]
    found += folder.glob("cache/.*.unfinished")
    return sorted(path.relative_to(folder).as_posix() for path in found)


def starts(folder):
    """The ledger, a list per start of the process."""
    found = []
    for line in (folder / "ledger.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "start" in entry:
            found.append([])
        found[-1].append(entry)
    return found


def of(entries, name):
    return [entry for entry in entries if name in entry]


def assert_nothing_was_lost_or_doubled(folder, expected):
    """Every start went on where a whole checkpoint was, with the right records."""
    (whole,) = starts(expected)
    records = {entry["step"]: entry["records"] for entry in of(whole, "step")}
    digests = {entry["saved"]: entry["digest"] for entry in of(whole, "saved")}
    assert list(records) == list(range(1, STEPS + 1))
    taken = np.reshape(list(records.values()), (-1, RECORDS))  # a row per epoch
    assert (np.sort(taken) == np.arange(RECORDS)).all()
    assert len(taken) == STEPS * BATCH // RECORDS

    reached = saved = 0  # by any start so far
    for entries in starts(folder):
        restored, first = of(entries, "restored"), 1
        for found in restored:
            # Not half a checkpoint: every bit is as the uninterrupted run had it.
            assert found["digest"] == digests[found["restored"]]
            assert found["damage"] == []
            first = found["restored"] + 1
        steps = [entry["step"] for entry in of(entries, "step")]
        if restored or steps:  # the last checkpoint but one that was begun is whole
            assert first - 1 >= saved - EVERY
        assert steps == list(range(first, first + len(steps)))
        assert not steps or first <= reached + 1
        for entry in of(entries, "step"):
            assert entry["records"] == records[entry["step"]]
        for entry in of(entries, "saved"):
            assert entry["digest"] == digests[entry["saved"]]
        reached = max([reached, *steps])
        saved = max([saved, *(entry["saved"] for entry in of(entries, "saved"))])
    assert reached == saved == STEPS


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_as_uninterrupted(folder, expected):
    assert_same_outcome(outcome(folder), outcome(expected))
    assert contents(folder / "cache") == contents(expected / "cache")
    assert_nothing_was_lost_or_doubled(folder, expected)
    there = {path.name for path in (folder / "checkpoints").glob("[!.]*")}
    assert there == {str(STEPS - EVERY), str(STEPS)}


def test_twenty_kills_leave_no_trace(command, uninterrupted, tmp_path):
    random = np.random.default_rng(SEED)
    fell, halves, repeated = Counter(), 0, 0
    start_up = seconds_to_first_word(command, tmp_path / "clock")
    for number in range(RUNS):
        folder = tmp_path / str(number)
        for kind, count, delay in moments(random):
            if kind == "start-up":
                delay = start_up * delay / 0.05
            place = kill(command(folder), kind, count, delay)
            half = half_written(folder)
            print(f"run {number}: {kind} {count} + {delay:.3f} s: {place}, {half}")
            fell[place] += 1
            halves += bool(half)
        status, errors = finish(command(folder))
        assert status == 0, errors
        assert_as_uninterrupted(folder, uninterrupted)
        repeated += sum(len(of(entries, "step")) for entries in starts(folder)) - STEPS
    print(f"fell in {dict(fell)}; {halves} left something half-written; ", end="")
    print(f"{repeated} steps were made again")
    assert fell.total() == 5 * RUNS


def seconds_to_first_word(command, folder):
    """Of a start that finds its programs compiled."""
    began = time.monotonic()
    process = command(folder)
    process.stdout.readline()
    seconds = time.monotonic() - began
    process.kill()
    process.communicate()
    return seconds
