r"""MM-PbKD: the game of PbKD with a white-box teacher and a Q-function as critic.

Any function Q and an anchor policy :math:`\rho` define a reward, :math:`r(s, a) =
Q(s, a) - \gamma V_\rho(s')`, :math:`V_\rho(s) = \sum_a \rho(a|s) Q(s, a)`, for which no
Bellman residual has to vanish. Under it the imitation gap is a moment gap, over the
student's responses if the teacher is the anchor, over the teacher's if the student is:

.. math:: J(\pi_E) - J(\pi_\theta) = \hat{\mathbb E} \sum_h \gamma^h
    \sum_a (\pi_E - \pi_\theta)(a | s_h)\, Q(s_h, a)

and the Bradley-Terry logit of a pair is a difference of advantage sums. The critic
maximises the gap inside the confidence set of the preferences, as in
`rkd_jax.objectives.pbkd`; every step it sees all actions of both policies.

========  ==============  ==========  ================================================
gap       responses       anchor      student's loss
========  ==============  ==========  ================================================
on        the student's   teacher     ``student_step``
off       the teacher's   student     mean action value, negated (`one_step`)
mixed     both            each its    weighted sum; two critics, each with its own
                          own         anchor, confidence set and multiplier
========  ==============  ==========  ================================================

==================  =============================  ====================================
student_step        cost-to-go of                  status
==================  =============================  ====================================
reinforce           each action and what follows   unbiased
one_step            each action, states given      biased unless the policies agree
one_step_plus_long  both, the first one summed     unbiased, less variance
                    over all actions
==================  =============================  ====================================

Cost: the student's states that the critic reads, on the rollouts (on) or on the other
responses (off), are computed once for all its steps. What is over the vocabulary is
read a few positions at a time, if heads say it; see `rkd_jax.objectives.action_values`.

Source: MM-PbKD, 2505.18952, for the reformulation through Q. Reconstruction: which gap,
which anchor, which student step and all hyper-parameters are not published in what we
have; neither is the solver (see `rkd_jax.objectives.pbkd`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from rkd_jax.losses import confidence_slack, dual_update, reward_player_loss
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.masking import masked_sum, sequence_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.action_values import (
    FrozenPolicy,
    Moments,
    QFunction,
    QValues,
    action_moments,
    student_rows,
)
from rkd_jax.objectives.game import (
    LESS_BASELINE,
    Baseline,
    length,
    prompt_mean,
    sft_nll,
    value_of,
    weighted,
)
from rkd_jax.objectives.pbkd import Constraint, DualScale
from rkd_jax.objectives.q_anchor import pair_terms
from rkd_jax.objectives.reward_model import l2_penalty
from rkd_jax.objectives.white_box import (
    OFF,
    ON,
    STEPS,
    Credit,
    Observed,
    Side,
    Step,
    StudentStep,
    View,
    discounted,
    foreseen,
    observe,
    own_nll,
)
from rkd_jax.types import Mean, Objective, Params

Gap = Literal["on", "off", "mixed"]
Means = dict[str, Mean]

_SIDES = {"on": (ON,), "off": (OFF,), "mixed": (OFF, ON)}
_REQUIRES = {
    "on": ("anchor_nll", "rollouts", "preferences"),
    "off": ("anchor_nll", "demonstrations"),
    "mixed": ("anchor_nll", "rollouts", "preferences", "demonstrations"),
}


def make_mm_pbkd(
    model: CausalLM,
    q_values: QValues,
    *,
    teacher: CausalLM | None = None,
    gap: Gap = "on",
    on_weight: float = 0.5,
    share_critic: bool = False,
    student_step: StudentStep = "reinforce",
    epsilon: float = 0.02,
    gamma: float = 1.0,
    temperature: float = 1.0,
    center_q: bool = True,
    q_bound: float | None = 5.0,
    baseline: Baseline = "loo_per_step",
    discount_weighting: bool = False,
    constraint: Constraint = "dual",
    hinge: bool = False,
    dual_scale: DualScale = "relative",
    dual_step_size: float = 0.5,
    slack_clip: float = 10.0,
    l2: float = 0.0,
    sft_weight: float = 0.0,
) -> Objective:
    """The two players of MM-PbKD and the step of the multiplier between them.

    Args:
        model: the student.
        q_values: the critic's raw action values, ``(params, sequences, features) ->
            [.., T, V]``: a head on a frozen trunk's states before each target
            (`rkd_jax.models.heads.head_q_values`), or a model of its own.
        teacher: the model whose states the signal holds in the place of log-probs; its
            parameters are in ``frozen["teacher"]``.
        gap: which identity; see the module's table. ``"on"`` needs rollouts and the
            teacher's log-probs on them and on both responses of every pair. ``"off"``
            needs its log-probs on the demonstrations and no rollouts (None is fine);
            there the preference logit moves with the student.
        on_weight: in [0, 1], weight of the on-policy side of ``"mixed"``, in the loss
            of both players; the other side has the rest.
        share_critic: one critic for both sides of ``"mixed"``. An ablation: with two
            anchors, one Q is not the gap of any single reward.
        student_step: how the on-policy gap is descended; see the module's table.
        epsilon: radius of the confidence set, nats per pair above the anchor.
        gamma: discount in [0, 1].
        temperature: the policy is ``softmax(logits / temperature)``; rollouts have to
            be sampled, and the teacher's log-probs taken, at the same one.
        center_q: subtract the anchor's mean from Q. Alone it changes no loss; with a
            bound, it is the advantage that is bounded.
        q_bound: R, Q becomes R * tanh(Q / R); None for no bound.
        baseline: of the sampled credit; as in `make_pbkd`.
        discount_weighting: weight step h of ``"reinforce"`` by gamma**h, the exact
            gradient for gamma < 1. The other steps always are weighted so.
        constraint, hinge, dual_scale, dual_step_size, slack_clip: as in `make_pbkd`.
        l2: weight of `l2_penalty` in the likelihood that defines the set, nats per
            pair. `WhiteBoxSignal.anchor_nll` has to contain the anchor's own penalty.
        sft_weight: weight of the mean NLL of the teacher's responses in the student's
            loss, nats per token.

    Returns:
        `Objective` over a `GameBatch` and a `WhiteBoxSignal`; ``anchor_nll`` comes from
        `rkd_jax.objectives.q_anchor.make_q_anchor`. Both losses are normalised by the
        number of prompts that are not padding; that is exact over micro-batches with
        equally many of them and of pairs. Metrics: ``critic/gap``, ``critic/nll``,
        ``critic/slack`` (against epsilon: positive is outside the set),
        ``critic/teacher_length``, ``critic/student_length``, ``student/gap`` (against
        the critic of the step), ``student/entropy_bound`` (mean NLL of the student's
        own samples), ``student/sft`` if weighted.

        ``"mixed"`` has critic parameters ``{"off": .., "on": ..}`` (unless shared),
        ``anchor_nll`` [pairs, 2] and a multiplier [2], ``init_state(dual=(1.0, 1.0))``,
        in that order; its metrics are ``critic/off_gap``, ``critic/on_gap`` and so on.
        A side's whole Lagrangian has the side's weight, so its multiplier means what it
        means alone.

    Gradient:
        ``student_loss`` reaches the student only, ``critic_loss`` the critic only; the
        cross-gradients are exactly zero. With Q = 0 the student's is exactly zero.

    Raises:
        ValueError: unknown gap, student_step, baseline or constraint; a number out of
            its range; when traced, a multiplier or anchor without two entries for
            ``"mixed"``.

    References:
        MM-PbKD, 2505.18952. Reconstruction: see the module's docstring.
    """
    for name, value, choices in (
        ("gap", gap, _SIDES),
        ("student_step", student_step, STEPS),
        ("baseline", baseline, LESS_BASELINE),
        ("constraint", constraint, get_args(Constraint)),
        ("dual_scale", dual_scale, get_args(DualScale)),
    ):
        check_choice(name, value, tuple(choices))
    for name, number, interval in (
        ("on_weight", on_weight, "[0, 1]"),
        ("epsilon", epsilon, "(0, inf)"),
        ("gamma", gamma, "[0, 1]"),
        ("temperature", temperature, "(0, inf)"),
        ("dual_step_size", dual_step_size, "(0, inf)"),
        ("slack_clip", slack_clip, "(0, inf]"),
        ("l2", l2, "[0, inf)"),
        ("sft_weight", sft_weight, "[0, inf)"),
    ):
        check_domain(name, number, interval)
    game = _Game(
        model=model,
        temperature=temperature,
        teacher=FrozenPolicy("teacher", teacher, temperature),
        q_function=QFunction(q_values, center_q, q_bound),
        sides=_SIDES[gap],
        weights=(1.0 - on_weight, on_weight) if gap == "mixed" else (1.0,),
        share_critic=share_critic,
        steps={"on": STEPS[student_step], "off": STEPS["one_step"]},
        credit=Credit(gamma, discount_weighting, LESS_BASELINE[baseline]),
        epsilon=epsilon,
        hinge=hinge,
        l2=l2,
        dual_update=partial(
            dual_update,
            epsilon=epsilon if dual_scale == "relative" else 1.0,
            step_size=dual_step_size,
            clip=slack_clip,
        ),
        sft=partial(sft_nll, model, temperature=temperature),
        sft_weight=sft_weight,
    )
    return Objective(
        "mm_pbkd",
        game.student_loss,
        game.critic_loss,
        game.dual_step if constraint == "dual" else None,
        requires=_REQUIRES[gap],
        critic_signal=game.critic_signal,
    )


@dataclasses.dataclass(frozen=True)
class _Game:
    """The rules of one game: the arguments of `make_mm_pbkd`, looked up."""

    model: CausalLM
    temperature: float
    teacher: FrozenPolicy
    q_function: QFunction
    sides: tuple[Side, ...]
    weights: tuple[float, ...]
    share_critic: bool
    steps: dict[str, Step]  # by side
    credit: Credit
    epsilon: float
    hinge: bool
    l2: float
    dual_update: Callable[..., jax.Array]
    sft: Callable[..., Mean]
    sft_weight: float

    def critic_signal(self, params, frozen, batch, signal) -> Observed:
        """The student's states wherever the critic reads its policy."""
        del frozen
        responses = [side.responses for side in self.sides]
        responses += ["preferences"] if OFF in self.sides else []
        return observe(self.model, params, batch, signal, responses)

    def critic_loss(self, critic, params, dual, frozen, batch, signal, rng):
        del rng
        observed = self.critic_signal(params, frozen, batch, signal)
        student = observed.policies(self.model, params, self.temperature)
        signal = observed.signal
        teacher = partial(self.teacher, frozen)
        anchors = {
            "student": student.get("preferences"),
            "teacher": teacher(signal.preferences),
        }
        metrics = {"critic/teacher_length": length(batch.demonstrations.sequences)}
        if batch.rollouts is not None:
            metrics["critic/student_length"] = length(batch.rollouts)
        loss = 0.0
        for i, (side, weight) in enumerate(zip(self.sides, self.weights, strict=True)):
            own = self._critic_of(critic, side)
            view = side.view(batch, signal)
            policy = student[side.responses]
            known = foreseen("gap", view, self.credit.gamma)
            moments = self._moments(("gap",), side, view, own, policy, teacher, known)
            gap = self._gap(moments, view)
            preferences = self._preference_terms(
                own,
                anchors[side.anchor],
                batch.preferences,
                signal.preference_features,
                self._entry(signal.anchor_nll, i, "anchor_nll"),
            )
            loss += weight * reward_player_loss(
                value_of(gap),
                value_of(preferences["slack"]),
                self._entry(dual, i, "dual"),
                hinge=self.hinge,
            )
            metrics |= self._named("critic", side, {"gap": gap, **preferences})
        return weighted(loss, gap.weight, metrics)

    def student_loss(self, params, critic, frozen, batch, signal, rng):
        del rng
        critic, signal = jax.lax.stop_gradient((critic, signal))
        teacher = partial(self.teacher, frozen)
        loss, metrics = 0.0, {}
        for side, weight in zip(self.sides, self.weights, strict=True):
            view, step = side.view(batch, signal), self.steps[side.name]
            mask = view.sequences.response_mask
            moments = self._moments(
                dict.fromkeys(("gap", "log_probs", *step.reads)),
                side,
                view,
                self._critic_of(critic, side),
                student_rows(
                    self.model, params, view.sequences, temperature=self.temperature
                ),
                teacher,
            )
            values = step.loss(moments, mask, self.credit)
            mean = prompt_mean(sequence_sum(values, mask), mask)
            loss += weight * value_of(mean)
            gap = self._gap(moments, view)
            metrics |= self._named("student", side, {"gap": gap})
            if side is ON:
                metrics["student/entropy_bound"] = own_nll(moments, mask)
        if self.sft_weight:
            metrics["student/sft"] = self.sft(params, batch.demonstrations)
            loss += self.sft_weight * value_of(metrics["student/sft"])
        return weighted(loss, mean.weight, jax.lax.stop_gradient(metrics))

    def dual_step(self, dual, metrics):
        """Each multiplier by the slack of its own side."""
        slacks = [metrics[self._name("critic", side, "slack")] for side in self.sides]
        moved = [
            self.dual_update(self._entry(dual, i, "dual"), slack)
            for i, slack in enumerate(slacks)
        ]
        return jnp.stack(moved) if len(moved) > 1 else moved[0]

    def _moments(self, names, side, view, critic, student, teacher, known=None):
        """What a side's critic says of the responses it looks at."""
        return action_moments(
            names,
            self.q_function,
            self.q_function.along(critic, view.sequences, view.features),
            view.sequences,
            anchor=side.anchor,
            student=student,
            teacher=teacher(view.teacher),
            foreseen=known,
        )

    def _gap(self, moments: Moments, view: View) -> Mean:
        """The moment gap that the critic of a side maximises."""
        mask = view.sequences.response_mask
        values = discounted(moments["gap"], mask, self.credit.gamma)
        return prompt_mean(sequence_sum(values, mask), mask)

    def _preference_terms(self, critic, anchor, pairs, features, anchor_nll) -> Means:
        """What the pairs say about a critic; pairs without any token do not count."""
        nll, _, valid = pair_terms(
            self.q_function, critic, pairs, features, anchor, self.credit.gamma
        )
        penalised = nll + self.l2 * l2_penalty(critic) if self.l2 else nll
        slack = confidence_slack(penalised, anchor_nll, epsilon=self.epsilon)
        count = valid.sum().astype(nll.dtype)
        terms = {"nll": nll, "slack": slack}
        return {k: Mean(masked_sum(v, valid), count) for k, v in terms.items()}

    def _critic_of(self, critic: Params, side: Side) -> Params:
        one = len(self.sides) == 1 or self.share_critic
        return critic if one else critic[side.name]

    def _entry(self, values: jax.Array, i: int, name: str) -> jax.Array:
        """Side i's entry of what each side has one of."""
        if len(self.sides) == 1:
            return values
        if values.ndim == 0 or values.shape[-1] != len(self.sides):
            raise ValueError(
                f'gap="mixed" needs {name} [.., {len(self.sides)}], one entry per '
                f"critic (off, on): its shape is {values.shape}"
            )
        return values[..., i]

    def _name(self, role: str, side: Side, what: str) -> str:
        one = len(self.sides) == 1
        return f"{role}/{what}" if one else f"{role}/{side.name}_{what}"

    def _named(self, role: str, side: Side, means: Means) -> Means:
        return {self._name(role, side, what): mean for what, mean in means.items()}
