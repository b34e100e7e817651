r"""Losses over a vocabulary from states and heads: the logits never exist as a whole.

A loss is a function of normalised log-probs. With
:math:`\ell = z - \log\sum_u e^{z_u}` and the *slope*
:math:`s_v = \partial L / \partial \ell_v`, its gradient in the logits is

.. math:: \frac{\partial L}{\partial z_v} = s_v - e^{\ell_v} \sum_u s_u

so a column has to know of its row the normaliser, the sum of the slopes and what the
loss itself keeps (`RowLoss`): a first pass over chunks of rows finds them, and then any
tile of columns can be visited in any order.

Three ways to a gradient, all exact for any cotangent:

- ``"keep"``: the log-probs stay, as in the dense loss. For few rows, which one chunk
  holds anyway.
- ``"recompute"``: the backward pass computes the logits again, tile by tile. The head's
  gradient is summed over all rows in float32 before it is stored in the head's dtype;
  temporaries are a few tiles. Six matrix products of the size of the logits, where the
  dense gradient takes four.
- ``"ahead"``: the first pass leaves the gradient of ``sum(weights * loss)`` behind. If
  the cotangent turns out to be proportional to ``weights``, as that of a weighted sum
  or mean is, it is scaled in place and done: four products. Otherwise it is computed
  again and written over. One array of the size of the head is kept in float32.

>>> from rkd_jax.losses.row_losses import TokenLogProb
>>> plan = Plan(TokenLogProb(), (1.0, 1.0), (None, None), 2, 2, 2, 2, "recompute", None)
>>> side = Readout(jnp.zeros((2, 1)), jnp.ones((1, 4)))
>>> targets, weights = jnp.array([0, 3], jnp.int32), jnp.ones(2)
>>> print(jnp.exp(vocabulary_loss(plan, side, None, targets, weights, None)))
[0.25 0.25]
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rkd_jax.losses.ahead import on_the_way, proportion
from rkd_jax.losses.readouts import (
    Plan,
    Readout,
    Span,
    all_logits,
    cast,
    columns_of,
    head_product,
    in_range,
    log_probs_of,
    normalise,
    over_tiles,
    own_zeros,
    product,
    shard_zeros,
    tempered_logits,
)
from rkd_jax.losses.row_losses import Logs
from rkd_jax.losses.row_order import order_rows, take_rows, unorder_rows
from rkd_jax.masking import accumulator


class _Rows(NamedTuple):
    """What the first pass finds, with N' rows each."""

    values: jax.Array
    normalisers: list[jax.Array]  # of each side
    pull: jax.Array  # sum of the slopes
    stats: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def vocabulary_loss(
    plan: Plan,
    student: Readout,
    teacher: Readout | None,
    data: Any,
    weights: jax.Array,
    mask: jax.Array | None,
) -> jax.Array:
    """The loss of every row, ``[N]``; 0 where ``mask`` [N] is not set.

    Gradient flows to ``student`` alone. ``weights`` [N] change no value: see the
    module's docstring.
    """
    rows = order_rows(plan.block, student, teacher, data, mask)
    found, _ = _first_pass(plan, rows, student, teacher, None)
    return unorder_rows(found.values, rows, len(student.hidden))


def _forward(plan, student, teacher, data, weights, mask):
    rows = order_rows(plan.block, student, teacher, data, mask)
    weights = take_rows(weights, rows.index) if plan.gradient == "ahead" else None
    logs = ahead = None
    if plan.gradient == "keep":
        found, logs = _only_pass(plan, rows, student, teacher)
    else:
        found, ahead = _first_pass(plan, rows, student, teacher, weights)
    values = unorder_rows(found.values, rows, len(student.hidden))
    return values, (rows, found, student, teacher, weights, ahead, logs)


def _backward(plan, residuals, cotangent):
    rows, found, student, teacher, weights, ahead, logs = residuals
    cotangent = take_rows(cotangent, rows.index)
    scale, unit = in_range(cotangent, student.hidden.dtype)

    def again(into):
        return _second_pass(plan, rows, found, student, teacher, scale, unit, into)

    if logs is not None:
        gradient = _kept(plan, rows, found, logs, student, scale, unit)
    elif ahead is None:
        gradient = again(None)
    else:  # where the gradient was not foreseen, it is written over the other
        factor, way = proportion(cotangent, weights)
        scaled = _scaled(plan, student, factor, ahead)
        ways = (lambda x: x, again, lambda x: jax.tree.map(jnp.zeros_like, x))
        gradient = on_the_way(way, *ways, scaled)
    hidden = unorder_rows(gradient.hidden, rows, len(student.hidden))
    gradient = gradient._replace(hidden=hidden)
    gradient = jax.tree.map(lambda x, like: x.astype(like.dtype), gradient, student)
    return gradient, None, None, None, None


vocabulary_loss.defvjp(_forward, _backward)


def _of_chunk(plan, logits, columns, data) -> tuple[_Rows, Logs]:
    """What there is to know of some rows, and their log-probs."""
    logs, normalisers = normalise(plan, logits, columns, data)
    stats = plan.loss.stats(logs, data, plan.axis_name)
    values = plan.loss.partial(logs, data, stats)
    pull = plan.loss.pull(logs, data, stats)
    return _Rows(values, normalisers, pull, stats), logs


def _only_pass(plan, rows, student, teacher) -> tuple[_Rows, Logs]:
    """All rows at once."""
    columns = columns_of(plan, student, 0, student.head.shape[1])
    logits = tempered_logits(plan, student, teacher, rows.hidden, slice(None))
    found, logs = _of_chunk(plan, logits, columns, rows.data)
    found = _together(plan, found)
    return found._replace(values=_of_live(rows, found.values)), logs


def _kept(plan, rows, found, logs, student, scale, unit) -> Readout:
    """The gradient out of the log-probs of all rows."""
    hidden = rows.hidden[0]
    delta = _logit_gradient(plan, logs, rows.data, found, _of_live(rows, scale))
    head = student.head.astype(hidden.dtype)

    def products(delta):
        # As an array of its own, or both would be computed from arrays of other terms.
        delta = jax.lax.optimization_barrier(delta)
        narrow = delta.astype(hidden.dtype)
        return product(narrow, head, (1, 1)), head_product(hidden, narrow)

    def tpu_products(delta):
        # Wide in one of them, where the matrix unit rounds it: a narrow array that both
        # read would be written beside the log-probs.
        states = product(delta.astype(hidden.dtype), head, (1, 1))
        return states, head_product(hidden.astype(delta.dtype), delta)

    states, head_gradient = jax.lax.platform_dependent(
        delta, tpu=tpu_products, default=products
    )
    if plan.axis_name is not None:
        states = jax.lax.psum(states, plan.axis_name)
    bias = None if student.bias is None else delta.sum(0)
    return jax.tree.map(unit, Readout(states, head_gradient, bias))


def _of_live(rows, values: jax.Array) -> jax.Array:
    """0 in the rows that do not count."""
    if rows.index is None:
        return values
    live = jnp.arange(len(values), dtype=jnp.int32) < rows.live
    return jnp.where(live, values, 0.0)


def _first_pass(plan, rows, student, teacher, weights):
    """`_Rows`, and the gradient of their sum under ``weights`` if there are any."""
    columns = columns_of(plan, student, 0, student.head.shape[1])

    def of_chunk(hidden, data, scale):
        logits = all_logits(plan, student, teacher, hidden)
        return _in_strips(plan, logits, columns, data, scale)

    def body(i, carry):
        found, gradient = carry
        here = functools.partial(_chunk, start=i * plan.rows, size=plan.rows)
        hidden, data = jax.tree.map(here, (rows.hidden, rows.data))
        scale = None
        if gradient is not None:
            live = i * plan.rows + jnp.arange(plan.rows, dtype=jnp.int32) < rows.live
            scale = jnp.where(live, here(weights), 0.0)
        new, delta = of_chunk(hidden, data, scale)
        if gradient is not None:
            gradient = _accumulate(plan, gradient, i, delta, hidden[0], student)
        return _write(found, new, i * plan.rows), gradient

    size = len(rows.hidden[0])
    here = functools.partial(_chunk, start=0, size=plan.rows)
    chunk = jax.tree.map(here, (rows.hidden, rows.data))
    example, _ = jax.eval_shape(functools.partial(of_chunk, scale=None), *chunk)
    blank = jax.tree.map(
        lambda x: own_zeros(plan, (size, *x.shape[1:]), x.dtype), example
    )
    gradient = None
    if weights is not None:
        gradient = _zeros(plan, student, size)
    else:  # each shard keeps its own sums until the end
        own = shard_zeros(plan, size, blank.values.dtype)
        blank = blank._replace(values=own, pull=own)
    count = -(-rows.live // plan.rows)
    found, gradient = jax.lax.fori_loop(0, count, body, (blank, gradient))
    if weights is None:
        found = _together(plan, found)
    return found._replace(values=_of_live(rows, found.values)), gradient


def _of_logits(plan, columns, logits, data, scale) -> tuple[_Rows, jax.Array | None]:
    """What there is to know of some rows, and their gradient if ``scale`` is given."""
    found, logs = _of_chunk(plan, logits, columns, data)
    if scale is None:
        return found, None
    found = _together(plan, found)
    return found, _logit_gradient(plan, logs, data, found, scale)


def _in_strips(plan, logits, columns, data, scale):
    """`_of_logits` of a chunk; on a CPU a few rows at a time, which stay in its cache.

    XLA walks over all of the memory there for every exponential. Of one side alone
    there are too few of them.
    """
    whole = functools.partial(_of_logits, plan, columns)
    if len(logits) < 2 or plan.axis_name is not None or plan.strip == plan.rows:
        return whole(logits, data, scale)

    def strips(logits, data, scale):
        student, teacher = logits

        def body(i, carry):
            found, student = carry
            here = functools.partial(_chunk, start=i * plan.strip, size=plan.strip)
            strip = jax.tree.map(here, ([student, teacher], data, scale))
            new, delta = whole(*strip)
            if delta is not None:
                # Plus zero, in words that make it wait for the values: XLA then writes
                # into the logits, not into a copy of all of them.
                wait = jnp.minimum(jnp.isnan(new.values).sum(dtype=jnp.int32), 0)
                student = _write(student, delta, i * plan.strip + wait)
            return _write(found, new, i * plan.strip), student

        example, _ = jax.eval_shape(whole, logits, data, None)
        blank = jax.tree.map(lambda x: own_zeros(plan, x.shape, x.dtype), example)
        count = len(student) // plan.strip
        found, delta = jax.lax.fori_loop(0, count, body, (blank, student))
        return found, None if scale is None else delta

    return jax.lax.platform_dependent(logits, data, scale, cpu=strips, default=whole)


def _together(plan: Plan, rows: _Rows) -> _Rows:
    """Sums over the vocabulary out of those of its shards."""
    if plan.axis_name is None:
        return rows
    values, pull = jax.lax.psum((rows.values, rows.pull), plan.axis_name)
    return rows._replace(values=values, pull=pull)


def _accumulate(plan, gradient, i, delta, hidden, student):
    """Add the gradient of chunk i of the first pass, whose columns are complete."""
    narrow = delta.astype(hidden.dtype)
    states = product(narrow, student.head.astype(narrow.dtype), (1, 1))
    if plan.axis_name is not None:
        states = jax.lax.psum(states, plan.axis_name)

    def tile(start, size, head):
        part = jax.lax.dynamic_slice_in_dim(narrow, start, size, axis=1)
        old = jax.lax.dynamic_slice_in_dim(head, start, size, axis=1)
        new = old + head_product(hidden, part)
        return jax.lax.dynamic_update_slice_in_dim(head, new, start, axis=1)

    # In one piece where that is no larger than the logits were: a tile is a copy.
    width, vocabulary = student.head.shape
    columns = vocabulary if width <= plan.rows else plan.columns
    head = over_tiles(columns, student, tile, gradient.head)
    bias = None if student.bias is None else gradient.bias + delta.sum(0)
    return Readout(_write(gradient.hidden, states, i * plan.rows), head, bias)


def _scaled(plan, student, scale, gradient: Readout) -> Readout:
    """The gradient times a factor, with the head's in its own dtype and in place.

    As one product it would be a second array beside the first: only a loop is sure to
    write where it reads.
    """

    def tile(start, size, head):
        part = scale * Span(start, size).of(head)
        return jax.lax.dynamic_update_slice_in_dim(head, part, start, axis=1)

    head = over_tiles(plan.columns, student, tile, gradient.head)
    bias = None if student.bias is None else scale * gradient.bias
    head = head.astype(student.head.dtype)
    return Readout(scale * gradient.hidden, head, bias)


def _second_pass(plan, rows, found, student, teacher, cotangent, unit, into):
    """The gradient under any cotangent in a unit, logits computed again.

    That in the head is written over the one of ``into``, if there is one.
    """
    dtype, count = accumulator(student.hidden), -(-rows.live // plan.block)
    zeros = functools.partial(shard_zeros, plan)

    def tile(start, size, carry):
        span = Span(start, size)
        columns = columns_of(plan, student, start, size)
        column_head = cast(plan, span.of(student.head), student.hidden.dtype)

        def body(i, carry):
            hidden_gradient, head, bias = carry
            here = functools.partial(_chunk, start=i * plan.block, size=plan.block)
            hidden, data, known, scale = jax.tree.map(
                here, (rows.hidden, rows.data, found, cotangent)
            )
            live = i * plan.block + jnp.arange(plan.block, dtype=jnp.int32) < rows.live
            logits = tempered_logits(plan, student, teacher, hidden, span)
            logs = log_probs_of(logits, known.normalisers, columns)
            scale = jnp.where(live, scale, 0.0)
            delta = _logit_gradient(plan, logs, data, known, scale)
            narrow = delta.astype(hidden[0].dtype)
            states = product(narrow, column_head, (1, 1))
            states = here(hidden_gradient) + states
            hidden_gradient = _write(hidden_gradient, states, i * plan.block)
            head = head + head_product(hidden[0], narrow)
            return hidden_gradient, head, bias + delta.sum(0)

        states, head_gradient, bias_gradient = carry
        blank = states, zeros(column_head.shape, dtype), zeros(size, dtype)
        states, head, bias = jax.lax.fori_loop(0, count, body, blank)
        head_gradient = jax.lax.dynamic_update_slice_in_dim(
            head_gradient, unit(head).astype(student.head.dtype), start, axis=1
        )
        bias_gradient = jax.lax.dynamic_update_slice_in_dim(
            bias_gradient, bias, start, axis=0
        )
        return states, head_gradient, bias_gradient

    width = student.hidden.shape[-1]
    blank = (
        zeros((len(rows.hidden[0]), width), dtype),
        zeros(student.head.shape, student.head.dtype) if into is None else into.head,
        zeros(student.head.shape[1], dtype),
    )
    states, head, bias = over_tiles(plan.columns, student, tile, blank)
    if plan.axis_name is not None:
        states = jax.lax.psum(states, plan.axis_name)
    bias = None if student.bias is None else unit(bias)
    return Readout(unit(states), head, bias)


def _logit_gradient(plan, logs: Logs, data, known: _Rows, scale) -> jax.Array:
    """``[C, V']``: gradient in the head's output, each row times ``scale``."""
    pull = known.pull if plan.normalised[0] else None
    scale = scale / plan.temperatures[0]
    delta = plan.loss.logit_gradient(logs, data, known.stats, pull, scale)
    cap = plan.softcaps[0]
    if cap is not None:
        logits = (logs.student + known.normalisers[0][:, None]) * plan.temperatures[0]
        delta = delta * jnp.where(delta != 0.0, 1.0 - (logits / cap) ** 2, 0.0)
    return delta


def _zeros(plan: Plan, student: Readout, size: int) -> Readout:
    """An accumulator of the gradient, with N' rows of states."""
    dtype = accumulator(student.hidden)
    states = own_zeros(plan, (size, student.hidden.shape[-1]), dtype)
    head = shard_zeros(plan, student.head.shape, dtype)
    bias = None if student.bias is None else shard_zeros(plan, head.shape[1], dtype)
    return Readout(states, head, bias)


def _chunk(array: jax.Array, start, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis=0)


def _write(buffers, parts, start):
    """Parts in place of the rows from ``start`` on, leaf by leaf."""
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0),
        buffers,
        parts,
    )
