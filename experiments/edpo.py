"""The e-DPO family: rewards distilled into a policy, with pessimism (2405.19316).

`config()` is of the paper's kind, TL;DR summarisation with several reward models; its
models, grid and coefficients are not published in what we have. `tiny()` is the wiring.

    python -m experiments.edpo --tiny
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.baselines import Dpo, DpoConfig
from experiments.command import run_command
from experiments.course import Course
from experiments.lab import Lab
from experiments.references import reference_log_probs
from experiments.reward_models import (
    OracleRewards,
    RewardModels,
    RewardSource,
    scaled,
)
from experiments.settings import (
    FitConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    RewardConfig,
    SettingsError,
    TaskConfig,
    WarmStartConfig,
)
from experiments.stages import Desk
from experiments.system import TOY_FIT, SystemConfig, run_system, toy_system
from experiments.trainer import Trainer
from rkd_jax.data.pipeline import ZippedBatches
from rkd_jax.objectives.edpo import make_ddpo, make_dpdpo, make_edpo, make_pdpo
from rkd_jax.types import AnchoredPairs, EnsembleSignal, Params, ReferenceSignal


@dataclasses.dataclass(frozen=True)
class EdpoConfig:
    """Distillation from an ensemble with a penalty; see `make_edpo`."""

    fit: FitConfig = FitConfig(accumulation=1)
    """With several reward models the pessimism is over each micro-batch."""
    beta: float = 0.1
    kappa: float = 0.1
    """Times beta, the weight of the forward KL from the start."""
    members: int = 3
    """Reward models of e-DPO; the others distil one."""
    rewards: Literal["model", "oracle"] = "model"
    """`model`: heads fitted to the pairs; `oracle`: what the oracle said of them, which
    is one reward."""


@dataclasses.dataclass(frozen=True)
class EdpoExperiment(SystemConfig):
    """DPO, d-DPO, p-DPO, dp-DPO and e-DPO."""

    out: str = "runs/edpo"
    """Output folder; the same command again resumes."""
    edpo: EdpoConfig = EdpoConfig()


class RewardDistillation:
    """d-DPO, dp-DPO or e-DPO: by the number of rewards and the penalty.

    Args:
        lab: the equipment.
        options: see `EdpoConfig`.
        source: where the rewards of the pairs come from, one or several.
    """

    metric = "student/distillation"

    def __init__(self, lab: Lab, options: EdpoConfig, source: RewardSource):
        self.lab, self.options, self.source = lab, options, source
        shared = {"beta": options.beta, "temperature": lab.policy.temperature}
        if source.members > 1:
            objective = make_edpo(lab.student, kappa=options.kappa, **shared)
        elif options.kappa:
            objective = make_dpdpo(lab.student, kappa=options.kappa, **shared)
        else:
            objective = make_ddpo(lab.student, **shared)
        self.trainer = Trainer(lab, objective, options.fit)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """Rewards are scaled to differences of root mean square 1, each model's own."""
        rewards = scaled(self.source.of_pairs(desk, stage, course, seed=seed))
        reference = reference_log_probs(self.lab, desk, course.start, course.pairs)

        def signal(index):
            return EnsembleSignal(reference[index], rewards[index])

        return train_anchored(
            self.trainer,
            desk,
            stage,
            course,
            signal,
            penalised=self.options.kappa > 0,
            steps=steps,
            seed=seed,
        )


class Pdpo:
    """DPO with the penalty."""

    metric = "student/preference_loss"

    def __init__(self, lab: Lab, options: EdpoConfig):
        self.lab, self.options = lab, options
        objective = make_pdpo(
            lab.student,
            beta=options.beta,
            kappa=options.kappa,
            temperature=lab.policy.temperature,
        )
        self.trainer = Trainer(lab, objective, options.fit)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """On labels, held back by samples of the start."""
        reference = reference_log_probs(self.lab, desk, course.start, course.pairs)
        return train_anchored(
            self.trainer,
            desk,
            stage,
            course,
            lambda index: ReferenceSignal(reference[index]),
            penalised=self.options.kappa > 0,
            steps=steps,
            seed=seed,
        )


def train_anchored(
    trainer: Trainer,
    desk: Desk,
    stage: str,
    course: Course,
    signal,
    *,
    penalised: bool,
    steps: int,
    seed: int,
) -> Params:
    """Train on pairs, beside samples of the start where there is a penalty."""
    lab = trainer.lab
    parts = {"pairs": trainer.batches(course.pairs, seed)}
    if penalised:
        parts["samples"] = lab.batches(
            course.start_samples(lab, desk),
            batch_size=trainer.options.batch_size,
            seed=seed,
        )

    def prepare(state, batch):
        del state
        pairs = batch["pairs"]
        return AnchoredPairs(pairs, batch.get("samples")), signal(pairs.index)

    return trainer.train(
        desk,
        stage,
        course.start,
        course.pairs,
        steps=steps,
        seed=seed,
        prepare=prepare,
        batches=ZippedBatches(parts),
    )


def config() -> EdpoExperiment:
    """A 1B policy on TL;DR pairs, five reward models."""
    return EdpoExperiment(
        models=ModelConfig(
            teacher="Llama-3.2-1B-SFT-tldr", drop_layers=(), dtype="bfloat16"
        ),
        task=TaskConfig(
            train_file="train_prompts.jsonl",
            held_out_file="held_out_prompts.jsonl",
            train_prompts=4096,
            held_out_prompts=512,
            pairs_file="tldr_pairs.jsonl",
        ),
        policy=PolicyConfig(
            temperature=1.0, max_prompt=896, max_teacher_prompt=896, max_response=128
        ),
        warm_start=WarmStartConfig(steps=0, steered=True),
        pairs=PairsConfig(rounds=0),
        updates=1500,
        edpo=EdpoConfig(
            fit=FitConfig(learning_rate=1e-6, batch_size=64, accumulation=16),
            members=5,
        ),
    )


def tiny() -> EdpoExperiment:
    """The same wiring with a random toy teacher."""
    return EdpoExperiment(
        **toy_system(), out="runs/edpo-tiny", edpo=EdpoConfig(fit=TOY_FIT)
    )


def family(lab: Lab, options: EdpoConfig, reward: RewardConfig) -> dict:
    """d-DPO, p-DPO, dp-DPO and e-DPO of the same options.

    Raises:
        SettingsError: several reward models of one oracle.
    """
    if options.rewards == "oracle":
        if options.members > 1:
            raise SettingsError(
                f"--edpo.rewards oracle is one reward, not {options.members}; set "
                "--edpo.members 1"
            )
        one = several = OracleRewards()
    else:
        one = RewardModels(lab, reward, 1)
        several = RewardModels(lab, reward, options.members)
    unpenalised = dataclasses.replace(options, kappa=0.0)
    return {
        "d-DPO": RewardDistillation(lab, unpenalised, one),
        "p-DPO": Pdpo(lab, options),
        "dp-DPO": RewardDistillation(lab, options, one),
        "e-DPO": RewardDistillation(lab, options, several),
    }


def table(lab: Lab, config: EdpoExperiment) -> dict:
    """All methods by the names they have in the report."""
    return {
        "DPO": Dpo(lab, DpoConfig(config.edpo.fit, config.edpo.beta)),
        **family(lab, config.edpo, config.reward),
    }


def run(config: EdpoExperiment) -> Path:
    """DPO, then the family, from the same start."""
    return run_system(
        config,
        "edpo",
        "e-DPO: rewards distilled into a policy, with pessimism",
        table,
    )


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
