"""The host loop: what it resumes, waits for, reports and refuses."""

import io
import itertools
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.training import (
    Interrupted,
    MetricsWriter,
    Progress,
    fit,
    init_state,
    make_update,
    memory_report,
    read_metrics,
)
from rkd_jax.training.checkpoint import Checkpoints
from rkd_jax.types import LossOutput, Objective
from tests.training import tiny_game

SGD = optax.sgd(0.5)


def decay(params, critic, frozen, batch, signal, rng):
    """x <- x (1 - rate); NaN batches spoil it."""
    total = jnp.sum(0.5 * params["x"] ** 2) * jnp.mean(batch)
    return LossOutput(total, jnp.float32(1), {})


@pytest.fixture(scope="module")
def update():
    """Shared, so that everything here compiles once."""
    return make_update(Objective("decay", decay), student_optimizer=SGD)


@pytest.fixture
def state(rng):
    return init_state({"x": jnp.ones(2)}, student_optimizer=SGD, rng=rng)


class Ones(tiny_game.Rows):
    """The same batch for ever, except NaN at the positions given."""

    def __init__(self, nan=()):
        super().__init__()
        self.nan = nan

    def __next__(self):
        self.position += 1
        return np.full(4, np.nan if self.position in self.nan else 1.0, np.float32)


def test_steps_are_counted_in_total(state, update):
    batches = Ones()
    state = fit(state, update, batches, steps=3)
    assert (int(state.step), batches.position) == (3, 3)
    np.testing.assert_array_equal(state.student.params["x"], 0.5**3)
    state = fit(state, update, batches, steps=5)
    assert (int(state.step), batches.position) == (5, 5)
    state = fit(state, update, batches, steps=5)
    assert batches.position == 5


def test_checkpoints_at_the_interval_and_the_end_then_resume(tmp_path, state, update):
    start, first = jax.tree.map(jnp.copy, state), Ones()
    with Checkpoints(tmp_path, config={}, keep=9) as checkpoints:
        fit(state, update, first, steps=5, checkpoints=checkpoints, checkpoint_every=2)
        assert sorted(int(p.name) for p in tmp_path.iterdir()) == [2, 4, 5]
        second = Ones()
        end = fit(start, update, second, steps=7, checkpoints=checkpoints)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))
        assert (int(end.step), second.position) == (7, 7)
        np.testing.assert_array_equal(end.student.params["x"], 0.5**7)
        # A state ahead of the checkpoints is not set back.
        end = fit(end, update, second, steps=8)
        end = fit(end, update, second, steps=9, checkpoints=checkpoints)
        assert (int(end.step), second.position) == (9, 9)


@pytest.mark.parametrize("in_flight", [0, 2])
def test_it_waits_for_the_metrics_of_an_earlier_step(state, in_flight):
    events = []

    class Value:
        def __init__(self, step):
            self.step = step

        def __float__(self):
            events.append(("wait", self.step))
            return 0.0

    def update(state, frozen, batch, signal):
        step = len([e for e in events if e[0] == "run"]) + 1
        events.append(("run", step))
        return state, {"student/loss": Value(step)}

    fit(state, update, Ones(), steps=5, in_flight=in_flight)
    for step in range(1, 6):
        run = events.index(("run", min(step + in_flight, 5)))
        assert events.index(("wait", step)) > run
        later = (
            events.index(("run", step + in_flight + 1)) if step + in_flight < 5 else 99
        )
        assert events.index(("wait", step)) < later


def test_a_log_from_before_the_checkpoint_is_rewritten(tmp_path, state, update):
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
        metrics.write(7, {"student/loss": 9.0})
        fit(state, update, Ones(), steps=2, metrics=metrics)
    entries = read_metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [1, 2]
    assert [entry["metrics"]["student/loss"] for entry in entries] == [1.0, 0.25]


def test_prepare_sees_the_current_state(state, update):
    seen = []

    def prepare(state, batch):
        seen.append(float(state.student.params["x"][0]))
        return batch * np.float32(2), ()  # twice the gradient: x <- 0

    fit(state, update, Ones(), steps=3, prepare=prepare)
    assert seen == [1.0, 0.0, 0.0]


def test_a_probe_measures_the_state_after_each_update(tmp_path, state, update):
    with MetricsWriter(tmp_path, tensorboard=False) as metrics:
        fit(
            state,
            update,
            Ones(),
            steps=2,
            metrics=metrics,
            probe=lambda state: {"held_out/x": state.student.params["x"][0]},
        )
    entries = read_metrics(tmp_path)
    assert [entry["metrics"]["held_out/x"] for entry in entries] == [0.5, 0.25]
    assert [entry["metrics"]["student/loss"] for entry in entries] == [1.0, 0.25]


def test_r16_skipped_steps_are_reported_and_too_many_end_the_run(state, update):
    out = io.StringIO()
    batches = Ones(nan=(2, 4, 5, 6, 7))
    with pytest.raises(RuntimeError, match="3 updates up to step 6 were refused"):
        fit(state, update, batches, steps=9, progress=Progress(out), max_skipped=2)
    notes = [line for line in out.getvalue().splitlines() if "skipped" in line]
    assert [note.split(":")[0] for note in notes] == [f"step {s}" for s in (2, 4, 5, 6)]


def test_r27_memory_is_told_before_the_first_step(state, update):
    out = io.StringIO()
    fit(state, update, Ones(), steps=1, progress=Progress(out), name="sft")
    first, second, *_ = out.getvalue().splitlines()
    assert first == "sft: 0/1"
    assert second.startswith("memory per device: student 0.01 KiB, inputs")


def test_r27_memory_report_counts_every_role_once():
    state = tiny_game.start()
    frozen = tiny_game.params()[2]
    batch = next(tiny_game.Rows())
    noise = tiny_game.Signal(np.zeros((16, 6), np.float32))
    report = memory_report(tiny_game.make(), state, frozen, batch, noise)
    floats = {
        "student": 12,
        "student optimizer": 2 * 12 + 2,  # two moments, two counters
        "critic": 6,
        "critic optimizer": 2 * 6 + 2,
        "frozen": 6,
        "inputs": 96 + 96 // 4 + 96,  # x, mask (one byte each), noise
    }
    assert report.roles == {role: 4 * count for role, count in floats.items()}
    assert report.peak == sum(report.roles.values()) + report.working
    assert report.working > 0


def test_batches_that_end_early_are_an_error(state, update):
    batches = itertools.islice(Ones(), 2)
    with pytest.raises(ValueError, match="ended after 2 of 5 steps: repeat the data"):
        fit(state, update, batches, steps=5)


def test_batches_without_a_position_are_refused_with_checkpoints(
    tmp_path, state, update
):
    batches = itertools.islice(Ones(), 2)
    with (
        Checkpoints(tmp_path, config={}) as checkpoints,
        pytest.raises(TypeError, match="islice has no get_state"),
    ):
        fit(state, update, batches, steps=2, checkpoints=checkpoints)


def test_interruption_without_checkpoints_says_so_and_restores_handlers(state, update):
    before = signal.getsignal(signal.SIGTERM)

    def prepare(state, batch):
        if int(state.step) == 1:
            signal.raise_signal(signal.SIGTERM)
        return batch, ()

    with pytest.raises(Interrupted, match="step 2 of 9; nothing was saved") as stop:
        fit(state, update, Ones(), steps=9, prepare=prepare)
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_is_obeyed_at_once(state, update):
    def prepare(state, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return batch, ()

    # A test run started in the background inherits an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            fit(state, update, Ones(), steps=9, prepare=prepare)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not isinstance(stop.value, Interrupted)


def test_it_runs_outside_the_main_thread(state, update):
    ends = []
    thread = threading.Thread(
        target=lambda: ends.append(fit(state, update, Ones(), steps=2))
    )
    thread.start()
    thread.join()
    assert [int(end.step) for end in ends] == [2]
