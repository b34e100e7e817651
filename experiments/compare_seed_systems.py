"""Every seed system and every baseline from the same start, on the same data.

Two settings. The sentiment task is quickstart's: a real language model, one seed. The
arithmetic task has a verifiable reward, a teacher trained in the run, and three seeds:
of the warm start, of all samples and of the order of the data.

    python -m experiments.compare_seed_systems
    python -m experiments.compare_seed_systems --arithmetic
    python -m experiments.compare_seed_systems --tiny

Every student makes as many updates. Seconds and memory are those of one update of the
student, with its samples and critic steps; what a method trains before (reward models,
anchors, an oracle of its own) is not in them. Offline pairs are the same for all; only
the rounds of online PbKD ask the oracle again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from experiments import ava, drdo, edpo, judging, mm_pbkd, pbkd, pooling, xkd
from experiments.arithmetic_task import ArithmeticConfig, prepare
from experiments.arithmetic_task import experiment as arithmetic_experiment
from experiments.ava import AvaConfig
from experiments.baselines import (
    Dpo,
    DpoConfig,
    Gkd,
    GkdConfig,
    Kd,
    MiniLlm,
    MiniLlmConfig,
    SeqKd,
    Sft,
)
from experiments.command import run_command
from experiments.course import Course, load_prompts, take_course
from experiments.drdo import DrdoConfig
from experiments.edpo import EdpoConfig
from experiments.judging import Judge, open_judge
from experiments.lab import Lab, open_lab
from experiments.moment_games import CriticConfig, MmkdConfig, MmPbkdConfig
from experiments.settings import (
    EvaluationConfig,
    ExperimentConfig,
    FitConfig,
    GameConfig,
    PairsConfig,
    SettingsError,
    TaskConfig,
    toy,
)
from experiments.stages import Desk
from experiments.system import TOY_FIT, Method, evidence, train_and_judge
from experiments.tvkd import Tvkd, TvkdConfig
from experiments.xkd import XkdConfig
from rkd_jax.evaluation.content import DataSource, Difference, Report, Verdict
from rkd_jax.evaluation.report import summary_table, write_report
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from rkd_jax.training.together import once

PARENTS = {
    "SeqKD": ("SFT",),
    "GKD": ("KD",),
    "PbKD offline": ("DPO",),
    "PbKD online": ("DPO", "PbKD offline"),
    "MM-PbKD": ("PbKD offline", "MMKD"),
    "TVKD": ("DPO",),
    "AVA-d": ("SeqKD",),
    "AVA-p": ("SFT", "DPO"),
    "AVA-p reward, DPO": ("DPO",),
    "X-KD sequence": ("SeqKD",),
    "X-KD GKD": ("GKD",),
    "X-KD MiniLLM": ("MiniLLM",),
    "p-DPO": ("DPO",),
    "dp-DPO": ("d-DPO",),
    "e-DPO": ("DPO", "dp-DPO"),
    "d-DPO, same oracle": ("DPO", "d-DPO"),
    "DRDO": ("d-DPO, same oracle", "DPO"),
}
"""The method, or methods, that each one extends or claims to improve on."""


@dataclasses.dataclass(frozen=True)
class CompareConfig(ExperimentConfig):
    """All methods from one start."""

    out: str = "runs/compare-sentiment"
    """Output folder; the same command again resumes."""
    seeds: tuple[int, ...] = (0,)
    updates: int = 12
    """Of every student."""
    methods: tuple[str, ...] = ()
    """Only these, by their names in the report."""
    evaluation: EvaluationConfig = EvaluationConfig(preferences=True)
    setting: Literal["sentiment", "arithmetic"] = "sentiment"
    """Arithmetic trains its teacher first. It is one of the presets."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    fit: FitConfig = FitConfig()
    """Of SFT, SeqKD and KD."""
    minillm: MiniLlmConfig = MiniLlmConfig()
    gkd: GkdConfig = GkdConfig()
    dpo: DpoConfig = DpoConfig()
    game: GameConfig = GameConfig()
    mmkd: MmkdConfig = MmkdConfig()
    mm_pbkd: MmPbkdConfig = MmPbkdConfig()
    tvkd: TvkdConfig = TvkdConfig()
    ava: AvaConfig = AvaConfig()
    xkd: XkdConfig = XkdConfig()
    drdo: DrdoConfig = DrdoConfig()
    edpo: EdpoConfig = EdpoConfig()


def with_fit(fit: FitConfig) -> dict:
    """Every method trained by `fit` alone, with the same step."""
    return {
        "fit": fit,
        "minillm": MiniLlmConfig(fit),
        "gkd": GkdConfig(fit=fit),
        "dpo": DpoConfig(fit=fit),
        "tvkd": TvkdConfig(fit=fit),
        "ava": AvaConfig(fit=fit),
        "xkd": XkdConfig(fit=fit, minillm_fit=fit),
        "edpo": EdpoConfig(fit=fit),
    }


def config() -> CompareConfig:
    """The sentiment task, SmolLM2-135M-Instruct, one seed.

    Preferences and games take quickstart's steps, likelihoods, divergences and MiniLLM
    larger ones: at 1e-5 a dozen of them leave the student where it was. Prompts and the
    steps of second players are what ninety minutes on two cores allow.
    """
    large = FitConfig(learning_rate=5e-5)
    critic = CriticConfig(steps=2)
    return CompareConfig(
        task=TaskConfig(held_out_prompts=80),
        pairs=PairsConfig(held_out_prompts=16),
        fit=large,
        gkd=GkdConfig(fit=large),
        minillm=MiniLlmConfig(large),
        xkd=XkdConfig(fit=large, minillm_fit=large),
        ava=AvaConfig(fit=large),
        mmkd=MmkdConfig(critic=critic),
        mm_pbkd=MmPbkdConfig(critic=critic, anchor_steps=45, keep_distributions=True),
        drdo=DrdoConfig(oracle_steps=32, oracle_learning_rate=5e-5),
    )


def arithmetic() -> CompareConfig:
    """The arithmetic task, three seeds.

    Likelihoods and divergences take large steps, preferences small ones: pairs of a
    right and a wrong number push both down long before 1e-3. Reward players hardly tell
    right from wrong here, so only a small epsilon keeps the zero reward out of the set.
    """
    task = ArithmeticConfig()
    large = FitConfig(learning_rate=1e-3, batch_size=64, accumulation=1)
    small = FitConfig(learning_rate=1e-5, batch_size=64, accumulation=1)
    critic = CriticConfig(width=None, steps=5, learning_rate=3e-3)
    return CompareConfig(
        **arithmetic_experiment(task),
        out="runs/compare-arithmetic",
        setting="arithmetic",
        arithmetic=task,
        seeds=(0, 1, 2),
        updates=200,
        fit=large,
        minillm=MiniLlmConfig(large),
        gkd=GkdConfig(fit=large),
        xkd=XkdConfig(fit=large, minillm_fit=large),
        dpo=DpoConfig(fit=small),
        tvkd=TvkdConfig(fit=small),
        ava=AvaConfig(fit=large),
        edpo=EdpoConfig(fit=small),
        drdo=DrdoConfig(fit=small, oracle_steps=300, oracle_learning_rate=3e-4),
        game=GameConfig(
            round_steps=40,
            pairs_per_step=64,
            accumulation=1,
            learning_rate=5e-5,
            critic_learning_rate=3e-4,
            epsilon=0.002,
        ),
        mmkd=MmkdConfig(learning_rate=5e-5, accumulation=1, critic=critic),
        mm_pbkd=MmPbkdConfig(
            learning_rate=5e-5,
            pairs_per_step=64,
            accumulation=1,
            critic=critic,
            epsilon=0.002,
            anchor=FitConfig(learning_rate=5e-3, batch_size=64, accumulation=1),
            anchor_steps=300,
        ),
    )


def tiny() -> CompareConfig:
    """Six of the methods on the toy teacher, two seeds."""
    shared = toy()
    shared["pairs"] = dataclasses.replace(shared["pairs"], rounds=1)
    critic = CriticConfig(width=None, steps=1)
    return CompareConfig(
        **shared,
        **with_fit(TOY_FIT),
        out="runs/compare-tiny",
        seeds=(0, 1),
        updates=3,
        methods=("SFT", "SeqKD", "DPO", "PbKD online", "TVKD", "DRDO"),
        evaluation=EvaluationConfig(preferences=True, likelihood_prompts=8),
        game=GameConfig(
            round_steps=1,
            pairs_per_step=8,
            accumulation=1,
            critic_steps=1,
            epsilon=1e-3,
        ),
        mmkd=MmkdConfig(accumulation=1, critic=critic),
        mm_pbkd=MmPbkdConfig(
            pairs_per_step=4,
            accumulation=1,
            critic=critic,
            epsilon=1e-3,
            anchor=FitConfig(learning_rate=0.03, batch_size=8, accumulation=1),
            anchor_steps=40,
        ),
        drdo=DrdoConfig(fit=TOY_FIT, oracle_steps=2, oracle_learning_rate=1e-3),
    )


def run(config: CompareConfig) -> Path:
    """Every method, every seed, one report."""
    folder = RunFolder.open(
        config.out, config.identity(), name="compare", overwrite=config.fresh
    )
    final = folder.stage("report")
    if not final.done:
        started = time.monotonic()
        if config.setting == "arithmetic":
            prepare(config.arithmetic)
        with Progress() as progress:
            report = compare(config, folder, progress)
            report.timings["total"] = time.monotonic() - started
            page = once(lambda: write_report(final.path, report).name)
            final.finish({"report": page})
            print(summary_table(report))
    return final.path / final.result["report"]


def compare(config: CompareConfig, folder: RunFolder, progress: Progress) -> Report:
    """Train and judge; each method is compiled once for all seeds."""
    lab = open_lab(config)
    methods = chosen(table(lab, config), config.methods)
    classes, data = enrol(config, lab, folder, progress)
    for label, method in methods.items():
        for seed, desk, course, judge in classes:
            train_and_judge(desk, course, judge, label, method, config.updates, seed)
    return report_of(config, classes, methods, data)


class Class(NamedTuple):
    """What the students of one seed share."""

    seed: int
    desk: Desk
    course: Course
    judge: Judge


def enrol(
    config: CompareConfig, lab: Lab, folder: RunFolder, progress: Progress
) -> tuple[list[Class], list[DataSource]]:
    """The common start of every seed, and what became of the prompts."""
    prompts, held_out, data = load_prompts(config.task, lab)
    classes = []
    for seed in config.seeds:
        run = RunFolder.open(folder.path / f"seed-{seed}", config.identity())
        desk = Desk(run, progress, config.checkpoint_every, config.checkpoints_kept)
        course = take_course(lab, desk, config, prompts, seed=seed)
        judge = open_judge(lab, desk, course, held_out, seed=seed)
        classes.append(Class(seed, desk, course, judge))
    return classes, data


def table(lab: Lab, config: CompareConfig) -> dict[str, Method]:
    """All methods by the names they have in the report."""
    return {
        "SFT": Sft(lab, config.fit),
        "SeqKD": SeqKd(lab, config.fit),
        "KD": Kd(lab, config.fit),
        "GKD": Gkd(lab, config.gkd),
        "MiniLLM": MiniLlm(lab, config.minillm),
        "DPO": Dpo(lab, config.dpo),
        **pbkd.family(lab, config.game, config.reward, config.pairs.rounds),
        **mm_pbkd.family(lab, config.mmkd, config.mm_pbkd),
        "TVKD": Tvkd(lab, config.tvkd),
        **ava.family(lab, config.ava, config.dpo),
        **xkd.family(lab, config.xkd),
        **edpo.family(lab, config.edpo, config.reward),
        **drdo.family(lab, config.drdo, config.edpo.beta),
    }


def chosen(methods: Mapping[str, Method], names: Sequence[str]) -> dict[str, Method]:
    """The named ones, all if none is named.

    Raises:
        SettingsError: no such method.
    """
    unknown = [name for name in names if name not in methods]
    if unknown:
        known = ", ".join(methods)
        raise SettingsError(f"--methods: there is no {unknown[0]!r}; there are {known}")
    return {k: m for k, m in methods.items() if not names or k in names}


def report_of(
    config: CompareConfig,
    classes: Sequence[Class],
    methods: Mapping[str, Method],
    data: Sequence[DataSource],
) -> Report:
    """One table over all seeds; curves and samples of the first."""
    _, desk, _, judge = classes[0]
    judged = [one.judge.judged for one in classes]
    pairs = [
        (label, other)
        for label in methods
        for other in (judging.START, *PARENTS.get(label, ()))
        if other in judged[0]
    ]
    compared = pooling.differences(judged, pairs)
    flag = " --arithmetic" if config.setting == "arithmetic" else ""
    return Report(
        title=f"The seed systems compared: {config.setting}",
        command=f"python -m experiments.compare_seed_systems{flag} --out {config.out}",
        summary=verdicts(compared),
        policies=pooling.pool(judged),
        unit="seeds" if len(judged) > 1 else "prompts",
        differences=compared,
        **evidence(config, desk, judge, methods, data),
        timings=dict(desk.progress.timings),
    )


def verdicts(compared: Sequence[Difference]) -> list[Verdict]:
    """Who beat the method it extends, who did not, who was worse."""
    found = {
        "higher": "Higher reward than its parent",
        "lower": "Lower reward than its parent",
        "not separated": "Not told apart from its parent",
    }
    lines = []
    for finding, words in found.items():
        names = [
            f"{d.first} ({d.second})"
            for d in compared
            if d.second != judging.START and d.finding == finding
        ]
        lines.append(Verdict(f"{words}: {', '.join(names) or 'none'}."))
    return lines


def main() -> None:
    """Command line."""
    run_command(run, config, tiny, arithmetic=arithmetic)


if __name__ == "__main__":
    main()
