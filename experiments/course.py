"""What every student of an experiment starts from: stages 1 to 3.

The teacher's answers, a student that can speak, preference pairs, and prompts set aside
for later rounds and for measuring. Each part is read from a file where the options name
one, and made otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import TypeVar

import jax

from experiments import ledger
from experiments.lab import Lab
from experiments.sentiment_task import make_prompts
from experiments.settings import ExperimentConfig, SettingsError, TaskConfig
from experiments.stages import (
    Desk,
    as_key,
    collect_pairs,
    student_corpus,
    teacher_corpus,
)
from experiments.warm_start import warm_start
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord, PromptRecord
from rkd_jax.data.sources import read_jsonl
from rkd_jax.evaluation.content import DataSource
from rkd_jax.signals.oracles import Oracle
from rkd_jax.types import Params

Record = TypeVar("Record", DemonstrationRecord, PreferenceRecord)
HELD_OUT_SHARE = 10  # one in ten pairs of a file is held out


@dataclasses.dataclass(frozen=True)
class Course:
    """The common start and the common data of all methods of an experiment."""

    config: ExperimentConfig
    rng: jax.Array
    start: Params  # of the student, after the warm start
    demonstrations: Sequence[DemonstrationRecord]  # answers of the teacher
    lesson: Sequence[DemonstrationRecord]  # what the warm start was trained on
    pairs: Sequence[PreferenceRecord]  # of the start and the teacher, labelled
    held_out_pairs: Sequence[PreferenceRecord]  # of prompts that nothing above has
    fresh: Sequence[Sequence[DemonstrationRecord]]  # prompts of each online round

    def more_pairs(
        self,
        lab: Lab,
        desk: Desk,
        number: int,
        student: Params,
        *,
        stage: str,
        oracle: Oracle | None = None,
    ) -> list[PreferenceRecord]:
        """Pairs of online round ``number`` (from 1), sampled from ``student``.

        The lab's oracle labels them, or the one given.
        """
        return collect_pairs(
            lab,
            desk,
            stage,
            student,
            self.fresh[number - 1],
            self.lesson,
            oracle=oracle or lab.oracle,
            ties=self.config.pairs.ties,
            batch_size=self.config.policy.rollout_prompts,
            rng=jax.random.fold_in(self.rng, number),
        )

    def start_samples(self, lab: Lab, desk: Desk) -> list[DemonstrationRecord]:
        """One answer of the start to every training prompt."""
        return student_corpus(
            lab,
            desk,
            "3-start-samples",
            self.start,
            self.demonstrations,
            batch_size=self.config.policy.batch_size,
            rng=jax.random.fold_in(self.rng, 0),
        )


def take_course(
    lab: Lab,
    desk: Desk,
    config: ExperimentConfig,
    prompts: Sequence[PromptRecord],
    *,
    seed: int,
) -> Course:
    """Run stages 1 to 3, or come back to what an earlier start made of them.

    Raises:
        SettingsError: not enough prompts or pairs.
        RecordError: a file cannot be read.
    """
    keys = jax.random.split(jax.random.key(seed), 6)
    size = config.policy.batch_size
    if config.task.demonstrations_file:
        file = config.task.demonstrations_file
        demonstrations = read_jsonl(file, DemonstrationRecord)[0]
    else:
        demonstrations = teacher_corpus(
            lab, desk, "1-teacher", prompts, batch_size=size, rng=keys[0]
        )
    plain = demonstrations
    if not config.warm_start.steered:
        asked = [PromptRecord(p.prompt) for p in prompts[: config.warm_start.prompts]]
        plain = teacher_corpus(
            lab, desk, "1-teacher-plain", asked, batch_size=size, rng=keys[1]
        )
    offline, fresh, unseen = divide(demonstrations, config)
    if config.task.pairs_file:
        pairs = read_jsonl(config.task.pairs_file, PreferenceRecord)[0]
        pairs, held_out = hold_out(pairs)
        unseen = held_out
    aside = {as_key(record) for record in unseen}
    lesson, taught, offline, *fresh = (
        without(some, aside) for some in (plain, demonstrations, offline, *fresh)
    )
    start = warm_start(lab, desk, config.warm_start, lesson, seed=seed)

    def pairs_of(name: str, records, key):
        return collect_pairs(
            lab,
            desk,
            name,
            start,
            records,
            plain,
            oracle=lab.oracle,
            ties=config.pairs.ties,
            batch_size=config.policy.rollout_prompts,
            rng=key,
        )

    if not config.task.pairs_file:
        pairs = pairs_of("3-pairs", offline, keys[2])
        held_out = pairs_of("3-pairs-held-out", unseen, keys[5])
    if not pairs or not held_out:
        raise SettingsError(
            f"{len(pairs)} pairs to train on and {len(held_out)} held out; raise "
            "--pairs.offline-prompts and --pairs.held-out-prompts, or choose an oracle "
            "that tells the candidates apart"
        )
    return Course(config, keys[3], start, taught, lesson, pairs, held_out, fresh)


def hold_out(
    pairs: Sequence[PreferenceRecord],
) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
    """The last tenth of the pairs, with all others of the same prompts, set aside."""
    cut = max(len(pairs) // HELD_OUT_SHARE, 1)
    aside = {as_key(pair) for pair in pairs[-cut:]}
    return without(pairs, aside), [pair for pair in pairs if as_key(pair) in aside]


def without(records: Sequence[Record], aside: Collection[str]) -> list[Record]:
    """The records of other prompts than these."""
    return [record for record in records if as_key(record) not in aside]


def divide(
    demonstrations: Sequence[DemonstrationRecord], config: ExperimentConfig
) -> tuple[
    Sequence[DemonstrationRecord],
    list[Sequence[DemonstrationRecord]],
    Sequence[DemonstrationRecord],
]:
    """Prompts for the offline pairs, fresh ones for every round, and held-out ones.

    Raises:
        SettingsError: there are not enough.
    """
    pairs = config.pairs
    offline = 0 if config.task.pairs_file else pairs.offline_prompts
    unseen = 0 if config.task.pairs_file else pairs.held_out_prompts
    trained = offline + pairs.rounds * pairs.round_prompts
    if trained + unseen > len(demonstrations):
        raise SettingsError(
            f"{trained + unseen} training prompts are needed ({offline} offline, "
            f"{pairs.rounds} rounds of {pairs.round_prompts}, {unseen} held out), the "
            f"teacher answered {len(demonstrations)}; give more or lower "
            "--pairs.offline-prompts"
        )
    firsts = range(offline, trained, pairs.round_prompts)
    return (
        demonstrations[:offline],
        [demonstrations[i : i + pairs.round_prompts] for i in firsts],
        demonstrations[trained : trained + unseen],
    )


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
