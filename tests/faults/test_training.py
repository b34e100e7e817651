"""Faults of other trainers, and of disks and users, that training must survive."""

import contextlib
import errno
import io
import json
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.training import Progress, checkpoint, fit, init_state, make_update
from rkd_jax.types import LossOutput, Mean, Objective
from tests.faults.damage import FULL_DISK, SLOW_DISK
from tests.faults.processes import (
    assert_same_outcome,
    error_line,
    finish,
    outcome,
    start_two,
    wait_until_ready,
)
from tests.training import tiny_game

STEPS = 4


# T4: the mean of micro-batch means is not the mean over tokens.


def squares(params, critic, frozen, batch, signal, rng):
    """Sum over tokens of 0.5 (w x - y)^2, and how many were counted."""
    mask = batch["mask"]
    error = batch["x"] * params["w"] - batch["y"]
    weight = jnp.sum(mask, dtype=jnp.float32)

    def total(values):
        return jnp.sum(jnp.where(mask, values, 0.0))

    means = {"student/error": Mean(total(jnp.abs(error)), weight)}
    return LossOutput(total(0.5 * error**2), weight, means)


@pytest.fixture(scope="module")
def uneven():
    """16 rows of 1 to 9 tokens; the loss grows with the length of the row."""
    rng = np.random.default_rng(3)
    lengths = np.concatenate([np.full(4, n) for n in (1, 3, 7, 9)])[rng.permutation(16)]
    mask = np.arange(9) < lengths[:, None]
    x = rng.normal(size=(16, 9)) * np.sqrt(lengths)[:, None]
    y = rng.normal(size=(16, 9))
    return {"x": x.astype("f4"), "y": y.astype("f4"), "mask": mask}


def by_hand(batch, w):
    """Loss, metric and gradient in float64."""
    x, y, mask = (batch[k].astype("f8") for k in ("x", "y", "mask"))
    error = (x * w - y) * mask
    count = mask.sum()
    return (
        0.5 * (error**2).sum() / count,
        np.abs(error).sum() / count,
        (error * x).sum() / count,
    )


@pytest.mark.parametrize("accumulation", [1, 4, 16])
def test_t4_r19_micro_batches_with_unequal_token_counts_add_exactly(
    uneven, accumulation, rng
):
    w = 0.25
    loss, error, grad = by_hand(uneven, w)
    sgd = optax.sgd(1.0)
    state = init_state({"w": jnp.float32(w)}, student_optimizer=sgd, rng=rng)
    update = make_update(
        Objective("squares", squares),
        student_optimizer=sgd,
        accumulation=accumulation,
    )
    state, metrics = update(state, None, uneven, ())
    assert float(metrics["student/loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["student/error"]) == pytest.approx(error, rel=1e-5)
    assert float(metrics["student/grad_norm"]) == pytest.approx(abs(grad), rel=1e-5)
    assert w - float(state.student.params["w"]) == pytest.approx(grad, rel=1e-5)


def test_t4_the_wrong_way_would_have_been_seen(uneven):
    """The data above tell the two apart, wherever the batch is cut."""
    right = by_hand(uneven, 0.25)
    for parts in (4, 16):
        cuts = [{k: v[i::parts] for k, v in uneven.items()} for i in range(parts)]
        wrong = np.mean([by_hand(cut, 0.25) for cut in cuts], axis=0)
        assert np.all(np.abs(wrong / right - 1) > 1e-2)


# T7: a resume that replays, and everything else that ends a process.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert finish(start(folder, str(STEPS)))[0] == 0
    return outcome(folder)


def assert_resumes_to(start, folder, expected):
    """One more start of the same command ends as if nothing had happened."""
    status, errors = finish(start(folder, str(STEPS)))
    assert (status, "train: 2/4" in errors) == (0, True), errors
    found = outcome(folder)
    assert_same_outcome(found, expected)
    assert expected[1] == {"position": STEPS}
    steps = [json.loads(line)["step"] for line in found[2].splitlines()]
    assert steps == [1, 2, 3, 4]


def test_t7_r31_killed_and_resumed_is_bit_identical(start, tmp_path, uninterrupted):
    status, _ = finish(start(tmp_path, str(STEPS), "kill=3"))
    assert status == -signal.SIGKILL
    # The log is ahead of the checkpoint: step 3 has to be repeated, not doubled.
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert_resumes_to(start, tmp_path, uninterrupted)


def test_ctrl_c_finishes_the_step_saves_and_resumes(start, tmp_path, uninterrupted):
    process = start(tmp_path, str(STEPS), "wait=1")
    wait_until_ready(process)
    process.send_signal(signal.SIGINT)
    status, errors = finish(process)
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        f"stopped after step 2 of 4, saved in {tmp_path}/checkpoints; "
        "the same command goes on from there"
    )
    assert_resumes_to(start, tmp_path, uninterrupted)


def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(
    start, tmp_path, uninterrupted
):
    status, errors = finish(start(tmp_path, str(STEPS), "disk=3"))
    assert status == 1
    assert "Traceback" not in errors
    # Python may warn of coroutines of orbax behind it.
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert line.startswith(
        f"error: cannot write checkpoints in {tmp_path}/checkpoints: File too large; "
        "free some space or choose another folder; checkpoints [2] are intact and the "
        "same command goes on from the newest"
    )
    assert any(p.name.startswith("4.") for p in (tmp_path / "checkpoints").iterdir())
    assert_resumes_to(start, tmp_path, uninterrupted)
    # The half-written one is swept.
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"2", "4"}


def test_a_run_goes_on_without_a_checkpoint_that_found_no_space(start, tmp_path):
    """That of step 4; there is space again before that of step 6."""
    steps, there = "8", tmp_path / "uninterrupted"
    assert finish(start(there, steps))[0] == 0
    process = start(tmp_path / "run", steps, "dearth=3")
    status, errors = finish(process)
    assert status == 0, errors
    assert_same_outcome(outcome(tmp_path / "run"), outcome(there))
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"6", "8"}
    assert "checkpoint 1 of at most 3 lost: cannot write checkpoints in" in errors


class FullDisk:
    """In place of `write_checksums`: there is no space for so many checkpoints."""

    def __init__(self, times, write):
        self.times, self._write = times, write

    def __call__(self, folder):
        self.times -= 1
        if self.times >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write(folder)


@pytest.mark.parametrize(
    ("full", "steps", "raised", "left"),
    [(3, 5, None, {"4", "5"}), (4, 6, "4 lost", set()), (9, 3, "last", set())],
)
def test_some_checkpoints_in_a_row_may_be_lost_and_never_the_last(
    full, steps, raised, left, monkeypatch, tmp_path
):
    disk = FullDisk(full, checkpoint.write_checksums)
    monkeypatch.setattr(checkpoint, "write_checksums", disk)
    stream = io.StringIO()
    wrong = contextlib.nullcontext()
    if raised:
        wrong = pytest.raises(checkpoint.CheckpointError, match="No space left")
    with (
        wrong,
        checkpoint.Checkpoints(tmp_path / "there", config={}) as checkpoints,
        Progress(stream) as progress,
    ):
        fit(
            tiny_game.start(),
            tiny_game.make(),
            tiny_game.Rows(),
            steps=steps,
            frozen=tiny_game.params()[2],
            prepare=tiny_game.prepare,
            checkpoints=checkpoints,
            progress=progress,
            checkpoint_every=1,
        )
    lost = 2 if raised == "last" else 3
    assert stream.getvalue().count(" of at most 3 lost: ") == lost
    there = {path.name for path in (tmp_path / "there").iterdir()}
    assert {name for name in there if "tmp" not in name} == left


def test_a_preempted_process_stops_all_of_them_at_the_same_step(start, tmp_path):
    both = start_two(start, tmp_path, "500")
    wait_until_ready(both[1])
    both[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in both]
    assert [status for status, _ in ends] == [128 + signal.SIGTERM] * 2, ends
    lines = {
        line
        for _, errors in ends
        for line in errors.splitlines()
        if line.startswith("stopped")
    }
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert lines == {
        f"stopped after step {saved.name} of 500, saved in {tmp_path}/checkpoints; "
        "the same command goes on from there"
    }
    log = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(log) == int(saved.name) < 500


def test_a_killed_process_ends_the_other_and_both_go_on_together(start, tmp_path):
    folder = tmp_path / "checkpoints"
    both = start_two(start, tmp_path, "500", "3")
    # Not while its devices exchange something: there the other's may not hear of it,
    # and the runtime's time-out ends that process before it can say anything.
    for line in iter(both[1].stdout.readline, ""):
        saved = any(path.name.isdigit() for path in folder.glob("*"))
        if saved and line == "between steps\n":
            break
    else:
        pytest.fail("it ended by itself")
    assert both[0].poll() is None
    both[1].kill()
    killed = time.monotonic()
    finish(both[1])
    status, errors = finish(both[0])
    assert time.monotonic() - killed < 60.0
    assert status not in (0, None)
    assert "error: a step failed in process 0 of 2" in errors
    saved = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    ends = [finish(p) for p in start_two(start, tmp_path, str(saved + 2), "3")]
    assert [status for status, _ in ends] == [0, 0], ends
    log = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert steps == list(range(1, saved + 3))


def test_nobody_waits_for_one_that_died_while_a_checkpoint_was_written(start, tmp_path):
    both = start_two(start, tmp_path, "500", "1", **SLOW_DISK)
    while not list((tmp_path / "checkpoints").glob("1.*")):
        assert both[0].poll() is None
        time.sleep(0.1)
    # The second step ends at once, and then both wait for the first one's checkpoint.
    time.sleep(3.0)
    both[1].kill()
    finish(both[1])
    status, errors = finish(both[0])
    assert status not in (0, None)
    assert "error: a step failed in process 0 of 2" in errors
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_what_one_process_cannot_finish_in_the_background_all_are_told(start, tmp_path):
    """orbax waits for minutes, also when the processes end: they leave before."""
    both = start_two(start, tmp_path, "500", "1", **FULL_DISK)
    for process in both:
        assert error_line(process).startswith(
            f"error: cannot write checkpoints in {tmp_path}/checkpoints: "
            "process 0 of 2: No space left on device; free some space"
        )
    first, second = (finish(process, timeout=60)[0] for process in both)
    assert second == 1
    # The first one stays longer, and the runtime may notice that the other has left.
    assert first in (1, -signal.SIGABRT)


# T10: what is frozen stays alive and unchanged, what is donated is really gone.


def test_t10_frozen_trees_survive_and_the_state_is_donated():
    student, critic, frozen = tiny_game.params()
    state = tiny_game.start()
    # The reference started from the very arrays that the student started from.
    frozen = {**frozen, "reference": student, "old_critic": critic}
    before = jax.tree.map(np.array, frozen)
    update, rows = tiny_game.make(), tiny_game.Rows()
    for _ in range(3):
        old, (batch, noise) = state, tiny_game.prepare(state, next(rows))
        state, _ = update(state, frozen, batch, noise)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    ours = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.student)}
    theirs = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(frozen)}
    assert not ours & theirs
