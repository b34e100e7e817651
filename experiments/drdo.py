"""DRDO: an oracle's reward differences and the preferences at once (2410.08458).

`config()` follows the sister papers of the same group (their own hyper-parameters are
not published in what we have): Phi-3-mini on Reddit TL;DR pairs, 2,000 steps of 64
pairs. `tiny()` is the wiring.

    python -m experiments.drdo --tiny
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from experiments.command import run_command
from experiments.course import Course
from experiments.edpo import EdpoConfig, RewardDistillation
from experiments.game import TextBook
from experiments.lab import Lab
from experiments.references import checksums, kept
from experiments.reward_models import (
    OracleRewards,
    RewardSource,
    scaled,
    with_rewards,
)
from experiments.settings import (
    FitConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    TaskConfig,
    WarmStartConfig,
)
from experiments.stages import Desk
from experiments.system import TOY_FIT, SystemConfig, run_system, toy_system
from experiments.trainer import Trainer
from rkd_jax.models.heads import RewardModel, ScalarHead
from rkd_jax.objectives.drdo import make_drdo, make_drdo_oracle
from rkd_jax.placement import follow_parameters
from rkd_jax.signals.cache_identity import data_hash
from rkd_jax.types import Params


@dataclasses.dataclass(frozen=True)
class DrdoConfig:
    """The student's loss, and where its rewards come from; see `make_drdo`."""

    fit: FitConfig = FitConfig()
    alpha: float = 0.1
    gamma: float = 2.0
    rewards: Literal["model", "oracle"] = "model"
    """`model`: a reward model that keeps its language-model head, trained first on the
    same pairs; `oracle`: what the oracle said when it labelled them."""
    oracle_alpha: float = 0.01
    """Weight of the likelihood of the chosen response in that reward model's loss."""
    oracle_steps: int = 17
    oracle_learning_rate: float = 1e-5


@dataclasses.dataclass(frozen=True)
class DrdoExperiment(SystemConfig):
    """DRDO beside d-DPO on the same rewards."""

    out: str = "runs/drdo"
    """Output folder; the same command again resumes."""
    drdo: DrdoConfig = DrdoConfig()


class DrdoOracle:
    """A reward model that keeps its language-model head, fitted to the pairs once.

    Whoever reads it on a course reads the same rewards: its folder is ``3-oracle``.
    """

    members = 1

    def __init__(self, lab: Lab, options: DrdoConfig):
        self.lab, self.options = lab, options
        self.model = RewardModel(lab.student, ScalarHead())
        fit = dataclasses.replace(
            options.fit, learning_rate=options.oracle_learning_rate
        )
        objective = make_drdo_oracle(self.model, alpha=options.oracle_alpha)
        self.trainer = Trainer(lab, objective, fit)
        self._score = follow_parameters(
            jax.jit(
                lambda params, rows: self.model.sequence_rewards(params, rows).sum(-1)
            )
        )

    def of_pairs(
        self, desk: Desk, stage: str, course: Course, *, seed: int
    ) -> np.ndarray:
        """``float32[n, 2, 1]``; the trunk starts as the student does."""
        del stage
        options = dataclasses.asdict(self.options)
        of = [data_hash(course.pairs), checksums(course.start), options, seed]

        def rewards() -> np.ndarray:
            return self._rewards(desk, course, seed)

        return kept(desk, "3-oracle-rewards", of, rewards)

    def _rewards(self, desk: Desk, course: Course, seed: int) -> np.ndarray:
        lab, pairs = self.lab, course.pairs
        width = lab.student.config.hidden_size
        start = {
            "trunk": course.start,
            "head": self.model.head.init(jax.random.key(seed), width),
        }
        params = self.trainer.train(
            desk, "3-oracle", start, pairs, steps=self.options.oracle_steps, seed=seed
        )
        book = TextBook(lambda rows: self._score(params, rows))
        return book.look_up(lab.collated(pairs).sequences)[:, :, None]


class Drdo:
    """Cached rewards of an oracle, and a student with a reward head."""

    metric = "student/distillation"

    def __init__(self, lab: Lab, options: DrdoConfig, source: RewardSource):
        self.lab, self.source, self.head = lab, source, ScalarHead()
        objective = make_drdo(
            lab.student,
            self.head,
            alpha=options.alpha,
            gamma=options.gamma,
            temperature=lab.policy.temperature,
        )
        self.trainer = Trainer(lab, objective, options.fit)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """The rewards are scaled to differences of root mean square 1."""
        rewards = scaled(self.source.of_pairs(desk, stage, course, seed=seed))
        width = self.lab.student.config.hidden_size
        start = {
            "policy": course.start,
            "reward_head": self.head.init(jax.random.key(seed), width),
        }
        pairs = with_rewards(course.pairs, rewards[:, :, 0])
        params = self.trainer.train(desk, stage, start, pairs, steps=steps, seed=seed)
        return params["policy"]


def config() -> DrdoExperiment:
    """Phi-3-mini on TL;DR pairs, 2,000 steps of 64."""
    return DrdoExperiment(
        models=ModelConfig(
            teacher="Phi-3-mini-4k-instruct", drop_layers=(), dtype="bfloat16"
        ),
        task=TaskConfig(
            train_file="train_prompts.jsonl",
            held_out_file="held_out_prompts.jsonl",
            train_prompts=1024,
            held_out_prompts=512,
            pairs_file="tldr_pairs.jsonl",
        ),
        policy=PolicyConfig(
            temperature=1.0, max_prompt=896, max_teacher_prompt=896, max_response=128
        ),
        warm_start=WarmStartConfig(steps=0, steered=True),
        pairs=PairsConfig(rounds=0),
        updates=2000,
        drdo=DrdoConfig(
            fit=FitConfig(learning_rate=5e-6, batch_size=64, accumulation=16),
            oracle_steps=2000,
        ),
    )


def tiny() -> DrdoExperiment:
    """The same wiring with a random toy teacher."""
    return DrdoExperiment(
        **toy_system(),
        out="runs/drdo-tiny",
        drdo=DrdoConfig(fit=TOY_FIT, oracle_steps=2, oracle_learning_rate=1e-3),
    )


def family(lab: Lab, options: DrdoConfig, beta: float = 0.1) -> dict:
    """d-DPO on the rewards that DRDO reads, and DRDO."""
    asked = options.rewards == "oracle"
    source = OracleRewards() if asked else DrdoOracle(lab, options)
    rival = EdpoConfig(fit=options.fit, beta=beta, kappa=0.0)
    return {
        "d-DPO, same oracle": RewardDistillation(lab, rival, source),
        "DRDO": Drdo(lab, options, source),
    }


def table(lab: Lab, config: DrdoExperiment) -> dict:
    """All methods by the names they have in the report."""
    return family(lab, config.drdo)


def run(config: DrdoExperiment) -> Path:
    """d-DPO, then DRDO, from the same start and on the same rewards."""
    return run_system(
        config,
        "drdo",
        "DRDO: rewards distilled and preferences learnt at once",
        table,
    )


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
