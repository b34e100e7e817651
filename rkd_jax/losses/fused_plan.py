"""How a fused loss is cut into chunks and tiles, checked and run.

>>> half = Tiles(logits=2**24)  # half the memory of the first pass
>>> half.gradient is None
True
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from rkd_jax.losses.domain import check_choice, check_domain, static_number
from rkd_jax.losses.readouts import Plan, Readout, few_rows
from rkd_jax.losses.row_losses import RowLoss
from rkd_jax.losses.vocabulary_tiles import vocabulary_loss
from rkd_jax.masking import accumulator
from rkd_jax.sharding import ambient_axes


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. Sizes decide memory and time and nothing else.

    Attributes:
        logits: most numbers in one array of logits, ``rows x V`` in the first pass.
        strip: numbers of it that a CPU takes at once, out of its cache, where a loss
            has two sides; other devices take all.
        block: most rows at once in the second pass.
        columns: of the vocabulary at once in the second pass.
        gradient: ``"recompute"`` computes the logits again in the backward pass: the
            least memory. ``"ahead"`` prepares the gradient of ``sum(weights * values)``
            in the first pass, a third less time, for one float32 array of the size of
            the head. None: ahead for float32 heads, whose gradient is that array,
            unless they meet few rows of narrower states, see `readouts.few_rows`.
            Rows that all fit into the first pass at once keep their log-probs instead:
            nothing is computed twice.
    """

    logits: int = 2**25
    strip: int = 2**19
    block: int = 2048
    columns: int = 4096
    gradient: Literal["recompute", "ahead"] | None = None

    def __post_init__(self):
        for name in ("logits", "strip", "block", "columns"):
            check_domain(name, getattr(self, name), "[1, inf)")
        if self.gradient is not None:
            check_choice("gradient", self.gradient, ("recompute", "ahead"))


TILES = Tiles()
_CHUNKS = 4
"""Of a block at least, where there are two sides: in three, their logits would be more
than a quarter of what the dense loss holds."""
_ROWS = 256
"""Of such a chunk at least: products of fewer take longer."""


def run(
    loss: RowLoss,
    sides: tuple[Readout, Readout | None],
    data: Any,
    *,
    mask,
    weights,
    temperatures: tuple[float, float],
    softcaps,
    axis_name,
    tiles: Tiles,
    normalised=(True, True),
) -> jax.Array:
    """Check, and run on this device or on all of the mesh in use."""
    student, teacher = sides
    batch = student.hidden.shape[:-1]
    for side in sides:
        if side is not None:
            _check_readout(side, batch)
    for array in (mask, weights):
        if array is not None:
            chex.assert_shape(array, batch)
    chex.assert_tree_shape_prefix(data, batch)
    temperatures = tuple(_positive("temperature", one) for one in temperatures)
    softcaps = tuple(
        None if cap is None else _positive("softcap", cap) for cap in softcaps
    )
    if weights is None:
        weights = jnp.ones(batch, bool) if mask is None else mask
    weights = jax.lax.stop_gradient(weights.astype(accumulator(student.hidden)))
    if 0 in batch:
        return jnp.zeros_like(weights)
    local = functools.partial(
        _local,
        loss,
        temperatures=temperatures,
        softcaps=softcaps,
        tiles=tiles,
        normalised=normalised,
    )
    arguments = (student, jax.lax.stop_gradient(teacher), data, weights, mask)
    rows = ambient_axes("batch", batch[0]) if batch else ()
    columns = ambient_axes("vocab", student.head.shape[1])
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    if axis_name is None and (rows or columns) and not manual:
        return _over_mesh(local, rows, columns, arguments)
    # In a `jax.shard_map` the caller says what every device does. Axes that it leaves
    # out are the partitioner's.
    _check_cut(axis_name, student, teacher)
    arguments, others = _along_rows(arguments, axis_name)
    return local(*arguments, axis_name=axis_name, batch_axes=others)


def _positive(name: str, value) -> float:
    value = static_number(name, value)
    check_domain(name, value, "(0, inf)")
    return value


def _check_cut(axis_name: str | None, *sides: Readout | None) -> None:
    """Raise ValueError unless JAX knows that heads are cut over the axis."""
    for side in sides:
        if None in (axis_name, side) or axis_name in _varying(side.head):
            continue
        raise ValueError(
            f"axis_name={axis_name!r}, over which a head is not cut: in jax.shard_map "
            f"give it PartitionSpec(None, {axis_name!r}) and leave check_vma=True, "
            "without which gradients of heads come out divided by the axis' size"
        )


def _along_rows(arguments, axis_name: str | None):
    """All arguments as varying over every axis that one varies over but the columns'.

    The gradient of what is the same on all devices adds up over the rows of each. Gives
    those axes too; there are none outside of `jax.shard_map`.
    """
    kinds = [_varying(x) for x in jax.tree.leaves(arguments)]
    axes = frozenset().union(*kinds) - {axis_name}

    def varying(array):
        missing = tuple(sorted(axes - _varying(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(varying, arguments), tuple(sorted(axes))


def _varying(array) -> frozenset[str]:
    """Mesh axes over which it differs, as a `jax.shard_map` has it."""
    kind = jax.typeof(array)
    if hasattr(kind, "vma"):  # jax 0.9
        return kind.vma
    return kind.manual_axis_type.varying


def _over_mesh(local, rows: tuple[str, ...], columns: tuple[str, ...], arguments):
    """Every device takes its own rows and columns.

    Left to the partitioner, a loop over chunks of rows that lie on several devices
    would gather all of them on each.
    """
    row, column = PartitionSpec(rows or None), PartitionSpec(columns or None)

    def side(readout):
        if readout is None:
            return None
        bias = None if readout.bias is None else column
        return Readout(row, PartitionSpec(None, *column), bias)

    def everywhere(array):  # its gradient adds up over the rows of all devices
        return jax.lax.pcast(array, rows, to="varying") if rows else array

    def body(student, teacher, *rest):
        student, teacher = (
            x
            and x._replace(
                head=everywhere(x.head), bias=jax.tree.map(everywhere, x.bias)
            )
            for x in (student, teacher)
        )
        axis = columns[0] if columns else None
        return local(student, teacher, *rest, axis_name=axis, batch_axes=rows)

    student, teacher, *rest = arguments
    specs = (
        side(student),
        side(teacher),
        *(jax.tree.map(lambda _: row, x) for x in rest),
    )
    return jax.shard_map(body, in_specs=specs, out_specs=row)(*arguments)


def _local(
    loss: RowLoss,
    student: Readout,
    teacher: Readout | None,
    data: Any,
    weights: jax.Array,
    mask: jax.Array | None,
    *,
    temperatures,
    softcaps,
    tiles: Tiles,
    normalised,
    axis_name: str | None = None,
    batch_axes: tuple[str, ...] = (),
) -> jax.Array:
    """The rows and columns of one device, ``[*batch, ..]``."""
    batch = student.hidden.shape[:-1]

    def rows(array):
        return array.reshape(-1, *array.shape[len(batch) :])

    student, teacher = (
        None if side is None else side._replace(hidden=rows(side.hidden))
        for side in (student, teacher)
    )
    chunk, block, strip = _cut(student, tiles, two_sided=teacher is not None)
    by_tiles = not batch_axes and few_rows(student, teacher)
    gradient = tiles.gradient
    if chunk >= len(student.hidden):
        gradient, by_tiles = "keep", False
    elif gradient is None:
        wide = student.head.dtype.itemsize >= 4 and axis_name is None
        gradient = "ahead" if wide and not by_tiles else "recompute"
    plan = Plan(
        loss=loss,
        temperatures=temperatures,
        softcaps=softcaps,
        rows=chunk,
        strip=strip,
        block=block,
        columns=tiles.columns,
        gradient=gradient,
        axis_name=axis_name,
        normalised=normalised,
        batch_axes=batch_axes,
        by_tiles=by_tiles,
    )
    data, weights, mask = jax.tree.map(rows, (data, weights, mask))
    return vocabulary_loss(plan, student, teacher, data, weights, mask).reshape(batch)


def _cut(student: Readout, tiles: Tiles, *, two_sided: bool) -> tuple[int, int, int]:
    """Rows of a chunk, of a block of whole chunks, and of a strip, part of a chunk."""
    count, width = len(student.hidden), student.head.shape[1]
    blocks = max(-(-count // tiles.block), 1)
    block = max(-(-count // blocks), 1)
    chunks = -(-block // max(tiles.logits // width, 8))
    if two_sided and chunks > 1:
        chunks = max(chunks, min(_CHUNKS, block // _ROWS))
    chunk = -(-block // chunks)
    if chunk > 8:
        chunk = -(-chunk // 8) * 8
    strip = 8 * math.gcd(chunk // 8, max(tiles.strip // width // 8, 1))
    return chunk, chunk * chunks, chunk if chunk % 8 else strip


def _check_readout(side: Readout, batch: tuple[int, ...]) -> None:
    chex.assert_rank(side.head, 2)
    chex.assert_shape(side.hidden, (*batch, side.head.shape[0]))
    if side.bias is not None:
        chex.assert_shape(side.bias, (side.head.shape[1],))
