"""Eight devices and one give the same training; nothing moves or recompiles."""

import jax
import numpy as np
import pytest

from rkd_jax.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    replicated,
    shard_batch,
    tree_shardings,
)
from rkd_jax.training.state import state_shardings
from tests.training import tiny_game

STUDENT_AXES = {"w": (None, "embed"), "b": (None, "mlp")}
CRITIC_AXES = {"v": (None, "embed")}


@pytest.fixture
def compiled():
    """Names of the functions XLA compiled so far."""
    names = []

    def listen(event, _, **details):
        if event.endswith("backend_compile_duration"):
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def train(state, update, frozen, place, steps=3):
    rows, seen = tiny_game.Rows(width=8), []
    for _ in range(steps):
        batch, signal = tiny_game.prepare(state, next(rows))
        state, metrics = update(state, frozen, place(batch), place(signal))
        seen.append({k: float(v) for k, v in metrics.items()})
    return state, seen


def on_mesh(mesh, accumulation):
    student, critic, frozen = tiny_game.params(8)
    shardings = state_shardings(
        student,
        tree_shardings(STUDENT_AXES, mesh, shapes=student),
        student_optimizer=tiny_game.STUDENT,
        critic_params=critic,
        critic_shardings=tree_shardings(CRITIC_AXES, mesh, shapes=critic),
        critic_optimizer=tiny_game.CRITIC,
    )
    update = tiny_game.make(
        accumulation=accumulation,
        state_shardings=shardings,
        batch_sharding=batch_sharding(mesh),
    )
    state = tiny_game.start(width=8, shardings=shardings)
    return shardings, state, update, jax.device_put(frozen, replicated(mesh))


@pytest.mark.parametrize(
    ("config", "accumulation"),
    [(MeshConfig(data=8), 1), (MeshConfig(data=2, fsdp=2, tensor=2), 2)],
)
def test_mesh_equals_one_device(config, accumulation, compiled):
    one, seen_one = train(
        tiny_game.start(width=8),
        tiny_game.make(accumulation=accumulation),
        tiny_game.params(8)[2],
        lambda tree: tree,
    )
    mesh = make_mesh(config)
    shardings, state, update, frozen = on_mesh(mesh, accumulation)
    before = compiled.count("jit(update)")
    state, seen = train(state, update, frozen, lambda tree: shard_batch(tree, mesh))
    assert compiled.count("jit(update)") - before == 1
    one, many = tiny_game.flat(one), tiny_game.flat(state)
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, atol=1e-5, err_msg=name)
    for metrics, expected in zip(seen, seen_one, strict=True):
        assert metrics == pytest.approx(expected, abs=1e-5)
    for leaf, home in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(home, leaf.ndim)
