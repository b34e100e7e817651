"""What games on the moments of action values share: sides and student steps.

A moment gap can be taken on the student's responses or on the teacher's. The two
`Side`s say what each of them looks at, so that an objective is one piece of code over
the sides it plays on. The student's steps against a critic are in `STEPS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax

from rkd_jax.losses import (
    anchored_advantages,
    one_step,
    one_step_plus_long,
    reinforce,
    reward_to_go,
    trajectory_return,
)
from rkd_jax.losses.likelihood import taken_values, tempered_log_softmax
from rkd_jax.masking import fill_masked, sequence_mean
from rkd_jax.models.api import CausalLM, response_logits
from rkd_jax.objectives.game import prompt_mean
from rkd_jax.types import GameBatch, Mean, Params, Sequences, WhiteBoxSignal

StudentStep = Literal["reinforce", "one_step", "one_step_plus_long"]


class View(NamedTuple):
    """The responses a side looks at, ``[*batch]``, and what is known about them."""

    sequences: Sequences
    teacher: jax.Array | None  # float[*batch, T, V], log-probs
    features: jax.Array | None  # float[*batch, T, D]


@dataclasses.dataclass(frozen=True)
class Side:
    """Whose responses moments are taken on, and whose policy anchors the critic.

    ``anchor(student, teacher)`` picks the anchor's log-probs, given the teacher's and a
    function that returns the student's.
    """

    name: str
    view: Callable[[GameBatch, WhiteBoxSignal], View]
    anchor: Callable[[Callable[[], jax.Array], jax.Array], jax.Array]


ON = Side(
    "on",
    lambda batch, signal: View(
        batch.rollouts, signal.rollouts, signal.rollout_features
    ),
    lambda student, teacher: teacher,
)
OFF = Side(
    "off",
    lambda batch, signal: View(
        batch.demonstrations.sequences,
        signal.demonstrations,
        signal.demonstration_features,
    ),
    lambda student, teacher: student(),
)


def all_log_probs(
    model: CausalLM, params: Params, sequences: Sequences, *, temperature: float
) -> jax.Array:
    """Log-probs of every token, ``[*batch, T, V]``, those of zero logits in padding."""
    logits = response_logits(model, params, sequences)
    logits = fill_masked(logits, sequences.response_mask)
    return tempered_log_softmax(logits, temperature)


@dataclasses.dataclass(frozen=True)
class Credit:
    """How the student is credited: discount, weights of its steps, baseline.

    Example: ``Credit(1.0, False, LESS_BASELINE["loo_per_step"])``.
    """

    gamma: float
    discount_weighting: bool  # of "reinforce"; the other steps are weighted always
    less_baseline: Callable[..., jax.Array]


class Scene(NamedTuple):
    """A side's responses as the student's step sees them, ``[*batch, T, ..]``."""

    student: jax.Array  # [*batch, T, V], log-probs; what is differentiated
    q_values: jax.Array  # [*batch, T, V]
    advantages: jax.Array  # [*batch, T], of the actions
    actions: jax.Array  # int[*batch, T]
    mask: jax.Array  # bool[*batch, T]


def stage(
    side: Side, view: View, log_probs: jax.Array, q_function: Callable[..., jax.Array]
) -> Scene:
    """The critic's verdict on a side's responses.

    ``q_function`` is ``(sequences, features, anchor_log_probs) -> [*batch, T, V]``.
    """
    actions, mask = view.sequences.targets, view.sequences.response_mask
    anchor = side.anchor(lambda: jax.lax.stop_gradient(log_probs), view.teacher)
    q_values = q_function(view.sequences, view.features, anchor)
    advantages = anchored_advantages(q_values, anchor, actions, mask)
    return Scene(log_probs, q_values, advantages, actions, mask)


def _reinforce(scene: Scene, credit: Credit) -> jax.Array:
    """The cost of an action is minus its advantage; it is credited with all to go."""
    to_go = reward_to_go(scene.advantages, scene.mask, gamma=credit.gamma)
    return reinforce(
        taken_values(scene.student, scene.actions, scene.mask),
        _less_baseline(to_go, scene, credit),
        scene.mask,
        gamma=credit.gamma if credit.discount_weighting else 1.0,
    )


def _one_step(scene: Scene, credit: Credit) -> jax.Array:
    return one_step(scene.q_values, scene.student, scene.mask, gamma=credit.gamma)


def _one_step_plus_long(scene: Scene, credit: Credit) -> jax.Array:
    to_go = reward_to_go(scene.advantages, scene.mask, gamma=credit.gamma)
    return one_step_plus_long(
        scene.q_values,
        scene.student,
        scene.actions,
        # G_h without its own step is gamma G_{h+1}, at gamma = 0 as well.
        _less_baseline(to_go - scene.advantages, scene, credit),
        scene.mask,
        gamma=credit.gamma,
    )


def _less_baseline(to_go: jax.Array, scene: Scene, credit: Credit) -> jax.Array:
    returns = trajectory_return(scene.advantages, scene.mask, gamma=credit.gamma)
    return credit.less_baseline(to_go, returns, scene.mask)


STEPS = {
    "reinforce": _reinforce,
    "one_step": _one_step,
    "one_step_plus_long": _one_step_plus_long,
}
"""By name: ``(scene, credit) -> [*batch, T]``, the student's loss against a critic."""


def own_nll(scene: Scene) -> Mean:
    """Mean negative log-likelihood of the actions, nats per token."""
    nll = -taken_values(scene.student, scene.actions, scene.mask)
    return prompt_mean(sequence_mean(nll, scene.mask), scene.mask)
