"""Few shapes for many batches, so that nothing is compiled twice.

Samplers and searches are compiled once per shape of their prompts. `bucketed` brings
every batch to one of a few shapes first: prompts to the narrowest width that holds the
longest, rows to the smallest count that holds the batch.

>>> import numpy as np
>>> prompts = Prompts(np.array([[7, 8]]), np.array([[True, True]]))
>>> bucket_prompts(prompts, widths=(4, 8), rows=(2,)).tokens.tolist()
[[0, 0, 7, 8], [0, 0, 7, 8]]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax
import numpy as np

from rkd_jax.types import Prompts

_P = ParamSpec("_P")
_R = TypeVar("_R")


def bucketed(
    run: Callable[_P, _R], *, widths: Sequence[int], rows: Sequence[int]
) -> Callable[_P, _R]:
    """``run``, given its prompts in few shapes and its results cut back to the rows.

    A row's result does not depend on the width of its padding or on other rows, so it
    is, to rounding, that of ``run`` itself. Rows are filled up with copies of the last
    one, and every combination of a width and a row count in use compiles once.

    Args:
        run: from `make_sampler`, `make_mixed_sampler` or `make_beam_search`: arguments
            that are `Prompts` are brought to a bucket, each to a width of its own;
            every leaf of the result has a leading axis of rows.
        widths: allowed P, ascending, such as ``TokenizeConfig.prompt_widths``.
        rows: allowed B, ascending.

    Returns:
        a function with the arguments of ``run``, which are concrete: it must not be
        called inside `jax.jit`. Its result is on the host, numpy arrays with the rows
        it was given; the prompts in it have the bucket's width.

    Raises:
        ValueError: buckets that are not positive and ascending; and from the call, a
            batch without rows, longer or with more rows than the last bucket, or
            batches that differ in their number of rows.
        TypeError: a call without prompts.
    """
    widths, rows = _ascending("widths", widths), _ascending("rows", rows)

    def bucket(value):
        if not isinstance(value, Prompts):
            return value
        return bucket_prompts(value, widths=widths, rows=rows)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Prompts)]
        if not given:
            raise TypeError("no argument is a rkd_jax.types.Prompts")
        counts = [prompts.tokens.shape[0] for prompts in given]
        if len(set(counts)) > 1:  # filled up they would all look alike
            raise ValueError(f"batches of prompts with {counts} rows: give one of each")
        count = counts[0]
        named = {name: bucket(value) for name, value in kwargs.items()}
        result = run(*(bucket(value) for value in args), **named)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], result)

    return call


def bucket_prompts(
    prompts: Prompts, *, widths: Sequence[int], rows: Sequence[int]
) -> Prompts:
    """Prompts [B, P] left-padded to the smallest buckets, on the host.

    Args:
        prompts: on the host or a device, padded on either side or with holes.
        widths: allowed P, ascending.
        rows: allowed B, ascending; the last prompt is repeated to fill up.

    Raises:
        ValueError: prompts that are not [B, P], no rows, or no bucket that is large
            enough.
    """
    tokens, mask = np.asarray(prompts.tokens), np.asarray(prompts.mask)
    if tokens.ndim != 2 or mask.shape != tokens.shape:
        raise ValueError(
            f"prompts must be [B, P]: tokens {tokens.shape}, mask {mask.shape}"
        )
    if not len(tokens):
        raise ValueError("there is no prompt in the batch")
    width = _smallest(widths, int(mask.sum(axis=1).max()), "tokens in a prompt")
    count = _smallest(rows, len(tokens), "prompts in a batch")
    order = np.argsort(mask, axis=1, kind="stable")
    missing = max(width - order.shape[1], 0)

    def fit(values):
        values = np.take_along_axis(values, order, axis=1)[:, -width:]
        values = np.pad(values, ((0, 0), (missing, 0)))
        return np.pad(values, ((0, count - len(values)), (0, 0)), mode="edge")

    return Prompts(fit(tokens), fit(mask))


def _ascending(name: str, buckets: Sequence[int]) -> tuple[int, ...]:
    buckets = tuple(buckets)
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(f"{name} must ascend from at least 1, got {buckets}")
    return buckets


def _smallest(buckets: Sequence[int], needed: int, what: str) -> int:
    for size in buckets:
        if size >= needed:
            return size
    raise ValueError(
        f"{needed} {what}, but the largest bucket holds {buckets[-1]}: add a larger "
        "one, or cut the batch"
    )
