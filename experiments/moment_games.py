"""Games on action values with a white-box teacher: MM-PbKD, and MMKD beside it.

The critic is a small head on the frozen trunk's states *before* each target, with one
value per token of the vocabulary. What frozen models say of the pairs never changes: it
is taken once and looked up; what they say of samples is taken at every step. That is
their states before each target, and the losses read their heads; or the distributions
themselves, T x V numbers for every response, where there is room for them.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Literal

import jax
import numpy as np

from experiments.course import Course
from experiments.game import TextBook
from experiments.lab import Lab
from experiments.settings import FitConfig, SettingsError
from experiments.stages import Desk, train, training_key
from experiments.trainer import Step, Trainer, constant_rate
from rkd_jax.data.collate import collate
from rkd_jax.data.pipeline import ZippedBatches
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.evaluation.generation import with_prompts
from rkd_jax.losses import check_epsilon
from rkd_jax.models.heads import QHead, head_q_values
from rkd_jax.objectives.action_values import FrozenPolicy, QFunction
from rkd_jax.objectives.mm_pbkd import make_mm_pbkd
from rkd_jax.objectives.mmkd import make_mmkd
from rkd_jax.objectives.q_anchor import make_q_anchor, pair_advantages
from rkd_jax.objectives.reward_model import l2_penalty, pair_losses
from rkd_jax.placement import fetch, follow_parameters
from rkd_jax.signals.teacher import make_features, make_teacher_log_probs
from rkd_jax.training.state import TrainState, step_keys
from rkd_jax.types import (
    DemonstrationBatch,
    GameBatch,
    Objective,
    Params,
    PreferenceBatch,
    Sequences,
    WhiteBoxSignal,
)


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """The second player of both games."""

    width: int | None = 64
    """Units between state and action values; `None` is a linear head, D x V weights."""
    steps: int = 3
    """Per step of the student."""
    learning_rate: float = 3e-4


@dataclasses.dataclass(frozen=True)
class MmPbkdConfig:
    """MM-PbKD; see `make_mm_pbkd`."""

    gap: Literal["on", "off", "mixed"] = "on"
    student_step: Literal["reinforce", "one_step", "one_step_plus_long"] = "reinforce"
    learning_rate: float = 1e-5
    pairs_per_step: int = 16
    """A multiple of `--policy.rollout-prompts`."""
    accumulation: int = 4
    critic: CriticConfig = CriticConfig()
    q_bound: float = 5.0
    l2: float = 1e-3
    """Penalty on the critic, nats per pair."""
    epsilon: float = 0.05
    """Radius of the confidence set, nats per pair."""
    dual: float = 10.0
    """Where the multiplier starts."""
    anchor: FitConfig = FitConfig(learning_rate=1e-3, batch_size=32, accumulation=8)
    """Maximum likelihood of the critic, the centre of the set."""
    anchor_steps: int = 60
    keep_distributions: bool = False
    """Keep the teacher's distribution at every token, T x V numbers for every response
    of a pair, in place of its state: no head is computed twice, but they are large on
    the host and in every update."""


@dataclasses.dataclass(frozen=True)
class MmkdConfig:
    """MMKD; see `make_mmkd`."""

    on_weight: float = 0.5
    learning_rate: float = 1e-5
    accumulation: int = 4
    critic: CriticConfig = CriticConfig()
    q_bound: float = 1.0


class _MomentGame:
    """What both games do at every step: sample, ask the teacher, look states up."""

    def __init__(
        self, lab: Lab, objective: Objective, options, sampled: bool, dense: bool
    ):
        self.lab, self.options, self.sampled = lab, options, sampled
        self.ask = lab.teacher_policy if dense else lab.teacher_states
        self.step = Step(
            objective,
            student_optimizer=constant_rate(options.learning_rate),
            critic_optimizer=constant_rate(options.critic.learning_rate),
            critic_steps=options.critic.steps,
            accumulation=options.accumulation,
        )
        lab.check_rows(
            "--policy.rollout-prompts", lab.policy.rollout_prompts, options.accumulation
        )
        self.update = self.step.update_on(lab.mesh, max_traces=lab.widths)

    def _begin(self, course: Course, critic: Params, seed: int, dual=1.0) -> TrainState:
        return self.step.begin(
            course.start,
            critic=critic,
            dual=dual,
            rng=training_key(seed),
            mesh=self.lab.mesh,
        )

    def _demonstrations(self, course: Course, seed: int):
        size = self.lab.policy.rollout_prompts
        return self.lab.batches(course.demonstrations, batch_size=size, seed=seed)

    def _hear(self, sequences: Sequences) -> jax.Array:
        """The teacher's word on responses behind its own prompts."""
        return self.ask(self.lab.teacher_params, sequences)

    def _look(
        self, state: TrainState, demonstrations: DemonstrationBatch, taught: bool
    ) -> tuple[Sequences | None, dict[str, jax.Array]]:
        """Fresh samples, and what is known of them and of the teacher's responses."""
        lab, found = self.lab, {}
        if taught:
            found["demonstrations"] = self._hear(demonstrations.teacher_sequences)
            found["demonstration_features"] = lab.states(demonstrations.sequences)
        if not self.sampled:
            return None, found
        samples = lab.roll_out(
            state.student.params,
            demonstrations.sequences.prompts,
            step_keys(state).prepare,
        ).sequences
        heard = with_prompts(samples, demonstrations.teacher_sequences.prompts)
        found["rollouts"] = self._hear(heard)
        found["rollout_features"] = lab.states(samples)
        return samples, found


class Mmkd(_MomentGame):
    """Adversarial moments without preferences."""

    metric = "critic/distance"

    def __init__(self, lab: Lab, options: MmkdConfig):
        self.head = _q_head(lab, options.critic)
        objective = make_mmkd(
            lab.student,
            head_q_values(self.head),
            teacher=lab.teacher,
            on_weight=options.on_weight,
            q_bound=options.q_bound,
            temperature=lab.policy.temperature,
        )
        sampled = options.on_weight > 0
        super().__init__(lab, objective, options, sampled=sampled, dense=False)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """The student."""
        keys = jax.random.split(jax.random.key(seed))
        width = self.lab.trunk.config.hidden_size
        critic = {
            side: self.head.init(key, width)
            for side, key in zip(("off", "on"), keys, strict=True)
        }

        def prepare(state, batch):
            taught = self.options.on_weight < 1
            samples, found = self._look(state, batch, taught)
            return GameBatch(batch, samples), WhiteBoxSignal(**found)

        state = train(
            desk,
            stage.replace("-", " "),
            desk.run.stage(stage).path,
            self._begin(course, critic, seed),
            self.update,
            self._demonstrations(course, seed),
            steps=steps,
            config={"game": dataclasses.asdict(self.options), "seed": seed},
            prepare=prepare,
            frozen=self.lab.frozen,
        )
        return state.student.params


class MmPbkd(_MomentGame):
    """Moments inside the confidence set of the preferences.

    The critic starts at its maximum likelihood, anchored as its side of the game is: on
    the teacher's policy for the on-policy gap, on the start's for the off-policy one.
    """

    metric = "student/gap"

    def __init__(self, lab: Lab, options: MmPbkdConfig):
        self.head = _q_head(lab, options.critic)
        if options.gap == "mixed":
            self.sides, self.metric = ("off", "on"), "student/on_gap"
        else:
            self.sides, self.epsilon = (options.gap,), options.epsilon
        dense, temperature = options.keep_distributions, lab.policy.temperature
        values = head_q_values(self.head)
        likelihood = {"q_bound": options.q_bound, "l2": options.l2}
        objective = make_mm_pbkd(
            lab.student,
            values,
            teacher=None if dense else lab.teacher,
            gap=options.gap,
            student_step=options.student_step,
            epsilon=options.epsilon,
            temperature=temperature,
            **likelihood,
        )
        sampled = options.gap != "off"
        super().__init__(lab, objective, options, sampled=sampled, dense=dense)
        self.q_function = QFunction(values, center=True, bound=options.q_bound)
        models = {"on": lab.teacher, "off": lab.student}
        self.policies = {
            side: FrozenPolicy("anchor", None if dense else models[side], temperature)
            for side in self.sides
        }
        self.anchors = {
            side: Trainer(
                lab,
                make_q_anchor(
                    values, anchor=policy.model, temperature=temperature, **likelihood
                ),
                options.anchor,
            )
            for side, policy in self.policies.items()
        }
        self._ask_start = follow_parameters(
            make_teacher_log_probs(lab.student, temperature=temperature)
            if dense
            else make_features(lab.student, states="before")
        )
        lab.check_rows(
            "--mm-pbkd.pairs-per-step", options.pairs_per_step, options.accumulation
        )
        self._pair_nll = {
            side: follow_parameters(jax.jit(partial(self._pair_nll_of, side)))
            for side in self.sides
        }

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """Anchor, then the game; the student."""
        lab, options = self.lab, self.options
        if len(course.pairs) < options.pairs_per_step:
            raise SettingsError(
                f"{stage}: {len(course.pairs)} pairs for batches of "
                f"{options.pairs_per_step}; lower --mm-pbkd.pairs-per-step"
            )
        states, teacher = TextBook(lab.states), TextBook(self._hear)
        start = TextBook(lambda rows: self._ask_start(course.start, rows))
        anchors = {"on": lab.frozen["teacher"], "off": course.start}

        def on_pairs(side: str, pairs: PreferenceBatch) -> WhiteBoxSignal:
            """What the critic of a side reads of pairs."""
            if side == "on":
                anchor = teacher.look_up(pairs.teacher_sequences)
            else:
                anchor = start.look_up(pairs.sequences)
            features = states.look_up(pairs.sequences)
            return WhiteBoxSignal(preferences=anchor, preference_features=features)

        critics, nlls = {}, []
        for side in self.sides:
            name = f"{stage}-anchor-{side}"
            look, frozen = partial(on_pairs, side), {"anchor": anchors[side]}
            critic = self._fit_anchor(desk, name, course, side, look, frozen, seed)
            nlls.append(self._anchor_nll(critic, course, side, look, frozen))
            critics[side] = critic
        for nll in nlls:
            try:
                check_epsilon(options.epsilon, float(nll.mean()))
            except ValueError as error:
                raise SettingsError(f"{stage}: {error}") from None
        mixed = len(self.sides) > 1
        anchor_nll = np.stack(nlls, axis=-1) if mixed else nlls[0]
        dual = (options.dual,) * 2 if mixed else options.dual

        def prepare(state, batch):
            demonstrations, pairs = batch["demonstrations"], batch["preferences"]
            taught = "off" in self.sides
            samples, found = self._look(state, demonstrations, taught)
            found["preference_features"] = states.look_up(pairs.sequences)
            if "on" in self.sides:
                found["preferences"] = teacher.look_up(pairs.teacher_sequences)
            signal = WhiteBoxSignal(anchor_nll=anchor_nll[pairs.index], **found)
            return GameBatch(demonstrations, samples, pairs), signal

        state = train(
            desk,
            stage.replace("-", " "),
            desk.run.stage(stage).path,
            self._begin(course, critics if mixed else critics[options.gap], seed, dual),
            self.update,
            self._batches(course, seed),
            steps=steps,
            config={"game": dataclasses.asdict(options), "seed": seed},
            prepare=prepare,
            frozen=lab.frozen,
        )
        return state.student.params

    def _fit_anchor(self, desk, name, course, side, look, frozen, seed) -> Params:
        width = self.lab.trunk.config.hidden_size
        return self.anchors[side].train(
            desk,
            name,
            self.head.init(jax.random.key(seed), width),
            course.pairs,
            steps=self.options.anchor_steps,
            seed=seed,
            prepare=lambda state, batch: (batch, look(batch)),
            frozen=frozen,
        )

    def _anchor_nll(self, critic, course, side, look, frozen) -> np.ndarray:
        """Penalised loss of every pair under an anchor, ``float32[n]``."""
        lab, size = self.lab, self.options.pairs_per_step
        rows = [
            tokenize_record(r, lab.tokenizer, lab.rows, i)
            for i, r in enumerate(course.pairs)
        ]
        parts = []
        for first in range(0, len(rows), size):
            some = rows[first : first + size]
            pairs = collate(some + some[-1:] * (size - len(some)), lab.rows)
            nll = self._pair_nll[side](critic, (pairs, look(pairs)), frozen)
            parts.append(fetch(nll)[: len(some)])
        return np.concatenate(parts)

    def _pair_nll_of(self, side: str, critic, rows, frozen):
        pairs, signal = rows
        returns = pair_advantages(
            self.q_function,
            critic,
            pairs.sequences,
            signal.preference_features,
            self.policies[side](frozen, signal.preferences),
            gamma=1.0,
        )
        nll, _ = pair_losses(returns, pairs)
        return nll + self.options.l2 * l2_penalty(critic)

    def _batches(self, course: Course, seed: int) -> ZippedBatches:
        preferences = self.lab.batches(
            course.pairs, batch_size=self.options.pairs_per_step, seed=seed
        )
        demonstrations = self._demonstrations(course, seed)
        return ZippedBatches(
            {"demonstrations": demonstrations, "preferences": preferences}
        )


def _q_head(lab: Lab, options: CriticConfig) -> QHead:
    return QHead(actions=lab.trunk.config.vocab_size, width=options.width)
