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

import jax
import jax.numpy as jnp

from experiments import judging, ledger
from experiments.command import run_command
from experiments.game import Game
from experiments.lab import Lab, open_lab
from experiments.rivals import train_dpo
from experiments.sentiment_task import make_prompts
from experiments.settings import (
    DpoConfig,
    GameConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    QuickstartConfig,
    SettingsError,
    TaskConfig,
    WarmStartConfig,
)
from experiments.stages import Desk, collect_pairs, teacher_corpus
from experiments.warm_start import warm_start
from rkd_jax.data.records import DemonstrationRecord, PromptRecord
from rkd_jax.data.sources import read_jsonl
from rkd_jax.evaluation.content import DataSource, Report
from rkd_jax.evaluation.report import summary_table, write_report
from rkd_jax.interop import save_model
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from rkd_jax.types import Params


def config() -> QuickstartConfig:
    """The real run."""
    return QuickstartConfig()


def tiny() -> QuickstartConfig:
    """The same wiring with a random toy teacher: seconds on a CPU, no weights."""
    return QuickstartConfig(
        out="runs/tiny",
        oracle="experiments.sentiment_task:letter_share",
        models=ModelConfig(teacher="random", drop_layers=(1,), reward_layers=2),
        task=TaskConfig(train_prompts=24, held_out_prompts=8),
        policy=PolicyConfig(
            temperature=1.0,
            max_prompt=96,
            max_teacher_prompt=320,
            max_response=12,
            batch_size=8,
        ),
        warm_start=WarmStartConfig(prompts=16, steps=3, batch_size=4, warmup_steps=1),
        pairs=PairsConfig(
            offline_prompts=8, round_prompts=4, held_out_prompts=2, ties="half"
        ),
        game=GameConfig(
            offline_steps=2,
            rounds=3,
            round_steps=1,
            prompts_per_step=2,
            samples_per_prompt=2,
            pairs_per_step=8,
            accumulation=1,
            critic_steps=2,
            anchor_steps=60,
            anchor_learning_rate=0.03,
            l2=1e-3,
            epsilon=1e-3,
        ),
        dpo=DpoConfig(pairs_per_step=4, accumulation=1),
    )


def run(config: QuickstartConfig) -> Path:
    """All stages; returns the path of the report."""
    folder = RunFolder.open(
        config.out, identity(config), name="quickstart", overwrite=config.fresh
    )
    with Progress() as progress:
        desk = Desk(folder, progress, config.checkpoint_every)
        final = folder.stage("report")
        if not final.done:
            report = distil(config, desk)
            page = write_report(final.path, report)
            final.finish({"report": page.name})
            print(summary_table(report))
            print(f"\nstudent: {folder.path / 'student'}")
    return final.path / final.result["report"]


def distil(config: QuickstartConfig, desk: Desk) -> Report:
    """Stages 1 to 6."""
    started = time.monotonic()
    lab = open_lab(config)
    keys = jax.random.split(jax.random.key(config.seed), 6)
    prompts, held_out, data = load_prompts(config.task, lab)
    batch_size = config.policy.batch_size

    def demonstrations_of(name: str, prompts, key):
        return teacher_corpus(lab, desk, name, prompts, batch_size=batch_size, rng=key)

    def pairs_of(name: str, student, demonstrations, key):
        return collect_pairs(
            lab,
            desk,
            name,
            student,
            demonstrations,
            lesson,
            ties=config.pairs.ties,
            batch_size=config.game.prompts_per_step,
            rng=key,
        )

    demonstrations = demonstrations_of("1-teacher", prompts, keys[0])
    offline, fresh, unseen = divide(demonstrations, config.pairs, config.game)
    lesson = demonstrations
    if not config.warm_start.steered:
        plain = [PromptRecord(p.prompt) for p in prompts[: config.warm_start.prompts]]
        lesson = demonstrations_of("1-teacher-plain", plain, keys[1])
    start = warm_start(lab, desk, config.warm_start, lesson, seed=config.seed)

    pairs = pairs_of("3-pairs", start, offline, keys[2])
    game = Game(
        lab,
        desk,
        config.game,
        demonstrations,
        pairs_of("3-pairs-held-out", start, unseen, keys[5]),
        temperature=config.policy.temperature,
        seed=config.seed,
    )
    state = game.play(
        "4-offline", game.begin(start), pairs, steps=config.game.offline_steps
    )
    students = {judging.START: start, judging.OFFLINE: copied(state.student.params)}
    for number, records in enumerate(fresh, start=1):
        key = jax.random.fold_in(keys[3], number)
        pairs = pairs + pairs_of(
            f"5-round-{number}-pairs", state.student.params, records, key
        )
        state = game.play(
            f"5-round-{number}", state, pairs, steps=config.game.round_steps
        )
    students[judging.ONLINE] = state.student.params
    export(lab, desk, state.student.params)
    updates = int(state.step)
    del state  # the optimiser's moments; the baseline needs the room
    students[judging.DPO] = train_dpo(
        lab,
        desk,
        config.dpo,
        start,
        pairs,
        steps=updates,
        temperature=config.policy.temperature,
        seed=config.seed,
    )
    return conclude(config, desk, lab, students, held_out, data, keys[4], started)


def export(lab: Lab, desk: Desk, params: Params) -> None:
    """The final student as a Hugging Face folder, ``student/`` in the run's folder."""
    save_model(
        desk.run.path / "student",
        lab.student.config,
        params,
        tokenizer=lab.tokenizer,
        overwrite=True,
    )


def conclude(config, desk, lab, students, held_out, data, key, started) -> Report:
    """Stage 6: sample, measure, compare, and say what came out."""
    heard = judging.listen(
        lab,
        desk,
        students,
        held_out,
        batch_size=config.policy.batch_size,
        rng=key,
    )
    folder = desk.run.stage("6-evaluation").path
    judging.save_responses(folder / "responses.json", heard, held_out)
    policies = judging.measure(
        lab,
        desk,
        students,
        heard,
        held_out,
        temperature=config.policy.temperature,
        likelihood_prompts=config.evaluation.likelihood_prompts,
    )
    compared = judging.differences(heard)
    return Report(
        title="Reward-guided distillation of SmolLM2-135M-Instruct (Q4_1)"
        if config.models.teacher == "smollm2"
        else f"Reward-guided distillation of {config.models.teacher}",
        created=datetime.now().strftime("%Y-%m-%d %H:%M"),
        command=f"python -m experiments.quickstart --out {config.out}",
        summary=judging.verdicts(policies, compared, config.game.rounds),
        policies=policies,
        differences=compared,
        games={"PbKD": ledger.game_curves(desk.run, config.game)},
        losses=ledger.loss_curves(desk.run, config.game),
        samples=judging.side_by_side(heard, held_out, config.evaluation.samples_shown),
        data=ledger.data_sources(lab, desk.run, config.game, data),
        settings=dataclasses.asdict(config),
        versions=ledger.library_versions(),
        assets=ledger.asset_hashes(config.models),
        timings={
            **desk.progress.timings,
            "total": time.monotonic() - started,
        },
    )


def identity(config: QuickstartConfig) -> dict:
    """What makes this run this run: every option but the output folder."""
    options = dataclasses.asdict(config)
    del options["out"], options["fresh"]
    return options


def load_prompts(
    task: TaskConfig, lab: Lab
) -> tuple[list[PromptRecord], list[PromptRecord], list[DataSource]]:
    """Training and held-out prompts, and what was skipped or cut.

    Raises:
        SettingsError: one file is given and the other is not, or one has no prompts.
        RecordError: a file cannot be read at all.
    """
    files = {"training": task.train_file, "held-out": task.held_out_file}
    if all(files.values()):
        counts = (task.train_prompts, task.held_out_prompts)
        found = [read_jsonl(f, PromptRecord, on_error="skip") for f in files.values()]
        sets = [
            records[:count] for (records, _), count in zip(found, counts, strict=True)
        ]
        reports = [report for _, report in found]
        surplus = [len(records) for records, _ in found]
    elif any(files.values()):
        raise SettingsError("give both --task.train-file and --task.held-out-file")
    else:
        sets = make_prompts(task.train_prompts, task.held_out_prompts, seed=task.seed)
        reports = [None, None]
        surplus = [len(records) for records in sets]
    sources = []
    for name, records, report, read in zip(files, sets, reports, surplus, strict=True):
        if not records:
            raise SettingsError(f"there are no {name} prompts: {report}")
        title = f"{name} prompts ({files[name] or 'built in'})"
        sources.append(ledger.prompt_source(title, records, lab, report, read))
    return *sets, sources


def divide(
    demonstrations: Sequence[DemonstrationRecord], pairs: PairsConfig, game: GameConfig
) -> tuple[
    Sequence[DemonstrationRecord],
    list[Sequence[DemonstrationRecord]],
    Sequence[DemonstrationRecord],
]:
    """Prompts for the offline pairs, fresh ones for every round, and held-out ones.

    Raises:
        SettingsError: there are not enough.
    """
    trained = pairs.offline_prompts + game.rounds * pairs.round_prompts
    needed = trained + pairs.held_out_prompts
    if needed > len(demonstrations):
        raise SettingsError(
            f"{needed} training prompts are needed ({pairs.offline_prompts} offline, "
            f"{game.rounds} rounds of {pairs.round_prompts}, "
            f"{pairs.held_out_prompts} held out), the teacher answered "
            f"{len(demonstrations)}; give more or lower --pairs.offline-prompts"
        )
    firsts = range(pairs.offline_prompts, trained, pairs.round_prompts)
    return (
        demonstrations[: pairs.offline_prompts],
        [demonstrations[i : i + pairs.round_prompts] for i in firsts],
        demonstrations[trained:needed],
    )


def copied(params):
    """A copy that survives the donation of the original."""
    return jax.tree.map(jnp.copy, params)


def main() -> None:
    """Command line: every option of `QuickstartConfig`, and ``--tiny``."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
