"""Losses: arrays in, unreduced float32 values in nats out; student first.

===================  ===================================================================
likelihood           log-probs of given tokens
divergences          between next-token distributions, ``[..., V] x [..., V] -> [...]``
topk                 the same where the teacher is a list and one bucket for the rest
divergence_terms     what they sum over the vocabulary
fused                both from states and heads: ``[.., T, V]`` logits never exist
fused_plan           how a fused loss is cut; how it is computed: vocabulary_tiles,
                     readouts, row_losses, row_order; fused_policy_gradient: MiniLLM's
ahead                gradients made along with the values, for a foreseen cotangent
preference           on pairs of sequence log-probs, ``Pair -> [...]``
reward               Bradley-Terry and the confidence set of rewards
reward_distillation  an oracle's reward differences as a target (DRDO, the e-DPO family)
pairs                what several losses on pairs share
minmax               the reward player, the multiplier, gaps; where the minus sign is
returns              discounts and returns along a response
importance           weights of text that another sampler wrote
moments              a student's steps and distances on the moments of action values
policy_gradient      surrogates for the student's side of a game, ``[.., T] -> [.., T]``
posterior            a Gaussian over rewards, and the rewards that action values imply
variational          both tied to imitation (AVRIL, X-KD)
ava                  the same for text, from demonstrations or preferences
value                soft values and potential-based shaping (TVKD)
tvkd_release         the losses of the code released with TVKD
===================  ===================================================================

Reductions live in `rkd_jax.masking`, and so does `fill_masked`, which keeps padding
out of a loss that takes no mask. The teacher, the reference and everything
precomputed are data: no loss sends gradient to them.
"""

from rkd_jax.losses.ava import ava_demonstration, ava_preference
from rkd_jax.losses.divergences import (
    forward_kl,
    generalized_jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    topk_forward_kl,
    total_variation,
)
from rkd_jax.losses.fused import (
    linear_divergence,
    linear_expectation,
    linear_soft_value,
    linear_token_log_probs,
    linear_topk_divergence,
)
from rkd_jax.losses.fused_policy_gradient import linear_sequence_reverse_kl
from rkd_jax.losses.importance import per_decision_weights
from rkd_jax.losses.likelihood import log1mexp, token_log_probs
from rkd_jax.losses.minmax import (
    advantage_sum,
    anchored_advantages,
    dual_update,
    moment_gap,
    reward_gap,
    reward_player_loss,
)
from rkd_jax.losses.moments import (
    bounded_moment_distance,
    centered_q,
    gradient_penalty,
    off_policy_moment,
    on_policy_moment,
    one_step,
    one_step_plus_long,
    spread_topk,
)
from rkd_jax.losses.policy_gradient import (
    leave_one_out,
    leave_one_out_per_step,
    on_policy_distillation,
    reinforce,
    sequence_reverse_kl,
)
from rkd_jax.losses.posterior import (
    gaussian_kl,
    gaussian_log_prob,
    temporal_difference,
)
from rkd_jax.losses.preference import dpo, ipo, simpo
from rkd_jax.losses.returns import discount_weights, reward_to_go, trajectory_return
from rkd_jax.losses.reward import (
    bradley_terry,
    check_epsilon,
    confidence_slack,
    triviality_threshold,
)
from rkd_jax.losses.reward_distillation import (
    check_rewards,
    drdo,
    pessimistic_reduce,
    reward_distillation,
    reward_scale,
    running_mean_loss,
)
from rkd_jax.losses.topk import topk_divergence
from rkd_jax.losses.tvkd_release import (
    bucket_entropy,
    bucket_log_probs,
    release_return,
    target_bucket_log_probs,
)
from rkd_jax.losses.value import (
    check_shaping,
    next_value_sum,
    potential_shaping,
    soft_value,
    tvkd,
)
from rkd_jax.losses.variational import avril, experiential_regularizer

__all__ = [
    "advantage_sum",
    "anchored_advantages",
    "ava_demonstration",
    "ava_preference",
    "avril",
    "bounded_moment_distance",
    "bradley_terry",
    "bucket_entropy",
    "bucket_log_probs",
    "centered_q",
    "check_epsilon",
    "check_rewards",
    "check_shaping",
    "confidence_slack",
    "discount_weights",
    "dpo",
    "drdo",
    "dual_update",
    "experiential_regularizer",
    "forward_kl",
    "gaussian_kl",
    "gaussian_log_prob",
    "generalized_jsd",
    "gradient_penalty",
    "ipo",
    "leave_one_out",
    "leave_one_out_per_step",
    "linear_divergence",
    "linear_expectation",
    "linear_sequence_reverse_kl",
    "linear_soft_value",
    "linear_token_log_probs",
    "linear_topk_divergence",
    "log1mexp",
    "moment_gap",
    "next_value_sum",
    "off_policy_moment",
    "on_policy_distillation",
    "on_policy_moment",
    "one_step",
    "one_step_plus_long",
    "per_decision_weights",
    "pessimistic_reduce",
    "potential_shaping",
    "reinforce",
    "release_return",
    "reverse_kl",
    "reward_distillation",
    "reward_gap",
    "reward_player_loss",
    "reward_scale",
    "reward_to_go",
    "running_mean_loss",
    "sequence_reverse_kl",
    "simpo",
    "skew_forward_kl",
    "skew_reverse_kl",
    "soft_value",
    "spread_topk",
    "target_bucket_log_probs",
    "temporal_difference",
    "token_log_probs",
    "topk_divergence",
    "topk_forward_kl",
    "total_variation",
    "trajectory_return",
    "triviality_threshold",
    "tvkd",
]
