"""Token-level distillation: a divergence to the teacher at every target.

.. math:: \\mathcal L = \\sum_t m_t\\,
    \\mathrm D\\big(\\pi_\\theta(\\cdot|s_t), \\pi_E(\\cdot|s_t')\\big)

where :math:`s_t'` may carry the teacher's own prompt. Forward KL by default. A teacher
that is a model gives its states and its head, and no array over the vocabulary is ever
kept; one that is known by its log-probs alone gives those.
"""

from __future__ import annotations

import jax

from rkd_jax.losses import forward_kl, token_log_probs
from rkd_jax.losses.domain import check_domain
from rkd_jax.masking import masked_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.policy import read
from rkd_jax.objectives.teaching import Divergence, Teaching
from rkd_jax.types import DemonstrationBatch, LossOutput, Mean, Objective


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
    teaching = Teaching(teacher)

    def student_loss(params, critic, frozen, batch: DemonstrationBatch, signal, rng):
        del critic, rng
        seen = read(model, params, batch.sequences, temperature=temperature)
        mask = batch.sequences.response_mask
        values = teaching.divergence(divergence, seen, frozen, signal)
        total = masked_sum(values, mask)
        weight = mask.sum().astype(total.dtype)
        metrics = {"student/divergence": Mean(total, weight)}
        if teacher is None:  # out of states it would be another pass of the head
            nll = -token_log_probs(seen.logits, batch.sequences.targets)
            nll = jax.lax.stop_gradient(masked_sum(nll, mask))
            metrics["student/nll"] = Mean(nll, weight)
        return LossOutput(total, weight, metrics)

    return Objective("kd", student_loss, requires=teaching.requires)
