r"""Bradley-Terry maximum likelihood of a Q-function: the anchor of MM-PbKD.

.. math:: \hat Q = \arg\min_Q \overline{\mathrm{NLL}}_Q(D), \qquad
    \mathrm{NLL}_Q = -\log\sigma\big(A_\rho(\tau_0) - A_\rho(\tau_1)\big), \qquad
    A_\rho(\tau) = \sum_h \gamma^h \big(Q(s_h, a_h) - V_\rho(s_h)\big)

with :math:`\rho` the policy that anchors Q: the teacher for the on-policy gap, the
student for the off-policy one. As in `rkd_jax.objectives.reward_model`, the trained
player takes the ``student`` seat of the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rkd_jax.losses import advantage_sum, centered_q
from rkd_jax.losses.domain import check_domain
from rkd_jax.masking import fill_masked, masked_sum
from rkd_jax.objectives.policy import members
from rkd_jax.objectives.reward_model import l2_penalty, pair_losses
from rkd_jax.types import (
    LossOutput,
    Mean,
    Objective,
    Pair,
    Params,
    PreferenceBatch,
    Sequences,
    WhiteBoxSignal,
)

QValues = Callable[[Params, Sequences, jax.Array | None], jax.Array]
"""``(parameters, sequences [*batch], features | None) -> float[*batch, T, V]``.

Entry t holds the value of every action in the state *before* target t; the features are
a frozen trunk's states there.
"""


@dataclasses.dataclass(frozen=True)
class QFunction:
    """A critic's action values as the game reads them: centred, then bounded.

    Example: ``QFunction(head_on_features, center=True, bound=5.0)``.

    Raises:
        ValueError: ``bound`` is not positive.
    """

    values: QValues
    center: bool  # less the anchor's mean, so that the bound is one on advantages
    bound: float | None  # R: the value becomes R * tanh(value / R)

    def __post_init__(self) -> None:
        check_domain("q_bound", self.bound, "(0, inf)")

    def __call__(
        self,
        params: Params,
        sequences: Sequences,
        features: jax.Array | None,
        anchor_log_probs: jax.Array | None,
    ) -> jax.Array:
        """float32[*batch, T, V], 0 in padding; gradient flows to ``params``.

        The anchor's log-probs are read only if ``center`` is set.
        """
        mask = sequences.response_mask
        if features is not None:
            features = fill_masked(features, mask)
        values = fill_masked(self.values(params, sequences, features), mask)
        if self.center:
            values = centered_q(values, anchor_log_probs, mask)
        if self.bound is None:
            return values
        return self.bound * jnp.tanh(values / self.bound)


def pair_advantages(
    q_function: QFunction,
    params: Params,
    sequences: Sequences,
    features: jax.Array | None,
    anchor_log_probs: jax.Array,
    gamma: float,
) -> Pair:
    """`advantage_sum` of both responses of each pair, ``[pairs]`` each.

    Their loss (`pair_losses`) under the anchor's parameters, plus its penalty if there
    is one, is the ``anchor_nll`` that the game asks for.
    """
    q_values = q_function(params, sequences, features, anchor_log_probs)
    return members(
        advantage_sum(
            q_values,
            anchor_log_probs,
            sequences.targets,
            sequences.response_mask,
            gamma=gamma,
        )
    )


def make_q_anchor(
    q_values: QValues,
    *,
    gamma: float = 1.0,
    center_q: bool = True,
    q_bound: float | None = 5.0,
    l2: float = 0.0,
) -> Objective:
    """Bradley-Terry loss of advantage sums, per pair.

    Args:
        q_values: the critic's raw action values; see `QValues`.
        gamma: discount in [0, 1]; the sum is not divided by length.
        center_q, q_bound: as in `rkd_jax.objectives.mm_pbkd.make_mm_pbkd`, and equal to
            what the game will use.
        l2: weight of `l2_penalty`, nats per pair. Separable preferences have no finite
            maximum of the likelihood; with a penalty or a bound they have one.

    Returns:
        `Objective` whose ``student_loss`` trains the critic's parameters on a
        `PreferenceBatch`. It requires `WhiteBoxSignal.preferences`, the log-probs [B,
        2, T, V] of the *anchoring* policy: the teacher's, or, for the off-policy gap,
        those of the student at hand. Unit: nats per pair. Metrics ``anchor/nll`` and
        ``anchor/accuracy`` (ties count half).

    Gradient:
        Flows to the critic's parameters only.

    Raises:
        ValueError: q_bound or l2 out of range; gamma when traced.

    References:
        MM-PbKD, 2505.18952. Reconstruction: see `make_mm_pbkd`.
    """
    check_domain("l2", l2, "[0, inf)")
    q_function = QFunction(q_values, center_q, q_bound)

    def student_loss(
        params, critic, frozen, batch: PreferenceBatch, signal: WhiteBoxSignal, rng
    ):
        del critic, frozen, rng
        signal = jax.lax.stop_gradient(signal)
        returns = pair_advantages(
            q_function,
            params,
            batch.sequences,
            signal.preference_features,
            signal.preferences,
            gamma,
        )
        nll, valid = pair_losses(returns, batch)
        total = masked_sum(nll, valid)
        weight = valid.sum().astype(total.dtype)
        hit = 0.5 * (1.0 + jnp.sign(returns.chosen - returns.rejected))
        metrics = {
            "anchor/nll": Mean(total, weight),
            "anchor/accuracy": Mean(masked_sum(hit, valid), weight),
        }
        if l2:
            total = total + l2 * weight * l2_penalty(params)
        return LossOutput(total, weight, metrics)

    return Objective("q_anchor", student_loss, requires=("preferences",))
