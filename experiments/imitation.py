"""Responses of the current student, seen by student and teacher alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from experiments.lab import Lab
from rkd_jax.evaluation.generation import with_prompts
from rkd_jax.objectives.gkd import mix_rows
from rkd_jax.training.state import TrainState, step_keys
from rkd_jax.types import (
    DemonstrationBatch,
    ImitationBatch,
    ImitationSignal,
    Params,
    Sequences,
)


def student_answers(
    lab: Lab, params: Params, batch: DemonstrationBatch, rng: jax.Array
) -> DemonstrationBatch:
    """The same prompts, answered once by the student; the teacher reads its own."""
    samples = lab.sample_student(params, batch.sequences.prompts, rng)
    sequences = jax.tree.map(lambda x: x[:, 0], samples.sequences)
    seen_by_teacher = with_prompts(sequences, batch.teacher_sequences.prompts)
    return DemonstrationBatch(sequences, seen_by_teacher, batch.index)


def prepare_imitation(
    lab: Lab,
    *,
    rho: float,
    policy=lambda params: params,
    teach: Callable[[Sequences], Any] | None = None,
):
    """A ``prepare`` that imitates on the student's answers in a share ``rho`` of rows.

    Args:
        lab: sampler and teacher; both at the policies' temperature.
        rho: in [0, 1]. At 0 the batch's own responses are imitated, nothing is sampled.
        policy: finds the policy in the trained parameters.
        teach: the signal on the imitated responses, given them as the teacher sees
            them. None: an `ImitationSignal` of its log-probs.

    Returns:
        ``(state, DemonstrationBatch) -> (ImitationBatch, signal)``.
    """
    if teach is None:

        def teach(sequences: Sequences) -> ImitationSignal:
            return ImitationSignal(lab.teacher_policy(lab.teacher_params, sequences))

    def prepare(state: TrainState, batch: DemonstrationBatch):
        imitated = None
        if rho:
            sample_key, coin = jax.random.split(step_keys(state).prepare)
            params = policy(state.student.params)
            answers = student_answers(lab, params, batch, sample_key)
            imitated = mix_rows(coin, batch, answers, rho=rho)
        seen = (batch if imitated is None else imitated).teacher_sequences
        return ImitationBatch(batch, imitated), teach(seen)

    return prepare
