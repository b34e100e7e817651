"""Token-level distillation from the teacher's most likely tokens.

.. math:: \\mathcal L = \\sum_t m_t \\Big[\\sum_{v\\in K_t} p_v \\log\\frac{p_v}{q_v}
    + p_{rest} \\log\\frac{p_{rest}}{q_{rest}}\\Big]

with p the teacher and q the student at target t, or another divergence between the same
buckets. The signal is small enough to be computed once and kept
(`rkd_jax.signals.cache`), so that no teacher is in memory here; and no logits of the
student are either, see `rkd_jax.losses.fused`.
"""

from __future__ import annotations

import jax.numpy as jnp

from rkd_jax.losses import forward_kl, linear_topk_divergence
from rkd_jax.losses.domain import check_domain
from rkd_jax.losses.topk import coarse_summand_of
from rkd_jax.masking import fill_masked, masked_sum
from rkd_jax.models.api import CausalLM, response_hidden
from rkd_jax.objectives.teaching import Divergence
from rkd_jax.types import (
    DemonstrationBatch,
    LossOutput,
    Mean,
    Objective,
    TopkSignal,
)


def make_topk_kd(
    model: CausalLM, divergence: Divergence = forward_kl, *, temperature: float = 1.0
) -> Objective:
    """A divergence to the teacher's top k and one bucket for the rest, per target.

    Args:
        model: the student.
        divergence: any that `rkd_jax.losses.topk_divergence` takes.
        temperature: the policy is ``softmax(logits / temperature)``; the signal has to
            be taken at the same temperature.

    Returns:
        `Objective` that requires `TopkSignal`. Unit: nats per token. At most what
        `make_kd` gives with this divergence, and equal to it at K = V. Metric
        ``student/divergence``, at the temperature.

    Gradient:
        Flows to the student's parameters only; the signal is data.

    Raises:
        ValueError: temperature out of range, or a divergence that `topk_divergence`
            refuses; when traced, a signal that says it was taken at another
            temperature.

    References:
        Coarse-grained KL as in DCKD, 2502.17927; see
        `rkd_jax.losses.topk_divergence`. Deviation: no factor temperature squared.
    """
    check_domain("temperature", temperature, "(0, inf)")
    coarse_summand_of(divergence)

    def student_loss(
        params, critic, frozen, batch: DemonstrationBatch, signal: TopkSignal, rng
    ):
        del critic, frozen, rng
        if signal.temperature not in (None, temperature):
            raise ValueError(
                f"the teacher's list was taken at temperature {signal.temperature:g}, "
                f"the student's policy is at {temperature:g}: make the cache, or the "
                "objective, with the other's"
            )
        sequences = batch.sequences
        mask = sequences.response_mask
        hidden = fill_masked(response_hidden(model, params, sequences), mask)
        values = linear_topk_divergence(
            hidden,
            model.head(params),
            fill_masked(signal.ids, mask),
            fill_masked(signal.log_probs, mask, -jnp.inf),
            divergence=divergence,
            mask=mask,
            temperature=temperature,
            bias=model.head_bias(params),
            softcap=getattr(model.config, "logit_softcap", None),
        )
        total = masked_sum(values, mask)
        weight = mask.sum().astype(total.dtype)
        metrics = {"student/divergence": Mean(total, weight)}
        return LossOutput(total, weight, metrics)

    requires = ("ids", "log_probs")
    return Objective("topk_kd", student_loss, requires=requires, packed=True)
