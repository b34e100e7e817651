"""Token-level distillation: a divergence to the teacher at every target.

.. math:: \\mathcal L = \\sum_t m_t\\,
    \\mathrm D\\big(\\pi_\\theta(\\cdot|s_t), \\pi_E(\\cdot|s_t')\\big)

where :math:`s_t'` may carry the teacher's own prompt. Forward KL by default. A teacher
that is a model gives its states and its head, and no array over the vocabulary is ever
kept; one that is known by its log-probs alone gives those.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from rkd_jax.losses import forward_kl, linear_divergence, token_log_probs
from rkd_jax.losses.domain import check_domain
from rkd_jax.masking import fill_masked, masked_sum
from rkd_jax.models.api import CausalLM, response_hidden, response_logits
from rkd_jax.objectives.policy import frozen_params
from rkd_jax.types import (
    DemonstrationBatch,
    LossOutput,
    Mean,
    Objective,
    TeacherSignal,
    TeacherStates,
)

Divergence = Callable[..., jax.Array]


def make_kd(
    model: CausalLM,
    divergence: Divergence = forward_kl,
    *,
    teacher: CausalLM | None = None,
    temperature: float = 1.0,
) -> Objective:
    """Distillation from the teacher's full distribution, per target token.

    Args:
        model: the student.
        divergence: any of `rkd_jax.losses.divergences` over full distributions; bind
            options by name with `functools.partial`. Without ``teacher`` any function
            ``(student_logits [.., V], teacher_logits [.., V]) -> [..]``.
        teacher: the model whose states the signal holds; its width may be another than
            the student's. None: the signal holds log-probs.
        temperature: of both policies, ``softmax(logits / temperature)``; log-probs in
            the signal have to be taken at it, and ``divergence`` not bring its own.

    Returns:
        `Objective` that requires `TeacherStates.hidden` and the teacher's parameters
        as ``frozen["teacher"]``, or `TeacherSignal.log_probs`. Unit: nats per token.
        Metric ``student/divergence``; out of log-probs ``student/nll`` too. Both are at
        the temperature.

    Gradient:
        Flows to the student's parameters only; signal and teacher are data.

    Raises:
        ValueError: temperature out of range; when traced, a divergence that
            `linear_divergence` does not know, or no teacher in ``frozen``.

    References:
        Hinton, Vinyals and Dean, 2015 (word-level KD). Deviation: no factor
        temperature squared.
    """
    check_domain("temperature", temperature, "(0, inf)")
    if teacher is None:
        return _from_log_probs(model, divergence, temperature)

    def student_loss(
        params, critic, frozen, batch: DemonstrationBatch, signal: TeacherStates, rng
    ):
        del critic, rng
        sequences = batch.sequences
        mask = sequences.response_mask
        teacher_params = frozen_params(frozen, "teacher", "kd")
        values = linear_divergence(
            response_hidden(model, params, sequences),
            model.head(params),
            signal.hidden,
            teacher.head(teacher_params),
            divergence=divergence,
            mask=mask,
            temperature=temperature,
            student_bias=model.head_bias(params),
            teacher_bias=teacher.head_bias(teacher_params),
            student_softcap=model.config.logit_softcap,
            teacher_softcap=teacher.config.logit_softcap,
        )
        total = masked_sum(values, mask)
        weight = mask.sum().astype(total.dtype)
        return LossOutput(total, weight, {"student/divergence": Mean(total, weight)})

    return Objective("kd", student_loss, requires=("hidden",))


def _from_log_probs(
    model: CausalLM, divergence: Divergence, temperature: float
) -> Objective:
    """Of a teacher whose log-probs are known and no more."""

    def student_loss(
        params, critic, frozen, batch: DemonstrationBatch, signal: TeacherSignal, rng
    ):
        del critic, frozen, rng
        sequences = batch.sequences
        mask = sequences.response_mask
        student = fill_masked(response_logits(model, params, sequences), mask)
        student = student / temperature
        teacher = jax.lax.stop_gradient(fill_masked(signal.log_probs, mask))
        total = masked_sum(divergence(student, teacher), mask)
        nll = masked_sum(-token_log_probs(student, sequences.targets), mask)
        weight = mask.sum().astype(total.dtype)
        metrics = {
            "student/divergence": Mean(total, weight),
            "student/nll": Mean(jax.lax.stop_gradient(nll), weight),
        }
        return LossOutput(total, weight, metrics)

    return Objective("kd", student_loss, requires=("log_probs",))
