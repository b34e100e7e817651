r"""MMKD: distillation by adversarial action-value moments, on and off policy.

.. math:: d^{off} = \sup_f \mathbb E_{\pi_E} \sum_t \gamma^t
    \big(f(s_t, a_t) - \mathbb E_{a\sim\pi_\theta} f(s_t, a)\big), \qquad
    d^{on} = \sup_f \mathbb E_{\pi_\theta} \sum_t \gamma^t
    \big(\mathbb E_{a\sim\pi_E} f(s_t, a) - f(s_t, a_t)\big)

Either is at least the imitation gap, for every reward whose action values, the
student's (off) or the teacher's (on), are in the class of critics. Two critics maximise
:math:`(1 - w)\, d^{off} + w\, d^{on}`, the student minimises it: the off-policy term by
its gradient on the teacher's responses, the on-policy term by policy gradient. There is
no preference data and no constraint, so no multiplier.

With nothing but a bound on f the suprema are total variations
(`rkd_jax.losses.bounded_moment_distance`): what an adversary adds is the restriction
that its capacity and its penalty impose.

Source: MMKD, 2406.02959. Reconstruction: the abstract's idea is public, the repository
named there holds no implementation. Open are the combination of the two terms (convex
here), whether moments are sampled, the bound and the penalty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rkd_jax.losses import gradient_penalty
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.masking import accumulator, sequence_mean, sequence_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.action_values import (
    FrozenPolicy,
    QFunction,
    QValues,
    Rows,
    action_moments,
    student_rows,
)
from rkd_jax.objectives.game import (
    LESS_BASELINE,
    Baseline,
    prompt_mean,
    sft_nll,
    value_of,
    weighted,
)
from rkd_jax.objectives.white_box import (
    OFF,
    ON,
    STEPS,
    Credit,
    Observed,
    Side,
    View,
    discounted,
    foreseen,
    observe,
    own_nll,
)
from rkd_jax.types import LossOutput, Mean, Objective

Moments = Literal["all_actions", "sampled"]


def make_mmkd(
    model: CausalLM,
    q_values: QValues,
    *,
    teacher: CausalLM | None = None,
    on_weight: float = 0.5,
    q_bound: float | None = 1.0,
    moments: Moments = "all_actions",
    gamma: float = 1.0,
    temperature: float = 1.0,
    baseline: Baseline = "loo_per_step",
    discount_weighting: bool = False,
    critic_penalty: float = 0.0,
    penalty_target: float = 0.4,
    sft_weight: float = 0.0,
) -> Objective:
    """The two players of MMKD: a pair of critics, and the student.

    Args:
        model: the student.
        q_values: a critic's raw values, as in `make_mm_pbkd`; one function for both
            critics.
        teacher: the model whose states the signal holds in the place of log-probs; its
            parameters are in ``frozen["teacher"]``.
        on_weight: in [0, 1], weight w of the on-policy distance; the off-policy one has
            the rest. A side of weight 0 is not computed and needs no data: at 0 the
            rollouts may be None.
        q_bound: Q, a critic's value becomes Q * tanh(value / Q); None for no bound, and
            then no supremum unless the penalty or the optimiser provides one.
        moments: ``"all_actions"`` averages a critic over the actions of both policies
            in each state; ``"sampled"`` takes the action that was sampled, as the
            formulas read, and asks the teacher for no log-probs on its own responses.
            Both have the same mean.
        gamma: discount in [0, 1].
        temperature: the policy is ``softmax(logits / temperature)``; rollouts have to
            be sampled, and the teacher's log-probs taken, at the same one.
        baseline: of the on-policy term's credit; as in `make_pbkd`.
        discount_weighting: weight step h of the on-policy term by gamma**h, the exact
            gradient for gamma < 1.
        critic_penalty: coefficient of `gradient_penalty`, the squared difference
            between the norm of a state's moment's gradient in the features and
            ``penalty_target``, averaged over tokens. Needs features in the signal and a
            critic that reads position t's alone at position t.
        penalty_target: at least 0.
        sft_weight: weight of the mean NLL of the teacher's responses in the student's
            loss, nats per token.

    Returns:
        `Objective` over a `GameBatch` (preferences None) and a `WhiteBoxSignal`, of
        which it requires ``rollouts`` and, for all actions, ``demonstrations``. Critic
        parameters are ``{"off": .., "on": ..}``. Both losses are normalised by the
        number of prompts that are not padding, in the unit of the critics. Metrics:
        ``critic/off_distance``, ``critic/on_distance`` (estimates against the current
        critics), ``critic/distance`` (weighted), ``critic/off_penalty`` and
        ``critic/on_penalty`` if there is one, ``student/entropy_bound`` (mean NLL of
        the student's own samples), ``student/sft`` if weighted.

    Gradient:
        ``student_loss`` reaches the student only, ``critic_loss`` the critics only; the
        cross-gradients are exactly zero.

    Raises:
        ValueError: unknown moments or baseline; a number out of its range; when traced,
            a penalty without features.

    References:
        MMKD, 2406.02959. Reconstruction: see the module's docstring.
    """
    check_choice("moments", moments, get_args(Moments))
    check_choice("baseline", baseline, tuple(LESS_BASELINE))
    for name, number, interval in (
        ("on_weight", on_weight, "[0, 1]"),
        ("gamma", gamma, "[0, 1]"),
        ("temperature", temperature, "(0, inf)"),
        ("critic_penalty", critic_penalty, "[0, inf)"),
        ("penalty_target", penalty_target, "[0, inf)"),
        ("sft_weight", sft_weight, "[0, inf)"),
    ):
        check_domain(name, number, interval)
    sides = tuple(
        (side, weight)
        for side, weight in ((OFF, 1.0 - on_weight), (ON, on_weight))
        if weight
    )
    game = _Game(
        model=model,
        temperature=temperature,
        teacher=FrozenPolicy("teacher", teacher, temperature),
        q_function=QFunction(q_values, center=False, bound=q_bound),
        sides=sides,
        sampled=moments == "sampled",
        credit=Credit(gamma, discount_weighting, LESS_BASELINE[baseline]),
        critic_penalty=critic_penalty,
        penalty_target=penalty_target,
        sft=partial(sft_nll, model, temperature=temperature),
        sft_weight=sft_weight,
    )
    requires = [name for side, _ in sides for name in _REQUIRES[moments][side.name]]
    return Objective(
        "mmkd",
        game.student_loss,
        game.critic_loss,
        requires=tuple(requires),
        critic_signal=game.critic_signal,
    )


# A sampled moment is the teacher's mean less the value of the student's action (on), or
# the value of the teacher's action less the student's mean (off).
_SIGNS = {"on": -1.0, "off": 1.0}
_REQUIRES = {
    "all_actions": {"on": ("rollouts",), "off": ("demonstrations",)},
    "sampled": {"on": ("rollouts",), "off": ()},
}
_STEPS = {"on": STEPS["reinforce"], "off": STEPS["one_step"]}


@dataclasses.dataclass(frozen=True)
class _Game:
    """The rules of one game: the arguments of `make_mmkd`, looked up."""

    model: CausalLM
    temperature: float
    teacher: FrozenPolicy
    q_function: QFunction
    sides: tuple[tuple[Side, float], ...]  # with their weights
    sampled: bool  # moments of the actions that were taken
    credit: Credit
    critic_penalty: float
    penalty_target: float
    sft: Callable[..., Mean]
    sft_weight: float

    def critic_signal(self, params, frozen, batch, signal) -> Observed:
        """The student's states wherever the critics read its policy."""
        del frozen
        read = [
            side.responses
            for side, _ in self.sides
            if side.anchor == "student" or not self.sampled
        ]
        return observe(self.model, params, batch, signal, read)

    def critic_loss(self, critic, params, dual, frozen, batch, signal, rng):
        del dual, rng
        observed = self.critic_signal(params, frozen, batch, signal)
        student = observed.policies(self.model, params, self.temperature)
        signal = observed.signal
        distance, penalty, metrics = 0.0, 0.0, {}
        for side, weight in self.sides:
            view = side.view(batch, signal)
            mask = view.sequences.response_mask
            moments = partial(
                self._moments,
                side,
                view,
                critic[side.name],
                student.get(side.responses),
                self.teacher(frozen, view.teacher),
            )
            values = moments(view.features, averaged=True)
            values = discounted(values, mask, self.credit.gamma)
            mean = prompt_mean(sequence_sum(values, mask), mask)
            metrics[f"critic/{side.name}_distance"] = mean
            distance += weight * value_of(mean)
            if self.critic_penalty:
                slopes = self._penalty(moments, view)
                metrics[f"critic/{side.name}_penalty"] = slopes
                penalty += weight * value_of(slopes)
        prompts = mean.weight
        metrics["critic/distance"] = Mean(distance * prompts, prompts)
        return weighted(self.critic_penalty * penalty - distance, prompts, metrics)

    def student_loss(self, params, critic, frozen, batch, signal, rng) -> LossOutput:
        del rng
        critic, signal = jax.lax.stop_gradient((critic, signal))
        loss, metrics = 0.0, {}
        for side, weight in self.sides:
            view, step = side.view(batch, signal), _STEPS[side.name]
            mask = view.sequences.response_mask
            moments = action_moments(
                step.reads,
                self.q_function,
                self._critic_rows(critic[side.name], view, view.features),
                view.sequences,
                anchor=side.anchor,
                student=student_rows(
                    self.model, params, view.sequences, temperature=self.temperature
                ),
                teacher=self.teacher(frozen, view.teacher),
            )
            values = step.loss(moments, mask, self.credit)
            mean = prompt_mean(sequence_sum(values, mask), mask)
            loss += weight * value_of(mean)
            if side is ON:
                metrics["student/entropy_bound"] = own_nll(moments, mask)
        if self.sft_weight:
            metrics["student/sft"] = self.sft(params, batch.demonstrations)
            loss += self.sft_weight * value_of(metrics["student/sft"])
        return weighted(loss, mean.weight, jax.lax.stop_gradient(metrics))

    def _moments(
        self, side: Side, view: View, critic, student, teacher, features, averaged=False
    ):
        """What the critic of a side maximises, per position, without discount.

        ``averaged`` says that the discounted mean is all that they are wanted for.
        """
        name = "advantages" if self.sampled else "gap"
        known = foreseen(name, view, self.credit.gamma) if averaged else None
        moments = action_moments(
            (name,),
            self.q_function,
            self._critic_rows(critic, view, features),
            view.sequences,
            anchor=side.anchor,
            student=student,
            teacher=teacher,
            foreseen=known,
        )[name]
        return _SIGNS[side.name] * moments if self.sampled else moments

    def _critic_rows(self, critic, view: View, features) -> Rows:
        return self.q_function.along(critic, view.sequences, features)

    def _penalty(self, moments: Callable[..., jax.Array], view: View) -> Mean:
        """Penalty on the slope of each state's undiscounted moment, per token."""
        if view.features is None:
            raise ValueError(
                "critic_penalty is on a critic's slope in the features: the signal "
                "needs rollout_features and demonstration_features"
            )
        features = view.features.astype(accumulator(view.features))
        slopes = jax.grad(lambda h: jnp.sum(moments(h)))(features)
        mask = view.sequences.response_mask
        penalty = gradient_penalty(slopes, mask, target=self.penalty_target)
        return prompt_mean(sequence_mean(penalty, mask), mask)
