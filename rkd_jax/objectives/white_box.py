"""What games on the moments of action values share: sides and student steps.

A moment gap can be taken on the student's responses or on the teacher's. The two
`Side`s say what each of them looks at, so that an objective is one piece of code over
the sides it plays on. The student's steps against a critic are in `STEPS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import jax

from rkd_jax.losses import discount_weights, reinforce, reward_to_go, trajectory_return
from rkd_jax.masking import sequence_mean
from rkd_jax.models.api import CausalLM, response_hidden
from rkd_jax.objectives.action_values import Moments, Player, Rows, policy_rows
from rkd_jax.objectives.game import prompt_mean
from rkd_jax.types import GameBatch, Mean, Params, Sequences, WhiteBoxSignal

StudentStep = Literal["reinforce", "one_step", "one_step_plus_long"]


class View(NamedTuple):
    """The responses a side looks at, ``[*batch]``, and what is known about them."""

    sequences: Sequences
    teacher: jax.Array | None  # float[*batch, T, V], log-probs, or [*batch, T, D]
    features: jax.Array | None  # float[*batch, T, D]


class Observed(NamedTuple):
    """A signal, and the student's states before the targets of some of the responses.

    Computed once, it is what every step of a critic is given for a signal
    (`rkd_jax.types.Objective`): the student stands still meanwhile.
    """

    signal: WhiteBoxSignal
    states: dict[str, jax.Array]  # by field of the batch, [*batch, T, D]

    def policies(
        self, model: CausalLM, params: Params, temperature: float
    ) -> dict[str, Rows]:
        """The student's log-probs there; gradient flows to nothing."""
        params = jax.lax.stop_gradient(params)
        return {
            name: policy_rows(model, params, states, temperature=temperature)
            for name, states in self.states.items()
        }


def observe(
    model: CausalLM,
    params: Params,
    batch: GameBatch,
    signal: WhiteBoxSignal | Observed,
    responses: Iterable[str],
) -> Observed:
    """The student's states on the named responses; nothing if they are there already.

    Gradient: none.
    """
    if isinstance(signal, Observed):
        return jax.lax.stop_gradient(signal)
    states = {}
    for name in responses:
        found = getattr(batch, name)
        sequences = found if isinstance(found, Sequences) else found.sequences
        states[name] = response_hidden(model, params, sequences)
    return jax.lax.stop_gradient(Observed(signal, states))


@dataclasses.dataclass(frozen=True)
class Side:
    """Whose responses moments are taken on, and whose policy anchors the critic."""

    name: str
    responses: str  # field of the batch
    view: Callable[[GameBatch, WhiteBoxSignal], View]
    anchor: Player


ON = Side(
    "on",
    "rollouts",
    lambda batch, signal: View(
        batch.rollouts, signal.rollouts, signal.rollout_features
    ),
    "teacher",
)
OFF = Side(
    "off",
    "demonstrations",
    lambda batch, signal: View(
        batch.demonstrations.sequences,
        signal.demonstrations,
        signal.demonstration_features,
    ),
    "student",
)


@dataclasses.dataclass(frozen=True)
class Credit:
    """How the student is credited: discount, weights of its steps, baseline.

    Example: ``Credit(1.0, False, LESS_BASELINE["loo_per_step"])``.
    """

    gamma: float
    discount_weighting: bool  # of "reinforce"; the other steps are weighted always
    less_baseline: Callable[..., jax.Array]


class Step(NamedTuple):
    """A step of the student against a critic."""

    reads: tuple[str, ...]  # names of `MOMENTS`
    loss: Callable[[Moments, jax.Array, Credit], jax.Array]
    """``(moments, mask, credit) -> [*batch, T]``."""


def discounted(values: jax.Array, mask: jax.Array, gamma: float) -> jax.Array:
    """Values per position [*batch, T] times the discount of each."""
    return discount_weights(mask, gamma=gamma).astype(values.dtype) * values


def foreseen(name: str, view: View, gamma: float) -> Moments:
    """What the mean of a discounted moment multiplies it with, for `action_moments`.

    Up to a factor: one over the number of prompts, and of each one's samples.
    """
    return {name: discount_weights(view.sequences.response_mask, gamma=gamma)}


def _reinforce(moments: Moments, mask: jax.Array, credit: Credit) -> jax.Array:
    """The cost of an action is minus its advantage; it is credited with all to go."""
    to_go = reward_to_go(moments["advantages"], mask, gamma=credit.gamma)
    return reinforce(
        moments["log_probs"],
        _less_baseline(to_go, moments, mask, credit),
        mask,
        gamma=credit.gamma if credit.discount_weighting else 1.0,
    )


def _one_step(moments: Moments, mask: jax.Array, credit: Credit) -> jax.Array:
    return discounted(moments["one_step"], mask, credit.gamma)


def _one_step_plus_long(moments: Moments, mask: jax.Array, credit: Credit) -> jax.Array:
    """See `rkd_jax.losses.one_step_plus_long`."""
    advantages = moments["advantages"]
    to_go = reward_to_go(advantages, mask, gamma=credit.gamma)
    # G_h without its own step is gamma G_{h+1}, at gamma = 0 as well.
    later = _less_baseline(to_go - advantages, moments, mask, credit)
    first = _one_step(moments, mask, credit)
    return first + reinforce(moments["log_probs"], later, mask, gamma=credit.gamma)


def _less_baseline(
    to_go: jax.Array, moments: Moments, mask: jax.Array, credit: Credit
) -> jax.Array:
    returns = trajectory_return(moments["advantages"], mask, gamma=credit.gamma)
    return credit.less_baseline(to_go, returns, mask)


STEPS = {
    "reinforce": Step(("advantages", "log_probs"), _reinforce),
    "one_step": Step(("one_step",), _one_step),
    "one_step_plus_long": Step(
        ("advantages", "one_step", "log_probs"), _one_step_plus_long
    ),
}
"""By name."""


def own_nll(moments: Moments, mask: jax.Array) -> Mean:
    """Mean negative log-likelihood of the actions, nats per token."""
    return prompt_mean(sequence_mean(-moments["log_probs"], mask), mask)
