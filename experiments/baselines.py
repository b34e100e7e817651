"""The methods every system is measured against, from the same start and data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments.course import Course
from experiments.judging import pair_log_probs
from experiments.lab import Lab
from experiments.settings import FitConfig
from experiments.stages import Desk
from experiments.trainer import Trainer
from rkd_jax.data.records import PreferenceRecord
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.types import Params, ReferenceSignal


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
        """The start's scores are computed once; the trained student."""
        pairs = course.pairs if pairs is None else pairs
        reference = pair_log_probs(self.lab, course.start, pairs)
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
