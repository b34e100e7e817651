"""Responses of the current student, alone or with the teacher, seen by both alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.lab import Lab, sampling_config
from experiments.settings import SettingsError
from rkd_jax.evaluation.generation import with_prompts
from rkd_jax.models.mixed_sampling import make_mixed_sampler
from rkd_jax.objectives.gkd import mix_rows
from rkd_jax.placement import follow_parameters
from rkd_jax.sharding import mesh_of
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
    return answers(samples.sequences, batch)


def answers(samples: Sequences, batch: DemonstrationBatch) -> DemonstrationBatch:
    """The first sample ``[B, G, P + T]`` of each prompt in the place of the batch's."""
    sequences = jax.tree.map(lambda x: x[:, 0], samples)
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
            answered = student_answers(lab, params, batch, sample_key)
            imitated = mix_rows(coin, batch, answered, rho=rho)
        seen = (batch if imitated is None else imitated).teacher_sequences
        return ImitationBatch(batch, imitated), teach(seen)

    return prepare


def prepare_mixed(lab: Lab, *, alpha: float):
    """A ``prepare`` that imitates on what student and teacher write together.

    Args:
        lab: teacher and policies; every token is drawn at their temperature.
        alpha: in [0, 1], the teacher's share in each token's probability.

    Returns:
        ``(state, DemonstrationBatch) -> (ImitationBatch, signal)``, the samples with
        their importance weights.

    Raises:
        SettingsError: the teacher is on other devices than the student.
    """
    if mesh_of(lab.teacher_params) != lab.mesh:
        raise SettingsError(
            f"alpha {alpha:g}: student and teacher write every token together, so "
            "leave --teacher-mesh out, or take an alpha of 0"
        )
    config = sampling_config(lab.policy, lab.tokenizer, samples=1)
    sample = make_mixed_sampler(lab.student, lab.teacher, config, alpha=alpha)

    def write(params, prompts, rng):
        samples = sample(*params, prompts[0], rng, prompts[1])
        weights = jnp.exp(samples.log_probs - samples.behaviour_log_probs)
        return samples.sequences, weights[:, 0]

    write = follow_parameters(write, to_host=True)

    def prepare(state: TrainState, batch: DemonstrationBatch):
        params = state.student.params, lab.teacher_params
        prompts = batch.sequences.prompts, batch.teacher_sequences.prompts
        sequences, weights = write(params, prompts, step_keys(state).prepare)
        imitated = answers(sequences, batch)
        signal = lab.teach(imitated.teacher_sequences)
        return ImitationBatch(batch, imitated, weights), signal

    return prepare
