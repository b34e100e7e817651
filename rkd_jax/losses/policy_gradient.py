r"""Policy-gradient surrogates: losses whose *gradient* is the point.

Samples come from the student; no gradient flows through sampling, and everything that
multiplies a log-prob is a constant. All functions are to be minimised: the minus sign
is inside.

>>> import jax.numpy as jnp
>>> print(leave_one_out(jnp.array([1.0, 2.0, 6.0])))
[-3.  -1.5  4.5]
"""

from __future__ import annotations

from typing import Literal, get_args

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.divergences import reverse_kl
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.importance import Factors, Importance, counted, factors
from rkd_jax.losses.likelihood import token_log_probs
from rkd_jax.losses.returns import discount_weights, reward_to_go
from rkd_jax.masking import accumulator, fill_masked, masked_mean

LongPart = Literal["following", "inclusive"]
CreditBaseline = Literal["none", "others", "whitened"]


def leave_one_out(returns: jax.Array) -> jax.Array:
    r"""Each sample's return against the mean of the other samples of its prompt.

    .. math:: A_i = R_i - \tfrac{1}{G - 1} \sum_{j \ne i} R_j
        = \tfrac{G}{G - 1} (R_i - \bar R)

    The baseline does not depend on sample i, so it is unbiased; the in-sample mean
    alone would shrink the gradient by (G - 1) / G.

    Args:
        returns: float[*batch, G], total return of G samples of one prompt, G >= 2.

    Returns:
        float32[*batch, G], advantages in the unit of the returns; they add up to 0.

    Gradient:
        Linear in ``returns``; `reinforce` stops it.

    Raises:
        ValueError: G < 2.

    References:
        Kool, van Hoof and Welling, 2019; Ahmadian et al., RLOO, 2402.14740.
        Deviation: none.
    """
    _check_group(returns.shape[-1])
    returns = returns.astype(accumulator(returns))
    return returns - _mean_of_others(returns, axis=-1)


def leave_one_out_per_step(returns_to_go: jax.Array, mask: jax.Array) -> jax.Array:
    r"""Return-to-go against that of the prompt's other samples at the same step.

    .. math:: A_{i,t} = G_{i,t} - \tfrac{1}{G - 1} \sum_{j \ne i} G_{j,t}

    where a sample that has ended contributes 0. Samples of one prompt start their
    response in the same column, so column t is step t for all.

    Args:
        returns_to_go: float[*batch, G, T], see `reward_to_go`; padding may hold
            anything. G >= 2.
        mask: bool or 0/1 numbers, [*batch, G, T].

    Returns:
        float32[*batch, G, T], advantages in the unit of the returns; 0 where the mask
        is not set.

    Gradient:
        Linear in set entries of ``returns_to_go``; `reinforce` stops it.

    Raises:
        ValueError: G < 2.
        AssertionError: shapes differ.

    References:
        As `leave_one_out`. Deviation: per step, which is unbiased too.
    """
    chex.assert_equal_shape([returns_to_go, mask])
    _check_group(returns_to_go.shape[-2])
    to_go = fill_masked(returns_to_go.astype(accumulator(returns_to_go)), mask)
    return fill_masked(to_go - _mean_of_others(to_go, axis=-2), mask)


def reinforce(
    log_probs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
) -> jax.Array:
    r"""REINFORCE surrogate of -J, per token, to be minimised; PbKD's student step.

    .. math:: -m_h\, w_h\, \mathrm{sg}[A_h] \log\pi_\theta(a_h | s_h),
        \qquad w_h = \gamma^h

    Sum it over the tokens (`rkd_jax.masking.sequence_sum`) and average over samples.

    Args:
        log_probs: float[*batch, T], the student's, of its own samples, in nats.
        advantages: float[*batch, T], return-to-go minus baseline.
        mask: bool or 0/1 numbers, [*batch, T]. Both inputs may hold anything elsewhere.
        gamma: in [0, 1], the discount of the steps. With the returns' own gamma the
            gradient is that of the discounted objective; 1 (common practice) is exact
            for undiscounted returns only.

    Returns:
        float32[*batch, T]; 0 where the mask is not set. The value means nothing.

    Gradient:
        Flows to set ``log_probs`` only, as minus weight times advantage; nothing flows
        to ``advantages``.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked).
        AssertionError: shapes differ.

    References:
        Williams, 1992; Sutton et al., Policy Gradient Methods, 1999, Thm. 1.
        Deviation: none.
    """
    chex.assert_equal_shape([log_probs, advantages, mask])
    log_probs = fill_masked(log_probs.astype(accumulator(log_probs)), mask)
    advantages = jax.lax.stop_gradient(fill_masked(advantages, mask))
    weights = discount_weights(mask, gamma=gamma).astype(log_probs.dtype)
    return -weights * advantages.astype(log_probs.dtype) * log_probs


def on_policy_distillation(
    student_log_probs: jax.Array,
    teacher_log_probs: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 0.0,
    clip: float | None = None,
) -> jax.Array:
    r"""Reverse KL to the teacher by policy gradient on student samples, per token.

    .. math:: -m_t\,\mathrm{sg}[A_t] \log\pi_\theta(y_t | s_t), \qquad
        A_t = \sum_{t' \ge t} \gamma^{t' - t}
        \big(\log\pi_E(y_{t'} | s_{t'}) - \log\pi_\theta(y_{t'} | s_{t'})\big)

    It sees sampled tokens only; `rkd_jax.losses.divergences.reverse_kl` is the exact
    single-step term from the full distributions.

    Args:
        student_log_probs: float[*batch, T], of the student's own samples, in nats.
        teacher_log_probs: float[*batch, T], of the same tokens. -inf, a token the
            teacher rules out, is an infinite penalty unless clipped.
        mask: bool or 0/1 numbers, [*batch, T]. Both inputs may hold anything elsewhere.
        gamma: in [0, 1]. 0 credits a token with its own log-ratio (on-policy
            distillation; in expectation the gradient of `reverse_kl` at fixed states),
            1 with all that follow: the exact gradient of the sequence-level KL.
        clip: positive, nats: bound on the size of each log-ratio; None for no bound.

    Returns:
        float32[*batch, T]; 0 where the mask is not set. The value means nothing.

    Gradient:
        Flows to set ``student_log_probs`` only, as -A_t; the log-prob inside A_t is a
        constant, and so is the teacher.

    Raises:
        ValueError: gamma or clip out of range (Python numbers; traced ones are not
            checked).
        AssertionError: shapes differ.

    References:
        G-OPD, 2602.12125, scale 1 (gamma = 0); MiniLLM, 2306.08543, sequence gradient
        (gamma = 1). Deviation: no importance weights, no length normalisation.
    """
    chex.assert_equal_shape([student_log_probs, teacher_log_probs, mask])
    student = fill_masked(
        student_log_probs.astype(accumulator(student_log_probs)), mask
    )
    teacher = fill_masked(teacher_log_probs, mask).astype(student.dtype)
    log_ratio = jax.lax.stop_gradient(teacher - student)
    if clip is not None:
        check_domain("clip", clip, "(0, inf)")
        log_ratio = jnp.clip(log_ratio, -clip, clip)
    return reinforce(student, reward_to_go(log_ratio, mask, gamma=gamma), mask)


def sequence_reverse_kl(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    gamma: float = 1.0,
    long_part: LongPart = "following",
    length_normalised: bool = False,
    importance_weights: jax.Array | None = None,
    importance: Importance = "per_decision",
    baseline: CreditBaseline = "none",
) -> jax.Array:
    r"""Sequence-level reverse KL on samples, per token; MiniLLM's loss.

    .. math:: m_t \Big(\mathrm{KL}(\pi_\theta\|\pi_E)(s_t) + \mathrm{sg}[C_t]
        \big(\log\pi_\theta(y_t|s_t) - \mathrm{sg}[\log\pi_\theta(y_t|s_t)]\big)\Big),
        \qquad C_t = \sum_{t' > t} \gamma^{t' - t}
        \log\frac{\pi_\theta(y_{t'}|s_{t'})}{\pi_E(y_{t'}|s_{t'})}

    The single-step term averages over the next token exactly, the long part credits a
    token with what it led to. The second bracket is 0: the value is the single-step
    term, whose sum over a response is an unbiased estimate of the divergence.

    Text of another sampler, such as a mixture with the teacher, comes with the weights
    :math:`w_t` of its tokens, student over sampler. With :math:`W_t` their product
    through t, the single step counts :math:`W_{t-1}` and each log-ratio
    :math:`W_{t'}`, and the expectations are those of the student's own text.

    Args:
        student_logits: float[*batch, T, V], unnormalised, along the samples.
        teacher_logits: float[*batch, T, V]; log-probs are as good. -inf marks
            impossible tokens.
        targets: int[*batch, T], the sampled tokens.
        mask: bool or 0/1 numbers, [*batch, T]. All inputs may hold anything elsewhere.
        gamma: in [0, 1]. 1 gives the gradient of the sequence-level divergence, 0 drops
            the long part: `reverse_kl` at fixed states.
        long_part: which log-ratios C_t holds. "inclusive" adds the token's own, as the
            released code does; the single-step term is then counted twice.
        length_normalised: divide C_t by the number of log-ratios it sums, so that early
            tokens do not weigh more for having more behind them. Biased.
        importance_weights: float[*batch, T], at least 0, student over sampler at every
            target; None: the student wrote the samples.
        importance: what they multiply. "per_decision", the products above, is exact,
            and spreads with the length. "token" multiplies C_t by w_t alone and
            nothing else, as MiniLLM does: bounded as the weights are, but biased, for
            states and the log-ratios behind a target are the sampler's.
        baseline: what C_t is less. "others": its mean over the other rows that reach
            step t, counted by column; unbiased, and with less variance where rows are
            many and far from the teacher. "whitened": its mean over all targets, and
            C_t is divided by its standard deviation; biased, and the long part no
            longer has the scale of the single step.

    Returns:
        float32[*batch, T]; 0 where the mask is not set. +inf or NaN, honestly, where
        the teacher is -inf at a token the student allows, as in `reverse_kl`; a target
        that the student rules out ends what counts per decision.

    Gradient:
        Flows to set ``student_logits`` only, nothing to the weights. It is not the
        derivative of the value.

    Raises:
        ValueError: gamma out of range (Python numbers; traced ones are not checked),
            unknown long_part, importance or baseline, or vocabularies of different
            size.
        AssertionError: other shapes disagree.

    References:
        Gu et al., MiniLLM, 2306.08543, single and long part of the gradient, weights of
        teacher-mixed samples. Deviation: no clipping of stale samples; only set targets
        are whitened; "token" leaves the single step unweighted, as the released code
        does and the paper, in expectation. Reconstruction: the divisor of the length
        normalisation.
    """
    chex.assert_equal_shape([targets, mask])
    counts = factors(importance_weights, mask, importance)
    alive = mask  # states of weight 0 are those of no response of the student
    if counts.states is not None:
        alive = mask.astype(bool) & (counts.states > 0.0)
    student = fill_masked(student_logits.astype(accumulator(student_logits)), alive)
    teacher = jax.lax.stop_gradient(fill_masked(teacher_logits, alive))
    teacher, targets = teacher.astype(student.dtype), fill_masked(targets, mask)
    single_step = counted(counts.states, reverse_kl(student, teacher))

    taken = token_log_probs(student, targets)
    own = jax.lax.stop_gradient(taken) - token_log_probs(teacher, targets)
    credit = long_part_credit(
        own,
        mask,
        gamma=gamma,
        long_part=long_part,
        length_normalised=length_normalised,
        counts=counts,
        baseline=baseline,
    )
    nothing = taken - jax.lax.stop_gradient(taken)
    if importance_weights is not None:  # the student may rule a target out: no credit
        nothing = jnp.where(taken > -jnp.inf, nothing, 0.0)
    return fill_masked(single_step + credit * nothing, mask)


def long_part_credit(
    log_ratios: jax.Array,
    mask: jax.Array,
    *,
    gamma: float,
    long_part: LongPart,
    length_normalised: bool,
    counts: Factors,
    baseline: CreditBaseline,
) -> jax.Array:
    """C_t of `sequence_reverse_kl` out of ``log pi / pi_E`` of the tokens, [*batch, T].

    Arguments and errors as there; ``counts`` are the `factors` of its weights. Nothing
    here stops a gradient.
    """
    check_domain("gamma", gamma, "[0, 1]")
    check_choice("long_part", long_part, get_args(LongPart))
    check_choice("baseline", baseline, get_args(CreditBaseline))
    log_ratios = counted(counts.signals, log_ratios)
    credit = reward_to_go(log_ratios, mask, gamma=gamma)
    summed = reward_to_go(jnp.ones_like(log_ratios), mask)  # how many log-ratios
    if long_part == "following":
        credit, summed = credit - log_ratios, summed - 1.0
    if length_normalised:
        credit = credit / jnp.maximum(summed, 1.0)
    # Weighted as the target is: so its mean times the score's is 0 under any sampler.
    if baseline == "others":
        credit = credit - counted(counts.signals, _mean_of_other_rows(credit, mask))
    elif baseline == "whitened":
        mean = masked_mean(credit, mask)
        variance = masked_mean(jnp.square(credit - mean), mask)
        credit = credit - counted(counts.signals, jnp.broadcast_to(mean, credit.shape))
        credit = credit / jnp.sqrt(jnp.maximum(variance, jnp.finfo(credit.dtype).eps))
    return counted(counts.credits, credit)


def _check_group(samples: int) -> None:
    if samples < 2:
        raise ValueError(
            f"leave-one-out needs two samples per prompt or more, got {samples}: raise "
            "samples_per_prompt or use no baseline"
        )


def _mean_of_other_rows(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Over the other rows where the mask is set in this column; 0 where none is."""
    rows = tuple(range(values.ndim - 1))
    own, here = fill_masked(values, mask), mask.astype(values.dtype)
    total = own.sum(rows, keepdims=True) - own
    return total / jnp.maximum(here.sum(rows, keepdims=True) - here, 1.0)


def _mean_of_others(values: jax.Array, axis: int) -> jax.Array:
    """Mean over ``axis`` without the entry itself."""
    total = jnp.sum(values, axis=axis, keepdims=True)
    return (total - values) / (values.shape[axis] - 1)
