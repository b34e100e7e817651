"""Distil a real teacher into a smaller student, guided by reward, end to end.

Teacher: SmolLM2-135M-Instruct (Q4_1), told by a system message the student never sees
to write cheerfully. Student: the same network without ten of its thirty layers. Reward:
VADER sentiment of the response. Stages, each resumable:

1. the teacher answers the training prompts, with and without that message;
2. warm start: forward KL to the plain teacher on its plain text, so that the student
   can speak; what the steered teacher values is left to the stages that follow;
3. pairs of responses, labelled by the oracle;
4. offline PbKD: the min-max game on those pairs;
5. online PbKD: per round fresh pairs from the current student, a new anchor, more game;
6. evaluation on held-out prompts beside DPO on the same pairs; `report.html`.

    python -m experiments.quickstart
    python -m experiments.quickstart --help
    python -m experiments.quickstart --tiny --out runs/tiny

Ctrl-C leaves a checkpoint; the same command again goes on. Two CPU cores and 8 GiB of
memory are enough. Measured results: docs/quickstart.md.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from experiments import judging, ledger
from experiments.baselines import Dpo, DpoConfig
from experiments.command import run_command
from experiments.course import load_prompts, take_course
from experiments.game import Game
from experiments.judging import Judge, open_judge
from experiments.lab import open_lab
from experiments.settings import (
    ExperimentConfig,
    FitConfig,
    GameConfig,
    toy,
)
from experiments.stages import Desk
from experiments.system import export_student
from rkd_jax.evaluation.content import (
    Difference,
    Policy,
    Report,
    Verdict,
    quality_flags,
)
from rkd_jax.evaluation.report import summary_table, write_report
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from rkd_jax.training.together import once

DPO, OFFLINE, ONLINE = "DPO", "PbKD offline", "PbKD online"
COMPARED = (
    (ONLINE, judging.START),
    (ONLINE, DPO),
    (ONLINE, OFFLINE),
    (OFFLINE, judging.START),
    (DPO, judging.START),
    (judging.TEACHER, judging.START),
    (judging.TEACHER, ONLINE),
)


@dataclasses.dataclass(frozen=True)
class QuickstartConfig(ExperimentConfig):
    """Distil a steered teacher into a smaller student, guided by an oracle's reward."""

    out: str = "runs/quickstart"
    """Output folder; the same command again resumes."""
    game: GameConfig = GameConfig()
    dpo: DpoConfig = DpoConfig()


def config() -> QuickstartConfig:
    """The real run."""
    return QuickstartConfig()


def tiny() -> QuickstartConfig:
    """The same wiring with a random toy teacher: seconds on a CPU, no weights."""
    return QuickstartConfig(
        out="runs/tiny",
        **toy(),
        game=GameConfig(
            offline_steps=2,
            round_steps=1,
            pairs_per_step=8,
            accumulation=1,
            critic_steps=2,
            epsilon=1e-3,
        ),
        dpo=DpoConfig(fit=FitConfig(batch_size=4, accumulation=1)),
    )


def run(config: QuickstartConfig) -> Path:
    """All stages; returns the path of the report."""
    folder = RunFolder.open(
        config.out, config.identity(), name="quickstart", overwrite=config.fresh
    )
    with Progress() as progress:
        desk = Desk(folder, progress, config.checkpoint_every, config.checkpoints_kept)
        final = folder.stage("report")
        if not final.done:
            report = distil(config, desk)
            page = once(lambda: write_report(final.path, report).name)
            final.finish({"report": page})
            print(summary_table(report))
            print(f"\nstudent: {folder.path / 'student'}")
    return final.path / final.result["report"]


def distil(config: QuickstartConfig, desk: Desk) -> Report:
    """Stages 1 to 6."""
    started = time.monotonic()
    lab = open_lab(config)
    game, dpo = Game(lab, config.game, config.reward), Dpo(lab, config.dpo)
    prompts, held_out, data = load_prompts(config.task, lab)
    course = take_course(lab, desk, config, prompts, seed=config.seed)
    judge = open_judge(lab, desk, course, held_out, seed=config.seed)

    match = game.open(desk, course, seed=config.seed)
    pairs = list(course.pairs)
    state = match.play(
        "4-offline", match.begin(), pairs, steps=config.game.offline_steps
    )
    judge.student(OFFLINE, state.student.params)
    for number in range(1, config.pairs.rounds + 1):
        stage = f"5-round-{number}"
        student = state.student.params
        pairs += course.more_pairs(lab, desk, number, student, stage=f"{stage}-pairs")
        state = match.play(stage, state, pairs, steps=config.game.round_steps)
    judge.student(ONLINE, state.student.params)
    export_student(lab, desk.run.path / "student", state.student.params)
    updates = int(state.step)
    del state  # the optimiser's moments; the baseline needs the room
    rival = dpo.train(
        desk, "6-dpo", course, steps=updates, seed=config.seed, pairs=pairs
    )
    judge.student(DPO, rival)
    return conclude(config, desk, lab, judge, data, started)


def conclude(config, desk, lab, judge: Judge, data, started: float) -> Report:
    """What came out, compared, beside everything needed to check it."""
    policies = judge.policies
    compared = judging.differences(judge.judged, COMPARED)
    phases = ledger.phases(config.pairs)
    return Report(
        title="Reward-guided distillation of SmolLM2-135M-Instruct (Q4_1)"
        if config.models.teacher == "smollm2"
        else f"Reward-guided distillation of {config.models.teacher}",
        created=datetime.now().strftime("%Y-%m-%d %H:%M"),
        command=f"python -m experiments.quickstart --out {config.out}",
        summary=verdicts(policies, compared, config.pairs.rounds),
        policies=policies,
        differences=compared,
        games={"PbKD": ledger.game_curves(desk.run, config.game.epsilon, phases)},
        losses=ledger.loss_curves(desk.run, config.pairs),
        samples=judging.side_by_side(
            judge.judged, judge.prompts, config.evaluation.samples_shown
        ),
        data=ledger.data_sources(lab, desk.run, config.pairs, data),
        settings=dataclasses.asdict(config),
        versions=ledger.package_versions(),
        assets=ledger.asset_hashes(config.models.teacher),
        timings={
            **desk.progress.timings,
            "total": time.monotonic() - started,
        },
    )


def verdicts(
    policies: Sequence[Policy], compared: Sequence[Difference], rounds: int
) -> list[Verdict]:
    """What the run shows, and what it does not."""
    by_name = {policy.name: policy for policy in policies}
    online = by_name[ONLINE]
    gain = next(d for d in compared if (d.first, d.second) == (ONLINE, judging.START))
    rival = next(d for d in compared if (d.first, d.second) == (ONLINE, DPO))
    closed = online.gap_closed
    flags = quality_flags(policies).get(ONLINE, ())
    return [
        Verdict(
            f"Online PbKD ({rounds} rounds) against the warm start, "
            f"{gain.difference.n} held-out prompts: reward "
            f"{judging.signed(gain.difference)}, {gain.finding}.",
            "pass" if gain.finding == "higher" else "fail",
        ),
        Verdict(
            f"Share of the gap from warm start to teacher closed: {closed.note}"
            if closed.note
            else f"Share of the gap from warm start to teacher closed: "
            f"{closed.value:.0%} [{closed.interval.low:.0%}, "
            f"{closed.interval.high:.0%}]; the goal is 50%.",
            "pass" if closed.value >= 0.5 else "fail",
        ),
        Verdict(
            "Fluency: " + ("; ".join(flags) if flags else "no sign of collapse") + ".",
            "fail" if flags else "pass",
        ),
        Verdict(
            f"Online PbKD against DPO on the same pairs, with as many updates: reward "
            f"{judging.signed(rival.difference)}, {rival.finding}."
        ),
    ]


def main() -> None:
    """Command line: every option of `QuickstartConfig`, and ``--tiny``."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
