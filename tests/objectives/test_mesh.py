"""One update of a language model on eight devices is that on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.losses import generalized_jsd
from rkd_jax.models.api import response_hidden
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.minillm import make_minillm
from rkd_jax.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    shard_batch,
    tree_shardings,
)
from rkd_jax.training import init_state, make_update
from rkd_jax.training.state import state_shardings
from rkd_jax.types import (
    DemonstrationBatch,
    PreferenceBatch,
    ReferenceSignal,
    Sequences,
    TeacherStates,
)

STUDENT = DecoderConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_length=16,
)
MODEL = Decoder(STUDENT)
TEACHER = Decoder(DecoderConfig(**STUDENT.__dict__ | {"hidden_size": 24}))
ADAM = optax.adam(1e-2, eps=1e-3)  # a gradient of rounding makes no step
B, P, T = 16, 3, 6


def sequences(*batch):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 48, (*batch, P + T)).astype(np.int32)
    mask = np.arange(T) < rng.integers(1, T + 1, (*batch, 1))
    token_mask = np.concatenate([np.ones((*batch, P), bool), mask], axis=-1)
    return Sequences(tokens, token_mask, mask)


def demonstrations():
    rows = sequences(B)
    batch = DemonstrationBatch(rows, rows, np.arange(B, dtype=np.int32))
    hidden = response_hidden(TEACHER, TEACHER.init(jax.random.key(1)), rows)
    return batch, TeacherStates(np.asarray(hidden))


def preferences():
    rows = sequences(B, 2)
    label, index = np.ones(B, np.float32), np.arange(B, dtype=np.int32)
    rewards = np.zeros((B, 2), np.float32)
    batch = PreferenceBatch(rows, rows, label, rewards, index)
    return batch, ReferenceSignal(np.full((B, 2), -9.0, np.float32))


CASES = {
    "kd": (functools.partial(make_kd, MODEL, generalized_jsd), demonstrations),
    "minillm": (functools.partial(make_minillm, MODEL), demonstrations),
    "dpo": (functools.partial(make_dpo, MODEL, beta=1.0), preferences),
}


def objective_of(name):
    make, data = CASES[name]
    given = {} if data is preferences else {"teacher": TEACHER}
    return make(**given), *data()


@functools.cache
def on_one_device(name):
    objective, batch, signal = objective_of(name)
    state = init_state(
        MODEL.init(jax.random.key(0)), student_optimizer=ADAM, rng=jax.random.key(2)
    )
    update = make_update(objective, student_optimizer=ADAM, accumulation=2)
    frozen = {"teacher": TEACHER.init(jax.random.key(1))}
    state, metrics = update(state, frozen, batch, signal)
    return jax.tree.map(np.asarray, (state.student.params, metrics))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("kd", (8, 1, 1)),
        ("kd", (1, 8, 1)),
        ("kd", (2, 2, 2)),
        ("kd", (1, 2, 4)),
        ("minillm", (2, 2, 2)),
        ("dpo", (2, 2, 2)),
    ],
    ids=str,
)
def test_an_update_on_a_mesh_is_the_update(name, sizes):
    objective, batch, signal = objective_of(name)
    mesh = make_mesh(MeshConfig(*sizes))
    params = MODEL.init(jax.random.key(0))
    teacher = TEACHER.init(jax.random.key(1))
    homes = tree_shardings(MODEL.logical_axes(), mesh, shapes=params)
    shardings = state_shardings(params, homes, student_optimizer=ADAM)
    update = make_update(
        objective,
        student_optimizer=ADAM,
        accumulation=2,
        state_shardings=shardings,
        batch_sharding=batch_sharding(mesh),
    )
    state = init_state(
        params,
        student_optimizer=ADAM,
        rng=jax.random.key(2),
        shardings=shardings,
    )
    frozen = {
        "teacher": jax.device_put(
            teacher, tree_shardings(TEACHER.logical_axes(), mesh, shapes=teacher)
        )
    }
    state, metrics = update(
        state, frozen, shard_batch(batch, mesh), shard_batch(signal, mesh)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (state.student.params, metrics), on_one_device(name))
    moved = jax.tree.map(
        lambda new, old: jnp.abs(new - old).max(), state.student.params, params
    )
    assert min(map(float, jax.tree.leaves(moved))) > 1e-4
