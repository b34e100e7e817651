r"""What objectives on samples report of them, whoever wrote them.

Means are over the student's own text, as far as the samples are weighted: per decision
all are, by token the targets and not the states. How well that goes is told by
``student/importance`` and ``student/importance_squared``, the means of w and w^2 over
targets: of n targets as many as

.. math:: n\, \frac{\overline{w}^2}{\overline{w^2}}

would be worth as much if all had the same weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rkd_jax.losses.importance import Importance, counted, factors
from rkd_jax.masking import masked_sum
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
    *,
    importance: Importance = "per_decision",
    log_probs: jax.Array | None = None,
) -> dict[str, Mean]:
    """Means over the samples, weighted as the module says.

    Args:
        metric: name of ``values``.
        values: float[B, T], each as much as its state counts, as losses return them.
        weights: float[B, T] of `imitated_weights`, or None.
        mask: bool[B, T]; all may hold anything elsewhere.
        importance: see `rkd_jax.losses.sequence_reverse_kl`.
        log_probs: float[B, T], the student's of the targets; None if nobody knows them.

    Returns:
        ``metric`` and, as far as it is known, ``student/nll``, both in nats per token;
        with weights the two means of these. No gradient flows.
    """
    counts = factors(weights, mask, importance)
    states, targets = (
        mask if factor is None else factor for factor in (counts.states, counts.targets)
    )
    total = masked_sum(values, mask)
    metrics = {metric: Mean(total, states.sum().astype(total.dtype))}
    if log_probs is not None:
        nll = masked_sum(counted(counts.targets, -log_probs), mask)
        metrics["student/nll"] = Mean(nll, targets.sum().astype(nll.dtype))
    if counts.targets is not None:
        count = mask.sum().astype(targets.dtype)
        metrics["student/importance"] = Mean(targets.sum(), count)
        squares = jnp.square(targets).sum()
        metrics["student/importance_squared"] = Mean(squares, count)
    return jax.lax.stop_gradient(metrics)
