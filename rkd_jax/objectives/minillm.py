r"""MiniLLM: the sequence-level reverse KL to the teacher, by policy gradient.

.. math:: \mathcal L = \mathbb E_x\,\mathbb E_{y\sim\pi_\theta} \sum_t
    \log\frac{\pi_\theta(y_t|s_t)}{\pi_E(y_t|s_t)}
    = \mathbb E_x\,\mathbb E_{y\sim\pi_\theta} \sum_t
    \mathrm{KL}\big(\pi_\theta \| \pi_E\big)(s_t)

The states depend on the student as well, so the gradient of the right-hand side at
fixed states is only a part of it; `rkd_jax.losses.sequence_reverse_kl` holds both.
Responses may come from a mixture with the teacher, with the weights of their tokens
(`rkd_jax.models.mixed_sampling`). What the paper adds for stability and this module
leaves out: the clipped ratio of stale samples, and a language modelling loss on other
text.
"""

from __future__ import annotations

from typing import get_args

from rkd_jax.losses import token_log_probs
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.importance import Importance
from rkd_jax.losses.policy_gradient import CreditBaseline, LongPart
from rkd_jax.masking import masked_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.gkd import imitated_responses
from rkd_jax.objectives.importance import imitated_weights, sample_metrics
from rkd_jax.objectives.policy import read
from rkd_jax.objectives.teaching import Teaching
from rkd_jax.types import LossOutput, Objective


def make_minillm(
    model: CausalLM,
    *,
    teacher: CausalLM | None = None,
    temperature: float = 1.0,
    gamma: float = 1.0,
    long_part: LongPart = "following",
    length_normalised: bool = False,
    importance: Importance = "per_decision",
    baseline: CreditBaseline = "none",
) -> Objective:
    """Reverse KL of whole responses, written by the student or with the teacher.

    Args:
        model: the student.
        teacher: see `make_kd`.
        temperature: the policy is ``softmax(logits / temperature)``; the responses have
            to be sampled at it, without top-k or top-p, from the current parameters or
            with weights of these, or the gradient is biased. The signal is taken at the
            same temperature.
        gamma, long_part, length_normalised, importance, baseline: see
            `sequence_reverse_kl`; rows are those of a micro-batch. The defaults give
            the exact gradient, a baseline of "others" too, with less variance. A gamma
            of 0 is GKD with reverse KL on the student's samples, normalised by
            responses instead of tokens.

    Returns:
        `Objective` over an `ImitationBatch` or a `DemonstrationBatch` whose signal is
        that of `make_kd` on the imitated responses. Where these are not the student's
        own the batch has their ``importance_weights``. Unit: nats per response. The
        value estimates the divergence, without bias unless ``importance`` is "token".
        Metrics ``student/divergence`` and, out of log-probs, ``student/nll``, both in
        nats per token, and with weights ``student/importance`` and
        ``student/importance_squared``; see `rkd_jax.objectives.importance`.

    Gradient:
        Flows to the student's parameters only; responses and signal are data.

    Raises:
        ValueError: an option out of its domain; weights of responses that are not
            there.

    References:
        Gu et al., MiniLLM, 2306.08543. Deviation: see the module's docstring.
    """
    check_domain("temperature", temperature, "(0, inf)")
    check_choice("importance", importance, get_args(Importance))
    teaching = Teaching(teacher)

    def student_loss(params, critic, frozen, batch, signal, rng):
        del critic, rng
        sequences = imitated_responses(batch).sequences
        weights = imitated_weights(batch)
        mask = sequences.response_mask
        seen = read(model, params, sequences, temperature=temperature)
        values = teaching.sequence_reverse_kl(
            seen,
            frozen,
            signal,
            gamma=gamma,
            long_part=long_part,
            length_normalised=length_normalised,
            importance_weights=weights,
            importance=importance,
            baseline=baseline,
        )
        log_probs = None
        if teacher is None:  # out of states it would be another pass of the head
            log_probs = token_log_probs(seen.logits, sequences.targets)
        metrics = sample_metrics(
            "student/divergence",
            values,
            weights,
            mask,
            importance=importance,
            log_probs=log_probs,
        )
        total = masked_sum(values, mask)
        responses = mask.any(axis=-1).sum().astype(total.dtype)
        return LossOutput(total, responses, metrics)

    return Objective("minillm", student_loss, requires=teaching.requires)
