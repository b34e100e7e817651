"""Checkpoints that a disk damaged: noticed, named, kept aside, and done without."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.training import (
    MetricsWriter,
    Progress,
    RunFolder,
    fit,
    init_state,
    make_update,
    read_metrics,
)
from rkd_jax.training.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
)
from rkd_jax.training.checksums import CHECKSUMS
from rkd_jax.types import LossOutput, Objective
from tests.faults.damage import cut, flip
from tests.training import tiny_game

CONFIG = {"seed": 0}


@pytest.fixture(scope="module")
def state():
    """Of the tiny game, with an array large enough to have a file of its own."""
    noise = jax.random.normal(jax.random.key(0), (300, 300))
    return dataclasses.replace(tiny_game.start(), dual=noise)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("pristine") / "checkpoints"
    with Checkpoints(folder, config=CONFIG, keep=2) as checkpoints:
        for step in (2, 3):
            at = dataclasses.replace(state, step=jnp.int32(step))
            checkpoints.save(at, {"position": 5 * step})
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """Checkpoints 2 and 3, both whole."""
    shutil.copytree(pristine, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def arrays(step):
    """The largest file of a checkpoint: the numbers themselves."""
    files = [path for path in (step / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def age(step):
    """As a version wrote it that did not know its layout, nor checksums."""
    path = step / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["layout"]
    path.write_text(json.dumps(meta))
    (step / CHECKSUMS).unlink()


def names(folder):
    return {path.name for path in folder.iterdir()}


def position(folder, state):
    """Of the checkpoint that is restored, which has to be bit for bit its state."""
    with Checkpoints(folder, config=CONFIG) as checkpoints:
        found, position = checkpoints.restore(state)
    expected = tiny_game.flat(dataclasses.replace(state, step=found.step))
    for name, value in tiny_game.flat(found).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    return position, checkpoints.damage


DAMAGE = {
    "array file cut": (lambda step: cut(arrays(step)), r"has \d+ bytes, \d+ were wr"),
    "array file changed": (lambda step: flip(arrays(step)), "is not what was written"),
    "array file missing": (lambda step: arrays(step).unlink(), "state/.* is missing"),
    "array index missing": (
        lambda step: (step / "state/manifest.ocdbt").unlink(),
        "state/manifest.ocdbt is missing",
    ),
    "state missing": (lambda step: shutil.rmtree(step / "state"), "is missing"),
    "metadata missing": (lambda step: shutil.rmtree(step / "meta"), "meta.* missing"),
    "metadata cut": (lambda step: cut(step / "meta/metadata"), "meta/metadata has"),
    "position missing": (lambda step: shutil.rmtree(step / "data"), "data.* missing"),
    "checksums cut": (lambda step: cut(step / CHECKSUMS), f"{CHECKSUMS} is unreadable"),
    "older format": (age, "meta lacks layout, as in an older format"),
    "nothing left": (empty, ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_is_used_and_the_damage_named(
    folder, state, damage, caplog
):
    harm, reason = DAMAGE[damage]
    harm(folder / "3")
    found, lines = position(folder, state)
    assert found == {"position": 10}
    (line,) = lines
    assert re.search(rf"checkpoint 3 in .* is damaged \(.*{reason}.*\)", line)
    assert line.endswith("it is now called damaged-3, and the run goes on from step 2")
    assert line in caplog.text
    assert names(folder) == {"2", "damaged-3"}


def test_a_whole_checkpoint_is_not_suspected(folder, state):
    assert position(folder, state) == ({"position": 15}, [])
    assert names(folder) == {"2", "3"}


@pytest.mark.parametrize(
    "harm",
    # Not arrays: reads that orbax has begun when one fails outlive their event loop.
    [
        lambda step: shutil.rmtree(step / "state"),
        lambda step: shutil.rmtree(step / "meta"),
        lambda step: shutil.rmtree(step / "data"),
        lambda step: cut(step / "meta/metadata"),
    ],
)
def test_a_checkpoint_without_checksums_falls_back_on_what_orbax_notices(
    folder, state, harm, caplog
):
    for step in ("2", "3"):
        (folder / step / CHECKSUMS).unlink()
    harm(folder / "3")
    found, lines = position(folder, state)
    assert (found, len(lines)) == ({"position": 10}, 1)
    assert "2 has no checksums: an older one" in caplog.text


def test_a_step_that_was_damaged_can_be_saved_again_and_again(folder, state):
    for name in ("damaged-3", "damaged-3-2"):
        flip(arrays(folder / "3"))
        with Checkpoints(folder, config=CONFIG, keep=2) as checkpoints:
            checkpoints.restore(state)
            assert checkpoints.latest() == 2
            at = dataclasses.replace(state, step=jnp.int32(3))
            checkpoints.save(at, {"position": 15})
        assert name in names(folder)
    assert position(folder, state) == ({"position": 15}, [])
    assert names(folder) == {"2", "3", "damaged-3", "damaged-3-2"}


def test_when_none_is_whole_nothing_begins_afresh(folder, state):
    flip(arrays(folder / "3"))
    arrays(folder / "2").unlink()
    with (
        Checkpoints(folder, config=CONFIG) as checkpoints,
        pytest.raises(
            CheckpointError,
            match=r"no checkpoint is whole \(3: .* is not what was written; "
            r"2: .* is missing\); put a copy of one back, or move the folder away",
        ),
    ):
        checkpoints.restore(state)
    assert names(folder) == {"2", "3"}


def test_another_configuration_is_no_damage(folder, state):
    with (
        Checkpoints(folder, config={"seed": 1}) as checkpoints,
        pytest.raises(CheckpointMismatch, match="seed is 0 there, 1 here"),
    ):
        checkpoints.restore(state)
    assert names(folder) == {"2", "3"}


def test_what_cannot_be_read_although_it_is_whole_is_no_damage(
    folder, state, monkeypatch
):
    def fails(*args, **kwargs):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with Checkpoints(folder, config=CONFIG) as checkpoints:
        monkeypatch.setattr(checkpoints._reader, "restore", fails)
        with pytest.raises(
            CheckpointError, match="read checkpoint 3 .* RESOURCE_EXHAUSTED.* as they"
        ):
            checkpoints.restore(state)
    assert names(folder) == {"2", "3"}


# A run that meets it.


def decay(params, critic, frozen, batch, signal, rng):
    """x <- x / 2 for batches of ones."""
    return LossOutput(jnp.sum(0.5 * params["x"] ** 2), jnp.float32(1), {})


SGD = optax.sgd(0.5)


class Ones(tiny_game.Rows):
    def __next__(self):
        self.position += 1
        return np.ones(4, np.float32)


@pytest.fixture(scope="module")
def update():
    return make_update(Objective("decay", decay), student_optimizer=SGD)


def run(folder, update, rng, steps):
    """The final state, the data position, and what progress said."""
    start = init_state({"x": jnp.ones(2)}, student_optimizer=SGD, rng=rng)
    batches, stream = Ones(), io.StringIO()
    with (
        Checkpoints(folder / "checkpoints", config={}) as checkpoints,
        MetricsWriter(folder, tensorboard=False) as metrics,
    ):
        state = fit(
            start,
            update,
            batches,
            steps=steps,
            checkpoints=checkpoints,
            metrics=metrics,
            progress=Progress(stream),
            checkpoint_every=2,
        )
    return state, batches.position, stream.getvalue()


def test_a_run_goes_on_from_the_whole_checkpoint_and_repeats_the_rest(
    tmp_path, update, rng
):
    run(tmp_path, update, rng, steps=4)
    flip(arrays(tmp_path / "checkpoints/4"))
    state, position, said = run(tmp_path, update, rng, steps=6)
    np.testing.assert_array_equal(state.student.params["x"], 0.5**6)
    assert (int(state.step), position) == (6, 6)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert "checkpoint 4 in" in said.splitlines()[0]
    assert "train: 2/6" in said
    assert names(tmp_path / "checkpoints") == {"4", "6", "damaged-4"}


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start(tmp_path, update, rng):
    run(tmp_path, update, rng, steps=4)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    for step in ("2", "4"):
        cut(arrays(tmp_path / "checkpoints" / step))
    for _ in range(2):  # and the second time it is the same
        with pytest.raises(CheckpointError, match="no checkpoint is whole"):
            run(tmp_path, update, rng, steps=6)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


# Folders that nobody may write to.


@contextlib.contextmanager
def nobody():
    """Root is refused nothing, so become nobody for a while."""
    was_root = os.geteuid() == 0
    if was_root:
        try:
            os.seteuid(65534)
        except OSError:
            pytest.skip("root may become nobody else here")
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


def test_a_read_only_folder_is_one_line_and_costs_no_checkpoint(folder, state):
    at = dataclasses.replace(state, step=jnp.int32(4))
    before = set(threading.enumerate())
    with Checkpoints(folder, config=CONFIG) as checkpoints:
        # orbax looks for half-written ones in the background, as root.
        for thread in set(threading.enumerate()) - before:
            if not thread.daemon:
                thread.join(timeout=20.0)
        folder.chmod(0o555)
        with (
            nobody(),
            pytest.raises(
                CheckpointError,
                match=r"cannot write checkpoints in .*: Permission denied; free some "
                r"space or choose another folder; checkpoints \[2, 3\] are intact",
            ),
        ):
            checkpoints.save(at, None)
        folder.chmod(0o755)
    # Nobody is left waiting for the folder, which would keep the process from ending.
    left = [t for t in set(threading.enumerate()) - before if not t.daemon]
    for thread in left:
        thread.join(timeout=20.0)
    assert not [thread for thread in left if thread.is_alive()]
    assert position(folder, state) == ({"position": 15}, [])


def test_a_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot open checkpoints in .*Not a dir"):
        Checkpoints(tmp_path / "file" / "checkpoints", config={})
    with pytest.raises(NotADirectoryError, match="file/run"):
        RunFolder.open(tmp_path / "file" / "run", {})
    with pytest.raises(NotADirectoryError, match="file/run"):
        MetricsWriter(tmp_path / "file" / "run", tensorboard=False)
