r"""What objectives on samples report of them, whoever wrote them.

Means are over the student's own text: samples of a mixture are weighted. How well that
goes is in ``student/effective_share``,

.. math:: \frac{(\sum w)^2}{n \sum w^2} \in (0, 1]

the share of the n targets that would be worth as much if all had the same weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rkd_jax.losses.importance import Importance, counted, shares
from rkd_jax.masking import fill_masked, masked_sum
from rkd_jax.types import DemonstrationBatch, ImitationBatch, Mean


def imitated_weights(batch: ImitationBatch | DemonstrationBatch) -> jax.Array | None:
    """The importance weights of the imitated responses, ``[B, T]``; None for none.

    Raises:
        ValueError: the batch has weights, but no responses that they are those of.
    """
    if isinstance(batch, DemonstrationBatch) or batch.importance_weights is None:
        return None
    if batch.imitated is None:
        raise ValueError(
            "importance_weights are those of the samples in imitated, which is None"
        )
    return batch.importance_weights


def sample_metrics(
    metric: str,
    values: jax.Array,
    weights: jax.Array | None,
    mask: jax.Array,
    importance: Importance,
    log_probs: jax.Array | None = None,
) -> dict[str, Mean]:
    """Means over the student's own text.

    Args:
        metric: name of ``values``.
        values: float[B, T], each as much as its state counts, as losses return them.
        weights: float[B, T] of `imitated_weights`, or None.
        mask: bool[B, T]; all may hold anything elsewhere.
        importance: see `rkd_jax.losses.sequence_reverse_kl`.
        log_probs: float[B, T], the student's of the targets; None if nobody knows them.

    Returns:
        ``metric`` and, as far as it is known, ``student/nll``, both in nats per token;
        with weights ``student/effective_share``. No gradient flows.
    """
    counts = shares(weights, mask, importance)
    states, targets = (
        mask if share is None else fill_masked(share, mask)
        for share in (counts.states, counts.targets)
    )
    total = masked_sum(values, mask)
    metrics = {metric: Mean(total, states.sum().astype(total.dtype))}
    if log_probs is not None:
        nll = masked_sum(counted(counts.targets, -log_probs), mask)
        metrics["student/nll"] = Mean(nll, targets.sum().astype(nll.dtype))
    if counts.targets is not None:
        count = mask.sum().astype(targets.dtype)
        squares = count * jnp.square(targets).sum()
        metrics["student/effective_share"] = Mean(jnp.square(targets.sum()), squares)
    return jax.lax.stop_gradient(metrics)
