"""The methods every system is measured against, from the same start and data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from experiments.course import Course
from experiments.imitation import prepare_imitation, prepare_mixed
from experiments.lab import Lab
from experiments.references import reference_log_probs
from experiments.settings import FitConfig
from experiments.stages import Desk
from experiments.trainer import Trainer
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.losses import generalized_jsd
from rkd_jax.losses.importance import Importance
from rkd_jax.losses.policy_gradient import CreditBaseline
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.gkd import make_gkd
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.minillm import make_minillm
from rkd_jax.objectives.sft import make_seqkd, make_sft
from rkd_jax.types import Params, ReferenceSignal


class Sft:
    """Maximum likelihood of the preferred responses."""

    metric = "student/nll"

    def __init__(self, lab: Lab, fit: FitConfig):
        self.trainer = Trainer(
            lab, make_sft(lab.student, temperature=lab.policy.temperature), fit
        )

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """On the better response of every pair."""
        records = [
            DemonstrationRecord(pair.prompt, pair.chosen, pair.teacher_prompt)
            for pair in course.pairs
        ]
        return self.trainer.train(
            desk, stage, course.start, records, steps=steps, seed=seed
        )


class SeqKd:
    """Maximum likelihood of the teacher's responses."""

    metric = "student/nll"

    def __init__(self, lab: Lab, fit: FitConfig):
        self.trainer = Trainer(
            lab, make_seqkd(lab.student, temperature=lab.policy.temperature), fit
        )

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """On the teacher's answers."""
        return self.trainer.train(
            desk, stage, course.start, course.demonstrations, steps=steps, seed=seed
        )


class Kd:
    """Forward KL to the teacher on the teacher's responses."""

    metric = "student/divergence"

    def __init__(self, lab: Lab, fit: FitConfig):
        self.lab = lab
        self.trainer = Trainer(
            lab,
            make_kd(
                lab.student, teacher=lab.teacher, temperature=lab.policy.temperature
            ),
            fit,
        )

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """On the teacher's answers, under its own prompts."""
        lab = self.lab

        def prepare(state, batch):
            del state
            return batch, lab.teach(batch.teacher_sequences)

        return self.trainer.train(
            desk,
            stage,
            course.start,
            course.demonstrations,
            steps=steps,
            seed=seed,
            prepare=prepare,
            frozen=lab.frozen,
        )


@dataclasses.dataclass(frozen=True)
class GkdConfig:
    """GKD: a divergence, partly on what the student writes."""

    fit: FitConfig = FitConfig()
    rho: float = 0.5
    """Share of rows the student writes."""
    beta: float = 0.5
    """Of the generalised JSD: 0 is forward, 1 reverse KL."""


class Gkd:
    """Generalised JSD on a mixture of the teacher's and the student's responses."""

    metric = "student/divergence"

    def __init__(self, lab: Lab, options: GkdConfig):
        self.lab, self.options = lab, options
        objective = make_gkd(
            lab.student,
            functools.partial(generalized_jsd, beta=options.beta),
            teacher=lab.teacher,
            temperature=lab.policy.temperature,
        )
        self.trainer = Trainer(lab, objective, options.fit)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """On the teacher's answers and fresh samples."""
        return self.trainer.train(
            desk,
            stage,
            course.start,
            course.demonstrations,
            steps=steps,
            seed=seed,
            prepare=prepare_imitation(
                self.lab, rho=self.options.rho, teach=self.lab.teach
            ),
            frozen=self.lab.frozen,
        )


@dataclasses.dataclass(frozen=True)
class MiniLlmConfig:
    """MiniLLM: reverse KL of whole responses, by policy gradient."""

    fit: FitConfig = FitConfig()
    alpha: float = 0.0
    """The teacher's share in the probability of every sampled token; 0.2 as
    published. At 0 the student writes alone."""
    importance: Importance = "per_decision"
    """How samples of the mixture are weighted: exactly, or by each token's own weight
    as published."""
    baseline: CreditBaseline = "whitened"
    """Of a token's credit: none, the mean of the other rows, or whitened as
    published."""


class MiniLlm:
    """Sequence-level reverse KL by policy gradient."""

    metric = "student/divergence"

    def __init__(self, lab: Lab, options: MiniLlmConfig):
        self.lab, self.options = lab, options
        if options.alpha:
            self.prepare = prepare_mixed(lab, alpha=options.alpha)
        else:
            self.prepare = prepare_imitation(lab, rho=1.0, teach=lab.teach)
        objective = make_minillm(
            lab.student,
            teacher=lab.teacher,
            temperature=lab.policy.temperature,
            importance=options.importance,
            baseline=options.baseline,
        )
        self.trainer = Trainer(lab, objective, options.fit)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """On fresh samples."""
        return self.trainer.train(
            desk,
            stage,
            course.start,
            course.demonstrations,
            steps=steps,
            seed=seed,
            prepare=self.prepare,
            frozen=self.lab.frozen,
        )


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """DPO: the start is the reference."""

    fit: FitConfig = FitConfig()
    beta: float = 0.1


class Dpo:
    """Direct preference optimisation on the course's pairs, or on given ones."""

    metric = "student/preference_loss"

    def __init__(self, lab: Lab, options: DpoConfig):
        self.lab, self.options = lab, options
        objective = make_dpo(
            lab.student, beta=options.beta, temperature=lab.policy.temperature
        )
        self.trainer = Trainer(lab, objective, options.fit)

    def train(
        self,
        desk: Desk,
        stage: str,
        course: Course,
        *,
        steps: int,
        seed: int,
        pairs: Sequence[PreferenceRecord] | None = None,
    ) -> Params:
        """The trained student; the start's scores are computed once in a run."""
        pairs = course.pairs if pairs is None else pairs
        reference = reference_log_probs(self.lab, desk, course.start, pairs)
        return self.trainer.train(
            desk,
            stage,
            course.start,
            pairs,
            steps=steps,
            seed=seed,
            prepare=lambda state, batch: (
                batch,
                ReferenceSignal(reference[batch.index]),
            ),
        )
