r"""TVKD: preference optimisation whose margin a teacher's values have shaped.

.. math:: \mathcal L = -\log\sigma\Big(\beta\,[\Delta\log\pi_\theta
    - \Delta\log\pi_{ref}] + s\,\alpha\,\Delta\Psi_\gamma\Big)

The shaping is one frozen number per response (`rkd_jax.signals.values.make_shaping`,
which also refuses the settings that are plain DPO), so a step costs what a step of DPO
does, and its gradient is that of DPO with the pairs re-weighted. Under Bradley-Terry
labels the optimum is :math:`\pi_{ref}\,e^{(r - s\alpha\Psi)/\beta}`: whatever changes
the loss changes what is learnt, so report both signs.

Source: TVKD, 2509.16965. Reconstruction: the objective's equation, its alpha and its
beta are not published in what we have. `make_tvkd_release` has the losses of the
released code, which are other ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rkd_jax.losses import (
    bradley_terry,
    bucket_entropy,
    bucket_log_probs,
    next_value_sum,
    release_return,
    target_bucket_log_probs,
    token_log_probs,
    tvkd,
)
from rkd_jax.losses.domain import check_choice
from rkd_jax.losses.tvkd_release import (
    RELEASE_VARIANTS,
    TRAINED,
    ReleaseSums,
    ReleaseVariant,
)
from rkd_jax.masking import fill_masked, sequence_sum
from rkd_jax.models.api import CausalLM, response_logits
from rkd_jax.objectives.per_pair import per_pair, real_pairs, real_pairs_of
from rkd_jax.objectives.policy import LATER, members, target_log_probs
from rkd_jax.packed import Pairs, pair_sums
from rkd_jax.types import (
    Objective,
    Pair,
    Params,
    PreferenceBatch,
    ReleaseSignal,
    ShapingSignal,
)


def make_tvkd(
    model: CausalLM,
    *,
    beta: float = 0.1,
    alpha: float | None = None,
    sign: float = 1.0,
    reference_free: bool = False,
    temperature: float = 1.0,
) -> Objective:
    """TVKD, per pair; soft labels mix the two orders.

    Args:
        model: the student.
        beta: scale of the log-ratios to the reference.
        alpha: scale of the shaping; None is ``beta``.
        sign: 1 or -1; see `rkd_jax.losses.tvkd`.
        reference_free: leave the reference out; ``ShapingSignal.log_probs`` may then be
            None.
        temperature: the policy is ``softmax(logits / temperature)``; the reference
            signal has to be computed at the same temperature.

    Returns:
        `Objective` that requires `ShapingSignal`; pairs may be packed. Unit: nats per
        pair. Metrics
        ``student/preference_loss``, ``student/margin`` (beta times the log-ratio
        difference), ``student/accuracy`` (how often it is positive) and
        ``student/shaping_margin`` (what the shaping adds to it).

    Gradient:
        Flows to the student's parameters only.

    References:
        TVKD, 2509.16965. Reconstruction: see the module's docstring. Deviation: soft
        labels, as conservative DPO.
    """
    weight_of_shaping = sign * (beta if alpha is None else alpha)

    def student_loss(params, critic, frozen, batch: Pairs, signal: ShapingSignal, rng):
        del critic, frozen, rng
        sequences, valid = batch.sequences, real_pairs_of(batch)
        log_probs = target_log_probs(
            model, params, sequences, temperature=temperature, tiles=LATER
        )
        scores = pair_sums(log_probs, batch)
        shaping = fill_masked(signal.shaping, valid)
        reference = (
            jnp.zeros_like(scores)
            if reference_free
            else fill_masked(signal.log_probs, valid)
        )

        def loss(order):
            pairs = (Pair(*members(x)[::order]) for x in (scores, reference, shaping))
            return tvkd(*pairs, beta=beta, alpha=alpha, sign=sign)

        label = fill_masked(batch.label, valid).astype(scores.dtype)
        losses = label * loss(1) + (1.0 - label) * loss(-1)
        margin = beta * _difference(scores - reference.astype(scores.dtype))
        added = weight_of_shaping * _difference(shaping)
        metrics = _margin_metrics(losses, margin)
        return per_pair(losses, valid, **metrics, shaping_margin=added)

    requires = ("shaping",) if reference_free else ("log_probs", "shaping")
    return Objective("tvkd", student_loss, requires=requires, packed=True)


def make_tvkd_release(
    model: CausalLM,
    *,
    variant: ReleaseVariant,
    gamma: float,
    beta: float = 1.0,
    alpha: float = 1.0,
) -> Objective:
    """A loss of the code released with TVKD, per pair; see `losses.tvkd_release`.

    Args:
        model: the student, at temperature 1 as in the released code.
        variant: which of them; a key of ``RELEASE_VARIANTS``.
        gamma: in [0, 1]. The released ``tpkd`` branches have 0.7.
        beta: scale of the log-probs in ``tpkd`` and ``tpkd_ref``.
        alpha: scale of the teacher's log-probs in ``full_dpo``.

    Returns:
        `Objective` that requires what the variant reads of a `ReleaseSignal`
        (`rkd_jax.signals.values.make_release_signal`). Unit: nats per pair. Metrics
        ``student/preference_loss``, ``student/margin`` (difference of the returns) and
        ``student/accuracy``.

    Gradient:
        Flows to the student's parameters only.

    Raises:
        ValueError: unknown variant.

    References:
        Code released with TVKD, 2509.16965. Deviation: soft labels, and the value after
        the last target is explicit. ``release_entropy`` is not the method that the
        paper describes.
    """
    check_choice("variant", variant, tuple(RELEASE_VARIANTS))
    reads = RELEASE_VARIANTS[variant].reads
    own = tuple(name for name in reads if name in TRAINED)
    cached = tuple(name for name in reads if name not in TRAINED)

    def student_loss(
        params, critic, frozen, batch: PreferenceBatch, signal: ReleaseSignal, rng
    ):
        del critic, frozen, rng
        valid = real_pairs(batch.sequences)
        sums = _student_sums(model, params, batch, signal, own)
        data = {name: fill_masked(getattr(signal, name), valid) for name in cached}
        returns = release_return(
            ReleaseSums(**sums, **data),
            variant=variant,
            gamma=gamma,
            beta=beta,
            alpha=alpha,
        )
        label = fill_masked(batch.label, valid)
        losses = bradley_terry(members(returns), label=label)
        return per_pair(losses, valid, **_margin_metrics(losses, _difference(returns)))

    ids = () if own == ("student",) else ("topk_ids",)
    return Objective(f"tvkd_{variant}", student_loss, requires=(*cached, *ids))


def _student_sums(
    model: CausalLM,
    params: Params,
    batch: PreferenceBatch,
    signal: ReleaseSignal,
    names: tuple[str, ...],
) -> dict[str, jax.Array]:
    """What a variant reads of the student, ``[B, 2]`` each, from one pass over it."""
    sequences = batch.sequences
    mask, targets = sequences.response_mask, sequences.targets
    logits = fill_masked(response_logits(model, params, sequences), mask)
    if names == ("student",):
        return {"student": sequence_sum(token_log_probs(logits, targets), mask)}
    ids = fill_masked(signal.topk_ids, mask)
    buckets = bucket_log_probs(logits, ids)
    sums = {
        "buckets": sequence_sum(target_bucket_log_probs(buckets, ids, targets), mask),
        "next_entropy": next_value_sum(bucket_entropy(buckets), mask),
    }
    return {name: sums[name] for name in names}


def _difference(values: jax.Array) -> jax.Array:
    """Chosen minus rejected, ``[..., 2] -> [...]``."""
    return values[..., 0] - values[..., 1]


def _margin_metrics(losses: jax.Array, margin: jax.Array) -> dict[str, jax.Array]:
    hits = (margin > 0).astype(margin.dtype)
    return {"preference_loss": losses, "margin": margin, "accuracy": hits}
