"""The losses that `rkd_jax.losses.vocabulary_tiles` can walk over.

>>> summand = summand_of(functools.partial(divergences.generalized_jsd, beta=0.3))
>>> summand.options
(('beta', 0.3),)
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rkd_jax.losses import divergence_terms as terms
from rkd_jax.losses import divergences
from rkd_jax.losses.divergences import log_rest
from rkd_jax.losses.domain import static_number
from rkd_jax.losses.importance import counted
from rkd_jax.losses.likelihood import put_tokens, take_tokens


class Apart(NamedTuple):
    """The tokens that a loss has listed, and all others, under the student."""

    listed: jax.Array  # [C, K], log-probs; -inf where there is no such token
    rest: jax.Array  # [C], log of the mass of all others


class Logs(NamedTuple):
    """Log-probs of some rows and columns, ``[C, V']``, and which tokens these are."""

    student: jax.Array
    teacher: jax.Array | None
    columns: jax.Array  # int32[V']
    apart: Apart | None = None  # of all shards, if the loss lists tokens
    power_sums: jax.Array | None = None  # [C, powers], of all shards, if it has any


class RowLoss(abc.ABC):
    """A loss per row of log-probs; hashable, for it is static.

    ``data`` is a pytree of arrays with C rows, such as targets.
    """

    powers: tuple[float, ...] = ()
    """Of the student's probabilities; the logs of their sums are in `Logs`."""

    def places(self, columns: jax.Array, data: Any) -> jax.Array | None:
        """int[C, K]: tokens that the loss lists, as places in ``columns``.

        Past the last where a token is absent. `stats` finds them in `Logs.apart`.
        """
        return None

    def stats(self, logs: Logs, data: Any, axis_name: str | None) -> Any:
        """What a column has to know of its row: a pytree of arrays with C rows.

        ``logs`` are all columns, or under ``axis_name`` a shard of them.
        """
        return None

    @abc.abstractmethod
    def partial(self, logs: Logs, data: Any, stats: Any) -> jax.Array:
        """``[C]``: the loss, or under ``axis_name`` this shard's summand of it."""

    @abc.abstractmethod
    def pull(self, logs: Logs, data: Any, stats: Any) -> jax.Array:
        """``[C]``: sum of the slopes, or under ``axis_name`` this shard's summand."""

    @abc.abstractmethod
    def logit_gradient(
        self, logs: Logs, data: Any, stats: Any, pull: jax.Array | None, scale
    ) -> jax.Array:
        """``[C, V']``: derivative in the logits, each row times ``scale`` [C].

        ``pull`` is that of all shards, None if nothing is normalised.
        """


class BySlopes(RowLoss):
    """A loss whose gradient is made of its slopes, column by column."""

    @abc.abstractmethod
    def slopes(self, logs: Logs, data: Any, stats: Any) -> jax.Array:
        """``[C, V']``: derivative of the loss in each of the student's log-probs."""

    def pull(self, logs: Logs, data: Any, stats: Any) -> jax.Array:
        """Of a loss that does not know it beforehand."""
        return self.slopes(logs, data, stats).sum(-1)

    def logit_gradient(self, logs: Logs, data, stats, pull, scale) -> jax.Array:
        """The slopes, less the student's mass times all of them together."""
        gradient = self.slopes(logs, data, stats)
        if pull is not None:
            gradient = gradient - jnp.exp(logs.student) * pull[:, None]
        return _scaled(gradient, scale)


class Summand(NamedTuple):
    """An elementwise function of the log-probs of student and teacher, with options."""

    terms: Callable[..., jax.Array]
    slopes: Callable[..., jax.Array]  # derivative of the terms in the student's
    pull: Callable[..., jax.Array] | None = None  # of the same sum as the slopes
    options: tuple[tuple[str, Any], ...] = ()  # by name; comparable


SUMMANDS = {
    divergences.forward_kl: Summand(terms.forward_kl_terms, terms.forward_kl_slopes),
    divergences.reverse_kl: Summand(
        terms.reverse_kl_terms, terms.reverse_kl_slopes, terms.reverse_kl_pull
    ),
    divergences.generalized_jsd: Summand(
        terms.generalized_jsd_terms, terms.generalized_jsd_slopes
    ),
    divergences.skew_forward_kl: Summand(
        terms.skew_forward_kl_terms, terms.skew_forward_kl_slopes
    ),
    divergences.skew_reverse_kl: Summand(
        terms.skew_reverse_kl_terms, terms.skew_reverse_kl_slopes
    ),
    divergences.total_variation: Summand(
        terms.total_variation_terms, terms.total_variation_slopes
    ),
}
"""What a divergence sums over the vocabulary."""


def _scaled(rows: jax.Array, scale: jax.Array) -> jax.Array:
    """Each row times a number; one without weight may hold anything, NaN too."""
    scale = scale[:, None]
    return jnp.where(scale != 0.0, rows * scale, 0.0)


@dataclasses.dataclass(frozen=True)
class TokenLogProb(BySlopes):
    """Log-probability of the target; ``data`` is int32[C]."""

    def partial(self, logs: Logs, data: jax.Array, stats: None) -> jax.Array:
        """The target's entry, where it is among the columns."""
        place, here = self._place(logs, data)
        place = jnp.where(here, place, 0)[:, None]
        return jnp.where(here, take_tokens(logs.student, place)[:, 0], 0.0)

    def slopes(self, logs: Logs, data: jax.Array, stats: None) -> jax.Array:
        """1 at the target."""
        return (logs.columns[None] == data[:, None]).astype(logs.student.dtype)

    def pull(self, logs: Logs, data: jax.Array, stats: None) -> jax.Array:
        """1 where the target is among the columns."""
        return self._place(logs, data)[1].astype(logs.student.dtype)

    def _place(self, logs: Logs, data: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Where the targets are among the columns, and whether they are."""
        place = data - logs.columns[0]
        return place, (place >= 0) & (place < logs.columns.size)


@dataclasses.dataclass(frozen=True)
class PerToken(BySlopes):
    """A sum over the vocabulary of a function of both log-probs."""

    summand: Summand

    def partial(self, logs: Logs, data: None, stats: None) -> jax.Array:
        """The sum over these columns."""
        options = dict(self.summand.options)
        return self.summand.terms(logs.student, logs.teacher, **options).sum(-1)

    def slopes(self, logs: Logs, data: None, stats: None) -> jax.Array:
        """Elementwise derivatives."""
        options = dict(self.summand.options)
        return self.summand.slopes(logs.student, logs.teacher, **options)

    def pull(self, logs: Logs, data: None, stats: None) -> jax.Array:
        """The sum of the slopes, or of what adds up to the same."""
        if self.summand.pull is None:
            return super().pull(logs, data, stats)
        options = dict(self.summand.options)
        return self.summand.pull(logs.student, logs.teacher, **options).sum(-1)


@dataclasses.dataclass(frozen=True)
class CreditedReverseKl(BySlopes):
    """``share`` of the reverse KL, and ``credit * (log_prob - sg[log_prob])``.

    ``data`` are targets int32[C], credits float[C] and shares float[C] or None, which
    is all of it. The second part, of the target, is 0 and has a gradient: the slopes
    are not those of the value.
    """

    single_step = PerToken(SUMMANDS[divergences.reverse_kl])

    def partial(self, logs: Logs, data, stats: None) -> jax.Array:
        """The divergence's sum over these columns."""
        *_, share = data
        return counted(share, self.single_step.partial(logs, None, None))

    def slopes(self, logs: Logs, data, stats: None) -> jax.Array:
        """Those of the divergence, and the credit at the target."""
        targets, credit, share = data
        slopes = self.single_step.slopes(logs, None, None)
        slopes = counted(None if share is None else share[:, None], slopes)
        here = logs.columns[None] == targets[:, None]
        return slopes + jnp.where(here, credit[:, None].astype(slopes.dtype), 0.0)


class _Buckets(NamedTuple):
    """Log-probs of the listed tokens, ``[C, K]``, and of all others, ``[C]``."""

    listed: jax.Array  # of the student
    student: jax.Array
    teacher: jax.Array


@dataclasses.dataclass(frozen=True)
class TopK(RowLoss):
    """A divergence with one bucket for the tail; ``data`` is ids and log-probs [C, K].

    The student's bucket is a log-sum-exp, of whose slope every token outside the list
    has its share.
    """

    vocabulary: int  # V, all shards together
    summand: Summand

    def places(self, columns: jax.Array, data) -> jax.Array:
        """The teacher's list. An entry with log-prob -inf counts as absent."""
        ids, log_probs = data
        width = columns.size
        places = ids - columns[0]
        present = (log_probs > -jnp.inf) & (places >= 0) & (places < width)
        return jnp.where(present, places, width)

    def stats(self, logs: Logs, data, axis_name: str | None) -> _Buckets:
        """All buckets of the student, the last one of the teacher."""
        listed, rest = logs.apart
        teacher = log_rest(data[1].astype(rest.dtype), self.vocabulary)[:, 0]
        return _Buckets(listed, rest, teacher)

    def partial(self, logs: Logs, data, stats: _Buckets) -> jax.Array:
        """All of it from the first shard."""
        ids, log_probs = data
        listed, rest = self._of_buckets(self.summand.terms, log_probs, stats)
        value = listed.sum(-1) + rest
        # A listed token that the student does not have is nowhere, its mass is.
        unknown = (log_probs > -jnp.inf) & ((ids < 0) | (ids >= self.vocabulary))
        value = jnp.where(unknown.any(-1), jnp.nan, value)
        return jnp.where(logs.columns[0] == 0, value, 0.0)

    def pull(self, logs: Logs, data, stats: _Buckets) -> jax.Array:
        """The slopes of all buckets, from the first shard."""
        listed, rest = self._slopes(data, stats)
        return jnp.where(logs.columns[0] == 0, listed.sum(-1) + rest, 0.0)

    def logit_gradient(self, logs: Logs, data, stats, pull, scale) -> jax.Array:
        """Outside the list a multiple of the student's mass: one pass, then K writes.

        The factor is the bucket's slope over its mass, less the pull, which may be
        larger than any number: its logarithm joins the log-prob.
        """
        slopes, rest = self._slopes(data, stats)
        some = rest != 0.0
        size = jnp.log(jnp.where(some, jnp.abs(rest), 1.0)) - stats.student
        size = jnp.where(some, size, -jnp.inf)
        top = jnp.maximum(size, 0.0)
        factor = jnp.sign(rest) * jnp.exp(size - top) - pull * jnp.exp(-top)
        size = top + jnp.log(jnp.abs(factor))
        others = jnp.sign(factor)[:, None] * jnp.exp(logs.student + size[:, None])
        others = _scaled(others, scale)
        listed = _scaled(slopes - jnp.exp(stats.listed) * pull[:, None], scale)
        return put_tokens(others, self.places(logs.columns, data), listed)

    def _slopes(self, data, stats: _Buckets) -> tuple[jax.Array, jax.Array]:
        """Derivatives in the student's buckets; 0 in one that holds no token."""
        listed, rest = self._of_buckets(self.summand.slopes, data[1], stats)
        return listed, jnp.where(stats.student > -jnp.inf, rest, 0.0)

    def _of_buckets(self, function, log_probs, stats: _Buckets):
        """An elementwise function of listed tokens, [C, K], and of the rest, [C]."""
        function = functools.partial(function, **dict(self.summand.options))
        listed = function(stats.listed, log_probs.astype(stats.listed.dtype))
        return listed, function(stats.student, stats.teacher)


@dataclasses.dataclass(frozen=True)
class SoftValue(BySlopes):
    """``scale * logsumexp(power * log_probs)``."""

    power: float
    scale: float

    @property
    def powers(self) -> tuple[float, ...]:
        """The one."""
        return (self.power,)

    def stats(self, logs: Logs, data: None, axis_name: str | None) -> jax.Array:
        """The log-sum-exp."""
        return logs.power_sums[:, 0]

    def partial(self, logs: Logs, data: None, stats: jax.Array) -> jax.Array:
        """All of it from the first shard."""
        return jnp.where(logs.columns[0] == 0, self.scale * stats, 0.0)

    def slopes(self, logs: Logs, data: None, stats: jax.Array) -> jax.Array:
        """Scale times power times the softmax of the powers."""
        share = jnp.exp(self.power * logs.student - stats[:, None])
        return self.scale * self.power * share

    def pull(self, logs: Logs, data: None, stats: jax.Array) -> jax.Array:
        """Shares add up to one; the first shard says so."""
        whole = jnp.full_like(stats, self.scale * self.power)
        return jnp.where(logs.columns[0] == 0, whole, 0.0)


def _expected_value_terms(log_probs: jax.Array, values: jax.Array) -> jax.Array:
    """Summands of an expectation: 0 where there is no mass, whatever the value."""
    mass = jnp.exp(log_probs)
    return jnp.where(mass > 0.0, mass * values, 0.0)


def _expected_under_terms(values: jax.Array, log_probs: jax.Array) -> jax.Array:
    """The same as a function of the values."""
    return _expected_value_terms(log_probs, values)


def _mass_of_teacher(values: jax.Array, log_probs: jax.Array) -> jax.Array:
    """Derivative of an expectation in the values."""
    return jnp.exp(log_probs)


EXPECTATION = {
    # Its derivative in the log-probs is the summand itself.
    "policy": Summand(_expected_value_terms, _expected_value_terms),
    "values": Summand(_expected_under_terms, _mass_of_teacher),
}
"""A mean of action values under a policy, by the side that is trained."""


def summand_of(divergence: Callable[..., jax.Array]) -> Summand:
    """The summand of a dense divergence, with its options."""
    function, options = divergence, {}
    if isinstance(divergence, functools.partial):
        function, options = divergence.func, divergence.keywords
    if function not in SUMMANDS or getattr(divergence, "args", ()):
        known = ", ".join(one.__name__ for one in SUMMANDS)
        raise ValueError(
            f"{divergence!r} cannot be fused; give one of {known}, or a "
            "functools.partial of one with options by name"
        )
    if "temperature" in options:
        raise ValueError("give the temperature to linear_divergence itself")
    options = {name: static_number(name, value) for name, value in options.items()}
    one = jnp.zeros(1)
    jax.eval_shape(functools.partial(function, **options), one, one)  # checks options
    return SUMMANDS[function]._replace(options=tuple(sorted(options.items())))
