"""DRDO: an oracle's reward differences and the preferences at once (2410.08458).

`config()` follows the sister papers of the same group (their own hyper-parameters are
not published in what we have): Phi-3-mini on Reddit TL;DR pairs, 2,000 steps of 64
pairs. `tiny()` is the wiring.

    python -m experiments.drdo --tiny
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np

from experiments.command import run_command
from experiments.course import Course
from experiments.edpo import EdpoConfig, RewardDistillation
from experiments.game import TextBook
from experiments.lab import Lab
from experiments.reward_models import (
    RewardSource,
    oracle_rewards,
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
from rkd_jax.data.collate import collate
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.models.heads import RewardModel, ScalarHead
from rkd_jax.objectives.drdo import make_drdo, make_drdo_oracle
from rkd_jax.types import Params


@dataclasses.dataclass(frozen=True)
class DrdoConfig:
    """The student's loss, and where its rewards come from; see `make_drdo`."""

    fit: FitConfig = FitConfig()
    alpha: float = 0.1
    gamma: float = 2.0
    rewards: RewardSource = "model"
    """`model`: a reward model that keeps its language-model head, trained first on the
    same pairs; `oracle`: what the oracle said when it labelled them."""
    oracle_alpha: float = 0.01
    """Weight of the likelihood of the chosen response in that reward model's loss."""
    oracle_steps: int = 17
    oracle_learning_rate: float = 1e-5


@dataclasses.dataclass(frozen=True)
class DrdoExperiment(SystemConfig):
    """DRDO beside d-DPO on what the oracle said of the pairs."""

    out: str = "runs/drdo"
    """Output folder; the same command again resumes."""
    drdo: DrdoConfig = DrdoConfig()


class Drdo:
    """Oracle, cached rewards, student with a reward head."""

    metric = "student/distillation"

    def __init__(self, lab: Lab, options: DrdoConfig):
        self.lab, self.options = lab, options
        self.reward_model = RewardModel(lab.student, ScalarHead())
        objective = make_drdo_oracle(self.reward_model, alpha=options.oracle_alpha)
        fit = dataclasses.replace(
            options.fit, learning_rate=options.oracle_learning_rate
        )
        self.oracle = Trainer(lab, objective, fit)
        self.head = ScalarHead()
        self.trainer = Trainer(
            lab,
            make_drdo(
                lab.student,
                self.head,
                alpha=options.alpha,
                gamma=options.gamma,
                temperature=lab.policy.temperature,
            ),
            options.fit,
        )
        self._score = jax.jit(
            lambda params, rows: self.reward_model.sequence_rewards(params, rows).sum(
                -1
            )
        )

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """The rewards are scaled to differences of root mean square 1."""
        rewards = oracle_rewards(course.pairs)
        if self.options.rewards == "model":
            rewards = self._oracle_rewards(desk, f"{stage}-oracle", course, seed)
        rng = jax.random.key(seed)
        width = self.lab.student.config.hidden_size
        start = {
            "policy": course.start,
            "reward_head": self.head.init(rng, width),
        }
        pairs = with_rewards(course.pairs, scaled(rewards)[:, :, 0])
        params = self.trainer.train(desk, stage, start, pairs, steps=steps, seed=seed)
        return params["policy"]

    def _oracle_rewards(self, desk, stage, course: Course, seed: int) -> np.ndarray:
        lab = self.lab
        width = lab.student.config.hidden_size
        start = {
            "trunk": course.start,
            "head": self.reward_model.head.init(jax.random.key(seed), width),
        }
        steps = self.options.oracle_steps
        params = self.oracle.train(
            desk, stage, start, course.pairs, steps=steps, seed=seed
        )
        rows = [
            tokenize_record(r, lab.tokenizer, lab.rows, i)
            for i, r in enumerate(course.pairs)
        ]
        book = TextBook(lambda rows: self._score(params, rows))
        return book.look_up(collate(rows, lab.rows).sequences)[:, :, None]


def config() -> DrdoExperiment:
    """Phi-3-mini on TL;DR pairs, 2,000 steps of 64."""
    return DrdoExperiment(
        models=ModelConfig(
            teacher="Phi-3-mini-4k-instruct", drop_layers=(), dtype="bfloat16"
        ),
        task=TaskConfig(
            train_file="train_prompts.jsonl",
            held_out_file="held_out_prompts.jsonl",
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


def run(config: DrdoExperiment) -> Path:
    """d-DPO on the oracle's rewards, then DRDO, from the same start."""
    rival = EdpoConfig(fit=config.drdo.fit, kappa=0.0, members=1, rewards="oracle")
    return run_system(
        config,
        "drdo",
        "DRDO: rewards distilled and preferences learnt at once",
        lambda lab: {
            "d-DPO": RewardDistillation(lab, rival, config.reward),
            "DRDO": Drdo(lab, config.drdo),
        },
    )


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
