"""Several processes make one run; what stops one of them stops all, in one line."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from rkd_jax.training.metrics import read_metrics
from tests.experiments import shared_training
from tests.experiments.two_processes import run_two


def run_toy(folder: Path, *arguments: str) -> list[tuple[int, str, str]]:
    """A whole experiment."""
    return run_two("experiments.tvkd", "--tiny", "--out", str(folder), *arguments)


def last_line(errors: str) -> str:
    """The error that a user is shown."""
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    return line


def test_an_error_of_process_0_ends_both_in_one_line(tmp_path):
    (tmp_path / "foreign.txt").write_text("of nobody's run")
    ends = run_toy(tmp_path, "--mesh.data", "-1")
    assert [status for status, _, _ in ends] == [2, 2], ends
    assert "holds no run (foreign.txt)" in last_line(ends[0][2])
    assert "process 0 stopped with RunMismatch" in last_line(ends[1][2])
    assert os.listdir(tmp_path) == ["foreign.txt"]


def test_a_mesh_that_leaves_a_process_without_work_is_refused(tmp_path):
    for status, _, errors in run_toy(tmp_path / "run"):
        assert status == 2
        assert "it must take all of them; set one axis to -1" in last_line(errors)
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("failure", "status", "message", "devices"),
    [
        ("disk", 2, "error: the disk of this process is full", 1),
        ("fault", 1, "ZeroDivisionError: a fault of ours", 2),
    ],
)
def test_an_error_of_one_process_alone_ends_the_other_soon(
    failure, status, message, devices
):
    """And not after the minutes for which a process waits for all others at its end."""
    start = time.monotonic()
    module = "tests.experiments.failing_process"
    other, failed = run_two(module, "--failure", failure, devices=devices)
    assert time.monotonic() - start < 60.0
    assert "about to fail" in failed[1].splitlines()
    assert failed[0] == status, failed
    assert message in failed[2].splitlines()
    assert other[0] == 2, other
    assert "a step failed in process 0 of 2" in last_line(other[2])


def test_the_runtime_ends_the_other_where_it_is_process_0():
    """They find each other by it, so there is nobody to say it any better."""
    start = time.monotonic()
    failed, other = run_two(
        "tests.experiments.failing_process", "--failure=disk", "--process=0"
    )
    assert time.monotonic() - start < 60.0
    assert failed[0] == 2
    assert "error: the disk of this process is full" in failed[2].splitlines()
    assert other[0] not in (0, None)
    assert "distributed service detected fatal errors" in other[2]


def test_processes_that_do_not_fail_end_as_they_should():
    ends = run_two("tests.experiments.failing_process")
    assert [status for status, _, _ in ends] == [0, 0], ends


@pytest.fixture(scope="module")
def shared(compiled_programs, tmp_path_factory):
    """The folder of a training by two processes, and what each of them saw."""
    folder = tmp_path_factory.mktemp("shared")
    ends = run_two("tests.experiments.shared_training", str(folder))
    assert [status for status, _, _ in ends] == [0, 0], ends
    return folder, [
        json.loads((folder / f"seen-{index}.json").read_text()) for index in range(2)
    ]


def test_each_reads_half_of_every_batch_and_trains_what_one_does(shared, tmp_path):
    """Samples and the teacher's wider prompts included."""
    folder, seen = shared
    read = shared_training.train(tmp_path, shared_training.MESH)
    batches = np.array(read).reshape(shared_training.STEPS, 2, -1)
    for index, process in enumerate(seen):
        assert process["read"] == batches[:, index].ravel().tolist()
    logs = [read_metrics(run / "run" / "4-gkd") for run in (folder, tmp_path)]
    assert len(logs[0]) == shared_training.STEPS
    for mine, alone in zip(*logs, strict=True):
        assert mine["metrics"] == pytest.approx(alone["metrics"], rel=1e-5, abs=1e-5)


def test_all_take_the_width_that_one_of_them_needs(shared):
    mesh = shared_training.MESH
    widths = shared_training.widths(mesh)
    assert len(set(widths)) == 2
    for process in shared[1]:
        assert process["widths"] == widths
    # There is a batch of which one half alone is wide.
    read = np.array([process["read"] for process in shared[1]])
    wide = np.isin(read, shared_training.WIDE).reshape(2, len(widths), -1).any(axis=-1)
    assert (wide[0] != wide[1]).any()


def test_rows_pass_between_meshes_of_different_devices(shared):
    """Each process has one device of either."""
    for process in shared[1]:
        assert process["between"] == [2.0 * row for row in range(8)]


def test_rows_come_together_where_devices_of_a_process_are_no_neighbours(shared):
    """As on a TPU slice; with a layer over two processes both bring the same rows."""
    for index, process in enumerate(shared[1]):
        alone, twice = (process["scattered"][n] for n in shared_training.SCATTERED)
        assert alone == [[index, index + 2], list(range(8))]
        assert twice == [[0, 1], list(range(8))]


def test_features_of_packed_pairs_are_laid_at_the_columns_of_everybodys_rows(shared):
    """Of the whole batch in each process, though each has read half of its rows."""
    alone = shared_training.laid(shared_training.MESH)
    for process in shared[1]:
        assert process["laid"]["index"] == alone["index"]
        np.testing.assert_allclose(
            process["laid"]["features"], alone["features"], rtol=1e-5, atol=1e-6
        )
