"""One system of a paper as an experiment: common data, its own training, one report.

A *method* is compiled once for a `Lab` and trains on any `Course`. Every experiment of
a single system is a table of methods, its parent among them, that start from the same
student and make as many updates; `run_system` does the rest.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from experiments import judging, ledger
from experiments.costs import read_costs
from experiments.course import Course, load_prompts, take_course
from experiments.judging import Judge, open_judge
from experiments.lab import Lab, open_lab
from experiments.settings import EvaluationConfig, ExperimentConfig, FitConfig, toy
from experiments.stages import Desk
from rkd_jax.evaluation.content import DataSource, Difference, Report, Series, Verdict
from rkd_jax.evaluation.report import summary_table, write_report
from rkd_jax.interop import save_model
from rkd_jax.placement import fetch
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from rkd_jax.training.together import once
from rkd_jax.types import Params


class Method(Protocol):
    """A way of training the student, compiled for one lab."""

    metric: str  # of the training log, the curve in the report

    def train(
        self, desk: Desk, stage: str, course: Course, *, steps: int, seed: int
    ) -> Params:
        """The deployable student after ``steps`` updates, logged in ``stage``."""


@runtime_checkable
class Game(Method, Protocol):
    """A method of two players inside a confidence set; its course is a plot."""

    epsilon: float


@dataclasses.dataclass(frozen=True)
class SystemConfig(ExperimentConfig):
    """One system beside its parent, on the same data."""

    updates: int = 17
    """Of every student."""
    evaluation: EvaluationConfig = EvaluationConfig(preferences=True)


TOY_FIT = FitConfig(batch_size=4, accumulation=1, learning_rate=1e-3)


def toy_system() -> dict[str, Any]:
    """What the ``tiny()`` of every system shares."""
    return {
        **toy(),
        "updates": 2,
        "evaluation": EvaluationConfig(preferences=True, likelihood_prompts=8),
    }


def run_system(
    config: SystemConfig,
    name: str,
    title: str,
    methods: Callable[[Lab, SystemConfig], Mapping[str, Method]],
) -> Path:
    """Train and report every method; the last one is the system itself.

    Args:
        config: the options.
        name: of the experiment, ``python -m experiments.<name>``.
        title: of the report.
        methods: ``(lab, config)`` -> all of them by name, compiled.

    Returns:
        The path of the report. The system's student is exported beside it.
    """
    folder = RunFolder.open(
        config.out, config.identity(), name=name, overwrite=config.fresh
    )
    with Progress() as progress:
        desk = Desk(folder, progress, config.checkpoint_every, config.checkpoints_kept)
        final = folder.stage("report")
        if not final.done:
            started = time.monotonic()
            lab = open_lab(config)
            # Before anything is sampled: options may not fit.
            table = methods(lab, config)
            prompts, held_out, data = load_prompts(config.task, lab)
            course = take_course(lab, desk, config, prompts, seed=config.seed)
            judge = open_judge(lab, desk, course, held_out, seed=config.seed)
            for label, method in table.items():
                params = train_and_judge(
                    desk, course, judge, label, method, config.updates, config.seed
                )
            export = folder.path / "student"
            if params is None and not once((export / "config.json").exists):
                # Stopped after it was judged: its last checkpoint is read.
                params = method.train(
                    desk,
                    stage_of(label),
                    course,
                    steps=config.updates,
                    seed=config.seed,
                )
            if params is not None:
                export_student(lab, export, params)
            report = report_of(config, name, title, desk, judge, table, data)
            total = {"total": time.monotonic() - started}
            report = dataclasses.replace(report, timings=progress.timings | total)
            page = once(lambda: write_report(final.path, report).name)
            final.finish({"report": page})
            print(summary_table(report))
    return final.path / final.result["report"]


def export_student(lab: Lab, folder: Path, params: Params) -> None:
    """Write the student as a Hugging Face folder, in place of what is there."""
    params = fetch(params)
    once(
        lambda: save_model(
            folder,
            lab.student.config,
            params,
            tokenizer=lab.tokenizer,
            overwrite=True,
        )
    )


def train_and_judge(
    desk: Desk,
    course: Course,
    judge: Judge,
    label: str,
    method: Method,
    updates: int,
    seed: int,
) -> Params | None:
    """Train a method and measure it, unless an earlier start did; None if it did."""
    if judge.known(label):
        return None
    stage = stage_of(label)
    params = method.train(desk, stage, course, steps=updates, seed=seed)
    judge.student(label, params, **read_costs(desk.run.stage(stage).path))
    return params


def stage_of(label: str) -> str:
    """The folder of a method's training."""
    return "4-" + "".join(c if c.isalnum() else "-" for c in label.lower())


def report_of(
    config: SystemConfig,
    name: str,
    title: str,
    desk: Desk,
    judge: Judge,
    methods: Mapping[str, Method],
    data: Sequence[DataSource],
) -> Report:
    """The report of one run of one system."""
    *parents, system = methods
    pairs = [(system, other) for other in (judging.START, *parents)]
    compared = judging.differences(judge.judged, pairs)
    return Report(
        title=title,
        command=f"python -m experiments.{name} --out {config.out}",
        summary=[_finding(difference) for difference in compared],
        policies=judge.policies,
        differences=compared,
        **evidence(config, desk, judge, methods, data),
    )


def evidence(
    config: ExperimentConfig,
    desk: Desk,
    judge: Judge,
    methods: Mapping[str, Method],
    data: Sequence[DataSource],
) -> dict[str, Any]:
    """What a report of methods shows beside its tables: curves, samples, origins."""
    return {
        "created": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "games": {
            label: ledger.game_curves(
                desk.run, method.epsilon, ledger.parts(desk.run, stage_of(label))
            )
            for label, method in methods.items()
            if isinstance(method, Game)
        },
        "losses": {
            f"{label}: {method.metric}": curve(desk, label, method.metric)
            for label, method in methods.items()
        },
        "samples": judging.side_by_side(
            judge.judged, judge.prompts, config.evaluation.samples_shown
        ),
        "data": data,
        "settings": dataclasses.asdict(config),
        "versions": ledger.package_versions(),
        "assets": ledger.asset_hashes(config.models.teacher),
    }


def curve(desk: Desk, label: str, metric: str) -> Series:
    """A metric of a method's training log."""
    return ledger.series(desk.run, ledger.parts(desk.run, stage_of(label)), metric)


def _finding(difference: Difference) -> Verdict:
    text = judging.signed(difference.difference)
    return Verdict(
        f"{difference.first} against {difference.second}: reward {text}, "
        f"{difference.finding}."
    )
