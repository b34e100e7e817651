"""Two processes whose common checkpoint is damaged: both say so, and go the same way.

Not part of `make test`; `make test-long` runs it.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from rkd_jax.training.checksums import CHECKSUMS
from tests.faults.damage import VIEWS, cut, flip, seen_here_alone, view
from tests.faults.processes import finish_all, start_together

pytestmark = pytest.mark.long


def run_both(start, folder, steps, there=None):
    """(exit status, standard error) of either; a checkpoint every three steps.

    Process 1 sees the folder as it is ``there``, if given.
    """
    kind = {"module": "two_processes", "devices": 2, **(VIEWS if there else {})}
    folders = [folder, there or folder]
    return finish_all(start_together(start, folders, steps, "3", **kind))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, start):
    """Two processes trained to step 6; checkpoints 3 and 6."""
    folder = tmp_path_factory.mktemp("two")
    ends = run_both(start, folder, "6")
    assert [status for status, _ in ends] == [0, 0], ends
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory, start, trained):
    """What they come to at step 8 when nothing is damaged."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(trained, folder)
    ends = run_both(start, folder, "8")
    assert [status for status, _ in ends] == [0, 0], ends
    assert "damaged" not in str(ends)
    return outcome(folder)


@pytest.fixture
def folder(trained, tmp_path):
    """A copy to do harm to."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def outcome(folder):
    """The players as both processes have them, which has to be the same; the log."""
    players = []
    for index in (0, 1):
        with np.load(folder / f"final-{index}.npz") as file:
            players.append(dict(file))
    assert_equal(*players)
    return players[0], (folder / "metrics.jsonl").read_bytes()


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def shard(step):
    """The largest file that process 1 wrote into a checkpoint."""
    files = [p for p in (step / "state/ocdbt.process_1").rglob("*") if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def names(folder):
    return {path.name for path in (folder / "checkpoints").iterdir()}


DAMAGE = {
    "cut": (cut, r"has \d+ bytes, \d+ were written"),
    "changed": (flip, "is not what was written"),
    "missing": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_both_name_the_file_and_go_on_from_the_same_checkpoint(
    start, folder, expected, damage
):
    harm, reason = DAMAGE[damage]
    file = shard(folder / "checkpoints/6")
    harm(file)
    ends = run_both(start, folder, "8")
    assert [status for status, _ in ends] == [0, 0], ends
    name = file.relative_to(folder / "checkpoints/6").as_posix()
    line = (
        rf"checkpoint 6 in {folder}/checkpoints is damaged \({name} {reason}\); it is "
        "now called damaged-6, and the run goes on from step 3"
    )
    for _, errors in ends:
        assert re.search(line, errors), errors
    players, log = outcome(folder)
    assert_equal(players, expected[0])
    assert log == expected[1]
    assert names(folder) == {"6", "8", "damaged-6"}


def test_neither_begins_afresh_when_all_are_damaged(start, folder):
    log = (folder / "metrics.jsonl").read_bytes()
    for step in ("3", "6"):
        flip(shard(folder / "checkpoints" / step))
    ends = run_both(start, folder, "8")
    lines = [re.findall("error: .*no checkpoint is whole.*", text) for _, text in ends]
    assert lines[0] == lines[1] != [], ends
    assert 0 not in [status for status, _ in ends]
    assert names(folder) == {"3", "6"}
    assert (folder / "metrics.jsonl").read_bytes() == log


def test_what_only_reading_could_tell_is_no_reason_to_fall_back(start, folder):
    """Without checksums each would have to decide by what it happens to read."""
    (folder / "checkpoints/6" / CHECKSUMS).unlink()
    shutil.rmtree(folder / "checkpoints/6/meta")
    ends = run_both(start, folder, "8")
    for status, errors in ends:
        assert status != 0
        assert "error: cannot read checkpoint 6" in errors, errors
        assert "move it away to go on from the one before" in errors, errors
    assert names(folder) == {"3", "6"}


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_both_stop_where_one_cannot_read_and_go_on_when_it_can(
    start, folder, expected, tmp_path, damage
):
    """A machine whose view of the common disk is wrong; the checkpoint is whole."""
    there = view(folder, tmp_path / "view")
    # The index; arrays as small as these are inside it.
    (file,) = (there / "checkpoints/6/state/d").iterdir()
    DAMAGE[damage][0](seen_here_alone(file))
    ends = run_both(start, folder, "8", there)
    lines = [re.findall("^error: .*", text, re.MULTILINE) for _, text in ends]
    assert lines[0] == lines[1] != [], ends
    assert re.match(
        r"error: not every process can read checkpoint 6 \(process 1 of 2: cannot read "
        rf"checkpoint 6 in {there}/checkpoints: .*; all stop and nothing was renamed",
        lines[0][0],
    )
    assert [status for status, _ in ends] == [1, 1]
    assert names(folder) == {"3", "6"}
    ends = run_both(start, folder, "8")
    assert [status for status, _ in ends] == [0, 0], ends
    players, log = outcome(folder)
    assert_equal(players, expected[0])
    assert log == expected[1]
