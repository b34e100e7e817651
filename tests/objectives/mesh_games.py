"""Reward models, critics and the games they play, as `mesh_check.Case`s.

Named as those of `mesh_policies`.
"""

import dataclasses
import functools

import jax
import numpy as np

from rkd_jax.models.heads import (
    SEQUENCE_HEAD,
    TOKEN_HEAD,
    QHead,
    RewardModel,
    head_q_values,
    head_sequence_rewards,
    head_token_rewards,
)
from rkd_jax.objectives.mm_pbkd import make_mm_pbkd
from rkd_jax.objectives.mmkd import make_mmkd
from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.objectives.q_anchor import make_q_anchor
from rkd_jax.objectives.reward_model import make_reward_ensemble, make_reward_model
from rkd_jax.types import GameSignal, PreferenceSignal
from tests.objectives.mesh_check import Case
from tests.objectives.mesh_data import (
    AXES,
    MODEL,
    TEACHER,
    B,
    D,
    T,
    V,
    drawn,
    game,
    game_signal,
    normal,
    packed_preferences,
    preferences,
    student,
    white_box_signal,
)

MEMBERS = 2
Q_HEAD = QHead(actions=V)
Q_AXES = {"output": {"kernel": ("embed", "vocab"), "bias": ("vocab",)}}
TRUNK = RewardModel(MODEL, TOKEN_HEAD)


def q_params(seed=5):
    return drawn(Q_HEAD, D, seed)


def trunk_params():
    head = drawn(TOKEN_HEAD, MODEL.config.hidden_size)
    return {"trunk": student(), "head": head}


def heads():
    """Of the members of an ensemble: ``[K, ..]``."""
    apart = (drawn(TOKEN_HEAD, D, seed=40 + k) for k in range(MEMBERS))
    return jax.tree.map(lambda *each: np.stack(each), *apart)


def mean_rewards(params, sequences, features):
    """What the members of an ensemble say on average."""
    one = head_token_rewards(TOKEN_HEAD)
    return jax.vmap(one, in_axes=(0, None, None))(params, sequences, features).mean(0)


def pbkd(rewards, critic, signal=None, **own):
    return Case(
        make_pbkd(MODEL, rewards, epsilon=0.5, **own),
        game(),
        game_signal() if signal is None else signal,
        critic=critic,
    )


def pbkd_of_packed_pairs():
    """In two micro-batches, which hold different numbers of pairs."""
    pairs = packed_preferences()
    targets = pairs.sequences.response_mask.shape
    signal = dataclasses.replace(
        game_signal(),
        anchor_nll=abs(normal(*pairs.label.shape, seed=32)),
        preferences=normal(*targets, D, seed=33),
    )
    found = pbkd(head_token_rewards(TOKEN_HEAD), drawn(TOKEN_HEAD, D), signal)
    return dataclasses.replace(found, batch=game(preferences=pairs))


def pbkd_with_a_trunk():
    """The reward player has a trunk of its own, which is trained."""
    signal = GameSignal(anchor_nll=game_signal().anchor_nll)
    return Case(
        make_pbkd(MODEL, TRUNK.token_rewards, epsilon=0.5),
        game(),
        signal,
        critic=trunk_params(),
        critic_axes={"trunk": AXES},
    )


def mm_pbkd(names, critic, axes=None, *, dual=1.0, critics=(), **options):
    make = functools.partial(make_mm_pbkd, MODEL, head_q_values(Q_HEAD))
    return Case(
        make(teacher=TEACHER, epsilon=0.5, **options),
        game(),
        white_box_signal(*names, critics=critics),
        critic=critic,
        critic_axes=axes,
        dual=dual,
        slices=200,
        taught="teacher",
    )


def mmkd(**options):
    make = functools.partial(make_mmkd, MODEL, head_q_values(Q_HEAD))
    return Case(
        make(teacher=TEACHER, **options),
        game(preferences=None),
        white_box_signal("rollouts", "demonstrations"),
        critic={"off": q_params(), "on": q_params(seed=6)},
        critic_axes={"off": Q_AXES, "on": Q_AXES},
        taught="teacher",
    )


def q_anchor():
    return Case(
        make_q_anchor(head_q_values(Q_HEAD), anchor=TEACHER, l2=0.01),
        preferences(),
        white_box_signal("preferences"),
        student=q_params(),
        axes=Q_AXES,
        slices=600,  # which holds one pair
        taught="anchor",
    )


def reward_model():
    return Case(
        make_reward_model(TRUNK.token_rewards, l2=0.01),
        preferences(),
        PreferenceSignal(),
        student=trunk_params(),
        axes={"trunk": AXES},
    )


def reward_ensemble():
    signal = PreferenceSignal(
        features=normal(B, 2, T, D, seed=30), weights=abs(normal(B, MEMBERS, seed=31))
    )
    return Case(
        make_reward_ensemble(head_token_rewards(TOKEN_HEAD), MEMBERS),
        preferences(),
        signal,
        student=heads(),
        axes=None,
    )


GAMES = {
    "pbkd": lambda: pbkd(
        head_token_rewards(TOKEN_HEAD), drawn(TOKEN_HEAD, D), sft_weight=0.1
    ),
    "pbkd of sequences": lambda: pbkd(
        head_sequence_rewards(SEQUENCE_HEAD), drawn(SEQUENCE_HEAD, D)
    ),
    "pbkd with an ensemble": lambda: pbkd(mean_rewards, heads()),
    "pbkd of packed pairs": pbkd_of_packed_pairs,
    "pbkd with a trunk": pbkd_with_a_trunk,
    "mm_pbkd": lambda: mm_pbkd(("rollouts", "preferences"), q_params()),
    "mm_pbkd off": lambda: mm_pbkd(("demonstrations",), q_params(), Q_AXES, gap="off"),
    "mm_pbkd mixed": lambda: mm_pbkd(
        ("rollouts", "preferences", "demonstrations"),
        {"off": q_params(), "on": q_params(seed=6)},
        {"off": Q_AXES, "on": Q_AXES},
        gap="mixed",
        student_step="one_step_plus_long",
        critics=(2,),
        dual=(1.0, 1.0),
    ),
    "mmkd": lambda: mmkd(critic_penalty=0.1),
    "mmkd sampled": lambda: mmkd(moments="sampled"),
    "q_anchor": q_anchor,
    "reward_model": reward_model,
    "reward_ensemble": reward_ensemble,
}
