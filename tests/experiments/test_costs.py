"""What a step costs: with the checkpoint that may be the last thing a start does."""

import errno
import io
import os

import pytest

from experiments import costs
from experiments.costs import read_costs
from experiments.stages import Desk, train
from rkd_jax.training.checkpoint import Checkpoints
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from tests.training import tiny_game

STEPS = 4


class Killed(BaseException):
    """Nothing of ours runs after it, as after SIGKILL."""


@pytest.fixture
def start_killed_after(monkeypatch):
    """A start that ends as soon as the checkpoint of a step is there."""

    def start_killed_after(step, folder):
        save = Checkpoints.save

        def save_and_die(self, state, data):
            save(self, state, data)
            if int(state.step) == step:
                self.wait()
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", save_and_die)
            with pytest.raises(Killed):
                start(folder)

    return start_killed_after


def start(folder):
    """One start of a training of `STEPS` steps with a checkpoint after each."""
    stream = io.StringIO()
    with Progress(stream) as progress:
        train(
            Desk(RunFolder(folder, {}), progress, checkpoint_every=1),
            "game",
            folder,
            tiny_game.start(),
            tiny_game.make(),
            tiny_game.Rows(),
            steps=STEPS,
            config={},
            prepare=tiny_game.prepare,
            frozen=tiny_game.params()[2],
        )
    return stream.getvalue()


def test_a_kill_behind_the_last_checkpoint_loses_no_cost(start_killed_after, tmp_path):
    start_killed_after(STEPS, tmp_path)
    there = read_costs(tmp_path)
    assert there["seconds_per_step"] > 0
    assert there["peak_gib"] > 0
    start(tmp_path)  # makes no step
    assert read_costs(tmp_path) == there


def test_a_start_of_one_step_keeps_the_pace_of_the_one_before(
    start_killed_after, tmp_path
):
    start_killed_after(STEPS - 1, tmp_path)
    there = read_costs(tmp_path)
    (tmp_path / ".cost.json.half").write_text("{")
    start(tmp_path)
    assert read_costs(tmp_path) == there
    assert not list(tmp_path.glob(".cost.json.*"))


def test_a_start_of_one_step_has_memory_and_no_pace(start_killed_after, tmp_path):
    start_killed_after(1, tmp_path)
    assert read_costs(tmp_path).keys() == {"peak_gib"}
    start(tmp_path)
    assert read_costs(tmp_path).keys() == {"peak_gib", "seconds_per_step"}


def test_a_full_disk_loses_the_cost_and_not_the_training(monkeypatch, tmp_path):
    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(costs, "write_json", full)
    said = start(tmp_path)
    assert said.count("game: the cost of a step is lost: [Errno 28] No space") == STEPS
    assert (tmp_path / "checkpoints" / str(STEPS)).is_dir()
    assert read_costs(tmp_path) == {}
