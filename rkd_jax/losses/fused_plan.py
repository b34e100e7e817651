"""How a fused loss is cut into chunks and tiles, checked and run.

>>> half = Tiles(logits=2**24)  # half the memory of the first pass
>>> half.gradient is None
True
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from rkd_jax.losses.domain import check_domain
from rkd_jax.losses.readouts import Plan, Readout
from rkd_jax.losses.row_losses import RowLoss
from rkd_jax.losses.vocabulary_tiles import vocabulary_loss
from rkd_jax.masking import accumulator


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. Sizes decide memory and time and nothing else.

    Attributes:
        logits: numbers in one array of logits, ``rows x V`` in the first pass.
        block: most rows at once in the second pass.
        columns: of the vocabulary at once in the second pass.
        gradient: ``"recompute"`` computes the logits again in the backward pass: the
            least memory. ``"ahead"`` prepares the gradient of ``sum(weights * values)``
            in the first pass, a third less time, for one float32 array of the size of
            the head. None: ahead for float32 heads, whose gradient is that array.
            Rows that all fit into the first pass at once keep their log-probs instead:
            nothing is computed twice.
    """

    logits: int = 2**25
    block: int = 2048
    columns: int = 4096
    gradient: Literal["recompute", "ahead"] | None = None


TILES = Tiles()


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
    """Check, flatten the batch, cut, run."""
    student, teacher = sides
    batch = student.hidden.shape[:-1]
    for side in sides:
        if side is not None:
            _check_readout(side, batch)
    for array in (mask, weights):
        if array is not None:
            chex.assert_shape(array, batch)
    for one in temperatures:
        check_domain("temperature", one, "(0, inf)")
    for cap in softcaps:
        if cap is not None:
            check_domain("softcap", cap, "(0, inf)")
    if weights is None:
        weights = jnp.ones(batch, bool) if mask is None else mask
    flat = len(batch)

    def rows(array):
        return array.reshape(-1, *array.shape[flat:])

    student, teacher = (
        None if side is None else side._replace(hidden=rows(side.hidden))
        for side in sides
    )
    if teacher is not None:
        teacher = jax.lax.stop_gradient(teacher)
    chunk, block = _cut(student, tiles)
    gradient = tiles.gradient
    if chunk >= len(student.hidden):
        gradient = "keep"
    elif gradient is None:
        wide = student.head.dtype.itemsize >= 4 and axis_name is None
        gradient = "ahead" if wide else "recompute"
    plan = Plan(
        loss=loss,
        temperatures=tuple(float(one) for one in temperatures),
        softcaps=softcaps,
        rows=chunk,
        block=block,
        columns=tiles.columns,
        gradient=gradient,
        axis_name=axis_name,
        normalised=normalised,
    )
    weights = jax.lax.stop_gradient(rows(weights).astype(accumulator(student.hidden)))
    mask = None if mask is None else rows(mask)
    data = jax.tree.map(rows, data)
    return vocabulary_loss(plan, student, teacher, data, weights, mask).reshape(batch)


def _cut(student: Readout, tiles: Tiles) -> tuple[int, int]:
    """Rows of a chunk, and rows of a block: a whole number of chunks."""
    count, width = len(student.hidden), student.head.shape[1]
    blocks = max(-(-count // tiles.block), 1)
    block = max(-(-count // blocks), 1)
    chunks = -(-block // max(tiles.logits // width, 8))
    chunk = -(-block // chunks)
    if chunk > 8:
        chunk = -(-chunk // 8) * 8
    return chunk, chunk * chunks


def _check_readout(side: Readout, batch: tuple[int, ...]) -> None:
    chex.assert_rank(side.head, 2)
    chex.assert_shape(side.hidden, (*batch, side.head.shape[0]))
    if side.bias is not None:
        chex.assert_shape(side.bias, (side.head.shape[1],))
