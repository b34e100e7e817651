"""AVA: a policy and a dense reward inferred together (2411.09341).

Both uses are here: AVA-d and AVA-p as direct alignment, and the reward of AVA-p as an
oracle that labels the pairs anew for DPO. `config()` has the paper's policy and kind of
data, Llama-2-7b-chat on helpful-and-harmless pairs; its coefficients and learning rates
are not published in what we have. `tiny()` is the wiring.

    python -m experiments.ava --tiny
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax

from experiments.baselines import Dpo, DpoConfig, Sft
from experiments.command import run_command
from experiments.course import Course
from experiments.lab import Lab
from experiments.settings import (
    FitConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    TaskConfig,
    WarmStartConfig,
)
from experiments.stages import Desk
from experiments.system import (
    TOY_FIT,
    SystemConfig,
    run_system,
    stage_of,
    toy_system,
)
from experiments.trainer import Trainer
from rkd_jax.data.records import PreferenceRecord
from rkd_jax.data.sources import read_jsonl, write_jsonl
from rkd_jax.models.attention_weights import response_attention
from rkd_jax.models.heads import GaussianHead
from rkd_jax.objectives.ava import ava_token_rewards, make_ava_d, make_ava_p
from rkd_jax.signals.oracles import label_preferences
from rkd_jax.signals.reward_oracle import RewardModelOracle
from rkd_jax.training.together import once
from rkd_jax.types import Params


@dataclasses.dataclass(frozen=True)
class AvaConfig:
    """Policy, posterior of the reward and their balance; see `make_ava_p`."""

    fit: FitConfig = FitConfig()
    td_weight: float = 0.1
    """Lambda, of the temporal differences' likelihood."""
    irl_weight: float = 1.0
    cer_weight: float = 1.0
    """Of the contrast between the last rewards of a pair; AVA-p only."""
    gamma: float = 1.0
    normalise: Literal["mean", "sum"] = "mean"
    attention_weights: bool = False
    """Whether the last layer's attention weighs the rewards."""


@dataclasses.dataclass(frozen=True)
class AvaExperiment(SystemConfig):
    """SFT, AVA-d, AVA-p, and DPO on the labels of AVA-p's reward."""

    out: str = "runs/ava"
    """Output folder; the same command again resumes."""
    ava: AvaConfig = AvaConfig()
    dpo: DpoConfig = DpoConfig()


class _Ava:
    """What the two share: one trunk, a reward head on it, and how it starts."""

    metric = "student/nll"

    def __init__(self, lab: Lab, options: AvaConfig, make, **own):
        self.lab, self.head = lab, GaussianHead()
        weights = None
        if options.attention_weights:
            weights = functools.partial(response_attention, lab.student)
        self.reading = {"reward_weights": weights}
        objective = make(
            lab.student,
            self.head.apply,
            td_weight=options.td_weight,
            irl_weight=options.irl_weight,
            gamma=options.gamma,
            normalise=options.normalise,
            temperature=lab.policy.temperature,
            **self.reading,
            **own,
        )
        self.trainer = Trainer(lab, objective, options.fit)

    def fit(self, desk: Desk, stage: str, course: Course, records, *, steps, seed):
        """Policy and reward head."""
        width = self.lab.student.config.hidden_size
        start = {
            "policy": course.start,
            "reward_head": self.head.init(jax.random.key(seed), width),
        }
        return self.trainer.train(desk, stage, start, records, steps=steps, seed=seed)


class AvaD(_Ava):
    """From the teacher's answers."""

    def __init__(self, lab: Lab, options: AvaConfig):
        super().__init__(lab, options, make_ava_d)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """The policy."""
        records = course.demonstrations
        params = self.fit(desk, stage, course, records, steps=steps, seed=seed)
        return params["policy"]


class AvaP(_Ava):
    """From the pairs."""

    def __init__(self, lab: Lab, options: AvaConfig):
        super().__init__(lab, options, make_ava_p, cer_weight=options.cer_weight)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """The policy."""
        params = self.fit(desk, stage, course, course.pairs, steps=steps, seed=seed)
        return params["policy"]

    def oracle(self, params: Params) -> RewardModelOracle:
        """The sum of the posterior's mean rewards of a response."""
        lab = self.lab
        rewards = ava_token_rewards(lab.student, self.head.apply, **self.reading)
        return RewardModelOracle(rewards, params, lab.tokenizer, lab.rows)


class AvaReward:
    """DPO on the course's pairs as AVA-p's reward orders them.

    The reward model is trained for as many updates as the student after it. It is the
    same run as `AvaP`'s and made once: whoever comes second finds it finished.
    """

    metric = Dpo.metric

    def __init__(self, lab: Lab, ava: AvaP, dpo: DpoConfig):
        self.ava, self.dpo = ava, Dpo(lab, dpo)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """Reward model, new labels, policy."""
        params = self.ava.fit(
            desk, stage_of("AVA-p"), course, course.pairs, steps=steps, seed=seed
        )
        labels = desk.run.stage(f"{stage}-labels")
        path = labels.path / "pairs.jsonl"
        if not labels.done:
            pairs, report = relabel(self.ava.oracle(params), course.pairs)
            desk.progress.note(f"{stage.replace('-', ' ')}: {report}")
            once(lambda: write_jsonl(path, pairs))
            labels.finish(dataclasses.asdict(report))
        pairs = read_jsonl(path, PreferenceRecord)[0]
        return self.dpo.train(desk, stage, course, steps=steps, seed=seed, pairs=pairs)


def relabel(oracle: RewardModelOracle, pairs: Sequence[PreferenceRecord]):
    """The same texts as another oracle orders them, and its report."""
    return label_preferences(
        oracle,
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
        teacher_prompts=[pair.teacher_prompt for pair in pairs],
        ties="half",
    )


def config() -> AvaExperiment:
    """Llama-2-7b-chat on helpful-and-harmless pairs."""
    fit = FitConfig(learning_rate=1e-6, batch_size=64, accumulation=16)
    return AvaExperiment(
        models=ModelConfig(teacher="Llama-2-7b-chat", drop_layers=(), dtype="bfloat16"),
        task=TaskConfig(
            train_file="train_prompts.jsonl",
            held_out_file="held_out_prompts.jsonl",
            train_prompts=8192,
            held_out_prompts=512,
            pairs_file="hh_pairs.jsonl",
        ),
        policy=PolicyConfig(
            temperature=1.0, max_prompt=512, max_teacher_prompt=512, max_response=512
        ),
        warm_start=WarmStartConfig(steps=0, steered=True),
        pairs=PairsConfig(rounds=0),
        updates=1500,
        ava=AvaConfig(fit=fit),
        dpo=DpoConfig(fit=fit),
    )


def tiny() -> AvaExperiment:
    """The same wiring with a random toy teacher."""
    return AvaExperiment(
        **toy_system(),
        out="runs/ava-tiny",
        ava=AvaConfig(fit=TOY_FIT),
        dpo=DpoConfig(fit=TOY_FIT),
    )


def family(lab: Lab, options: AvaConfig, dpo: DpoConfig) -> dict:
    """AVA-p's reward under DPO, AVA-d and AVA-p."""
    ava_p = AvaP(lab, options)
    return {
        "AVA-p reward, DPO": AvaReward(lab, ava_p, dpo),
        "AVA-d": AvaD(lab, options),
        "AVA-p": ava_p,
    }


def table(lab: Lab, config: AvaExperiment) -> dict:
    """All methods by the names they have in the report."""
    return {
        "SFT": Sft(lab, config.ava.fit),
        "DPO": Dpo(lab, config.dpo),
        **family(lab, config.ava, config.dpo),
    }


def run(config: AvaExperiment) -> Path:
    """SFT and DPO, then the family, from the same start."""
    return run_system(
        config,
        "ava",
        "AVA: policy and dense reward inferred together",
        table,
    )


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
