"""Trainings that blow up: what was fed then is written down, spikes are said."""

import hashlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.training import (
    Diverged,
    MetricsWriter,
    Progress,
    fit,
    init_state,
    make_update,
    read_metrics,
)
from rkd_jax.training.checkpoint import Checkpoints
from rkd_jax.training.refused import RefusedBatches, drawn
from rkd_jax.training.spikes import ENOUGH, FACTOR, SpikeWatch
from rkd_jax.types import LossOutput, Objective, PromptBatch, Prompts
from tests.training import tiny_game

STILL = optax.sgd(0.0)  # the loss is then the mean of the batch


class Levels(tiny_game.Rows):
    """Batches of ones, except at the positions given."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels

    def __next__(self):
        self.position += 1
        return np.full(4, self.levels.get(self.position, 1.0), np.float32)


@pytest.fixture(scope="module")
def update():
    def loss(params, critic, frozen, batch, signal, rng):
        return LossOutput(params["x"] * jnp.mean(batch), jnp.float32(1), {})

    return make_update(Objective("level", loss), student_optimizer=STILL)


@pytest.fixture
def train(update, rng, tmp_path):
    """Trains on levels up to a step; what progress said."""

    def train(levels, steps, folder=tmp_path / "run", **kwargs):
        stream = io.StringIO()
        state = init_state({"x": jnp.ones(())}, student_optimizer=STILL, rng=rng)
        with (
            MetricsWriter(folder, tensorboard=False) as metrics,
            Checkpoints(folder / "checkpoints", config={}) as checkpoints,
        ):
            fit(
                state,
                update,
                Levels(levels),
                steps=steps,
                metrics=metrics,
                checkpoints=checkpoints,
                progress=Progress(stream),
                **kwargs,
            )
        return stream.getvalue()

    return train


def test_refused_batches_are_described_beside_the_metrics(train, tmp_path):
    nan = dict.fromkeys((2, 4, 5, 6, 7, 8, 9), np.nan)
    file = tmp_path / "run" / "refused_batches.json"
    with pytest.raises(
        Diverged, match=rf"3 updates up to step 6 .* are described in {file}; look at"
    ):
        train(nan, 20, max_skipped=2)
    entries = json.loads(file.read_text())
    # Not that of step 2, after which one was taken.
    assert [entry["step"] for entry in entries] == [4, 5, 6]
    assert [entry["position_after"]["position"] for entry in entries] == [4, 5, 6]
    batch = np.full(4, np.nan, np.float32)
    assert entries[0]["arrays"] == {
        "batch": {
            "shape": [4],
            "dtype": "float32",
            "sha256": hashlib.sha256(batch.tobytes()).hexdigest(),
            "not_finite": 4,
        }
    }
    assert entries[0]["metrics"]["student/loss"] is None
    assert entries[0]["metrics"]["skipped"] == 1.0


def test_records_are_named_where_the_batch_knows_them(tmp_path):
    prompts = Prompts(np.zeros((2, 3), np.int32), np.ones((2, 3), bool))
    batch = {"demonstrations": PromptBatch(prompts, prompts, np.array([17, 4]))}
    refused = RefusedBatches(keep=2)
    for step in (1, 2, 3):
        source = drawn(batch, tiny_game.Rows())
        refused.add(step, {"student/loss": float("inf")}, source)
    assert refused.count == 3
    entries = json.loads(refused.write(tmp_path).read_text())
    assert [entry["step"] for entry in entries] == [2, 3]
    assert entries[0]["records"] == {"batch['demonstrations'].index": [17, 4]}
    assert "position_after" not in entries[0]
    mask = entries[0]["arrays"]["batch['demonstrations'].prompts.mask"]
    assert (mask["shape"], mask["dtype"]) == ([2, 3], "bool")
    refused.clear()
    assert json.loads(refused.write(tmp_path).read_text()) == []


def test_each_process_describes_the_rows_that_it_read(monkeypatch, tmp_path):
    for process, records in enumerate(([17, 4], [3, 9])):
        monkeypatch.setattr(jax, "process_index", lambda index=process: index)
        batch = PromptBatch(None, None, np.array(records))
        refused = RefusedBatches()
        refused.add(1, {}, drawn(batch, tiny_game.Rows()))
        refused.write(tmp_path)
    for name, records in ("", [17, 4]), ("-1", [3, 9]):
        (entry,) = json.loads((tmp_path / f"refused_batches{name}.json").read_text())
        assert entry["records"] == {"batch.index": records}


def test_a_dump_that_cannot_be_written_does_not_hide_the_reason(train, tmp_path):
    (tmp_path / "run" / "refused_batches.json").mkdir(parents=True)
    with pytest.raises(Diverged, match=r"3 updates .* could not be described in .*run"):
        train(dict.fromkeys(range(9), np.nan), 9, max_skipped=2)


def spikes(folder):
    return [
        entry["step"]
        for entry in read_metrics(folder)
        if entry["metrics"]["student/loss_spike"]
    ]


def test_a_spike_is_noted_and_logged_and_a_resume_sees_the_same(train, tmp_path):
    levels = {20: 50.0, 24: np.nan, 25: 1.2, 28: -50.0}
    said = train(levels, 30)
    assert spikes(tmp_path / "run") == [20]
    note = "step 20: loss 50 is 980 times the usual spread above the median 1"
    assert note in said.splitlines()
    # Stopped just before it: the losses before it are read back from the log.
    train(levels, 19, tmp_path / "again")
    assert note in train(levels, 30, tmp_path / "again").splitlines()
    logs = [tmp_path / name / "metrics.jsonl" for name in ("run", "again")]
    assert logs[0].read_bytes() == logs[1].read_bytes()


@pytest.mark.parametrize(
    "losses",
    [
        np.random.default_rng(0).normal(-1.0, 1.0, 2000),  # of either sign
        np.linspace(9.0, 1.0, 200),
        np.linspace(1.0, 2.0, 200),  # a slow rise is another matter
        [*np.ones(ENOUGH - 1), 99.0],  # too early to know
        np.full(99, np.nan),
    ],
)
def test_ordinary_curves_have_no_spikes(losses):
    watch = SpikeWatch()
    assert [watch.see(float(loss)) for loss in losses] == [None] * len(losses)


def test_a_spike_is_measured_in_spreads():
    noise = np.random.default_rng(0).normal(0.0, 1.0, 64)
    median = float(np.median(noise))
    spread = float(np.median(np.abs(noise - median)))
    for times, found in ((FACTOR - 0.01, False), (FACTOR + 0.01, True)):
        watch = SpikeWatch(noise.tolist())
        spike = watch.see(median + times * spread)
        assert (spike is not None) == found
    assert tuple(spike) == pytest.approx((median + times * spread, median, spread))
