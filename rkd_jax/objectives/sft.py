"""Supervised fine-tuning, and sequence-level distillation, which is the same loss.

.. math:: \\mathcal L = -\\sum_t m_t \\log \\pi_\\theta(y_t | s_t)

normalised by the number of target tokens. On text from a data set this is SFT; on
text sampled from the teacher it is SeqKD (Kim and Rush 2016, with samples instead of
beams).
"""

from __future__ import annotations

from rkd_jax.losses.domain import check_domain
from rkd_jax.masking import masked_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.policy import target_log_probs
from rkd_jax.types import DemonstrationBatch, LossOutput, Mean, Objective


def make_sft(model: CausalLM, *, temperature: float = 1.0) -> Objective:
    """Maximum likelihood of the batch's responses, per target token.

    Args:
        model: the student. Its loss reads `DemonstrationBatch.sequences`, i.e. the
            student's prompt; the signal is not used.
        temperature: the policy is ``softmax(logits / temperature)``; of a model that is
            to be sampled at another temperature than 1.

    Returns:
        `Objective` without a critic. Unit: nats per token. Metric ``student/nll``, of
        the policy at the temperature.

    Gradient:
        Flows to the student's parameters only.

    Raises:
        ValueError: temperature out of range.

    References:
        Catalogue baseline. Deviation: none.
    """

    check_domain("temperature", temperature, "(0, inf)")

    def student_loss(params, critic, frozen, batch: DemonstrationBatch, signal, rng):
        del critic, frozen, signal, rng
        sequences = batch.sequences
        mask = sequences.response_mask
        log_probs = target_log_probs(model, params, sequences, temperature=temperature)
        total = masked_sum(-log_probs, mask)
        weight = mask.sum().astype(total.dtype)
        return LossOutput(total, weight, {"student/nll": Mean(total, weight)})

    return Objective("sft", student_loss)


def make_seqkd(model: CausalLM, *, temperature: float = 1.0) -> Objective:
    """Sequence-level distillation: `make_sft` on responses the teacher wrote.

    Args:
        model, temperature: see `make_sft`.

    Returns:
        `Objective`; the same numbers as `make_sft`, for a batch of teacher samples.

    Gradient:
        As `make_sft`.

    Raises:
        ValueError: as `make_sft`.

    References:
        Kim and Rush, Sequence-Level Knowledge Distillation, 2016. Deviation: sampled
        text where the paper decodes with a beam.
    """
    return Objective("seqkd", make_sft(model, temperature=temperature).student_loss)
