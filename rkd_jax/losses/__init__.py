"""Losses: arrays in, unreduced float32 values in nats out; student first.

=================  =====================================================================
likelihood         log-probs of given tokens
divergences        between next-token distributions, ``[..., V] x [..., V] -> [...]``
preference         on pairs of sequence log-probs, ``Pair -> [...]``
reward             Bradley-Terry and the confidence set of rewards
minmax             the reward player, the multiplier, returns; where the minus sign is
policy_gradient    surrogates for the student's side of a game, ``[..., T] -> [..., T]``
=================  =====================================================================

Reductions live in `rkd_jax.masking`, and so does `fill_masked`, which keeps padding
out of a loss that takes no mask. The teacher, the reference and everything
precomputed are data: no loss sends gradient to them.
"""

from rkd_jax.losses.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    topk_forward_kl,
    total_variation,
)
from rkd_jax.losses.likelihood import token_log_probs
from rkd_jax.losses.minmax import (
    discount_weights,
    dual_update,
    reward_gap,
    reward_player_loss,
    reward_to_go,
    trajectory_return,
)
from rkd_jax.losses.policy_gradient import (
    leave_one_out,
    leave_one_out_per_step,
    on_policy_distillation,
    reinforce,
)
from rkd_jax.losses.preference import dpo, ipo, simpo
from rkd_jax.losses.reward import (
    bradley_terry,
    check_epsilon,
    confidence_slack,
    triviality_threshold,
)

__all__ = [
    "bradley_terry",
    "check_epsilon",
    "confidence_slack",
    "discount_weights",
    "dpo",
    "dual_update",
    "forward_kl",
    "generalized_jsd",
    "ipo",
    "leave_one_out",
    "leave_one_out_per_step",
    "on_policy_distillation",
    "reinforce",
    "reverse_kl",
    "reward_gap",
    "reward_player_loss",
    "reward_to_go",
    "simpo",
    "skew_forward_kl",
    "skew_reverse_kl",
    "token_log_probs",
    "topk_forward_kl",
    "total_variation",
    "trajectory_return",
    "triviality_threshold",
]
