"""MM-PbKD: the game with a white-box teacher and a Q-function (2505.18952).

Beside it PbKD, which reads the teacher's text only, and MMKD (2406.02959), which has no
preferences. The paper's hyper-parameters are not published in what we have: `config()`
is a setting of its kind, an 8B teacher and a 1B student with one vocabulary. `tiny()`
is the wiring.

    python -m experiments.mm_pbkd --tiny
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from experiments.command import run_command
from experiments.lab import Lab
from experiments.moment_games import (
    CriticConfig,
    Mmkd,
    MmkdConfig,
    MmPbkd,
    MmPbkdConfig,
)
from experiments.pbkd import Pbkd
from experiments.settings import (
    FitConfig,
    GameConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    TaskConfig,
    WarmStartConfig,
)
from experiments.system import SystemConfig, run_system, toy_system


@dataclasses.dataclass(frozen=True)
class MmPbkdExperiment(SystemConfig):
    """PbKD, MMKD and MM-PbKD."""

    out: str = "runs/mm-pbkd"
    """Output folder; the same command again resumes."""
    game: GameConfig = GameConfig()
    mmkd: MmkdConfig = MmkdConfig()
    mm_pbkd: MmPbkdConfig = MmPbkdConfig()


def config() -> MmPbkdExperiment:
    """An 8B teacher and a 1B student on instructions."""
    return MmPbkdExperiment(
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
        pairs=PairsConfig(offline_prompts=2048, rounds=0, held_out_prompts=64),
        updates=500,
        game=GameConfig(pairs_per_step=128, accumulation=16, learning_rate=1e-6),
        mmkd=MmkdConfig(learning_rate=1e-6, accumulation=64),
        mm_pbkd=MmPbkdConfig(
            learning_rate=1e-6,
            pairs_per_step=64,
            accumulation=64,
        ),
    )


def tiny() -> MmPbkdExperiment:
    """The same wiring with a random toy teacher, all of the vocabulary in both gaps."""
    critic = CriticConfig(width=8, steps=2)
    return MmPbkdExperiment(
        **toy_system(),
        out="runs/mm-pbkd-tiny",
        game=GameConfig(pairs_per_step=8, accumulation=1, critic_steps=2, epsilon=1e-3),
        mmkd=MmkdConfig(accumulation=1, critic=critic),
        mm_pbkd=MmPbkdConfig(
            gap="mixed",
            pairs_per_step=4,
            accumulation=1,
            critic=critic,
            epsilon=1e-3,
            anchor=FitConfig(learning_rate=0.03, batch_size=8, accumulation=1),
            anchor_steps=40,
        ),
    )


def family(lab: Lab, mmkd: MmkdConfig, mm_pbkd: MmPbkdConfig) -> dict:
    """MMKD and MM-PbKD."""
    return {"MMKD": Mmkd(lab, mmkd), "MM-PbKD": MmPbkd(lab, mm_pbkd)}


def table(lab: Lab, config: MmPbkdExperiment) -> dict:
    """All methods by the names they have in the report."""
    return {
        "PbKD": Pbkd(lab, config.game, config.reward),
        **family(lab, config.mmkd, config.mm_pbkd),
    }


def run(config: MmPbkdExperiment) -> Path:
    """PbKD offline, MMKD, MM-PbKD, from the same start."""
    return run_system(
        config,
        "mm_pbkd",
        "MM-PbKD: a game on action values",
        table,
    )


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
