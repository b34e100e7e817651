r"""Reward-model distillation into a policy, with and without pessimism.

The policy's implicit reward is regressed on explicit ones, and a forward KL from the
reference may hold it back:

.. math:: \mathrm{reduce}_i\, \overline{\ell_i} + \kappa\,\beta\,
    \mathbb E_{y\sim\pi_{ref}}[-\log\pi_\theta(y | x)], \qquad
    \ell_i = \big(r^i(x, y_1) - r^i(x, y_2) - h\big)^2

with h the implicit reward difference of `rkd_jax.losses.reward_distillation`, from
summed log-probs.

==============  ===========  =====  ===================================================
`make_ddpo`     distilled    no     one reward model
`make_pdpo`     DPO's loss   yes    no reward model, labels
`make_dpdpo`    distilled    yes    one reward model
`make_edpo`     distilled    yes    an ensemble, the mildest of which counts
==============  ===========  =====  ===================================================

Rewards enter as cached numbers, on a common scale (`rkd_jax.losses.reward_scale`), and
so does the reference; neither network is in memory here. The penalty reads samples of
the reference (`rkd_jax.types.AnchoredPairs`): responses of a data set are a proxy
only. It is silent at the start, its gradient being 0 where the student is the
reference, and the same kappa weighs more against DPO's loss than against a squared
error: tune it for each.

Source: Robust preference optimisation by reward-model distillation, 2405.19316.
Reconstruction: the exact losses with a penalty and its coefficient are not published
in what we have; kappa times beta is ours.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp

from rkd_jax.losses import pessimistic_reduce, reward_distillation, running_mean_loss
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.pairs import log_ratio, pair_difference
from rkd_jax.losses.reward_distillation import Reduction
from rkd_jax.masking import fill_masked, masked_sum, sequence_sum
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.per_pair import real_pairs_of
from rkd_jax.objectives.policy import LATER, members, target_log_probs
from rkd_jax.packed import pair_sums
from rkd_jax.types import (
    AnchoredPairs,
    EnsembleSignal,
    LossOutput,
    Mean,
    Objective,
    Params,
    ReferenceSignal,
)


def make_edpo(
    model: CausalLM,
    *,
    beta: float = 0.1,
    kappa: float = 0.1,
    reduce: Reduction = "min",
    softmin_temperature: float = 1.0,
    temperature: float = 1.0,
) -> Objective:
    """e-DPO: distillation from the mildest of K reward models, with the penalty.

    The reduction is over the means of what one call sees. A step cut into micro-batches
    (``accumulation``) therefore averages the reductions of its parts, a lower bound of
    the whole batch's for ``min`` and ``softmin``; ``mean`` is exact. ``ema_min`` is
    exact as well: which reward model counts is decided by running means, held by a
    second player with parameters ``{"means": float32[K]}``. Its optimiser has to be
    plain ``optax.sgd(1 - decay)`` with one critic step, and its price is a second
    forward pass of the student. At decay 0 it is ``min`` over the whole batch.

    Args:
        model: the student.
        beta: inverse strength of the leash to the reference.
        kappa: at least 0; times beta the weight of the penalty, and 0 needs no samples.
        reduce: see `rkd_jax.losses.pessimistic_reduce`.
        softmin_temperature: of ``softmin``, in squared nats.
        temperature: the policy is ``softmax(logits / temperature)``; the reference
            signal and the samples have to be at the same temperature.

    Returns:
        `Objective` over `AnchoredPairs` that requires `EnsembleSignal`. Labels are not
        read. A row whose pair is padding counts in no term. Pairs may be packed where
        kappa is 0: a sample of the reference belongs to the pair in its row. Metrics
        ``student/distillation`` (after the reduction, without the penalty),
        ``student/margin`` (the implicit reward difference); for K > 1
        ``student/distillation/i`` and ``student/weight/i`` of every reward model; and
        ``student/reference_nll`` (nats per response) where it is penalised.

    Gradient:
        ``student_loss`` reaches the student only, ``critic_loss`` the running means
        only.

    Raises:
        ValueError: here, an unknown reduction or a number out of range; when traced,
            a penalty without samples.

    References:
        2405.19316, e-DPO. Reconstruction: see the module's docstring and
        `rkd_jax.losses.pessimistic_reduce`.
    """
    check_domain("beta", beta, "(0, inf)")
    check_domain("kappa", kappa, "[0, inf)")
    check_choice("reduce", reduce, get_args(Reduction))
    check_domain("softmin_temperature", softmin_temperature, "(0, inf)")
    tracks = reduce == "ema_min"

    def regress(params, batch: AnchoredPairs, signal: EnsembleSignal):
        return _regression(model, params, batch, signal, beta, temperature)

    def student_loss(params, critic, frozen, batch, signal, rng):
        del frozen, rng
        losses, margin, valid = regress(params, batch, signal)
        objective, weights = pessimistic_reduce(
            losses,
            how=reduce,
            temperature=softmin_temperature,
            mask=valid,
            running=jax.lax.stop_gradient(critic["means"]) if tracks else None,
        )
        weight = valid.sum().astype(losses.dtype)
        total = objective * weight
        metrics = {
            "student/distillation": Mean(total, weight),
            "student/margin": Mean(masked_sum(margin, valid), weight),
        }
        if len(losses) > 1:
            for i, each in enumerate(losses):
                each = Mean(masked_sum(each, valid), weight)
                metrics[f"student/distillation/{i}"] = each
                metrics[f"student/weight/{i}"] = Mean(weights[i] * weight, weight)
        out = LossOutput(total, weight, metrics)
        return _penalised(out, model, params, batch, valid, kappa * beta, temperature)

    def critic_loss(critic, params, dual, frozen, batch, signal, rng):
        del dual, frozen, rng
        losses, _, valid = regress(jax.lax.stop_gradient(params), batch, signal)
        errors = running_mean_loss(critic["means"], losses)
        total = masked_sum(errors, jnp.broadcast_to(valid, errors.shape))
        return LossOutput(total, valid.sum().astype(total.dtype), {})

    return Objective(
        "edpo",
        student_loss,
        critic_loss if tracks else None,
        requires=("log_probs", "rewards"),
        packed=not kappa,
    )


def make_dpdpo(
    model: CausalLM, *, beta: float = 0.1, kappa: float = 0.1, temperature: float = 1.0
) -> Objective:
    """dp-DPO: distillation from one reward model, with the penalty.

    Args:
        model, beta, kappa, temperature: see `make_edpo`.

    Returns:
        As `make_edpo`, for a signal with K = 1.

    Gradient:
        Flows to the student only.

    Raises:
        ValueError: as `make_edpo`; when traced, more than one reward model.

    References:
        2405.19316, dp-DPO. Reconstruction: see the module's docstring.
    """
    ensemble = make_edpo(model, beta=beta, kappa=kappa, temperature=temperature)

    def student_loss(params, critic, frozen, batch, signal: EnsembleSignal, rng):
        models = signal.rewards.shape[-1]
        if models != 1:
            raise ValueError(
                f"the signal has {models} reward models, this objective takes one: "
                "choose it, or use make_edpo"
            )
        return ensemble.student_loss(params, critic, frozen, batch, signal, rng)

    return dataclasses.replace(ensemble, name="dpdpo", student_loss=student_loss)


def make_ddpo(
    model: CausalLM, *, beta: float = 0.1, temperature: float = 1.0
) -> Objective:
    """d-DPO: distillation from one reward model, no penalty, no samples.

    Args:
        model, beta, temperature: see `make_edpo`.

    Returns:
        As `make_edpo`, for a signal with K = 1.

    Gradient:
        Flows to the student only.

    Raises:
        ValueError: as `make_dpdpo`.

    References:
        2405.19316, d-DPO. Reconstruction: see `rkd_jax.losses.reward_distillation`.
    """
    objective = make_dpdpo(model, beta=beta, kappa=0.0, temperature=temperature)
    return dataclasses.replace(objective, name="ddpo")


def make_pdpo(
    model: CausalLM, *, beta: float = 0.1, kappa: float = 0.1, temperature: float = 1.0
) -> Objective:
    """p-DPO: DPO's loss with the penalty, without any reward model.

    Args:
        model, beta, kappa, temperature: see `make_edpo`.

    Returns:
        `Objective` over `AnchoredPairs` that requires the reference's log-probs only:
        `ReferenceSignal` or `EnsembleSignal`. Metrics as
        `rkd_jax.objectives.dpo.make_dpo`, and ``student/reference_nll``.

    Gradient:
        Flows to the student only.

    Raises:
        ValueError: beta or kappa out of range; when traced, a penalty without samples.

    References:
        2405.19316, p-DPO. Reconstruction: see the module's docstring.
    """
    check_domain("beta", beta, "(0, inf)")
    check_domain("kappa", kappa, "[0, inf)")
    dpo = make_dpo(model, beta=beta, temperature=temperature)

    def student_loss(
        params, critic, frozen, batch: AnchoredPairs, signal: ReferenceSignal, rng
    ):
        out = dpo.student_loss(params, critic, frozen, batch.pairs, signal, rng)
        valid = real_pairs_of(batch.pairs)
        return _penalised(out, model, params, batch, valid, kappa * beta, temperature)

    return Objective("pdpo", student_loss, requires=("log_probs",), packed=not kappa)


def _regression(
    model: CausalLM,
    params: Params,
    batch: AnchoredPairs,
    signal: EnsembleSignal,
    beta: float,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [K, B], implicit reward differences [B], and which pairs are data [B].

    Packed pairs, [B, M], are one axis here: B M.
    """
    pairs = batch.pairs
    valid = real_pairs_of(pairs)
    log_probs = target_log_probs(
        model, params, pairs.sequences, temperature=temperature, tiles=LATER
    )
    student = members(pair_sums(log_probs, pairs))
    reference = members(fill_masked(signal.log_probs, valid))
    rewards = members(jnp.moveaxis(fill_masked(signal.rewards, valid), -1, 0))
    losses = reward_distillation(student, reference, rewards, beta=beta)
    margin = beta * pair_difference(log_ratio(student, reference))
    return losses.reshape(len(losses), -1), margin.reshape(-1), valid.reshape(-1)


def _penalised(
    out: LossOutput,
    model: CausalLM,
    params: Params,
    batch: AnchoredPairs,
    valid: jax.Array,
    weight: float,
    temperature: float,
) -> LossOutput:
    """``out`` plus ``weight`` times the summed NLL of the reference's samples."""
    if weight == 0:
        return out
    if batch.samples is None:
        raise ValueError(
            f"the penalty (kappa * beta = {weight:g}) reads samples of the reference, "
            "and the batch has none: fill AnchoredPairs.samples, or set kappa = 0"
        )
    sequences = batch.samples.sequences
    log_probs = target_log_probs(model, params, sequences, temperature=temperature)
    nll = masked_sum(-sequence_sum(log_probs, sequences.response_mask), valid)
    metrics = out.metrics | {"student/reference_nll": Mean(nll, out.weight)}
    return LossOutput(out.total + weight * nll, out.weight, metrics)
