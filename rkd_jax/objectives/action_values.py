"""What a critic's action values say along responses, a few positions at a time.

A moment is a sum over the vocabulary: of a critic's values, weighted by the student's
or the teacher's probabilities. Each of the three is read from the states of a model by
a head; of policies or critics that are known by their numbers the numbers are read.
Where all positions together would be more than `LOGITS`, slices of them follow one
another (`rkd_jax.objectives.position_slices`). They are cut along T, or between rows
where a row has to be whole, and of a batch that lies on several devices each takes its
own rows: a head that is cut over them is put together once for all slices, and its
gradient summed over devices once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rkd_jax.losses import anchored_advantages, centered_q, moment_gap, one_step
from rkd_jax.losses.domain import check_domain
from rkd_jax.losses.likelihood import taken_values, tempered_log_softmax
from rkd_jax.masking import accumulator, fill_masked
from rkd_jax.models.api import CausalLM, response_hidden
from rkd_jax.models.projection import project
from rkd_jax.objectives.policy import frozen_params
from rkd_jax.objectives.position_slices import Along, in_slices
from rkd_jax.placement import on_own_rows
from rkd_jax.types import Params, Sequences

LOGITS = 2**25
"""Numbers over the vocabulary that a device holds at once, in each of a few arrays,
where the heads are whole on it."""

QValues = Callable[[Params, Sequences, jax.Array | None], jax.Array]
"""``(parameters, sequences [*batch], features | None) -> float[*batch, T, V]``.

Entry t holds the value of every action in the state *before* target t; the features are
a frozen trunk's states there. A critic that is nothing but a head on these also has
``on_states(parameters, features [.., D]) -> [.., V]`` (as that of
`rkd_jax.models.heads.head_q_values`): it is asked about a slice at a time.
"""

Player = Literal["student", "teacher"]
Moments = dict[str, jax.Array]  # by the names of `MOMENTS`


def _as_given(weights: None, rows: jax.Array) -> jax.Array:
    return rows


@dataclasses.dataclass(frozen=True)
class Rows:
    """Numbers over the vocabulary at every position, and what they are read from.

    Padding of the states may hold anything.

    Example: ``Rows(log_probs)`` are numbers that are there; ``Rows(hidden, lambda head,
    x: x @ head, head)`` those of a head.
    """

    states: jax.Array  # [*batch, T, D]
    read: Callable[[Any, jax.Array], jax.Array] = _as_given  # (.., [.., D]) -> [.., V]
    weights: Any = None  # arrays that it reads with, whole

    @property
    def vocabulary(self) -> int:
        """V."""
        one = jax.ShapeDtypeStruct((1, self.states.shape[-1]), self.states.dtype)
        return jax.eval_shape(self.read, self.weights, one).shape[-1]


def policy_rows(
    model: CausalLM, params: Params, states: jax.Array, *, temperature: float
) -> Rows:
    """A policy's log-probs from its states before every target, ``[*batch, T, D]``."""
    cap = model.config.logit_softcap
    read = partial(_log_probs, softcap=cap, temperature=temperature)
    return Rows(states, read, (model.head(params), model.head_bias(params)))


def _log_probs(weights, states, *, softcap: float | None, temperature: float):
    head, bias = weights
    logits = project(states, head, 1, accumulator(states))
    if bias is not None:
        logits += jnp.expand_dims(bias.astype(logits.dtype), range(logits.ndim - 1))
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return tempered_log_softmax(logits, temperature)


def student_rows(
    model: CausalLM, params: Params, sequences: Sequences, *, temperature: float
) -> Rows:
    """`policy_rows` after a pass of the trunk; gradient flows to ``params``."""
    states = response_hidden(model, params, sequences)
    return policy_rows(model, params, states, temperature=temperature)


@dataclasses.dataclass(frozen=True)
class FrozenPolicy:
    """A policy that a signal knows by its log-probs, or, with a model, by its states.

    Example: ``FrozenPolicy("teacher", None, 1.0)`` reads log-probs [*batch, T, V];
    ``FrozenPolicy("teacher", model, 1.0)`` states [*batch, T, D], and the head's
    parameters from ``frozen["teacher"]``.
    """

    name: str
    model: CausalLM | None
    temperature: float

    def __call__(self, frozen: Any, given: jax.Array | None) -> Rows | None:
        """None where the signal has nothing."""
        if given is None:
            return None
        given = jax.lax.stop_gradient(given)
        if self.model is None:
            return Rows(given)
        params = jax.lax.stop_gradient(frozen_params(frozen, self.name))
        return policy_rows(self.model, params, given, temperature=self.temperature)


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

    def along(
        self, params: Params, sequences: Sequences, features: jax.Array | None
    ) -> Rows:
        """The raw values of the responses; gradient flows to ``params``."""
        if features is not None and hasattr(self.values, "on_states"):
            return Rows(features, self.values.on_states, params)
        if features is not None:
            features = fill_masked(features, sequences.response_mask)
        return Rows(self.values(params, sequences, features))

    def shaped(
        self, values: jax.Array, anchor_log_probs: jax.Array | None, mask: jax.Array
    ) -> jax.Array:
        """Raw values [.., V] as the game reads them, 0 where the mask [..] is not set.

        The anchor's log-probs [.., V] are read only if ``center`` is set.
        """
        values = fill_masked(values, mask)
        if self.center:
            values = centered_q(values, anchor_log_probs, mask)
        if self.bound is None:
            return values
        return self.bound * jnp.tanh(values / self.bound)


class Slice(NamedTuple):
    """What is known at some positions."""

    q_values: jax.Array  # [.., V], shaped
    student: jax.Array | None  # [.., V], log-probs
    teacher: jax.Array | None
    anchor: jax.Array | None
    targets: jax.Array  # int32[..]
    mask: jax.Array  # bool[..]


MOMENTS: dict[str, Callable[[Slice], jax.Array]] = {
    "gap": lambda s: moment_gap(s.q_values, s.student, s.teacher, s.mask),
    "advantages": lambda s: anchored_advantages(
        s.q_values, s.anchor, s.targets, s.mask
    ),
    "one_step": lambda s: one_step(s.q_values, s.student, s.mask),
    "log_probs": lambda s: taken_values(s.student, s.targets, s.mask),
}
"""What is asked of a position, without discount, ``[..]`` each, 0 where masked:
`moment_gap`, `anchored_advantages` and `one_step`, and the student's log-prob of the
target."""

_READS: dict[str, tuple[str, ...]] = {
    "gap": ("student", "teacher"),
    "advantages": ("anchor",),
    "one_step": ("student",),
    "log_probs": ("student",),
}


def action_moments(
    names: Iterable[str],
    q_function: QFunction,
    q_rows: Rows,
    sequences: Sequences,
    *,
    anchor: Player,
    student: Rows | None = None,
    teacher: Rows | None = None,
    foreseen: Moments | None = None,
    logits: int | None = None,
) -> Moments:
    """The named `MOMENTS` at every target.

    Args:
        names: which.
        q_function: how raw values are shaped.
        q_rows: from its ``along``.
        sequences: [*batch].
        anchor: the policy that Q is anchored by.
        student: its log-probs along the responses; needed where a name or the anchor
            reads it, as is the teacher's.
        teacher: data.
        foreseen: by name, float[*batch, T]: up to one factor for all, what the caller
            will multiply the moments with. It changes no number, and spares slices
            their second computation.
        logits: numbers over the vocabulary that a device may hold at once; None for
            `LOGITS`.

    Returns:
        float32[*batch, T] by name.

    Gradient:
        Flows as the losses of the names say: to the critic from all but ``one_step``
        and ``log_probs``, to the student from ``gap`` and these. With ``foreseen`` and
        a critic that is read a slice at a time, to that critic's parameters alone. A
        head's gradient adds up over slices in the dtype of its parameters.
    """
    question = _asked(names, q_function, q_rows, sequences, anchor, student, teacher)
    return _along_positions(question, sequences, foreseen, logits or LOGITS)


def row_terms(
    conclude: Callable[[Moments, jax.Array, Any], Any],
    data: Any,
    names: Iterable[str],
    q_function: QFunction,
    q_rows: Rows,
    sequences: Sequences,
    *,
    anchor: Player,
    teacher: Rows,
    foreseen: Any,
    logits: int | None = None,
) -> Any:
    """What a row's `MOMENTS` come to, ``conclude(moments, mask, data)``, ``[B]``.

    Where a device can hold the log-probs of a row, its gradient is made as soon as it
    is read, however its moments are combined. A loss of `action_moments` has to read
    all rows a second time.

    Args:
        conclude: (moments [B, .., T], mask [B, .., T], data) to a pytree of [B], of
            every row by itself. It closes over nothing that is traced: that is data.
        data: a pytree of [B, ..].
        foreseen: like the result, float[B]: up to one factor for all, what the caller
            will multiply it with. It changes no number.
        names, q_function, q_rows, sequences, anchor, teacher, logits: see
            `action_moments`.

    Returns:
        A pytree of [B].

    Gradient:
        As `action_moments` with ``foreseen``.
    """
    question = _asked(names, q_function, q_rows, sequences, anchor, None, teacher)
    mask, logits = sequences.response_mask, logits or LOGITS
    size = logits // (math.prod(mask.shape[1:]) * question.width)
    if not size:
        moments = _along_positions(question, sequences, None, logits)
        return conclude(moments, mask, data)

    def at(critic, others, mask, targets, states, data):
        moments = question.at(critic, others, mask, targets, states)
        return conclude(moments, mask, data)

    def of_rows(weights, given):
        return _in_slices(at, weights, given, size, "rows")

    given = mask, sequences.targets, question.states, data
    return on_own_rows(of_rows, question.weights, (given, foreseen))


class _Question(NamedTuple):
    """What is asked about positions, and of whom."""

    at: Callable[..., Moments]  # (critic, other weights, mask, targets, states)
    weights: dict[str, Any]
    states: dict[str, jax.Array]
    width: int  # V


def _asked(names, q_function, q_rows, sequences, anchor, student, teacher) -> _Question:
    names = tuple(names)
    players = {"student": student, "teacher": teacher}
    read = {who for name in names for who in _READS[name]}
    if q_function.center:
        read.add("anchor")
    heard = {anchor if who == "anchor" else who for who in read}
    rows = {who: players[who] for who in players if who in heard} | {"q": q_rows}

    def at(critic, others, mask, targets, states):
        weights = {"q": critic, **others}
        said = {
            who: one.read(weights[who], fill_masked(states[who], mask))
            for who, one in rows.items()
        }
        # Nothing is padding any more: masks over the vocabulary would take passes.
        filled = jnp.ones(mask.shape, bool)
        here = Slice(
            q_function.shaped(said["q"], said.get(anchor), filled),
            said.get("student"),
            said.get("teacher"),
            said.get(anchor),
            fill_masked(targets, mask),
            filled,
        )
        return {name: fill_masked(MOMENTS[name](here), mask) for name in names}

    return _Question(
        at,
        {who: one.weights for who, one in rows.items()},
        {who: one.states for who, one in rows.items()},
        max(one.vocabulary for one in rows.values()),
    )


def _along_positions(
    question: _Question, sequences: Sequences, foreseen: Any, logits: int
) -> Moments:
    """Slices along T; foreseen as in `action_moments`."""

    def of_rows(weights, given):
        (mask, *_), _ = given
        size = logits // (math.prod(mask.shape[:-1]) * question.width)
        return _in_slices(question.at, weights, given, max(size, 1), "positions")

    given = sequences.response_mask, sequences.targets, question.states
    if sequences.response_mask.ndim == 1:
        return of_rows(question.weights, (given, foreseen))
    return on_own_rows(of_rows, question.weights, (given, foreseen))


def _in_slices(at, weights, given, size: int, along: Along) -> Any:
    """``at`` of all positions or rows ``given``, the critic's gradient foreseen."""
    here, foreseen = given
    critic = weights["q"]
    others = {who: one for who, one in weights.items() if who != "q"}
    if critic is None:  # all there is of it are numbers, whose gradient is no sum
        foreseen = None
    return in_slices(
        at, critic, others, here, size=size, along=along, foreseen=foreseen
    )
