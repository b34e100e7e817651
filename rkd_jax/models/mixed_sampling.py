r"""Teacher-mixed sampling: every token from a mixture of teacher and student.

.. math:: \tilde p(y_t | s_t) = \alpha\, \pi_E(y_t | s_t)
    + (1 - \alpha)\, \pi_\theta(y_t | s_t)

The teacher keeps a weak student's samples readable and close to its own; the student
sees the states that this leads to. What is learned from such samples has to be weighted
by student over mixture, see `rkd_jax.losses.sequence_reverse_kl`: with `Samples` as
returned here a token's weight is ``exp(log_probs - behaviour_log_probs)``, at most
1 / (1 - alpha), and 1 in padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rkd_jax.models.api import CausalLM
from rkd_jax.models.categorical import draw_tokens, truncate
from rkd_jax.models.decoding import check_eos_ids, check_prompts
from rkd_jax.models.sampling import (
    Draw,
    Samples,
    SamplingConfig,
    entry,
    sample_rows,
    tempered,
)
from rkd_jax.types import Params, Prompts


def make_mixed_sampler(
    student: CausalLM,
    teacher: CausalLM,
    config: SamplingConfig,
    *,
    alpha: float = 0.2,
) -> Callable[..., Samples]:
    """Build ``sample(student_params, teacher_params, prompts, rng, teacher_prompts)``.

    As `rkd_jax.models.sampling.make_sampler`, with two models reading the response that
    is being written, each behind its own prompts and with its own cache. Keys are used
    in the same way: alpha = 0 draws exactly what ``make_sampler(student, config)``
    does, and alpha = 1, up to rounding, what it draws from the teacher; exactly that
    where both models are the same.

    Both policies are ``softmax(logits / config.temperature)``. Top-k and top-p cut the
    mixture, after which the weights no longer make up for the tokens that were cut.

    ``log_probs`` are the student's, over the full vocabulary; -inf, an importance
    weight of 0, where the student rules the token out. ``behaviour_log_probs`` are the
    mixture's. Softmax and mixture are in float32.

    Args:
        student: any `CausalLM`.
        teacher: any `CausalLM` over the same token ids.
        config: static. A temperature of 0 has no mixture.
        alpha: in [0, 1], the teacher's share of the probability.

    Returns:
        The sampler. ``teacher_prompts`` [B, P'] may have another width than ``prompts``
        [B, P]; None, the default, shows the teacher the student's. The `Samples` hold
        the student's prompts. It may be called inside a jitted function.

    Gradient:
        None flows to either model's parameters.

    Raises:
        ValueError: alpha out of range, temperature 0, heads of different width, an EOS
            id outside the vocabulary; and from ``sample``, for either model's prompts,
            as `make_sampler`, or another number of prompts for the teacher.

    References:
        Gu et al., MiniLLM, 2306.08543, teacher-mixed sampling and its weights.
        Deviation: none at temperature 1; at others both models' logits are divided by
        it before they are mixed.
    """
    _check(student, teacher, config, alpha)
    draw = _mixed_draw(config, float(alpha))

    @jax.jit
    def generate(student_params, teacher_params, prompts, teacher_prompts, rng):
        voices = (
            (student, student_params, prompts),
            (teacher, teacher_params, teacher_prompts),
        )
        return sample_rows(config, voices, draw, rng)

    def sample(
        student_params: Params,
        teacher_params: Params,
        prompts: Prompts,
        rng: jax.Array,
        teacher_prompts: Prompts | None = None,
    ) -> Samples:
        new = config.max_new_tokens
        check_prompts(prompts, new, student.config.max_length)
        if teacher_prompts is None:
            teacher_prompts = prompts
        check_prompts(teacher_prompts, new, teacher.config.max_length, whose="teacher ")
        rows, others = prompts.tokens.shape[0], teacher_prompts.tokens.shape[0]
        if rows != others:
            raise ValueError(
                f"{rows} prompts, but {others} teacher prompts: give one of each per "
                "row"
            )
        return generate(student_params, teacher_params, prompts, teacher_prompts, rng)

    return sample


def _mixed_draw(config: SamplingConfig, alpha: float):
    """One token per row from the logits of student and teacher, [R, V] each."""

    def draw(logits, keys):
        student, teacher = (tempered(x, config.temperature) for x in logits)
        # In units of the student's softmax: for alpha = 0 this is, to the last bit,
        # what the student alone is drawn from, and for alpha = 1 and equal models too.
        share = alpha * jnp.expand_dims(student.total / teacher.total, 1)
        mixture = (1.0 - alpha) * student.weights + share * teacher.weights
        mixture = mixture / jnp.max(mixture, axis=-1, keepdims=True)
        kept = truncate(mixture, top_k=config.top_k, top_p=config.top_p)
        tokens = draw_tokens(kept, keys)
        mass = jnp.log(jnp.sum(kept, axis=-1))
        return Draw(
            tokens=tokens,
            mask=jnp.ones_like(tokens, dtype=bool),
            log_probs=entry(student.scaled, tokens) - jnp.log(student.total),
            behaviour_log_probs=jnp.log(entry(kept, tokens)) - mass,
        )

    return draw


def _check(student, teacher, config, alpha) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if not 0.0 < config.temperature < math.inf:
        raise ValueError(
            f"temperature must be positive to mix two policies, got "
            f"{config.temperature}: greedy decoding is make_sampler's"
        )
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"student head has {sizes[0]} entries, teacher head {sizes[1]}: over one "
            "token map, bring both to one width with "
            "rkd_jax.models.surgery.crop_vocab"
        )
    check_eos_ids(config.eos_ids, sizes[0])
