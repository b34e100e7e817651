"""The stages of reward-guided distillation, each resumable on its own.

A stage that samples text writes JSON Lines once and reads them ever after. A stage that
trains is one call of `fit` on its own checkpoint folder: called again after it has
finished, it restores the last checkpoint and returns.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.costs import CostedCheckpoints
from experiments.lab import Lab, Sampler
from rkd_jax.data.collate import collate
from rkd_jax.data.pipeline import BatchIterator, ZippedBatches
from rkd_jax.data.records import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    to_prompt,
)
from rkd_jax.data.sources import read_jsonl, write_jsonl
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.evaluation.generation import GenerationResult, generate
from rkd_jax.placement import fetch, place_rows
from rkd_jax.sharding import mesh_of, shard_batch
from rkd_jax.signals.oracles import Oracle, OracleError, label_preferences
from rkd_jax.training.loop import Update, fit
from rkd_jax.training.metrics import MetricsWriter
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from rkd_jax.training.state import TrainState
from rkd_jax.training.together import once
from rkd_jax.types import Params, Prompts

TRAINING = 1000  # beyond every number that a course or a judge folds into its key


@dataclasses.dataclass(frozen=True)
class Desk:
    """Where stages write and what they show: run folder, progress, checkpoints."""

    run: RunFolder
    progress: Progress
    checkpoint_every: int
    checkpoints_kept: int = 1  # of each stage


def training_key(seed: int) -> jax.Array:
    """Root of what a training draws; stages that sample text have other keys."""
    return jax.random.fold_in(jax.random.key(seed), TRAINING)


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
    """Responses to every prompt, in order, shown as a stage of its own."""
    rows = [
        tokenize_record(r, lab.tokenizer, lab.rows, i) for i, r in enumerate(records)
    ]
    desk.progress.stage(title, len(rows))

    def batches():
        for first in range(0, len(rows), batch_size):
            batch = collate(rows[first : first + batch_size], lab.rows)
            yield batch.teacher_prompts if as_teacher else batch.prompts

    def sample(params: Params, prompts: Prompts, key: jax.Array):
        samples = fetch(sampler(params, prompts, key))
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
    name: str,
    prompts: Sequence[PromptRecord],
    *,
    batch_size: int,
    rng: jax.Array,
) -> list[DemonstrationRecord]:
    """Stage 1: the teacher answers every prompt; empty answers are counted."""
    voice = (lab.sample_teacher, lab.teacher_params)
    return _corpus(
        lab, desk, name, voice, prompts, as_teacher=True, batch_size=batch_size, rng=rng
    )


def student_corpus(
    lab: Lab,
    desk: Desk,
    name: str,
    params: Params,
    demonstrations: Sequence[DemonstrationRecord],
    *,
    batch_size: int,
    rng: jax.Array,
) -> list[DemonstrationRecord]:
    """A student answers the demonstrations' prompts; empty answers are counted."""
    prompts = [to_prompt(record) for record in demonstrations]
    voice = (lab.sample_student, params)
    return _corpus(
        lab,
        desk,
        name,
        voice,
        prompts,
        as_teacher=False,
        batch_size=batch_size,
        rng=rng,
    )


def _corpus(lab, desk, name, voice, prompts, *, as_teacher, batch_size, rng):
    stage = desk.run.stage(name)
    path = stage.path / "demonstrations.jsonl"
    if not stage.done:
        result = write_responses(
            lab,
            desk,
            name.replace("-", " "),
            *voice,
            prompts,
            as_teacher=as_teacher,
            batch_size=batch_size,
            rng=rng,
        )
        records = [
            DemonstrationRecord(p.prompt, text, p.teacher_prompt)
            for p, text in zip(prompts, result.flat_texts, strict=True)
            if text.strip()
        ]
        once(lambda: write_jsonl(path, records))
        empty = len(prompts) - len(records)
        stage.finish({"kept": len(records), "empty": empty})
    return read_jsonl(path, DemonstrationRecord)[0]


def collect_pairs(
    lab: Lab,
    desk: Desk,
    name: str,
    student_params: Params,
    demonstrations: Sequence[DemonstrationRecord],
    plain: Sequence[DemonstrationRecord],
    *,
    oracle: Oracle,
    ties: str,
    batch_size: int,
    rng: jax.Array,
) -> list[PreferenceRecord]:
    """Stage 3 and each round: candidates for every prompt, every two of them a pair.

    The candidates are the teacher's answer, its plain one where ``plain`` has the
    prompt, and the current student's samples. The oracle says which is better.

    Raises:
        OracleError: the oracle failed, or had no reward for any pair.
    """
    stage = desk.run.stage(name)
    path = stage.path / "pairs.jsonl"
    if not stage.done:
        title = name.replace("-", " ")
        written = {as_key(record): record.response for record in plain}
        result = write_responses(
            lab,
            desk,
            title,
            lab.roll_out,
            student_params,
            [to_prompt(record) for record in demonstrations],
            as_teacher=False,
            batch_size=batch_size,
            rng=rng,
        )
        duels = []
        for record, samples in zip(demonstrations, result.texts, strict=True):
            other = written.get(as_key(record))
            plainly = [other] if other and other != record.response else []
            candidates = [record.response, *plainly, *samples]
            duels += [(record, *pair) for pair in itertools.combinations(candidates, 2)]
        records, report = label_preferences(
            oracle,
            [record.prompt for record, _, _ in duels],
            [first for _, first, _ in duels],
            [second for _, _, second in duels],
            teacher_prompts=[record.teacher_prompt for record, _, _ in duels],
            ties=ties,
        )
        desk.progress.note(f"{title}: {report}")
        if report.unscored and not records:
            # Not finished: the same command asks the oracle again.
            raise OracleError(f"{title}: {report}; see to the oracle and start again")
        once(lambda: write_jsonl(path, records))
        stage.finish(dataclasses.asdict(report))
    return read_jsonl(path, PreferenceRecord)[0]


def as_key(record: DemonstrationRecord | PreferenceRecord) -> str:
    """The student's prompt as a dictionary key."""
    return json.dumps(record.prompt, sort_keys=True)


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
    look_up: Callable | None = None,
    probe: Callable | None = None,
    frozen=None,
    checkpoint_every: int | None = None,
) -> TrainState:
    """`fit` with a checkpoint folder, a metrics log and a line of progress.

    ``steps`` counts from the state's step 0, as in `fit`. ``config`` is what the
    checkpoints are bound to. Where the state is on a mesh, rows are cut over it.
    ``look_up`` takes the place of ``prepare`` where nothing is computed: it is given
    the host's own rows of a batch, and returns them with their signal.
    """
    with (
        CostedCheckpoints(
            folder, desk.progress, title, config=config, keep=desk.checkpoints_kept
        ) as checkpoints,
        MetricsWriter(folder) as metrics,
    ):
        return fit(
            state,
            update,
            batches,
            steps=steps,
            frozen=frozen,
            prepare=_placing(prepare, look_up, mesh_of(state), batches),
            probe=probe,
            checkpoints=checkpoints,
            metrics=metrics,
            progress=desk.progress,
            checkpoint_every=checkpoint_every or desk.checkpoint_every,
            name=title,
        )


def _placing(
    prepare: Callable | None,
    look_up: Callable | None,
    mesh: Mesh | None,
    batches: BatchIterator | ZippedBatches,
) -> Callable | None:
    """``prepare``, or ``look_up``, with its rows on the mesh.

    A process brings the rows that its devices hold. Only the numbers of the records are
    whole in each, to look up by.
    """
    if look_up is not None:

        def looked_up(state, batch):
            del state
            found = look_up(batch)
            return found if mesh is None else shard_batch(found, mesh)

        return looked_up
    if mesh is None:
        return prepare

    def numbered(batch, index):
        if isinstance(batch, dict):
            return {name: numbered(batch[name], index[name]) for name in batch}
        return dataclasses.replace(batch, index=index)

    def placed(state, batch):
        batch = shard_batch(batch, mesh)
        if prepare is None:
            return batch, ()
        return place_rows(prepare(state, numbered(batch, batches.index)), mesh)

    return placed
