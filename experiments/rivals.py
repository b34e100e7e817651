"""The baseline of stage 6: DPO from the same start, on the same pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from experiments.game import TextBook
from experiments.lab import Lab
from experiments.settings import DpoConfig
from experiments.stages import Desk, train
from rkd_jax.data.collate import collate
from rkd_jax.data.pipeline import make_batches
from rkd_jax.data.records import PreferenceRecord
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.training.optim import OptimConfig, make_optimizer
from rkd_jax.training.state import init_state
from rkd_jax.training.update import make_update
from rkd_jax.types import Params, ReferenceSignal


def train_dpo(
    lab: Lab,
    desk: Desk,
    config: DpoConfig,
    start: Params,
    pairs: Sequence[PreferenceRecord],
    *,
    steps: int,
    temperature: float,
    seed: int,
) -> Params:
    """DPO with the start as the reference, whose scores are computed once."""
    rows = [tokenize_record(r, lab.tokenizer, lab.rows, i) for i, r in enumerate(pairs)]
    scores = TextBook(lambda rows: lab.reference_scores(start, rows))
    reference = scores.look_up(collate(rows, lab.rows).sequences)
    optimizer = make_optimizer(
        OptimConfig(learning_rate=config.learning_rate, weight_decay=0.0)
    )
    objective = make_dpo(lab.student, beta=config.beta, temperature=temperature)
    state = train(
        desk,
        "6 baseline: DPO",
        desk.run.stage("6-dpo").path,
        init_state(start, student_optimizer=optimizer, rng=jax.random.key(seed)),
        make_update(
            objective,
            student_optimizer=optimizer,
            accumulation=config.accumulation,
        ),
        make_batches(
            pairs,
            lab.tokenizer,
            lab.rows,
            batch_size=config.pairs_per_step,
            seed=seed,
        ),
        steps=steps,
        config={"dpo": dataclasses.asdict(config), "steps": steps, "seed": seed},
        prepare=lambda state, batch: (batch, ReferenceSignal(reference[batch.index])),
    )
    return state.student.params
