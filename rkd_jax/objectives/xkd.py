r"""X-KD: distillation, with the reward behind the teacher's text inferred beside it.

.. math:: \mathcal L = \mathcal L_{KD}(\theta)
    + w_X\,\mathbb E_{y\sim D}\,\mathcal R_X(y; \theta, \phi)

with D responses of the teacher or of a data set and :math:`\mathcal R_X` as in
`rkd_jax.objectives.reward_inference`. One regulariser, three parents:

=====================  ==============================  =================================
`make_xkd_sequence`    likelihood of fixed responses   `rkd_jax.objectives.sft`
`make_xkd_gkd`         a divergence, any responses     `rkd_jax.objectives.gkd`
`make_xkd_minillm`     sequence-level reverse KL       `rkd_jax.objectives.minillm`
=====================  ==============================  =================================

At :math:`w_X = 0` each is its parent. The distillation term covers every target, the
end of text included; only :math:`\mathcal R_X` has no last transition.

One player trains all of it: its parameters are ``{"policy": ..., "reward_head": ...}``,
and ``"q_head"`` where Q is a head. The deployed model is ``params["policy"]``.

Read before an experiment (derived; checked in ``tests/tabular/test_xkd.py``): raw
logits leave a gauge, Q + c(s). With the expected next value a tabular student absorbs
the regulariser in it and nothing is learned from it; with the sampled one what remains
pushes towards equal log-probs on the teacher's support. Log-probs have no gauge: the
term is a ridge on the change of surprisal and moves the optimum away from the teacher.
A Q head acts through the shared trunk only. Compare log-probs with raw logits.

Source: X-KD, 2602.12674. Reconstruction: no equation is published in what we have. The
regulariser is AVRIL's (2102.06483) with the teacher as the demonstrator; all options
and defaults are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rkd_jax.losses import forward_kl, token_log_probs
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.importance import Importance
from rkd_jax.losses.policy_gradient import CreditBaseline, LongPart
from rkd_jax.masking import sequence_mean, sequence_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.importance import imitated_weights, sample_metrics
from rkd_jax.objectives.policy import LATER, Reading, read
from rkd_jax.objectives.reward_inference import RewardInference, reward_regularizer
from rkd_jax.objectives.teaching import Divergence, Teaching
from rkd_jax.types import (
    DemonstrationBatch,
    ImitationBatch,
    LossOutput,
    Mean,
    Objective,
)

Normalise = Literal["tokens", "responses"]
TdSequences = Literal["fixed", "all"]


def make_xkd_sequence(
    model: CausalLM,
    inference: RewardInference,
    *,
    w_x: float = 1.0,
    temperature: float = 1.0,
    normalise: Normalise = "tokens",
) -> Objective:
    """Likelihood of the teacher's responses, and the reward behind them.

    Args:
        model: the student, ``params["policy"]``.
        inference: heads and options of the regulariser.
        w_x: at least 0, weight of the regulariser's mean over a response. 0 is
            `make_seqkd` (for ``normalise="tokens"``, temperature 1).
        temperature: the policy is ``softmax(logits / temperature)``, and Q is of the
            same; the signal, if one is read, has to be taken at it.
        normalise: "tokens": a response weighs its number of targets, as in the parent,
            its regulariser likewise. "responses": every response weighs 1.

    Returns:
        `Objective` over a `DemonstrationBatch`, or an `ImitationBatch` without
        ``imitated``. It requires ``log_probs`` if the next value is the expected one.
        Unit: nats per token, or per token averaged over responses. Metrics
        ``student/nll`` (at the temperature), ``student/regularizer`` and those of
        `reward_regularizer`.

    Gradient:
        Flows to all parameters, the policy's through likelihood and Q, none stopped by
        default; responses and signal are data.

    Raises:
        ValueError: an option out of its domain; when traced, ``imitated`` given.

    References:
        X-KD, 2602.12674: reconstruction, see the module's docstring.
    """
    check_choice("normalise", normalise, get_args(Normalise))

    def likelihood(seen: Reading, frozen, signal, weights) -> jax.Array:
        del frozen, signal, weights
        return -seen.log_probs

    objective = _objective(
        "xkd_sequence",
        _Base("student/nll", likelihood, normalise),
        model,
        inference,
        w_x=w_x,
        temperature=temperature,
        td_sequences="fixed",
    )

    def student_loss(params, critic, frozen, batch, signal, rng):
        if isinstance(batch, ImitationBatch) and batch.imitated is not None:
            raise ValueError(
                "xkd_sequence imitates the demonstrations: drop `imitated`, or use "
                "make_xkd_gkd for responses that the student wrote"
            )
        return objective.student_loss(params, critic, frozen, batch, signal, rng)

    expected = inference.next_value == "expected"
    return Objective(
        objective.name, student_loss, requires=("log_probs",) if expected else ()
    )


def make_xkd_gkd(
    model: CausalLM,
    inference: RewardInference,
    divergence: Divergence = forward_kl,
    *,
    teacher: CausalLM | None = None,
    w_x: float = 1.0,
    temperature: float = 1.0,
    normalise: Normalise = "tokens",
    td_sequences: TdSequences = "fixed",
) -> Objective:
    """A divergence on the imitated responses, the reward from the fixed ones.

    Args:
        model, inference, w_x, temperature, normalise: see `make_xkd_sequence`; at a w_x
            of 0 it is `make_gkd`.
        divergence: see `make_gkd`; the temperature is the policy's, not its own.
        teacher: see `make_kd`. An expected next value needs log-probs, so None.
        td_sequences: "fixed": the regulariser reads the demonstrations. "all": the mean
            of that and of the imitated responses.

    Returns:
        `Objective` over an `ImitationBatch` (`mix_rows` makes its ``imitated``) or a
        `DemonstrationBatch`, whose signal is that of `make_kd` on the imitated
        responses. An expected next value also reads ``demonstration_log_probs`` where
        the imitated responses are others. Metrics ``student/divergence``,
        ``student/nll`` (out of states only where the demonstrations are imitated) and
        the regulariser's. A row counts by its imitated response, the regulariser
        included: as its number of targets or as 1, and as 0 where it has none.

    Gradient:
        As `make_xkd_sequence`; none through sampling.

    Raises:
        ValueError: an option out of its domain; when traced, a missing signal.

    References:
        X-KD, 2602.12674: reconstruction, see the module's docstring. GKD, 2306.13649.
    """
    check_choice("normalise", normalise, get_args(Normalise))
    teaching = Teaching(teacher)

    def divergences(seen: Reading, frozen, signal, weights) -> jax.Array:
        del weights  # at the states of whoever wrote them
        return teaching.divergence(divergence, seen, frozen, signal)

    return _objective(
        "xkd_gkd",
        _Base("student/divergence", divergences, normalise, teaching),
        model,
        inference,
        w_x=w_x,
        temperature=temperature,
        td_sequences=td_sequences,
    )


def make_xkd_minillm(
    model: CausalLM,
    inference: RewardInference,
    *,
    teacher: CausalLM | None = None,
    w_x: float = 1.0,
    temperature: float = 1.0,
    gamma: float = 1.0,
    long_part: LongPart = "following",
    length_normalised: bool = False,
    importance: Importance = "per_decision",
    baseline: CreditBaseline = "none",
    td_sequences: TdSequences = "fixed",
) -> Objective:
    """Sequence-level reverse KL on samples, the reward from the fixed responses.

    Args:
        model, inference, w_x, temperature: see `make_xkd_sequence`; at a w_x of 0 it is
            `make_minillm`.
        teacher: see `make_xkd_gkd`.
        gamma, long_part, length_normalised, importance, baseline: of the reverse KL,
            see `make_minillm`; the regulariser has its own discount and no weights.
        td_sequences: see `make_xkd_gkd`.

    Returns:
        `Objective` over an `ImitationBatch` whose ``imitated`` the current student
        sampled at the temperature, or a mixture with the teacher, see `make_minillm`.
        Signal and metrics as `make_xkd_gkd`. Unit: nats per response.

    Gradient:
        As `make_xkd_sequence`; that of the reverse KL is the policy gradient.

    Raises:
        ValueError: an option out of its domain; when traced, a missing signal.

    References:
        X-KD, 2602.12674: reconstruction, see the module's docstring. MiniLLM,
        2306.08543.
    """
    check_choice("importance", importance, get_args(Importance))
    teaching = Teaching(teacher)

    def divergences(seen: Reading, frozen, signal, weights) -> jax.Array:
        return teaching.sequence_reverse_kl(
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

    return _objective(
        "xkd_minillm",
        _Base("student/divergence", divergences, "sum", teaching, importance),
        model,
        inference,
        w_x=w_x,
        temperature=temperature,
        td_sequences=td_sequences,
    )


class _Base(NamedTuple):
    """The distillation term: its metric, ``[B, T]`` values, and what a row weighs."""

    metric: str
    values: Callable[..., jax.Array]  # (seen, frozen, signal, importance weights)
    normalise: Literal["tokens", "responses", "sum"]
    teaching: Teaching = Teaching(None)
    importance: Importance | None = None  # None: the weights are not read


def _objective(
    name: str,
    base: _Base,
    model: CausalLM,
    inference: RewardInference,
    *,
    w_x: float,
    temperature: float,
    td_sequences: TdSequences,
) -> Objective:
    """Distillation plus ``w_x`` times the regulariser, row by row."""
    check_domain("w_x", w_x, "[0, inf)")
    check_domain("temperature", temperature, "(0, inf)")
    check_choice("td_sequences", td_sequences, get_args(TdSequences))
    from_log_probs = base.teaching.teacher is None
    if inference.next_value == "expected" and not from_log_probs:
        raise ValueError(
            'next_value="expected" is over the log-probs of the teacher: give '
            "teacher=None and a signal that has them"
        )

    def student_loss(params, critic, frozen, batch, signal, rng):
        del critic, rng
        if isinstance(batch, DemonstrationBatch):
            batch = ImitationBatch(batch)

        def seen_by_policy(responses: DemonstrationBatch) -> Reading:
            return read(
                model,
                params["policy"],
                responses.sequences,
                temperature=temperature,
                tiles=LATER,
            )

        fixed = imitated = seen_by_policy(batch.demonstrations)
        if batch.imitated is not None:
            imitated = seen_by_policy(batch.imitated)
        mask = imitated.sequences.response_mask
        weights = imitated_weights(batch) if base.importance else None
        values = base.values(imitated, frozen, signal, weights)
        totals, counts = _rows(values, mask, base.normalise)

        teacher = _fixed_log_probs(inference, batch, signal)
        regularizer, watched = reward_regularizer(inference, params, fixed, teacher)
        if td_sequences == "all" and imitated is not fixed:
            teacher = signal.log_probs if from_log_probs else None
            other, seen = reward_regularizer(inference, params, imitated, teacher)
            regularizer = 0.5 * (regularizer + other)
            watched = jax.tree.map(jnp.add, watched, seen)

        log_probs = None
        if imitated is fixed:
            log_probs = imitated.log_probs
        elif from_log_probs:  # out of states it would be another pass of the head
            log_probs = token_log_probs(imitated.logits, imitated.sequences.targets)
        importance = {"importance": base.importance} if base.importance else {}
        metrics = sample_metrics(
            base.metric, values, weights, mask, log_probs=log_probs, **importance
        )
        weight = counts.sum()
        metrics["student/regularizer"] = Mean((counts * regularizer).sum(), weight)
        total = (totals + w_x * counts * regularizer).sum()
        return LossOutput(total, weight, metrics | watched)

    return Objective(name, student_loss, requires=base.teaching.requires)


def _rows(values: jax.Array, mask: jax.Array, normalise: str):
    """Distillation loss and weight of every row, ``[B]`` each; 0 if nothing is set."""
    total = sequence_sum(values, mask)
    if normalise == "tokens":
        return total, mask.sum(axis=-1).astype(total.dtype)
    if normalise == "responses":
        total = sequence_mean(values, mask)
    return total, mask.any(axis=-1).astype(total.dtype)


def _fixed_log_probs(inference: RewardInference, batch: ImitationBatch, signal):
    """The teacher's log-probs on the demonstrations; None where nobody reads them."""
    if inference.next_value != "expected":
        return None
    found = getattr(signal, "demonstration_log_probs", None)
    if found is None and batch.imitated is not None:
        raise ValueError(
            'next_value="expected" needs demonstration_log_probs in the signal: '
            "log_probs are those of the imitated responses"
        )
    return signal.log_probs if found is None else found
