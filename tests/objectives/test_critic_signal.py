"""What the critic's steps read of the student is computed once for all of them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rkd_jax.aot.flops import matmul_flops
from rkd_jax.models.flops import trunk_flops
from rkd_jax.training import init_state, make_update
from rkd_jax.types import Sequences
from tests.objectives.mesh_data import MODEL, teacher
from tests.objectives.mesh_games import GAMES

STEPS, PARTS = 3, 2
# Of which responses the critic reads the student's policy.
READ = {
    "mm_pbkd": ("rollouts",),
    "mm_pbkd off": ("demonstrations", "preferences"),
    "mm_pbkd mixed": ("rollouts", "demonstrations", "preferences"),
    "mmkd": ("rollouts", "demonstrations"),
    "mmkd sampled": ("demonstrations",),
}


@pytest.fixture(scope="module", params=READ)
def updates(request):
    """A game, and its update as it is and with everything in every step."""
    case = GAMES[request.param]()
    each = dataclasses.replace(case.objective, critic_signal=None)
    make = functools.partial(
        make_update, critic_steps=STEPS, accumulation=PARTS, **case.optimizers()
    )
    state = init_state(
        case.student,
        critic_params=case.critic,
        dual=case.dual,
        rng=jax.random.key(2),
        **case.optimizers(),
    )
    given = ({"teacher": teacher()}, case.batch, case.signal)
    return request.param, case, make(case.objective), make(each), state, given


def flops(update, *arguments):
    jaxpr = update.trace(*arguments).jaxpr.jaxpr
    return matmul_flops(jaxpr, devices=1)


def test_the_student_runs_once_and_not_in_every_step(updates):
    name, case, once, each, state, given = updates
    saved = flops(each, state, *given) - flops(once, state, *given)
    forward = 0
    for field in READ[name]:
        leaves = jax.tree.leaves(
            getattr(case.batch, field), is_leaf=lambda x: isinstance(x, Sequences)
        )
        shape = next(x for x in leaves if isinstance(x, Sequences)).tokens.shape
        forward += trunk_flops(MODEL.config, int(np.prod(shape[:-1])), shape[-1])
    assert saved == (STEPS - 1) * forward


def test_nothing_else_changes(updates):
    *_, once, each, state, given = updates
    copies = [jax.tree.map(lambda x: x.copy(), state) for _ in range(2)]
    found, expected = (f(s, *given) for f, s in zip((once, each), copies, strict=True))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    raw = [
        (state.student, state.critic, state.dual, metrics)
        for state, metrics in (found, expected)
    ]
    jax.tree.map(close, *raw)
