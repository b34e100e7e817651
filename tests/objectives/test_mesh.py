"""One update of a language model on eight devices is that on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.data.packing import collate_packed, pack
from rkd_jax.data.tokenize import Tokenized
from rkd_jax.losses import generalized_jsd
from rkd_jax.models.api import response_hidden
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.heads import QHead, head_q_values
from rkd_jax.objectives import action_values
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.minillm import make_minillm
from rkd_jax.objectives.mm_pbkd import make_mm_pbkd
from rkd_jax.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    replicated,
    shard_batch,
    tree_shardings,
)
from rkd_jax.training import init_state, make_update
from rkd_jax.training.state import state_shardings
from rkd_jax.types import (
    DemonstrationBatch,
    GameBatch,
    PreferenceBatch,
    ReferenceSignal,
    Sequences,
    TeacherStates,
    WhiteBoxSignal,
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


@functools.cache
def student():
    return MODEL.init(jax.random.key(0))


@functools.cache
def teacher():
    return TEACHER.init(jax.random.key(1))


@jax.jit
def teacher_states(params, rows):
    return response_hidden(TEACHER, params, rows)


@functools.cache
def demonstrations():
    rows = sequences(B)
    batch = DemonstrationBatch(rows, rows, np.arange(B, dtype=np.int32))
    return batch, TeacherStates(np.asarray(teacher_states(teacher(), rows)))


def preferences():
    rows = sequences(B, 2)
    label, index = np.ones(B, np.float32), np.arange(B, dtype=np.int32)
    rewards = np.zeros((B, 2), np.float32)
    batch = PreferenceBatch(rows, rows, label, rewards, index)
    return batch, ReferenceSignal(np.full((B, 2), -9.0, np.float32))


def packed_preferences():
    """Pairs of any lengths in B rows, the last of them empty."""
    rng = np.random.default_rng(3)

    def ids(length):
        return rng.integers(0, 48, length).tolist()

    lengths = rng.integers(1, 4, (14, 3)).tolist()
    rows = [
        Tokenized(i, ids(p), ids(1), (ids(a), ids(b)))
        for i, (p, a, b) in enumerate(lengths)
    ]
    bins = pack(rows, STUDENT.max_length)
    batch = collate_packed(bins + [[]] * (B - len(bins)), STUDENT.max_length)
    return batch, ReferenceSignal(np.full((*batch.label.shape, 2), -9.0, np.float32))


def game():
    """Rollouts, pairs and demonstrations, with the teacher's states on all of them."""
    demonstrated, rollouts, (pairs, _) = sequences(B), sequences(B, 2), preferences()
    index = np.arange(B, dtype=np.int32)
    batch = GameBatch(
        DemonstrationBatch(demonstrated, demonstrated, index), rollouts, pairs
    )
    states = {
        name: np.asarray(teacher_states(teacher(), rows))
        for name, rows in (("rollouts", rollouts), ("preferences", pairs.sequences))
    }
    features = {f"{name[:-1]}_features": given for name, given in states.items()}
    return batch, WhiteBoxSignal(np.full(B, 0.6, np.float32), **states, **features)


def critic_of(name):
    """Of the one game among the cases: random, or the student's gradient is 0."""
    if name != "mm_pbkd":
        return None
    generator = np.random.default_rng(5)
    zeros = Q_HEAD.init(jax.random.key(0), TEACHER.config.hidden_size)
    return jax.tree.map(
        lambda x: jnp.asarray(generator.normal(size=x.shape), x.dtype), zeros
    )


Q_HEAD = QHead(actions=48)
CASES = {
    "mm_pbkd": (
        functools.partial(make_mm_pbkd, MODEL, head_q_values(Q_HEAD)),
        game,
    ),
    "kd": (functools.partial(make_kd, MODEL, generalized_jsd), demonstrations),
    "minillm": (functools.partial(make_minillm, MODEL), demonstrations),
    "dpo": (functools.partial(make_dpo, MODEL, beta=1.0), preferences),
    "packed": (functools.partial(make_dpo, MODEL, beta=1.0), packed_preferences),
}


def objective_of(name):
    make, data = CASES[name]
    given = {"teacher": TEACHER} if data in (demonstrations, game) else {}
    return make(**given), *data()


@functools.cache
def on_one_device(name):
    objective, batch, signal = objective_of(name)
    critic = critic_of(name)
    critic_optimizer = None if critic is None else ADAM
    state = init_state(
        student(),
        student_optimizer=ADAM,
        critic_params=critic,
        critic_optimizer=critic_optimizer,
        rng=jax.random.key(2),
    )
    update = make_update(
        objective,
        student_optimizer=ADAM,
        critic_optimizer=critic_optimizer,
        accumulation=2,
    )
    state, metrics = update(state, {"teacher": teacher()}, batch, signal)
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
        ("packed", (2, 2, 2)),
        ("mm_pbkd", (2, 2, 2)),
    ],
    ids=str,
)
def test_an_update_on_a_mesh_is_the_update(name, sizes, monkeypatch):
    monkeypatch.setattr(action_values, "LOGITS", 600)  # several slices per device
    objective, batch, signal = objective_of(name)
    mesh = make_mesh(MeshConfig(*sizes))
    params = student()
    homes = tree_shardings(MODEL.logical_axes(), mesh, shapes=params)
    critic = critic_of(name)
    critic_optimizer = None if critic is None else ADAM
    shardings = state_shardings(
        params,
        homes,
        student_optimizer=ADAM,
        critic_params=critic,
        critic_shardings=jax.tree.map(lambda _: replicated(mesh), critic),
        critic_optimizer=critic_optimizer,
    )
    update = make_update(
        objective,
        student_optimizer=ADAM,
        critic_optimizer=critic_optimizer,
        accumulation=2,
        state_shardings=shardings,
        batch_sharding=batch_sharding(mesh),
    )
    state = init_state(
        params,
        student_optimizer=ADAM,
        critic_params=critic,
        critic_optimizer=critic_optimizer,
        rng=jax.random.key(2),
        shardings=shardings,
    )
    homes = tree_shardings(TEACHER.logical_axes(), mesh, shapes=teacher())
    frozen = {"teacher": jax.device_put(teacher(), homes)}
    state, metrics = update(
        state, frozen, shard_batch(batch, mesh), shard_batch(signal, mesh)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, (state.student.params, metrics), on_one_device(name))
    moved = jax.tree.map(
        lambda new, old: jnp.abs(new - old).max(), state.student.params, params
    )
    assert min(map(float, jax.tree.leaves(moved))) > 1e-4
