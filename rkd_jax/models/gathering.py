"""Weights for a loop that reads all of them at every turn, as decoding does.

Parameters that are cut over fsdp are put together where they are used. A training step
does that once for thousands of columns; a decode loop would do it for every column, and
wait for the interconnect longer than for its own memory. So they are put together once,
before the loop, in the dtype that products are in. Axes that are cut over tensor stay
cut: nothing of them has to move.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rkd_jax.models.api import CausalLM
from rkd_jax.sharding import LogicalAxes, ambient_axes, constrain
from rkd_jax.types import Params

MOST_BYTES = 4 * 2**30
"""Of a device, where nothing else is said: a model of two billion parameters in
bfloat16."""
_CAST_WHERE_USED = ("kernel", "embedding")  # to the compute dtype, by every module


def gathered(model: CausalLM, params: Params, gather: bool | None = None) -> Params:
    """Parameters whose only cuts are those over tensor.

    Inside of `jax.set_mesh`, or of a function of `rkd_jax.placement`; elsewhere, and
    for a model that does not name its axes, they are what they were.

    Args:
        model: whose they are.
        params: traced.
        gather: False leaves them as they are; None too, where they would take more than
            `MOST_BYTES` on a device.

    Returns:
        The same numbers; kernels and embeddings in the model's compute dtype, as they
        are cast where they are used.
    """
    name_axes = getattr(model, "logical_axes", None)
    if gather is False or name_axes is None or not ambient_axes("embed", 0):
        return params
    dtype = jnp.dtype(model.config.dtype)

    def cast(path: Any, leaf: jax.Array, names: LogicalAxes) -> jax.Array:
        if path[-1].key not in _CAST_WHERE_USED:
            return leaf
        # In parts, or what moves are wide numbers that are cast where they arrive.
        return constrain(leaf.astype(dtype), names)

    def kept(leaf: jax.Array, names: LogicalAxes) -> list[tuple[str, ...]]:
        return [
            () if name in (None, "embed") else ambient_axes(name, size)
            for name, size in zip(names, leaf.shape, strict=True)
        ]

    mesh = jax.sharding.get_abstract_mesh()
    params = jax.tree_util.tree_map_with_path(cast, params, name_axes())
    axes = jax.tree.map(kept, params, name_axes())
    sizes = jax.tree.map(lambda leaf, cuts: _bytes(leaf, cuts, mesh), params, axes)
    if gather is None and sum(jax.tree.leaves(sizes)) > MOST_BYTES:
        return params

    def place(leaf: jax.Array, cuts: list[tuple[str, ...]]) -> jax.Array:
        spec = PartitionSpec(*(cut or None for cut in cuts))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, params, axes)


def _bytes(leaf: jax.Array, cuts: list[tuple[str, ...]], mesh: Any) -> int:
    parts = math.prod(mesh.shape[name] for cut in cuts for name in cut)
    return leaf.size * leaf.dtype.itemsize // parts
