"""Stage 2: forward KL to the teacher on the teacher's text, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from experiments.lab import Lab
from experiments.settings import WarmStartConfig
from experiments.stages import Desk, train, training_key
from experiments.trainer import Step, record_batches
from rkd_jax.data.records import DemonstrationRecord
from rkd_jax.objectives.kd import make_kd
from rkd_jax.training.optim import OptimConfig, make_optimizer
from rkd_jax.types import Params


def warm_start(
    lab: Lab,
    desk: Desk,
    config: WarmStartConfig,
    demonstrations: Sequence[DemonstrationRecord],
    *,
    seed: int,
) -> Params:
    """The student after distillation; every later policy starts from it.

    Without steps it is the student as it was given.
    """
    if not config.steps:
        return lab.student_params
    optimizer = make_optimizer(
        OptimConfig(
            learning_rate=config.learning_rate,
            schedule="cosine",
            warmup_steps=config.warmup_steps,
            total_steps=config.steps,
            end_factor=0.1,
            weight_decay=0.0,
        )
    )
    step = Step(make_kd(lab.student, teacher=lab.teacher), optimizer)

    def prepare(state, batch):
        del state
        return batch, lab.teach(batch.teacher_sequences)

    state = train(
        desk,
        "2 warm start",
        desk.run.stage("2-warm-start").path,
        step.begin(lab.student_params, rng=training_key(seed), mesh=lab.mesh),
        step.update_on(lab.mesh, max_traces=lab.widths),
        record_batches(
            "--warm-start",
            lab,
            demonstrations,
            batch_size=config.batch_size,
            row_length=config.row_length,
            seed=seed,
        ),
        steps=config.steps,
        config={"warm_start": dataclasses.asdict(config), "seed": seed},
        prepare=prepare,
        frozen=lab.frozen,
    )
    return state.student.params
