"""PbKD: the min-max game between student and reward player (2505.18952).

The whole method with its switches: offline and online, the constraint by dual ascent or
with a fixed multiplier, a reward for every token or one for the response, online pairs
labelled by the oracle or by an ensemble of reward models fitted to the offline pairs.
`quickstart` is the same game told step by step. The paper's hyper-parameters are not
published in what we have: `config()` is a setting of its kind, an 8B teacher and a 1B
student. `tiny()` is the wiring.

    python -m experiments.pbkd --tiny
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from experiments.baselines import Dpo, DpoConfig
from experiments.command import run_command
from experiments.course import Course
from experiments.game import Game
from experiments.lab import Lab
from experiments.reward_models import RewardModels
from experiments.settings import (
    FitConfig,
    GameConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    RewardConfig,
    SettingsError,
    TaskConfig,
    WarmStartConfig,
)
from experiments.stages import Desk
from experiments.system import SystemConfig, run_system, toy_system
from rkd_jax.signals.oracles import Oracle
from rkd_jax.types import Params


@dataclasses.dataclass(frozen=True)
class LabelConfig:
    """Who labels the pairs of the online rounds."""

    source: Literal["oracle", "models"] = "oracle"
    """`models`: reward models fitted to the offline pairs, so that the oracle is asked
    only once."""
    members: int = 3
    """Reward models, each fitted to its own bootstrap resample."""
    reduce: Literal["mean", "min"] = "mean"
    """One label from several models; `min` is pessimistic."""


@dataclasses.dataclass(frozen=True)
class PbkdExperiment(SystemConfig):
    """Offline and online PbKD beside DPO."""

    out: str = "runs/pbkd"
    """Output folder; the same command again resumes."""
    game: GameConfig = GameConfig()
    labels: LabelConfig = LabelConfig()
    dpo: DpoConfig = DpoConfig()


class Pbkd:
    """The game on the course's pairs, then ``rounds`` rounds on fresh ones.

    A round takes ``round_steps`` of the updates, the offline phase what they leave.
    """

    metric = "critic/gap"

    def __init__(
        self,
        lab: Lab,
        options: GameConfig,
        reward: RewardConfig,
        *,
        rounds: int = 0,
        labels: LabelConfig = LabelConfig(),
        game: Game | None = None,
    ):
        self.lab, self.options, self.rounds = lab, options, rounds
        self.epsilon = options.epsilon
        self.game = game or Game(lab, options, reward)
        self.reduce = labels.reduce
        self.models = None
        if rounds and labels.source == "models":
            self.models = RewardModels(lab, reward, labels.members)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """The student after all phases."""
        online = self.rounds * self.options.round_steps
        if steps <= online:
            raise SettingsError(
                f"{stage}: {self.rounds} rounds of {self.options.round_steps} steps "
                f"leave nothing of {steps} updates for the offline phase; raise "
                "--updates or lower --game.round-steps"
            )
        match = self.game.open(desk, course, seed=seed)
        oracle = self._oracle(desk, f"{stage}-labels", course, seed)
        pairs = list(course.pairs)
        state = match.play(stage, match.begin(), pairs, steps=steps - online)
        for number in range(1, self.rounds + 1):
            name = f"{stage}-round-{number}"
            pairs += course.more_pairs(
                self.lab,
                desk,
                number,
                state.student.params,
                stage=f"{name}-pairs",
                oracle=oracle,
            )
            state = match.play(name, state, pairs, steps=self.options.round_steps)
        return state.student.params

    def _oracle(self, desk, stage, course, seed) -> Oracle:
        """Of the online pairs."""
        if self.models is None:
            return self.lab.oracle
        heads = self.models.train(desk, stage, course, seed=seed)
        return self.models.oracle(heads, reduce=self.reduce)


def config() -> PbkdExperiment:
    """An 8B teacher and a 1B student on instructions, three rounds."""
    game = GameConfig(
        round_steps=100,
        pairs_per_step=128,
        accumulation=16,
        learning_rate=1e-6,
    )
    return PbkdExperiment(
        models=ModelConfig(
            teacher="Llama-3.1-8B-Instruct", student="Llama-3.2-1B", dtype="bfloat16"
        ),
        task=TaskConfig(
            train_file="train_prompts.jsonl",
            held_out_file="held_out_prompts.jsonl",
            train_prompts=8192,
            held_out_prompts=512,
        ),
        policy=PolicyConfig(
            temperature=1.0,
            max_prompt=512,
            max_teacher_prompt=512,
            max_response=256,
            rollout_prompts=64,
        ),
        warm_start=WarmStartConfig(prompts=4096, steps=500, batch_size=64),
        pairs=PairsConfig(
            offline_prompts=2048, round_prompts=1024, held_out_prompts=64
        ),
        updates=500,
        game=game,
        dpo=DpoConfig(
            fit=FitConfig(learning_rate=1e-6, batch_size=64, accumulation=16)
        ),
    )


def tiny() -> PbkdExperiment:
    """The same wiring with a random toy teacher and reward models as labellers."""
    toy = toy_system() | {"updates": 3}
    toy["pairs"] = dataclasses.replace(toy["pairs"], rounds=1)
    return PbkdExperiment(
        **toy,
        out="runs/pbkd-tiny",
        game=GameConfig(
            round_steps=1,
            pairs_per_step=8,
            accumulation=1,
            critic_steps=2,
            epsilon=1e-3,
        ),
        labels=LabelConfig(source="models", members=2),
        dpo=DpoConfig(fit=FitConfig(batch_size=4, accumulation=1)),
    )


def family(
    lab: Lab,
    options: GameConfig,
    reward: RewardConfig,
    rounds: int,
    labels=LabelConfig(),
) -> dict:
    """Both, by one compiled game."""
    game = Game(lab, options, reward)
    return {
        "PbKD offline": Pbkd(lab, options, reward, game=game),
        "PbKD online": Pbkd(
            lab, options, reward, rounds=rounds, labels=labels, game=game
        ),
    }


def table(lab: Lab, config: PbkdExperiment) -> dict:
    """All methods by the names they have in the report."""
    return {
        "DPO": Dpo(lab, config.dpo),
        **family(lab, config.game, config.reward, config.pairs.rounds, config.labels),
    }


def run(config: PbkdExperiment) -> Path:
    """DPO on the offline pairs, then the game offline and online."""
    return run_system(
        config,
        "pbkd",
        "PbKD: distillation as a game with a reward player",
        table,
    )


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
