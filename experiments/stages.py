"""The stages of reward-guided distillation, each resumable on its own.

A stage that samples text writes JSON Lines once and reads them ever after. A stage that
trains is one call of `fit` on its own checkpoint folder: called again after it has
finished, it restores the last checkpoint and returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.lab import Lab, Sampler
from rkd_jax.data.collate import collate
from rkd_jax.data.records import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
)
from rkd_jax.data.sources import read_jsonl, write_jsonl
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.evaluation.generation import GenerationResult, generate
from rkd_jax.signals.oracles import label_preferences
from rkd_jax.training.checkpoint import Checkpoints
from rkd_jax.training.loop import Update, fit
from rkd_jax.training.metrics import MetricsWriter
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder, Stage
from rkd_jax.training.state import TrainState
from rkd_jax.types import Params, Prompts


@dataclasses.dataclass(frozen=True)
class Desk:
    """Where stages write and what they show: run folder, progress, checkpoints."""

    run: RunFolder
    progress: Progress
    checkpoint_every: int


def write_responses(
    lab: Lab,
    desk: Desk,
    title: str,
    sampler: Sampler,
    params: Params,
    records: Sequence[PromptRecord],
    *,
    as_teacher: bool,
    batch_size: int,
    rng: jax.Array,
) -> GenerationResult:
    """One response per prompt record, in order, shown as a stage of its own."""
    rows = [
        tokenize_record(r, lab.tokenizer, lab.rows, i) for i, r in enumerate(records)
    ]
    desk.progress.stage(title, len(rows))

    def batches():
        for first in range(0, len(rows), batch_size):
            batch = collate(rows[first : first + batch_size], lab.rows)
            yield batch.teacher_prompts if as_teacher else batch.prompts

    def sample(params: Params, prompts: Prompts, key: jax.Array):
        samples = jax.block_until_ready(sampler(params, prompts, key))
        left = len(rows) - sample.done
        count = min(prompts.tokens.shape[0], left)
        sample.done += count
        tokens = int(np.sum(samples.sequences.response_mask))
        desk.progress.advance(count, tokens=tokens)
        return samples

    sample.done = 0
    return generate(sample, params, batches(), lab.tokenizer.decode, rng)


def teacher_corpus(
    lab: Lab,
    desk: Desk,
    prompts: Sequence[PromptRecord],
    *,
    batch_size: int,
    rng: jax.Array,
) -> list[DemonstrationRecord]:
    """Stage 1: the teacher, under its own prompt, answers every training prompt."""
    stage = desk.run.stage("1-teacher")
    path = stage.path / "demonstrations.jsonl"
    if not stage.done:
        result = write_responses(
            lab,
            desk,
            "1 teacher samples",
            lab.sample_teacher,
            lab.teacher_params,
            prompts,
            as_teacher=True,
            batch_size=batch_size,
            rng=rng,
        )
        records = [
            DemonstrationRecord(p.prompt, text, p.teacher_prompt)
            for p, text in zip(prompts, result.flat_texts, strict=True)
            if text.strip()
        ]
        write_jsonl(path, records)
        stage.finish({"asked": len(prompts), "empty": len(prompts) - len(records)})
    return read_jsonl(path, DemonstrationRecord)[0]


def collect_pairs(
    lab: Lab,
    desk: Desk,
    stage: Stage,
    title: str,
    student_params: Params,
    prompts: Sequence[PromptRecord],
    *,
    teacher_share: float,
    ties: str,
    batch_size: int,
    rng: jax.Array,
) -> list[PreferenceRecord]:
    """Two responses per prompt, labelled by the oracle.

    The first is the student's. The second is the teacher's for the first
    ``teacher_share`` of the prompts, the student's again for the rest.
    """
    path = stage.path / "pairs.jsonl"
    if not stage.done:
        keys = jax.random.split(rng, 3)
        cut = round(teacher_share * len(prompts))
        write = {"batch_size": batch_size}

        def student(name: str, records, key):
            if not records:
                return []
            result = write_responses(
                lab,
                desk,
                f"{title}: {name}",
                lab.sample_student,
                student_params,
                records,
                as_teacher=False,
                rng=key,
                **write,
            )
            return result.flat_texts

        first = student("student", prompts, keys[0])
        second = []
        if cut:
            second = write_responses(
                lab,
                desk,
                f"{title}: teacher",
                lab.sample_teacher,
                lab.teacher_params,
                prompts[:cut],
                as_teacher=True,
                rng=keys[1],
                **write,
            ).flat_texts
        second = second + student("student again", prompts[cut:], keys[2])
        records, report = label_preferences(
            lab.oracle,
            [p.prompt for p in prompts],
            first,
            second,
            teacher_prompts=[p.teacher_prompt for p in prompts],
            ties=ties,
        )
        desk.progress.note(f"{title}: {report}")
        write_jsonl(path, records)
        stage.finish(dataclasses.asdict(report))
    return read_jsonl(path, PreferenceRecord)[0]


def train(
    desk: Desk,
    title: str,
    folder: Path,
    state: TrainState,
    update: Update,
    batches,
    *,
    steps: int,
    config,
    prepare: Callable | None = None,
    frozen=None,
    keep: int = 1,
    checkpoint_every: int | None = None,
) -> TrainState:
    """`fit` with a checkpoint folder, a metrics log and a line of progress.

    ``steps`` counts from the state's step 0, as in `fit`. ``config`` is what the
    checkpoints are bound to.
    """
    desk.progress.stage(title, steps)
    with (
        Checkpoints(folder / "checkpoints", config=config, keep=keep) as checkpoints,
        MetricsWriter(folder) as metrics,
    ):
        return fit(
            state,
            update,
            batches,
            steps=steps,
            frozen=frozen,
            prepare=prepare,
            checkpoints=checkpoints,
            metrics=metrics,
            progress=desk.progress,
            checkpoint_every=checkpoint_every or desk.checkpoint_every,
        )
