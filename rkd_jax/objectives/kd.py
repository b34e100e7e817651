"""Token-level distillation: a divergence to the teacher at every target.

.. math:: \\mathcal L = \\sum_t m_t\\,
    \\mathrm D\\big(\\pi_\\theta(\\cdot|s_t), \\pi_E(\\cdot|s_t')\\big)

where :math:`s_t'` may carry the teacher's own prompt. Forward KL by default.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from rkd_jax.losses import forward_kl, token_log_probs
from rkd_jax.losses.domain import check_domain
from rkd_jax.masking import fill_masked, masked_sum
from rkd_jax.models.api import CausalLM, response_logits
from rkd_jax.types import (
    DemonstrationBatch,
    LossOutput,
    Mean,
    Objective,
    TeacherSignal,
)

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def make_kd(
    model: CausalLM, divergence: Divergence = forward_kl, *, temperature: float = 1.0
) -> Objective:
    """Distillation from the teacher's full distribution, per target token.

    Args:
        model: the student.
        divergence: ``(student_logits [.., V], teacher_logits [.., V]) -> [..]``, any of
            `rkd_jax.losses.divergences` over full distributions; bind options with
            `functools.partial`.
        temperature: the policy is ``softmax(logits / temperature)``; the signal has to
            be taken at the same temperature, and ``divergence`` not bring its own.

    Returns:
        `Objective` that requires `TeacherSignal.log_probs`. Unit: nats per token.
        Metrics ``student/divergence`` and ``student/nll``, both at the temperature.

    Gradient:
        Flows to the student's parameters only; the signal is data.

    Raises:
        ValueError: temperature out of range.

    References:
        Hinton, Vinyals and Dean, 2015 (word-level KD). Deviation: no factor
        temperature squared.
    """

    check_domain("temperature", temperature, "(0, inf)")

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

    return Objective("kd", student_loss, requires=("log_probs",), packed=True)
