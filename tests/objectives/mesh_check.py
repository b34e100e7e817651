"""One update on a mesh against the same update on one device.

Players are placed as in an experiment: a language model by the names of its axes, what
has no names by `parameter_shardings`, for which small heads are large ones here.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from rkd_jax import sharding
from rkd_jax.objectives import action_values
from rkd_jax.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    parameter_shardings,
    partition_spec,
    shard_batch,
)
from rkd_jax.training import init_state, make_update
from rkd_jax.training.state import state_shardings
from rkd_jax.types import Objective, Params
from tests.objectives.mesh_data import AXES, TEACHER_AXES, student, teacher

ADAM = optax.adam(1e-2, eps=1e-3)  # a gradient of rounding makes no step
USUAL = ((2, 2, 2),)
ALL = (8, 1, 1), (1, 8, 1), (1, 2, 4), *USUAL


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective, its players and what they look at.

    Axes are trees of names; what is missing in them has none.
    """

    objective: Objective
    batch: Any
    signal: Any = ()
    student: Params = dataclasses.field(default_factory=student)
    axes: Any = dataclasses.field(default_factory=lambda: AXES)
    critic: Params | None = None
    critic_axes: Any = None
    critic_optimizer: optax.GradientTransformation = ADAM
    critic_steps: int = 2
    dual: Any = 1.0
    slices: int | None = None  # of so many numbers, where action values are read
    taught: str | None = None  # by what name the update reads the teacher's head

    def optimizers(self):
        """As `init_state` and the others ask for them."""
        second = None if self.critic is None else self.critic_optimizer
        return {"student_optimizer": ADAM, "critic_optimizer": second}


def over_meshes(cases, **others):
    """Every objective on the usual mesh; of a variant, and on other meshes, what is
    named here. All other cases on all meshes are long.
    """
    assert others.keys() <= cases.keys()
    found = []
    for name in cases:
        usual = () if " " in name else USUAL
        for sizes in ALL:
            short = sizes in others.get(name, usual)
            marks = [] if short else [pytest.mark.long]
            found.append(pytest.param(name, sizes, marks=marks, id=f"{name}-{sizes}"))
    return pytest.mark.parametrize(("name", "sizes"), found)


class Meshes:
    """The cases of a file, each compared with one run of it on one device."""

    def __init__(self, cases):
        self.case = functools.cache(lambda name: cases[name]())
        self._alone = functools.cache(self._on_one_device)

    def check(self, name, sizes):
        """Parameters of both players and metrics are those of one device."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding, "SMALL", 0)
            if slices := self.case(name).slices:
                patch.setattr(action_values, "LOGITS", slices)
            expected, metrics = self._alone(name)
            state, found = self._on_mesh(name, make_mesh(MeshConfig(*sizes)))
        players = _players(state)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, jax.device_get((players, found)), (expected, metrics))
        if sizes != (8, 1, 1):
            for role, params in players.items():
                assert any(map(_is_cut, jax.tree.leaves(params))), role

    def _on_one_device(self, name):
        """Parameters of every player after the update, and metrics, on the host."""
        case = self.case(name)
        frozen = {} if case.taught is None else {case.taught: teacher()}
        state = _begin(case, case.student, case.critic)
        state, metrics = _update(case)(state, frozen, case.batch, case.signal)
        players = jax.device_get(_players(state))
        before = {"student": case.student, "critic": case.critic}
        for role, params in players.items():
            jax.tree_util.tree_map_with_path(
                functools.partial(_check_moved, role), params, before[role]
            )
        return players, jax.device_get(metrics)

    def _on_mesh(self, name, mesh):
        case = self.case(name)
        params = _place(case.student, case.axes, mesh)
        critic = _place(case.critic, case.critic_axes, mesh)
        homes = state_shardings(
            params,
            parameter_shardings(params, None, mesh),
            critic_params=critic,
            critic_shardings=critic and parameter_shardings(critic, None, mesh),
            **case.optimizers(),
        )
        update = _update(
            case, state_shardings=homes, batch_sharding=batch_sharding(mesh)
        )
        frozen = {}
        if case.taught is not None:
            frozen[case.taught] = _place(teacher(), TEACHER_AXES, mesh)
        return update(
            _begin(case, params, critic, shardings=homes),
            frozen,
            shard_batch(case.batch, mesh),
            shard_batch(case.signal, mesh),
        )


def _begin(case, params, critic, **placement):
    return init_state(
        params,
        critic_params=critic,
        dual=case.dual,
        rng=jax.random.key(2),
        **case.optimizers(),
        **placement,
    )


def _update(case, **placement):
    return make_update(
        case.objective,
        critic_steps=case.critic_steps,
        accumulation=2,
        **case.optimizers(),
        **placement,
    )


def _place(params, axes, mesh):
    """On the mesh as far as the axes have names."""
    if axes is None:
        return params
    if isinstance(axes, dict):
        return {name: _place(x, axes.get(name), mesh) for name, x in params.items()}
    return jax.device_put(params, NamedSharding(mesh, partition_spec(axes)))


def _players(state):
    """Parameters of each."""
    there = {"student": state.student, "critic": state.critic}
    return {role: x.params for role, x in there.items() if x is not None}


def _check_moved(role, path, new, old):
    moved = np.abs(new - np.asarray(old)).max()
    assert moved > 1e-4, f"{role}{jax.tree_util.keystr(path)} has not moved"


def _is_cut(array):
    return not array.sharding.is_fully_replicated
