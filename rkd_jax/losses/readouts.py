r"""What vocabulary heads say of states: some rows and some columns at a time.

>>> plan = Plan(None, (2.0, 2.0), (None, None), 1, 1, 1, 2, "keep", None)
>>> side = Readout(jnp.ones((1, 1)), jnp.array([[2.0, 4.0]]))
>>> print(tempered_logits(plan, side, None, [side.hidden], slice(None))[0])
[[1. 2.]]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rkd_jax.losses.likelihood import put_tokens, take_tokens
from rkd_jax.losses.row_losses import Apart, Logs, RowLoss
from rkd_jax.masking import accumulator

Gradient = Literal["keep", "recompute", "ahead"]


class Readout(NamedTuple):
    """A model's side of the loss."""

    hidden: jax.Array  # [N, D]
    head: jax.Array  # [D, V]
    bias: jax.Array | None = None  # [V]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static."""

    loss: RowLoss
    temperatures: tuple[float, float]  # of student and teacher
    softcaps: tuple[float | None, float | None]  # of student and teacher
    rows: int  # of a chunk of the first pass, which sees all columns
    strip: int  # rows of that at once once there are logits; divides ``rows``
    block: int  # rows of a chunk of the second pass, a multiple of ``rows``
    columns: int  # of a tile of the second pass
    gradient: Gradient
    axis_name: str | None
    normalised: tuple[bool, bool] = (True, True)  # or what the head says, as it is
    batch_axes: tuple[str, ...] = ()  # of the mesh, over which the rows are cut
    by_tiles: bool = False  # whether heads are cast tile by tile, see `few_rows`


class Span(NamedTuple):
    """Some columns of a head."""

    start: Any
    size: int

    def of(self, array: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(array, self.start, self.size, axis=-1)


def cast(plan, head: jax.Array, dtype) -> jax.Array:
    """A head, or a tile of one, in the dtype of the states that it meets.

    To stay in tiles, bfloat16 is rounded to in float32 first: the compiler for TPUs
    would move a mere cast out of the loop over tiles.
    """
    if plan.by_tiles and (head.dtype, dtype) == (jnp.float32, jnp.bfloat16):
        head = jax.lax.reduce_precision(head, exponent_bits=8, mantissa_bits=7)
    return head.astype(dtype)


def tempered_logits(plan, student, teacher, hidden, columns) -> list[jax.Array]:
    """Tempered logits of both sides, ``[C, V']`` each."""
    found, wide = [], accumulator(hidden[0])
    sides = (student, teacher)[: len(hidden)]
    options = zip(sides, hidden, plan.softcaps, plan.temperatures, strict=False)
    for side, states, cap, temperature in options:
        head, bias = side.head, side.bias
        if isinstance(columns, Span):
            head = columns.of(head)
            bias = None if bias is None else columns.of(bias)
        logits = product(states, cast(plan, head, states.dtype), (1, 0))
        logits = logits if bias is None else logits + bias.astype(logits.dtype)[None]
        logits = logits if cap is None else jnp.tanh(logits / cap) * cap
        found.append((logits / temperature).astype(wide))
    return found


def all_logits(plan, student, teacher, hidden) -> list[jax.Array]:
    """Tempered logits of some rows in all columns."""
    if not plan.by_tiles:
        return tempered_logits(plan, student, teacher, hidden, slice(None))

    def tile(start, size, logits):
        new = tempered_logits(plan, student, teacher, hidden, Span(start, size))
        return [
            jax.lax.dynamic_update_slice_in_dim(old, part, start, axis=1)
            for old, part in zip(logits, new, strict=True)
        ]

    shape = len(hidden[0]), student.head.shape[1]
    wide = accumulator(hidden[0])
    zeros = [shard_zeros(plan, shape, wide) for _ in hidden]
    return over_tiles(plan.columns, student, tile, zeros)


def few_rows(student: Readout, teacher: Readout | None) -> bool:
    """Whether wider heads meet too few rows of states to be cast as a whole.

    A loop over chunks of rows would keep the copy, which here is larger than the logits
    of a side would be. Not to be asked under a mesh that cuts the rows: what a device
    gathers of a head is that copy, and would be wider.
    """
    rows = len(student.hidden)
    return any(
        side.head.dtype.itemsize > side.hidden.dtype.itemsize
        and len(side.head) * side.hidden.dtype.itemsize
        > rows * accumulator(side.hidden).itemsize
        for side in (student, teacher)
        if side is not None
    )


def normalise(plan: Plan, logits: list[jax.Array], columns, data):
    """`Logs` of some rows with all columns, and the normalisers of the sides, ``[C]``.

    Tokens that the loss has listed are to be read from `Logs.apart`, not from the logs.
    """
    places = plan.loss.places(columns, data)
    if places is None:
        normalisers, powers = _normalisers(plan, logits)
        logs = log_probs_of(logits, normalisers, columns)
        return logs._replace(power_sums=powers), normalisers
    student, normaliser, apart = _normaliser_in_parts(plan, logits[0], places)
    logs = log_probs_of([student], [normaliser], columns)
    return logs._replace(apart=apart), [normaliser]


def _normalisers(plan: Plan, logits: list[jax.Array]):
    """Log of the sum of exponentials of each side, ``[C]`` or 0.

    And those of the student's probabilities to the loss's powers, ``[C, powers]``: the
    largest token is the same, and all sums go over the shards together.
    """
    tops = _over_shards(plan, jax.lax.pmax, [z.max(-1) for z in logits])
    shifted = [z - top[:, None] for z, top in zip(logits, tops, strict=True)]
    shifted += [power * shifted[0] for power in plan.loss.powers]
    totals = [jnp.exp(z).sum(-1) for z in shifted]
    totals = [jnp.log(x) for x in _over_shards(plan, jax.lax.psum, totals)]
    normalisers = [
        top + total if has else jnp.zeros_like(top)
        for top, total, has in zip(tops, totals, plan.normalised, strict=False)
    ]
    if not plan.loss.powers:
        return normalisers, None
    largest = tops[0] - normalisers[0]  # log-prob
    sums = zip(plan.loss.powers, totals[len(logits) :], strict=True)
    sums = [power * largest + total for power, total in sums]
    return normalisers, jnp.stack(sums, axis=-1)


def _over_shards(plan: Plan, reduce: Callable, parts: list) -> list[jax.Array]:
    """All of a row out of its shards' parts, in one collective."""
    if plan.axis_name is None:
        return parts
    parts = reduce(jnp.stack(parts, axis=-1), plan.axis_name)
    return list(jnp.unstack(parts, axis=-1))


def _normaliser_in_parts(plan: Plan, logits: jax.Array, places: jax.Array):
    """Logits [C, V'], -inf where a token is listed, their normaliser [C], and `Apart`.

    Both parts are summed under a maximum of their own: one minus the listed mass would
    round a small rest away.
    """
    here = places < logits.shape[1]
    own = take_tokens(logits, jnp.where(here, places, 0))
    own = listed = jnp.where(here, own, -jnp.inf)
    # Minus infinity, in words that make it wait for ``own``: XLA then writes into the
    # logits, not into a copy of them.
    rest = put_tokens(logits, places, jnp.minimum(own, -jnp.inf))
    top = rest.max(-1)
    if plan.axis_name is not None:
        top, listed = jax.lax.pmax((top, listed), plan.axis_name)
    top = jnp.where(top > -jnp.inf, top, 0.0)
    total = jnp.exp(rest - top[:, None]).sum(-1)
    if plan.axis_name is not None:
        total = jax.lax.psum(total, plan.axis_name)
    mass = top + jnp.log(total)
    normaliser = jnp.logaddexp(mass, jax.nn.logsumexp(listed, axis=-1))
    apart = Apart(listed - normaliser[:, None], mass - normaliser)
    if plan.softcaps[0] is not None:  # whose derivative is read off the logits
        rest = put_tokens(rest, places, own)
    return rest, normaliser, apart


def log_probs_of(logits: list[jax.Array], normalisers, columns) -> Logs:
    """Of any columns, once the normalisers are known."""
    logs = [z - one[:, None] for z, one in zip(logits, normalisers, strict=True)]
    return Logs(logs[0], logs[1] if len(logs) > 1 else None, columns)


def product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Matrix product over one axis of each, summed wide."""
    wide = accumulator(left)
    return jax.lax.dot_general(
        left, right, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=wide
    )


def head_product(states: jax.Array, delta: jax.Array) -> jax.Array:
    """``[D, V']`` of [C, D] and [C, V']: the gradient in a head, summed over rows.

    On CPUs the states are turned beforehand, the smaller ones: of a product over the
    rows of both XLA makes a slower one there, by a fifth.
    """
    turned = jax.lax.platform_dependent(
        states.T, cpu=jax.lax.optimization_barrier, default=lambda turned: turned
    )
    return product(turned, delta, (1, 0))


def in_range(cotangent: jax.Array, dtype) -> tuple[jax.Array, Callable]:
    """The cotangent in a unit near its largest entry, and what takes gradients back.

    Products of float16 would round a gradient under a small cotangent, such as one over
    the number of tokens, to 0. The unit is a power of two, so nothing else is rounded.
    Other dtypes have the range of float32.
    """
    if dtype != jnp.float16:
        return cotangent, lambda gradient: gradient
    largest = jnp.abs(cotangent).max()
    usable = (largest > 0.0) & jnp.isfinite(largest)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1.0))
    unit = jnp.ldexp(jnp.ones_like(largest), exponent)
    return cotangent / unit, lambda gradient: unit * gradient


def columns_of(plan, student, start, size) -> jax.Array:
    """Which tokens these columns of the head are."""
    first = start
    if plan.axis_name is not None:
        first = start + jax.lax.axis_index(plan.axis_name) * student.head.shape[1]
    return first + jnp.arange(size, dtype=jnp.int32)


def over_tiles(columns: int, student, tile: Callable, carry):
    """``tile(start, size, carry)`` for all columns; the last may be narrower."""
    width = student.head.shape[1]
    size = min(columns, width)
    whole = width // size
    carry = jax.lax.fori_loop(
        0, whole, lambda i, carry: tile(i * size, size, carry), carry
    )
    rest = width - whole * size
    return tile(whole * size, rest, carry) if rest else carry


def shard_zeros(plan: Plan, shape, dtype) -> jax.Array:
    """Zeros to which every shard of the vocabulary will add what is its own."""
    zeros = own_zeros(plan, shape, dtype)
    if plan.axis_name is None:
        return zeros
    return jax.lax.pcast(zeros, plan.axis_name, to="varying")


def own_zeros(plan: Plan, shape, dtype) -> jax.Array:
    """Zeros to which every shard of the rows will add what is its own."""
    zeros = jnp.zeros(shape, dtype)
    if not plan.batch_axes:
        return zeros
    return jax.lax.pcast(zeros, plan.batch_axes, to="varying")
