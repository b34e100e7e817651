"""A teacher on devices of its own, with rules and a type of its own."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from rkd_jax.evaluation.generation import with_prompts
from rkd_jax.evaluation.likelihood import sequence_divergences
from rkd_jax.models import head_part
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.gkd import make_gkd
from rkd_jax.placement import follow_parameters, place_rows
from rkd_jax.sharding import (
    DEFAULT_RULES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    mesh_of,
    tree_shardings,
)
from rkd_jax.signals.teacher import make_features, make_sequence_scorer
from rkd_jax.training import init_state, make_update
from rkd_jax.training.state import state_shardings
from rkd_jax.types import ImitationBatch, ReferenceSignal, TeacherStates
from tests.objectives.mesh_data import (
    AXES,
    MODEL,
    TEACHER,
    TEACHER_AXES,
    demonstrations,
    preferences,
    student,
    teacher,
)

ADAM = optax.adam(1e-2, eps=1e-3)  # a gradient of rounding makes no step
RULES = DEFAULT_RULES | {"embed": None, "vocab": ("fsdp", "tensor")}


@pytest.fixture(scope="module")
def mesh():
    """Of the student: half of the devices."""
    return make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])


@pytest.fixture(scope="module")
def other():
    """Of the teacher: the other half."""
    return make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[4:])


def halved(params):
    return jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)


def put(params, axes, mesh, rules=DEFAULT_RULES):
    """On the mesh; where there is none as it is."""
    if mesh is None:
        return params
    return jax.device_put(params, tree_shardings(axes, mesh, rules, shapes=params))


def state_on(mesh):
    params = put(student(), AXES, mesh)
    homes = mesh and state_shardings(
        params, tree_shardings(AXES, mesh), student_optimizer=ADAM
    )
    key = jax.random.key(0)
    return init_state(params, student_optimizer=ADAM, rng=key, shardings=homes), homes


def updated(objective, batch, signal, frozen, mesh):
    """(parameters, metrics) after one update."""
    state, homes = state_on(mesh)
    place = {}
    if mesh is not None:
        batch, signal = place_rows((batch, signal), mesh)
        place = {"state_shardings": homes, "batch_sharding": batch_sharding(mesh)}
    update = make_update(objective, student_optimizer=ADAM, **place)
    state, metrics = update(state, frozen, batch, signal)
    return jax.device_get((state.student.params, metrics))


def imitate(mesh, other):
    """Forward KL to the teacher's states; its head alone is with the student."""
    fixed = demonstrations()
    params = put(halved(teacher()), TEACHER_AXES, other, RULES)
    hear = follow_parameters(jax.jit(make_features(TEACHER, states="before")))
    states = hear(params, fixed.teacher_sequences)
    assert mesh_of(states) == other
    if mesh is None:
        frozen = params
    else:
        axes = head_part(TEACHER, params, TEACHER_AXES)
        frozen = put(head_part(TEACHER, params), axes, mesh)
        assert len(jax.tree.leaves(frozen)) == 1
        assert mesh_of(frozen) == mesh
    batch, signal = ImitationBatch(fixed, None), TeacherStates(states)
    objective = make_gkd(MODEL, teacher=TEACHER)
    return updated(objective, batch, signal, {"teacher": frozen}, mesh)


def prefer(mesh, other):
    """DPO, the reference on the other devices."""
    batch = preferences()
    params = put(halved(student()), AXES, other, RULES)
    score = follow_parameters(jax.jit(make_sequence_scorer(MODEL)))
    reference = ReferenceSignal(score(params, batch.sequences))
    return updated(make_dpo(MODEL), batch, reference, {}, mesh)


@pytest.mark.parametrize("method", [imitate, prefer])
def test_the_update_is_that_of_one_device(method, mesh, other):
    assert not set(mesh.devices.flat) & set(other.devices.flat)
    alone, there = method(None, None), method(mesh, other)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, there, alone)
    moved = jax.tree.map(
        lambda one, two: float(np.abs(one - two).max()), alone[0], student()
    )
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_divergences_are_those_of_one_device():
    """Of a student whose rows are not cut, and a teacher's that are in four."""
    rows = demonstrations().sequences
    alone = sequence_divergences(MODEL, student(), TEACHER, teacher(), rows)
    mesh = make_mesh(MeshConfig(tensor=4), jax.devices()[:4])
    other = make_mesh(MeshConfig(data=4), jax.devices()[4:])
    there = sequence_divergences(
        *(MODEL, put(student(), AXES, mesh)),
        *(TEACHER, put(teacher(), TEACHER_AXES, other)),
        rows,
        batch_size=2,
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, dataclasses.asdict(there), dataclasses.asdict(alone))


def test_responses_go_behind_prompts_wherever_they_are(mesh):
    rows = demonstrations()
    others = jax.tree.map(lambda x: x[:, :2], rows.teacher_sequences.prompts)
    alone = with_prompts(rows.sequences, others)
    assert isinstance(alone.tokens, np.ndarray)
    for sequences in rows.sequences, place_rows(rows.sequences, mesh):
        some = sequences, place_rows(others, mesh)
        there = with_prompts(*some)
        assert mesh_of(there.tokens) == mesh
        assert there.response_mask is some[0].response_mask
        jax.tree.map(np.testing.assert_array_equal, there, alone)


def test_the_rules_of_the_teacher_are_its_own(mesh, other):
    theirs = put(teacher(), TEACHER_AXES, other, RULES)["embed"]["embedding"]
    assert theirs.addressable_shards[0].data.shape[0] * 4 == theirs.shape[0]
    ours = put(student(), AXES, mesh)["embed"]["embedding"]
    assert ours.addressable_shards[0].data.shape[0] == ours.shape[0]
