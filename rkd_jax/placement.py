"""Rows, functions and results on a mesh: computation goes where parameters are.

Whoever puts parameters on a mesh (`rkd_jax.sharding`) says no more: rows are cut over
that mesh before a function reads them, and come back whole where the host needs them.
A teacher may be on other devices than its student. In several processes rows are on the
mesh already, or each process holds all of them and does the same with them.

>>> import jax.numpy as jnp
>>> double = follow_parameters(lambda params, rows: params * rows)
>>> double(jnp.float32(2.0), jnp.arange(3.0)).tolist()
[0.0, 2.0, 4.0]
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from rkd_jax.sharding import (
    ambient_axes,
    batch_sharding,
    check_divisible,
    mesh_of,
    row_shards,
)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """In a function that is traced: code that divides its work itself sees the mesh.

    See `rkd_jax.sharding.ambient_axes`. None changes nothing.
    """
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def describe_mesh(mesh: Mesh) -> str:
    """Its sizes, and how many devices there are, in a few words for a terminal."""
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return f"{sizes}, {mesh.size} of {jax.device_count()} devices"


def jit_on(mesh: Mesh, function: Callable) -> Any:
    """``function(params, rows, ...)`` jitted for a mesh; results are cut like rows."""

    def run(*arguments):
        with on_mesh(mesh):
            return function(*arguments)

    return jax.jit(run, out_shardings=batch_sharding(mesh))


def follow_parameters(function: Callable, *, to_host: bool = False) -> Callable:
    """``function(params, rows, ...)``, computed where its parameters are.

    With parameters on a mesh the rows are cut over it; rows that do not divide are
    filled up with copies of the last one, and what comes of these is dropped. With any
    other parameters, and inside a jitted function, it is ``function`` itself.

    Args:
        function: of parameters, a pytree of rows ``[B, ...]`` and whatever else, to a
            pytree of ``[B, ...]``. No row may depend on another.
        to_host: whether what was computed on a mesh comes back as numpy arrays, whole
            in every process. It does where rows were filled up.

    Returns:
        A function with the arguments of ``function``, compiled once per mesh and shape.
    """
    jitted = functools.cache(lambda mesh: jit_on(mesh, function))

    def follow(params, rows, *rest):
        mesh = mesh_of(params)
        if mesh is None:
            return function(params, rows, *rest)
        count = jax.tree.leaves(rows)[0].shape[0]
        missing = -count % row_shards(mesh)
        if missing:
            rows = fill_rows(fetch(rows), count + missing)
        found = jitted(mesh)(params, place_rows(rows, mesh), *rest)
        if missing or to_host:
            found = jax.tree.map(lambda x: x[:count], fetch(found))
        return found

    return follow


def on_own_rows(function: Callable, weights: Any, rows: Any) -> Any:
    """``function(weights, rows)`` while tracing: every device does the rows it has.

    For a loop over rows or positions. Left to the partitioner all devices would do all
    rows, or put weights that are cut over devices together in every round, and sum
    their gradients over devices as often.

    Args:
        function: of weights and a pytree of rows ``[B, ...]``, to a pytree of
            ``[B, ...]``. No row may depend on another.
        weights: every device has them as a whole, but for what is cut over axes along
            which no rows are.
        rows: pytree of arrays ``[B, ...]``.

    Returns:
        What ``function`` returns; it is called as it is where rows are not cut, see
        `rkd_jax.sharding.ambient_axes`.
    """
    axes = ambient_axes("batch", jax.tree.leaves(rows)[0].shape[0])
    if not axes:
        return function(weights, rows)

    def own(weights, rows):
        return function(jax.lax.pcast(weights, axes, to="varying"), rows)

    cut = PartitionSpec(axes)
    specs = PartitionSpec(), cut
    return jax.shard_map(own, in_specs=specs, out_specs=cut, axis_names=set(axes))(
        weights, rows
    )


def place_rows(rows: Any, mesh: Mesh) -> Any:
    """Place rows that every process has whole on the mesh, cut along B.

    Args:
        rows: pytree of arrays ``[B, ...]``, on the host, on the mesh or on another one.
            In several processes rows of another mesh pass through every host.
        mesh: where to place them.

    Raises:
        ShardingError: B does not divide evenly over the devices that share it.
    """
    sharding = batch_sharding(mesh)

    def place(path, array):
        name = f"rows{jax.tree_util.keystr(path)}"
        check_divisible(name, ("batch",), array, sharding)
        if mesh_of(array) is not None:
            return move(array, sharding)
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree_util.tree_map_with_path(place, rows)


def move(tree: Any, shardings: Any) -> Any:
    """`jax.device_put`, in several processes between any two meshes.

    What comes from other devices passes through every host there, so all processes
    have to call it.

    Args:
        tree: pytree of arrays, on the host or on a mesh.
        shardings: the same tree of `NamedSharding`.
    """

    def put(array, sharding):
        there = mesh_of(array)
        local = there is None or array.is_fully_addressable
        if local or _same_devices(there, sharding.mesh):
            return jax.device_put(array, sharding)
        array = fetch(array)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(put, tree, shardings)


def _same_devices(one: Mesh, other: Mesh) -> bool:
    """Then JAX can copy from one to the other in several processes."""
    return set(one.devices.flat) == set(other.devices.flat)


def fill_rows(tree: Any, size: int) -> Any:
    """Repeat the last of n >= 1 rows of every leaf ``[n, ...]`` up to ``size`` rows."""

    def fill(leaf):
        copies = np.ones(leaf.shape[0], int)
        copies[-1] += size - leaf.shape[0]
        return np.repeat(np.asarray(leaf), copies, axis=0)

    return jax.tree.map(fill, tree)


def fetch(tree: Any) -> Any:
    """Whole arrays on the host, in every process; all of them have to call it."""

    def whole(array):
        if getattr(array, "is_fully_addressable", True):
            return np.asarray(array)
        return multihost_utils.process_allgather(array, tiled=True)

    return jax.tree.map(whole, tree)
