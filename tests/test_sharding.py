"""Mesh sizes, the rules from logical to mesh axes, and where batches land."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from rkd_jax.sharding import (
    AXES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    mesh_shard,
    partition_spec,
    replicated,
    shard_batch,
    tree_shardings,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def test_mesh_axes_are_automatic(mesh):
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    # Explicit axes, the default of jax.make_mesh, would break un-jitted gradients.
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 1, 1)),
        (MeshConfig(data=-1, fsdp=4), (2, 4, 1)),
        (MeshConfig(data=2, tensor=-1), (2, 1, 4)),
    ],
)
def test_mesh_sizes(config, sizes):
    assert tuple(make_mesh(config).shape.values()) == sizes


def test_mesh_takes_the_first_devices_in_order():
    mesh = make_mesh(MeshConfig(data=4))
    assert set(mesh.devices.flat) == set(jax.devices()[:4])


@pytest.mark.parametrize("config", [MeshConfig(16), MeshConfig(-1, 3)])
def test_mesh_that_does_not_fit_is_refused(config):
    with pytest.raises(ValueError, match=f"data={config.data} .* not fit 8 devices"):
        make_mesh(config)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-1, -1, 1), (1, -2, 1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="positive size"):
        MeshConfig(*sizes)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("vocab", "embed"), PartitionSpec("tensor", "fsdp")),
        (("layers", "embed", "heads", None), (None, "fsdp", "tensor", None)),
        (("batch", None), PartitionSpec(("data", "fsdp"), None)),
        ((), PartitionSpec()),
    ],
)
def test_rules(axes, spec):
    assert partition_spec(axes) == PartitionSpec(*spec)


@pytest.mark.parametrize("axes", [("embed", "embed"), ("batch", "embed")])
def test_colliding_axes_are_refused(axes):
    with pytest.raises(ValueError, match=f"'{axes[0]}' and '{axes[1]}' .* 'fsdp'"):
        partition_spec(axes)


def test_own_rules_replace_the_defaults():
    rules = {"embed": None, "mlp": ("data", "tensor")}
    assert partition_spec(("embed", "mlp"), rules) == PartitionSpec(
        None, ("data", "tensor")
    )


def test_tree_shardings_cut_every_array_as_named(mesh):
    axes = {"mlp": {"up": ("embed", "mlp")}, "norm": ("embed",), "count": ()}
    params = {
        "mlp": {"up": jnp.ones((4, 6))},
        "norm": jnp.ones(4),
        "count": jnp.ones(()),
    }
    shardings = tree_shardings(axes, mesh, shapes=params)
    placed = jax.device_put(params, shardings)
    pieces = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, placed)
    assert pieces == {"mlp": {"up": (2, 3)}, "norm": (2,), "count": ()}


def test_uneven_axis_is_named(mesh):
    with pytest.raises(
        ValueError, match=r"\['head'\]: axis 'vocab' of size 7 .* 2 dev"
    ):
        tree_shardings({"head": ("vocab",)}, mesh, shapes={"head": jnp.ones(7)})


def test_more_names_than_axes_is_refused(mesh):
    with pytest.raises(ValueError, match="fewer axes"):
        tree_shardings({"b": ("embed", "mlp")}, mesh, shapes={"b": jnp.ones(4)})


def test_batch_is_cut_over_data_and_fsdp(mesh):
    tokens = np.arange(24).reshape(8, 3)
    batch = shard_batch({"tokens": tokens}, mesh)
    assert batch["tokens"].sharding == batch_sharding(mesh)
    assert batch["tokens"].addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(batch["tokens"], tokens)


def test_a_process_alone_holds_every_block(mesh):
    assert mesh_shard(mesh) == ((0, 1, 2, 3), 4)
    assert mesh_shard(None) == ((0,), 1)
    assert mesh_shard(mesh, {"batch": "tensor"}) == ((0, 1), 2)
    assert mesh_shard(mesh, {}) == ((0,), 1)  # rows are replicated


def test_batch_that_cannot_be_cut_is_named(mesh):
    with pytest.raises(ValueError, match=r"batch\['tokens'\]: axis 'batch' of size 6"):
        shard_batch({"tokens": np.zeros((6, 3))}, mesh)


def test_replicated_is_whole_everywhere(mesh):
    x = jax.device_put(jnp.arange(5.0), replicated(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(5,)}
    assert len(x.addressable_shards) == 8
