r"""What a teacher's values add to a preference: one number per response (TVKD).

The teacher is frozen, so its values are data: they are computed once per pair, in one
forward pass, and no teacher is in memory during training. Under its own prompt, pass
the batch's ``teacher_sequences``.

Centring takes two steps, because the mean of a corpus has to be known before it can be
subtracted::

    center = mean_value(make_state_values(teacher), params, corpus)
    shaping = make_shaping(teacher, center=center)

Taking c from every value adds :math:`(1 - \gamma)\,c\,T` to the shaping, up to what a
pair shares. So centring removes the part of :math:`\Psi` that is a plain length
penalty; `length_correlation` says how much of it that was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rkd_jax.losses import linear_soft_value
from rkd_jax.losses.domain import check_choice, check_domain
from rkd_jax.losses.tvkd_release import bucket_log_probs, target_bucket_log_probs
from rkd_jax.losses.value import (
    ValueSource,
    check_potential,
    check_shaping,
    last_entry,
    next_value_sum,
    potential_shaping,
    soft_value,
)
from rkd_jax.masking import fill_masked, sequence_sum
from rkd_jax.models.api import CausalLM, response_states
from rkd_jax.packed import refuse_packed
from rkd_jax.signals.teacher import Scorer
from rkd_jax.types import Params, ReleaseSignal, Sequences

Terminal = Literal["zero", "last_prefix", "after_eos"]


class StateValues(NamedTuple):
    """V around every target, ``float32[*batch, T]`` each, 0 where masked."""

    before: jax.Array  # of the state that predicts the target
    after: jax.Array  # of the state that has consumed it


def make_state_values(
    model: CausalLM,
    *,
    power: float = 0.7,
    scale: float = 1.0,
    value_source: ValueSource = "log_probs",
    support: int | None = None,
    temperature: float = 1.0,
) -> Callable[[Params, Sequences], StateValues]:
    """The soft value of every state of a response, from one pass over the teacher.

    Args:
        model: the teacher.
        power, scale: see `rkd_jax.losses.soft_value`. The defaults are a choice of
            this library.
        value_source: "log_probs", normalised; or "raw_logits". Preferences do not
            determine the offset of a state's logits, so the latter is a convention.
        support: take the values of the teacher's ``support`` most likely tokens and one
            bucket for all others; None of the full vocabulary. Merging the tail lowers
            the value for power < 1 and raises it for power > 1: a different signal.
        temperature: positive; divides the logits.

    Returns:
        Jitted ``(params, sequences [*batch]) -> StateValues``.

    Gradient:
        None: stopped at the model's parameters.

    Raises:
        ValueError: unknown value_source, a temperature that is not positive, a support
            of raw logits, or (when traced) one that is not below the vocabulary size.
    """
    check_domain("temperature", temperature, "(0, inf)")
    scores = _scores(value_source, support)

    def dense(params: Params, sequences: Sequences) -> jax.Array:
        logits = _state_logits(model, params, sequences) / temperature
        return soft_value(scores(logits), power=power, scale=scale)

    def fused(params: Params, sequences: Sequences) -> jax.Array:
        mask = sequences.response_mask
        none = jnp.zeros_like(mask[..., :1])
        before = jnp.concatenate([mask, none], axis=-1)
        after = jnp.concatenate([none, mask], axis=-1)
        return linear_soft_value(
            _states(model, params, sequences),
            model.head(params),
            power=power,
            scale=scale,
            mask=before | after,
            temperature=temperature,
            bias=model.head_bias(params),
            softcap=model.config.logit_softcap,
        )

    plain = value_source == "log_probs" and support is None
    values = fused if plain else dense

    @jax.jit
    def state_values(params: Params, sequences: Sequences) -> StateValues:
        params = jax.lax.stop_gradient(params)
        return _around(values(params, sequences), sequences.response_mask)

    return state_values


def make_shaping(
    model: CausalLM,
    *,
    gamma: float = 0.7,
    terminal: Terminal = "zero",
    power: float = 0.7,
    scale: float = 1.0,
    value_source: ValueSource = "log_probs",
    support: int | None = None,
    temperature: float = 1.0,
    center: float = 0.0,
) -> Scorer:
    """The potential-based shaping of each response under a teacher, ``[*batch]``.

    On a `PreferenceBatch` this is `ShapingSignal.shaping`, ``[B, 2]``.

    Args:
        model: the teacher; one that was itself trained by DPO, in the source.
        gamma: in [0, 1]. The default is that of the released ``tpkd`` branches.
        terminal: value after the last target: "zero"; "last_prefix", that of the prefix
            that predicts it; "after_eos", what the teacher says once it has read it.
        power, scale, value_source, support, temperature: see `make_state_values`.
        center: subtracted from every value but a "zero" terminal; from `mean_value`.

    Returns:
        Jitted ``(params, sequences [*batch]) -> float32[*batch]``, nats; 0 for an empty
        response.

    Gradient:
        None: stopped at the model's parameters.

    Raises:
        ValueError: settings that are identical to DPO
            (`rkd_jax.losses.check_shaping`), an unknown terminal, or as
            `make_state_values`.

    References:
        TVKD, 2509.16965. Reconstruction: see `rkd_jax.losses.potential_shaping`.
    """
    read = shaping_of_logits(
        gamma=gamma,
        terminal=terminal,
        power=power,
        scale=scale,
        value_source=value_source,
        support=support,
        temperature=temperature,
        center=center,
    )

    @jax.jit
    def shaping(params: Params, sequences: Sequences) -> jax.Array:
        logits = _state_logits(model, params, sequences)
        return read(logits, sequences.response_mask)

    return shaping


def shaping_of_logits(
    *,
    gamma: float = 0.7,
    terminal: Terminal = "zero",
    power: float = 0.7,
    scale: float = 1.0,
    value_source: ValueSource = "log_probs",
    support: int | None = None,
    temperature: float = 1.0,
    center: float = 0.0,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`make_shaping` for logits that are there already.

    Arguments and errors as `make_shaping`.

    Returns:
        ``(logits [*batch, T + 1, V], mask [*batch, T]) -> float32[*batch]``; the logits
        are of the states from before the first target to after the last.

    Gradient:
        Flows to the logits.
    """
    check_shaping(
        gamma=gamma, power=power, terminal=terminal, value_source=value_source
    )
    check_choice("terminal", terminal, get_args(Terminal))
    for name, value, interval in (
        ("gamma", gamma, "[0, 1]"),
        ("power", power, "(0, inf)"),
        ("scale", scale, "(0, inf)"),
        ("temperature", temperature, "(0, inf)"),
    ):
        check_domain(name, value, interval)
    scores = _scores(value_source, support)

    def shaping(logits: jax.Array, mask: jax.Array) -> jax.Array:
        values = soft_value(scores(logits / temperature), power=power, scale=scale)
        before, after = (x - center for x in _around(values, mask))
        end = last_entry(after, mask) if terminal == "after_eos" else terminal
        return potential_shaping(before, mask, gamma=gamma, terminal=end)

    return shaping


def make_release_signal(
    model: CausalLM,
    *,
    support: int = 50,
    power: float = 0.7,
    scale: float = 1.0,
    terminal: Terminal = "zero",
) -> Callable[[Params, Sequences], ReleaseSignal]:
    """What the released variants read of the teacher, from one pass over it.

    Args:
        model: the teacher.
        support: K, number of the teacher's most likely tokens that are told apart.
        power, scale: see `rkd_jax.losses.soft_value`. In the released code they are
            alpha_0 / alpha_tilde and alpha_tilde; in its ``tpkd`` branches 1 / tau and
            alpha tau, where the default tau = 1 makes every value 0.
        terminal: as in `make_shaping`.

    Returns:
        Jitted ``(params, sequences [B, 2]) -> ReleaseSignal`` whose ``reference`` is
        None; ``tpkd_ref`` alone reads it (`make_sequence_scorer` computes it, and
        `dataclasses.replace` puts it in).

    Gradient:
        None: stopped at the model's parameters.

    Raises:
        ValueError: power = 1, where every value is 0; an unknown terminal; or (when
            traced) a support that is not below the vocabulary size.

    References:
        Code released with TVKD, 2509.16965, which has K = 50 and temperature 1; see
        `rkd_jax.losses.tvkd_release`.
    """
    check_potential(power=power)
    check_choice("terminal", terminal, get_args(Terminal))

    @jax.jit
    def release_signal(params: Params, sequences: Sequences) -> ReleaseSignal:
        mask = sequences.response_mask
        logits = _state_logits(model, params, sequences)
        ids = _top_ids(logits, support)
        buckets = bucket_log_probs(logits, ids)
        values = _around(soft_value(buckets, power=power, scale=scale), mask)
        end = last_entry(values.after, mask) if terminal == "after_eos" else terminal
        ids, buckets = ids[..., :-1, :], buckets[..., :-1, :]
        teacher = target_bucket_log_probs(buckets, ids, sequences.targets)
        return ReleaseSignal(
            topk_ids=fill_masked(ids, mask),
            teacher=sequence_sum(teacher, mask),
            values=sequence_sum(values.before, mask),
            next_values=next_value_sum(values.before, mask, terminal=end),
        )

    return release_signal


def mean_value(
    state_values: Callable[[Params, Sequences], StateValues],
    params: Params,
    corpus: Iterable[Sequences],
) -> float:
    """Mean of V over the states before every target of a corpus, in nats.

    Args:
        state_values: from `make_state_values`, with the settings of the shaping.
        params: of the teacher.
        corpus: batches of any shape.

    Raises:
        ValueError: no target in the corpus.
    """
    total, count = 0.0, 0
    for sequences in corpus:
        values = state_values(params, sequences).before
        total += float(np.sum(np.asarray(values, np.float64)))  # 0 where masked
        count += int(np.sum(np.asarray(sequences.response_mask)))
    if not count:
        raise ValueError("the corpus holds no target to take a mean over")
    return total / count


def length_correlation(shaping: ArrayLike, response_mask: ArrayLike) -> float:
    """Correlation of the shaping with the length of the response.

    Near -1 the shaping is a length penalty in disguise; report it beside results.

    Args:
        shaping: float[*batch], `make_shaping`.
        response_mask: bool[*batch, T]; empty responses do not count.

    Returns:
        Pearson's coefficient, in [-1, 1]; NaN where the shaping or the length does not
        vary.
    """
    lengths = np.sum(np.asarray(response_mask), axis=-1).ravel()
    some = lengths > 0
    values = np.asarray(shaping, np.float64).ravel()[some]
    lengths = lengths[some].astype(np.float64)
    if values.size == 0 or np.ptp(values) == 0.0 or np.ptp(lengths) == 0.0:
        return math.nan
    return float(np.corrcoef(values, lengths)[0, 1])


def _state_logits(model: CausalLM, params: Params, sequences: Sequences) -> jax.Array:
    """Logits of the T + 1 states from before the first target to after the last."""
    params = jax.lax.stop_gradient(params)
    return model.unembed(params, _states(model, params, sequences))


def _states(model: CausalLM, params: Params, sequences: Sequences) -> jax.Array:
    """Those states, ``[*batch, T + 1, D]``."""
    refuse_packed(sequences, "state values")
    states = response_states(model, params, sequences)
    return jnp.concatenate([states.before, states.after[..., -1:, :]], axis=-2)


def _around(values: jax.Array, mask: jax.Array) -> StateValues:
    """Values ``[*batch, T + 1]`` of those states, before and after each target."""
    return StateValues(
        fill_masked(values[..., :-1], mask), fill_masked(values[..., 1:], mask)
    )


def _scores(
    value_source: ValueSource, support: int | None
) -> Callable[[jax.Array], jax.Array]:
    """From logits to what the values are taken of."""
    check_choice("value_source", value_source, get_args(ValueSource))
    if value_source == "raw_logits":
        if support is not None:
            raise ValueError("a support merges probabilities; raw_logits have none")
        return lambda logits: logits
    if support is None:
        return jax.nn.log_softmax
    return lambda logits: bucket_log_probs(logits, _top_ids(logits, support))


def _top_ids(logits: jax.Array, support: int) -> jax.Array:
    """int32[.., K]: the most likely tokens."""
    vocabulary = logits.shape[-1]
    if not 0 < support < vocabulary:
        raise ValueError(
            f"support={support} must be positive and below the teacher's {vocabulary} "
            "vocabulary entries; None takes them all"
        )
    return jax.lax.top_k(logits, support)[1]
