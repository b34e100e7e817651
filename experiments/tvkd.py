"""TVKD: the teacher's values as shaping inside DPO (2509.16965).

`config()` is the scale of the released recipe: a Llama-3.1-8B teacher after SFT and
DPO, a Llama-3.2-1B student after SFT, dpo-mix-7k, 5 epochs. `tiny()` is the wiring.

    python -m experiments.tvkd --tiny
    python -m experiments.tvkd --models.teacher DIR --models.student DIR \\
        --task.pairs-file dpo_mix.jsonl --task.train-file train.jsonl \\
        --task.held-out-file held_out.jsonl --oracle my_package:oracle
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.baselines import Dpo, DpoConfig
from experiments.command import run_command
from experiments.course import Course
from experiments.game import TextBook
from experiments.lab import Lab
from experiments.references import checksums, kept, reference_log_probs
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
from rkd_jax.objectives.tvkd import make_tvkd
from rkd_jax.placement import follow_parameters
from rkd_jax.signals.cache_identity import data_hash
from rkd_jax.signals.values import make_shaping
from rkd_jax.types import Params, ShapingSignal


@dataclasses.dataclass(frozen=True)
class TvkdConfig:
    """The shaping and its place in DPO; see `make_tvkd` and `make_shaping`."""

    fit: FitConfig = FitConfig()
    beta: float = 0.1
    alpha: float | None = None
    """Weight of the shaping; as `beta` if not given."""
    sign: Literal[1, -1] = 1
    """1: shaping is a margin already granted; -1: it pulls towards what it favours."""
    gamma: float = 0.7
    power: float = 0.7
    terminal: Literal["zero", "last_prefix", "after_eos"] = "zero"


@dataclasses.dataclass(frozen=True)
class TvkdExperiment(SystemConfig):
    """TVKD beside DPO."""

    out: str = "runs/tvkd"
    """Output folder; the same command again resumes."""
    tvkd: TvkdConfig = TvkdConfig()


class Tvkd:
    """DPO with the teacher's shaping, both computed once for every pair."""

    metric = "student/preference_loss"

    def __init__(self, lab: Lab, options: TvkdConfig):
        self.lab = lab
        self.settings = {
            "gamma": options.gamma,
            "power": options.power,
            "terminal": options.terminal,
            "temperature": lab.policy.temperature,
        }
        self.shaping = follow_parameters(make_shaping(lab.teacher, **self.settings))
        objective = make_tvkd(
            lab.student,
            beta=options.beta,
            alpha=options.alpha,
            sign=options.sign,
            temperature=lab.policy.temperature,
        )
        self.trainer = Trainer(lab, objective, options.fit)

    def train(self, desk: Desk, stage: str, course: Course, *, steps, seed) -> Params:
        """No teacher and no reference is needed once the table is there."""
        lab, pairs = self.lab, course.pairs

        of = [data_hash(pairs), checksums(lab.teacher_params), self.settings]

        def shape() -> np.ndarray:
            book = TextBook(lambda rows: self.shaping(lab.teacher_params, rows))
            return book.look_up(lab.collated(pairs).teacher_sequences)

        shaping = kept(desk, "3-shaping", of, shape)
        reference = reference_log_probs(lab, desk, course.start, pairs)
        return self.trainer.train(
            desk,
            stage,
            course.start,
            pairs,
            steps=steps,
            seed=seed,
            prepare=lambda state, batch: (
                batch,
                ShapingSignal(reference[batch.index], shaping[batch.index]),
            ),
        )


def config() -> TvkdExperiment:
    """The released recipe: 8B teacher, 1B student, 64 pairs a step, 5 epochs."""
    fit = FitConfig(learning_rate=5e-7, batch_size=64, accumulation=16)
    return TvkdExperiment(
        models=ModelConfig(
            teacher="Llama-3.1-8B-SFT-DPO",
            student="Llama-3.2-1B-SFT",
            dtype="bfloat16",
        ),
        task=TaskConfig(
            train_file="train_prompts.jsonl",
            held_out_file="held_out_prompts.jsonl",
            train_prompts=1024,
            held_out_prompts=512,
            pairs_file="dpo_mix_7k.jsonl",
        ),
        policy=PolicyConfig(
            temperature=1.0,
            max_prompt=1800,
            max_teacher_prompt=1800,
            max_response=248,
        ),
        warm_start=WarmStartConfig(steps=0, steered=True),
        pairs=PairsConfig(rounds=0),
        updates=5 * 6750 // 64,
        tvkd=TvkdConfig(fit=fit),
    )


def tiny() -> TvkdExperiment:
    """The same wiring with a random toy teacher."""
    return TvkdExperiment(
        **toy_system(), out="runs/tvkd-tiny", tvkd=TvkdConfig(fit=TOY_FIT)
    )


def table(lab: Lab, config: TvkdExperiment) -> dict:
    """All methods by the names they have in the report."""
    return {
        "DPO": Dpo(lab, DpoConfig(config.tvkd.fit, config.tvkd.beta)),
        "TVKD": Tvkd(lab, config.tvkd),
    }


def run(config: TvkdExperiment) -> Path:
    """DPO, then TVKD, from the same start."""
    return run_system(
        config,
        "tvkd",
        "TVKD: the teacher's values as shaping in DPO",
        table,
    )


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
