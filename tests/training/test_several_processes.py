"""Four processes train as one does: each with its rows, and its part of what is saved.

What they saved goes on in one process on one device, on two and on eight, and in two
processes, where it has to be readable for both.
"""

import collections
import json
import re
import shutil

import jax
import numpy as np
import pytest
import tensorstore

from rkd_jax.sharding import MeshConfig, make_mesh
from rkd_jax.training.checkpoint import Checkpoints
from rkd_jax.training.metrics import read_metrics
from tests.faults.damage import VIEWS, cut, seen_here_alone, view
from tests.faults.processes import finish_all, start_together, starting
from tests.training import shared_rows, tiny_game

COUNT, STEPS = 4, 3
MESHES = {1: None, 2: MeshConfig(fsdp=2), 8: MeshConfig(data=2, fsdp=2, tensor=2)}


@pytest.fixture(scope="module")
def start():
    with starting() as start:
        yield start


def run_together(start, folders, steps, timeout, **environment):
    """(exit status, standard error) of one process per folder, in the time given."""
    kind = {"module": "shared_rows", "devices": 1, **environment}
    count = str(len(folders))
    return finish_all(start_together(start, folders, steps, count, **kind), timeout)


@pytest.fixture(scope="module")
def four(tmp_path_factory, start):
    """The folder of four processes that trained together."""
    folder = tmp_path_factory.mktemp("four")
    ends = run_together(start, [folder] * COUNT, str(STEPS), timeout=180)
    assert [status for status, _ in ends] == [0] * COUNT, ends
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process on one device: its state after as many steps, what it read, the log.

    The log has one step more, and is of a run that never stopped.
    """
    state, read = shared_rows.train(tmp_path_factory.mktemp("one"), STEPS)
    longer = tmp_path_factory.mktemp("longer")
    shared_rows.train(longer, STEPS + 1)
    return tiny_game.flat(state), read, read_metrics(longer)


@pytest.fixture(scope="module")
def final(four):
    """The state as each of the four has it at the end."""
    states = []
    for index in range(COUNT):
        with np.load(four / f"final-{index}.npz") as file:
            states.append(dict(file))
    return states


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert found[name].dtype == value.dtype


def assert_same_metrics(found, expected):
    assert [entry["step"] for entry in found] == [entry["step"] for entry in expected]
    for mine, other in zip(found, expected, strict=True):
        assert mine["metrics"] == pytest.approx(other["metrics"], abs=1e-5)


def test_four_processes_train_as_one(four, final, one):
    state, _, log = one
    assert_same_metrics(read_metrics(four), log[:STEPS])
    for other in final[1:]:
        assert_equal(other, final[0])
    assert final[0].keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_allclose(final[0][name], value, atol=1e-5, err_msg=name)


def test_each_reads_its_rows_and_no_others(four, one):
    """Every global batch is cut into four blocks, in the order of the processes."""
    batches = np.array(one[1]).reshape(STEPS, COUNT, -1)
    assert len(set(batches.flat)) == STEPS * shared_rows.BATCH
    for index in range(COUNT):
        read = json.loads((four / f"read-{index}.json").read_text())
        assert read == batches[:, index].ravel().tolist()


def chunks(folder):
    """{array: its chunks, as their numbers} of one process's part of a checkpoint."""
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    found = collections.defaultdict(list)
    for key in tensorstore.KvStore.open(spec).result().list().result():
        array, _, chunk = key.decode().rpartition("/")
        if chunk != ".zarray":
            found[array].append(tuple(map(int, chunk.split("."))))
    return found


def test_each_writes_its_part_of_every_array_that_is_cut(four):
    saved = four / f"checkpoints/{STEPS}/state"
    folders = {path.name for path in saved.glob("ocdbt.process_*")}
    assert folders == {f"ocdbt.process_{index}" for index in range(COUNT)}
    written = [chunks(saved / f"ocdbt.process_{index}") for index in range(COUNT)]

    mesh = make_mesh(MeshConfig(fsdp=COUNT))
    state = jax.eval_shape(lambda: shared_rows.start(None))
    homes = jax.tree.leaves(shared_rows.shardings(mesh))
    cuts = 0
    for (path, leaf), home in zip(
        jax.tree_util.tree_leaves_with_path(state), homes, strict=True
    ):
        name = ".".join(
            str(getattr(key, "name", None) or getattr(key, "key", None) or key.idx)
            for key in path
        )
        parts = np.array(leaf.shape) // home.shard_shape(leaf.shape)
        found = [part.get(name, []) for part in written]
        if np.prod(parts) == 1:
            assert sum(found, []) in ([(0,)], [(0,) * leaf.ndim]), name
            continue
        cuts += 1
        assert np.prod(parts) == COUNT
        assert found == [[tuple(index * (parts > 1))] for index in range(COUNT)], name
    # All parameters and both moments.
    assert cuts == 3 * len(jax.tree.leaves(shared_rows.params()))


@pytest.mark.parametrize("devices", MESHES)
def test_what_four_wrote_goes_on_in_one_process(four, final, one, tmp_path, devices):
    shutil.copytree(four / "checkpoints", tmp_path / "checkpoints")
    mesh = MESHES[devices] and make_mesh(MESHES[devices])
    with Checkpoints(tmp_path / "checkpoints", config={}) as checkpoints:
        state, _ = checkpoints.restore(shared_rows.start(mesh))
    embedding = state.student.params["embed"]["embedding"]
    assert len(embedding.sharding.device_set) == devices
    assert_equal(tiny_game.flat(state), final[0])
    shared_rows.train(tmp_path, STEPS + 1, mesh)
    assert_same_metrics(read_metrics(tmp_path), one[2][STEPS:])


def test_both_stop_when_one_alone_cannot_read_it(four, start, tmp_path):
    """Two processes, of which the second sees files cut that it needs."""
    folder = tmp_path / "folder"
    shutil.copytree(four / "checkpoints", folder / "checkpoints")
    there = view(folder, tmp_path / "view")
    part = there / f"checkpoints/{STEPS}/state/ocdbt.process_{COUNT - 1}"
    for file in [path for path in part.rglob("*") if path.is_file()]:
        cut(seen_here_alone(file))
    folders = [folder, there]
    ends = run_together(start, folders, str(STEPS + 1), timeout=90, **VIEWS)
    lines = [re.findall("^error: .*", errors, re.MULTILINE) for _, errors in ends]
    assert lines[0] == lines[1] != [], ends
    assert re.fullmatch(
        rf"error: not every process can read checkpoint {STEPS} \(process 1 of 2: "
        rf"cannot read checkpoint {STEPS} in {there}/checkpoints: .*; its files are as "
        r"they were written, says process 0\); all stop and nothing was renamed: .*",
        lines[0][0],
    ), ends
    assert [status for status, _ in ends] == [1, 1]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {str(STEPS)}


def test_processes_with_a_folder_each_are_told_so_before_anything_is_done(
    start, tmp_path
):
    """They used to wait for one another in the first save, and for ever."""
    folders = [tmp_path / "mine", tmp_path / "yours"]
    ends = run_together(start, folders, "1", timeout=90)
    for folder, (status, errors) in zip(folders, ends, strict=True):
        assert status == 1
        assert (
            f"error: cannot open checkpoints in {folder}/checkpoints: process 1 of 2: "
            "not the folder of process 0; all need one, on a disk that they share or "
            "in a bucket; check the path and its permissions\n"
        ) in errors, errors
        assert not list((folder / "checkpoints").iterdir())


def test_a_folder_that_one_alone_cannot_use_stops_both(start, tmp_path):
    """A file stands where the second has to make its folder."""
    folders = [tmp_path / "folder", tmp_path / "file"]
    folders[1].touch()
    ends = run_together(start, folders, "1", timeout=90)
    for folder, (status, errors) in zip(folders, ends, strict=True):
        assert status == 1
        said = f"error: cannot open checkpoints in {folder}/checkpoints: process 1 of 2"
        assert f"{said}: [Errno 20] Not a directory: " in errors, errors
