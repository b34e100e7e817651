"""One mesh, one table from logical axes to mesh axes, and what follows from it.

The mesh has three axes: ``data`` (replicas), ``fsdp`` (parameters cut along their
width) and ``tensor`` (heads, hidden units, vocabulary). A model says what its array
axes *mean* (``("embed", "mlp")``); `DEFAULT_RULES` say where such an axis lives.

>>> tuple(partition_spec(("layers", "embed", "mlp")))
(None, 'fsdp', 'tensor')
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rkd_jax.types import Params

_LOGGER = logging.getLogger(__name__)

LogicalAxes = tuple[str | None, ...]
Rules = Mapping[str, str | tuple[str, ...] | None]

AXES = ("data", "fsdp", "tensor")

SMALL = 2**20  # numbers of an array that is not worth cutting

# A name that is not listed is replicated.
DEFAULT_RULES: Rules = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "embed": "fsdp",
        "heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
    }
)


class ShardingError(ValueError):
    """A mesh that does not fit; the message says what does not, and what to change."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1, "all that remain".

    Example: ``MeshConfig(data=-1, fsdp=4)`` is 2 x 4 x 1 on eight devices.
    """

    data: int = 1
    """Replicas; rows are cut over them."""
    fsdp: int = 1
    """Devices that share parameters along their width, and rows."""
    tensor: int = 1
    """Devices that share heads, hidden units and vocabulary."""

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise ShardingError(
                f"mesh {sizes}: every axis needs a positive size, one of them may be -1"
            )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh ``("data", "fsdp", "tensor")`` with automatic (GSPMD) axes.

    Args:
        config: sizes of the axes.
        devices: what to build it from; None takes all devices of all processes. A
            single process may use fewer than it has, and then takes the first ones.

    Raises:
        ShardingError: the sizes need more devices than there are, do not divide them
            (-1), or leave a device of another process without work.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = (config.data, config.fsdp, config.tensor)
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % fixed == 0:
        sizes = tuple(len(devices) // fixed if s == -1 else s for s in sizes)
    count = math.prod(sizes)
    if not 0 < count <= len(devices):
        raise ShardingError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does "
            f"not fit {len(devices)} devices; change the sizes of the mesh"
        )
    if count < len(devices) and jax.process_count() > 1:
        raise ShardingError(
            f"the mesh takes {count} of {len(devices)} devices, but with several "
            "processes it must take all of them; set one axis to -1"
        )
    # Named, because `jax.make_mesh` would otherwise build Explicit axes.
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices[:count])
    except AssertionError:
        # Of a TPU slice JAX orders blocks alone, so that neighbours in the mesh are
        # neighbours in the slice. Any other part of it is taken in the order given.
        _LOGGER.warning("these %d devices are no block of their slice", count)
        found = np.array(devices[:count]).reshape(sizes)
        return Mesh(found, AXES, axis_types=types)


def partition_spec(axes: LogicalAxes, rules: Rules = DEFAULT_RULES) -> PartitionSpec:
    """Where an array lives whose axes mean ``axes``.

    Raises:
        ShardingError: two axes of the array ask for the same mesh axis.
    """
    targets = [None if name is None else rules.get(name) for name in axes]
    taken: dict[str, str] = {}
    for name, target in zip(axes, targets, strict=True):
        for mesh_axis in _mesh_axes(target):
            if mesh_axis in taken:
                raise ShardingError(
                    f"logical axes {axes}: {taken[mesh_axis]!r} and {name!r} both map "
                    f"to mesh axis {mesh_axis!r}; replicate one of them in the rules"
                )
            taken[mesh_axis] = name
    return PartitionSpec(*targets)


def tree_shardings(
    logical_axes_tree: Any,
    mesh: Mesh,
    rules: Rules = DEFAULT_RULES,
    *,
    shapes: Params | None = None,
) -> Any:
    """A `NamedSharding` for every array of a model.

    Args:
        logical_axes_tree: the parameter tree with a tuple of logical names (or None)
            in the place of each array, e.g. ``{"kernel": ("embed", "mlp")}``.
        mesh: where to place them.
        rules: logical name -> mesh axis, several mesh axes, or None.
        shapes: the parameters or their abstract values; where given, every array is
            checked to divide evenly.

    Returns:
        The same tree with a `NamedSharding` per array.

    Raises:
        ShardingError: two axes of an array collide, or (with ``shapes``) an axis does
            not divide evenly, or an array has another number of axes.
    """

    def place(path, axes, array=None):
        sharding = NamedSharding(mesh, partition_spec(axes, rules))
        if array is not None:
            check_divisible(jax.tree_util.keystr(path), axes, array, sharding)
        return sharding

    rest = () if shapes is None else (shapes,)
    return jax.tree_util.tree_map_with_path(
        place, logical_axes_tree, *rest, is_leaf=_is_axes
    )


def batch_sharding(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> NamedSharding:
    """The leading axis B cut as the rule "batch" says, everything else replicated."""
    return NamedSharding(mesh, partition_spec(("batch",), rules))


def row_shards(mesh: Mesh | None, rules: Rules = DEFAULT_RULES) -> int:
    """Into how many parts the rule "batch" cuts rows; 1 without a mesh."""
    if mesh is None:
        return 1
    sharding = batch_sharding(mesh, rules)
    return math.prod(mesh.shape[name] for name in _mesh_axes(sharding.spec[0]))


def ambient_axes(name: str, size: int, rules: Rules = DEFAULT_RULES) -> tuple[str, ...]:
    """The mesh axes over which a logical axis of that size is cut right here.

    Here is inside `jax.set_mesh`, or the update, which knows its mesh. For code that
    has to say itself what every device does; all else is the partitioner's.

    Args:
        name: logical axis.
        size: of the array's axis.
        rules: as in `tree_shardings`.

    Returns:
        Names of mesh axes, of those that a `jax.shard_map` around it leaves to the
        partitioner; none outside of a mesh, or where the size does not divide: then
        every device has all of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    names = tuple(
        n
        for n in _mesh_axes(rules.get(name))
        if kinds.get(n) == AxisType.Auto and mesh.shape[n] > 1
    )
    parts = math.prod(mesh.shape[n] for n in names)
    return names if size % parts == 0 else ()


def constrain(
    array: jax.Array, axes: LogicalAxes, rules: Rules = DEFAULT_RULES
) -> jax.Array:
    """Cut an array along its named axes, on the mesh of right here (`ambient_axes`).

    What the partitioner would else have to guess: beside parameters that are cut over
    fsdp it may as well cut states along their width, and then sums them over all
    devices at every layer.

    Args:
        array: traced.
        axes: a logical name or None for each axis of the array.
        rules: as in `tree_shardings`.

    Returns:
        The array, itself where no axis is cut.
    """
    names = [
        () if axis is None else ambient_axes(axis, size, rules)
        for axis, size in zip(axes, array.shape, strict=True)
    ]
    if not any(names):
        return array
    spec = PartitionSpec(*(name or None for name in names))
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of arrays or abstract values; keys are left out.

    What has no sharding is there as a whole.
    """

    def size(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return 0
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def parameter_shardings(params: Any, axes: Any, mesh: Mesh) -> Any:
    """Where parameters live.

    Args:
        params: arrays or their abstract values.
        axes: the tree of `tree_shardings`; None where nothing is said of the axes:
            parameters that are on the mesh then stay where they are, of the others
            large matrices are cut over fsdp along an axis that divides, and the rest is
            replicated.
        mesh: the mesh.

    Raises:
        ShardingError: an axis does not divide over the devices.
    """
    if axes is not None:
        return tree_shardings(axes, mesh, shapes=params)

    def place(leaf):
        if mesh_of(leaf) == mesh:
            return leaf.sharding
        names: LogicalAxes = (None,) * leaf.ndim
        if math.prod(leaf.shape) >= SMALL:
            parts = mesh.shape["fsdp"]
            cut = next((i for i, n in enumerate(leaf.shape) if n % parts == 0), None)
            names = tuple("embed" if i == cut else None for i in range(leaf.ndim))
        return NamedSharding(mesh, partition_spec(names))

    return jax.tree.map(place, params)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which arrays are; None where there is none, and while tracing."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh
    return None


def mesh_shard(
    mesh: Mesh | None, rules: Rules = DEFAULT_RULES
) -> tuple[tuple[int, ...], int]:
    """Which rows of a global batch the devices of this process hold.

    Not always one block, nor rows of its own: on a TPU slice the devices of a host need
    not be neighbours in the mesh, and hosts that share a layer hold the same rows.

    Args:
        mesh: all devices; None where there is one only.
        rules: as in `tree_shardings`.

    Returns:
        ``(blocks, n)``: these blocks, ascending, of n equal ones; the ``shard`` of
        `make_batches`.
    """
    if mesh is None:
        return (0,), 1
    count = row_shards(mesh, rules)
    # Rows are cut into n parts where n rows are cut into parts of one.
    sharding = batch_sharding(mesh, rules)
    held = sharding.addressable_devices_indices_map((count,)).values()
    blocks = {block for (rows,) in held for block in range(*rows.indices(count))}
    return tuple(sorted(blocks)), count


def shard_batch(batch: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Place a host batch on the mesh, cut along B.

    Args:
        batch: pytree of arrays ``[b, ...]``, the rows of this process: those of
            `mesh_shard`, in their order. In a single process b is B.
        mesh: where to place it.
        rules: as in `tree_shardings`.

    Returns:
        The same tree of global arrays ``[B, ...]``.

    Raises:
        ShardingError: B does not divide evenly over the devices that share it.
    """
    sharding = batch_sharding(mesh, rules)
    blocks, count = mesh_shard(mesh, rules)

    def place(path, array):
        array = np.asarray(array)
        shape = array.shape
        if shape:
            shape = (shape[0] * count // len(blocks), *shape[1:])
        check_divisible(
            f"batch{jax.tree_util.keystr(path)}",
            ("batch",),
            jax.ShapeDtypeStruct(shape, array.dtype),
            sharding,
        )
        size = shape[0] // count  # of a block

        def rows(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = blocks.index(start // max(size, 1)) * size
            return array[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, rows)

    return jax.tree_util.tree_map_with_path(place, batch)


def _mesh_axes(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """What a rule names, or an entry of a spec."""
    return (target,) if isinstance(target, str) else target or ()


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(
        n is None or isinstance(n, str) for n in node
    )


def check_divisible(
    name: str, axes: LogicalAxes, array: Any, sharding: NamedSharding
) -> None:
    """Raise ShardingError unless every axis of ``array`` divides over its devices."""
    if len(axes) > len(array.shape):
        raise ShardingError(f"{name}: shape {array.shape} has fewer axes than {axes}")
    for axis, size, target in zip(axes, array.shape, sharding.spec, strict=False):
        names = _mesh_axes(target)
        parts = math.prod(sharding.mesh.shape[n] for n in names)
        if size % parts:
            raise ShardingError(
                f"{name}: axis {axis!r} of size {size} does not divide over {parts} "
                f"devices ({' x '.join(names)}); change the size or the mesh"
            )
