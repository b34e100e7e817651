r"""GKD: a token-level divergence on a mixture of fixed and student-written responses.

.. math:: \mathcal L = \mathbb E_x\,\mathbb E_{y \sim (1-\rho) D + \rho\,\pi_\theta}
    \sum_t m_t\, \mathrm D\big(\pi_\theta(\cdot|s_t), \pi_E(\cdot|s_t)\big)

No gradient flows through the sampling, so at every :math:`\rho` the loss is that of
`rkd_jax.objectives.kd` on whatever responses the batch holds: GKD is a matter of data.
`mix_rows` is the coin that decides, row by row, which response is imitated. With a
:math:`\rho` of 1 and `reverse_kl` the objective sees the single-step part of the
sequence-level divergence only; `rkd_jax.objectives.minillm` adds the rest.
"""

from __future__ import annotations

from typing import TypeVar

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses import forward_kl
from rkd_jax.losses.domain import check_domain
from rkd_jax.models.api import CausalLM
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.teaching import Divergence
from rkd_jax.types import DemonstrationBatch, ImitationBatch, Objective

_T = TypeVar("_T")


def make_gkd(
    model: CausalLM,
    divergence: Divergence = forward_kl,
    *,
    teacher: CausalLM | None = None,
    temperature: float = 1.0,
) -> Objective:
    """Distillation on the imitated responses, whoever wrote them, per target token.

    Args:
        model: the student.
        divergence: as in `make_kd`; ``functools.partial(generalized_jsd, beta=b)`` for
            the interpolation, whose endpoints are forward and reverse KL.
        teacher: see `make_kd`.
        temperature: the policy is ``softmax(logits / temperature)``; samples and signal
            have to be taken at the same temperature, and ``divergence`` must not bring
            one of its own.

    Returns:
        `Objective` over an `ImitationBatch` or a `DemonstrationBatch` whose signal is
        that of `make_kd` on the imitated responses (`imitated_responses`). On a
        `DemonstrationBatch` it is `make_kd`. Unit and metrics are those of `make_kd`.

    Gradient:
        Flows to the student's parameters only; responses and signal are data.

    Raises:
        ValueError: temperature out of range.

    References:
        Agarwal et al., GKD, 2306.13649. Deviation: normalised by target tokens; the
        coin is tossed per row (`mix_rows`).
    """
    distillation = make_kd(model, divergence, teacher=teacher, temperature=temperature)

    def student_loss(params, critic, frozen, batch, signal, rng):
        return distillation.student_loss(
            params, critic, frozen, imitated_responses(batch), signal, rng
        )

    return Objective("gkd", student_loss, requires=distillation.requires)


def imitated_responses(
    batch: ImitationBatch | DemonstrationBatch,
) -> DemonstrationBatch:
    """The responses a divergence is measured on: ``imitated`` if the batch has it."""
    if isinstance(batch, DemonstrationBatch):
        return batch
    return batch.demonstrations if batch.imitated is None else batch.imitated


def mix_rows(rng: jax.Array, fixed: _T, sampled: _T, *, rho: float) -> _T:
    r"""Each row from ``sampled`` with probability rho, from ``fixed`` otherwise.

    .. math:: y_b \sim (1 - \rho) D + \rho\,\pi_\theta

    Args:
        rng: the coin. The same key tosses the same coin for every pytree of B rows, so
            a batch and its cached signal may be mixed in two calls.
        fixed: pytree of arrays ``[B, ...]``, e.g. a `DemonstrationBatch` of the data
            set, row b answering prompt b.
        sampled: the same structure, shapes and dtypes, e.g. samples of the current
            student for the same prompts.
        rho: in [0, 1]. 0 returns ``fixed``, 1 returns ``sampled``, exactly.

    Returns:
        The pytree of the chosen rows; rows stay where they are.

    Gradient:
        None: what is imitated is data.

    Raises:
        ValueError: rho out of range (Python numbers; traced ones are not checked).
        AssertionError: the two pytrees differ in structure, shape or dtype.

    References:
        Agarwal et al., GKD, 2306.13649, Alg. 1. Deviation: a coin per row where the
        paper tosses one per step; the expectation over batches is the same.
    """
    check_domain("rho", rho, "[0, 1]")
    chex.assert_trees_all_equal_shapes_and_dtypes(fixed, sampled)
    fixed, sampled = jax.lax.stop_gradient((fixed, sampled))
    (rows,) = {leaf.shape[0] for leaf in jax.tree.leaves(fixed)}
    take_sampled = jax.random.bernoulli(rng, rho, (rows,))

    def choose(one: jax.Array, other: jax.Array) -> jax.Array:
        coin = jnp.expand_dims(take_sampled, tuple(range(1, one.ndim)))
        return jnp.where(coin, other, one)

    return jax.tree.map(choose, fixed, sampled)
