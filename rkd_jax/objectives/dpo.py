"""Direct preference optimisation on labelled pairs.

.. math:: \\mathcal L = -\\log\\sigma\\big(\\beta[
    (\\log\\pi_\\theta - \\log\\pi_{ref})(y^w)
    - (\\log\\pi_\\theta - \\log\\pi_{ref})(y^l)]\\big)

with log-probs summed over the response. The reference enters as two numbers per pair,
computed once (`rkd_jax.signals.teacher`); no reference model is in memory here.
"""

from __future__ import annotations

import jax

from rkd_jax.losses import dpo
from rkd_jax.masking import fill_masked, sequence_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.per_pair import per_pair, real_pairs
from rkd_jax.objectives.policy import LATER, members, target_log_probs
from rkd_jax.types import Objective, Pair, PreferenceBatch, ReferenceSignal


def make_dpo(
    model: CausalLM, *, beta: float = 0.1, temperature: float = 1.0
) -> Objective:
    """DPO, per pair; soft labels mix the two orders.

    Args:
        model: the student.
        beta: inverse strength of the KL leash to the reference.
        temperature: the policy is ``softmax(logits / temperature)``; the reference
            signal has to be computed at the same temperature.

    Returns:
        `Objective` that requires `ReferenceSignal.log_probs`. Unit: nats per pair.
        Metrics ``student/preference_loss``, ``student/margin`` (beta times the
        log-ratio difference) and ``student/accuracy``.

    Gradient:
        Flows to the student's parameters only.

    References:
        Rafailov et al., Direct Preference Optimization, 2023, Eq. (7). Deviation: soft
        labels, as conservative DPO.
    """

    def student_loss(
        params, critic, frozen, batch: PreferenceBatch, signal: ReferenceSignal, rng
    ):
        del critic, frozen, rng
        sequences, real = batch.sequences, real_pairs(batch.sequences)
        log_probs = target_log_probs(
            model, params, sequences, temperature=temperature, tiles=LATER
        )
        student = members(sequence_sum(log_probs, sequences.response_mask))
        reference = members(fill_masked(jax.lax.stop_gradient(signal.log_probs), real))
        keep = dpo(student, reference, beta=beta)
        swap = dpo(Pair(*student[::-1]), Pair(*reference[::-1]), beta=beta)
        label = fill_masked(batch.label, real)
        losses = label * keep + (1.0 - label) * swap
        margin = beta * (
            student.chosen - student.rejected - reference.chosen + reference.rejected
        )
        return per_pair(
            losses,
            real,
            preference_loss=losses,
            margin=margin,
            accuracy=(margin > 0).astype(losses.dtype),
        )

    return Objective("dpo", student_loss, requires=("log_probs",))
