"""What a checkpoint brings back, onto which devices, and what it refuses."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.sharding import MeshConfig, make_mesh, tree_shardings
from rkd_jax.training.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
)
from rkd_jax.training.state import abstract, state_shardings
from tests.training import tiny_game

CONFIG = {"optim": {"learning_rate": 1e-3, "betas": (0.9, 0.99)}, "seed": 0}


@pytest.fixture(scope="module")
def state():
    return tiny_game.start(seed=7)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, config=CONFIG, keep=2) as checkpoints:
        for step in (1, 2, 3):
            at = dataclasses.replace(state, step=jnp.int32(step))
            checkpoints.save(at, {"position": 5 * step})
        checkpoints.wait()
        assert checkpoints.latest() == 3
    return folder


def test_everything_comes_back_bit_for_bit(saved, state):
    with Checkpoints(saved, config=CONFIG) as checkpoints:
        found, position = checkpoints.restore(state)
    expected = tiny_game.flat(dataclasses.replace(state, step=jnp.int32(3)))
    restored = tiny_game.flat(found)
    assert restored.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(restored[name], value, err_msg=name)
        assert restored[name].dtype == value.dtype
    assert jnp.issubdtype(found.rng.dtype, jax.dtypes.prng_key)
    assert position == {"position": 15}


def test_only_the_newest_are_kept(saved):
    names = {path.name for path in saved.iterdir()}
    assert names == {"2", "3"}


def test_versions_and_configuration_are_inside(saved):
    meta = json.loads((saved / "3" / "meta" / "metadata").read_text())
    assert meta["versions"]["jax"] == jax.__version__
    assert meta["versions"].keys() >= {"rkd_jax", "flax", "optax", "orbax-checkpoint"}
    assert meta["config"] == json.loads(json.dumps(CONFIG))


def test_nothing_is_pickled(saved):
    for path in saved.rglob("*"):
        assert path.suffix not in (".pkl", ".pickle")
        if path.is_file():
            assert not path.read_bytes().startswith(b"\x80\x04")


def test_restores_onto_the_shardings_that_ask(saved, state):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=3))
    student, critic, _ = tiny_game.params()
    shardings = state_shardings(
        student,
        tree_shardings({"w": (None, "embed"), "b": (None, "mlp")}, mesh),
        student_optimizer=tiny_game.STUDENT,
        critic_params=critic,
        critic_shardings=tree_shardings({"v": (None, "embed")}, mesh),
        critic_optimizer=tiny_game.CRITIC,
    )
    template = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract(state),
        shardings,
    )
    with Checkpoints(saved, config=CONFIG) as checkpoints:
        found, _ = checkpoints.restore(template)
    assert found.student.params["b"].addressable_shards[0].data.shape == (1, 2)
    np.testing.assert_array_equal(found.student.params["w"], state.student.params["w"])


def test_another_configuration_is_named_field_by_field(saved, state):
    other = {"optim": {"learning_rate": 2e-3, "betas": (0.9, 0.99)}, "beta": 0.1}
    with (
        Checkpoints(saved, config=other) as checkpoints,
        pytest.raises(CheckpointMismatch) as error,
    ):
        checkpoints.restore(state)
    assert str(error.value) == (
        f"{saved}: checkpoint 3 has another configuration: beta is absent there, 0.1 "
        "here; optim.learning_rate is 0.001 there, 0.002 here; seed is 0 there, absent "
        "here; restore these fields, or use another folder"
    )


def test_another_state_is_named_array_by_array(saved, state):
    params = {**state.student.params, "w": jnp.zeros((1, 9), jnp.bfloat16)}
    other = dataclasses.replace(
        state, student=dataclasses.replace(state.student, params=params)
    )
    with (
        Checkpoints(saved, config=CONFIG) as checkpoints,
        pytest.raises(
            CheckpointMismatch,
            match=r"student.params\['w'\] is \"float32\(1, 6\)\" there, "
            r"\"bfloat16\(1, 9\)\" here",
        ),
    ):
        checkpoints.restore(other)


def test_a_save_is_a_snapshot_even_if_the_state_is_donated_at_once(tmp_path, state):
    big = dataclasses.replace(
        tiny_game.start(), dual=jnp.zeros((500, 500), jnp.float32)
    )
    step = jax.jit(
        lambda s: dataclasses.replace(s, dual=s.dual + 1.0), donate_argnums=0
    )
    with Checkpoints(tmp_path / "c", config={}) as checkpoints:
        template = abstract(big)
        checkpoints.save(big, None)
        for _ in range(20):
            big = step(big)
        checkpoints.wait()
        found, position = checkpoints.restore(template)
    assert float(jnp.max(jnp.abs(found.dual))) == 0.0
    assert float(jnp.min(big.dual)) == 20.0
    assert position is None


def test_other_versions_are_reported_not_refused(saved, state, monkeypatch, caplog):
    with Checkpoints(saved, config=CONFIG) as checkpoints:
        checkpoints._versions = {**checkpoints._versions, "jax": "9.9"}
        checkpoints.restore(state)
    assert "jax is " in caplog.text
    assert '"9.9" here' in caplog.text


def test_a_half_written_checkpoint_is_ignored(saved, tmp_path, state):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    with Checkpoints(folder, config=CONFIG) as checkpoints:
        assert checkpoints.latest() == 3


def test_unusable_folders_are_named(tmp_path, state):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot open checkpoints in .*/file"):
        Checkpoints(tmp_path / "file", config={})
    with (
        Checkpoints(tmp_path / "empty", config={}) as checkpoints,
        pytest.raises(CheckpointError, match="empty holds no checkpoint"),
    ):
        checkpoints.restore(state)


def test_positions_and_configurations_must_be_plain(tmp_path, state):
    with pytest.raises(ValueError, match="plain JSON: .*set"):
        Checkpoints(tmp_path / "a", config={"x": {1}})
    with (
        Checkpoints(tmp_path / "b", config={}) as checkpoints,
        pytest.raises(ValueError, match="data position must be plain JSON: .*bytes"),
    ):
        checkpoints.save(state, b"position")
