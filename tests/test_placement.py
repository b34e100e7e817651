"""Functions go where their parameters are; rows are cut, filled up and fetched."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.placement import (
    fetch,
    fill_rows,
    follow_parameters,
    on_own_rows,
    place_rows,
)
from rkd_jax.sharding import (
    MeshConfig,
    ShardingError,
    ambient_axes,
    batch_sharding,
    make_mesh,
    mesh_of,
    parameter_shardings,
    replicated,
    row_shards,
    tree_shardings,
)

AXES = {"w": ("embed", "mlp")}
PARAMS = {"w": np.arange(8.0, dtype=np.float32).reshape(4, 2)}
ROWS = {"x": np.arange(32.0, dtype=np.float32).reshape(8, 4)}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def params(mesh):
    return jax.device_put(PARAMS, tree_shardings(AXES, mesh, shapes=PARAMS))


def product(params, rows, factor=1.0):
    return {"y": rows["x"] @ params["w"] * factor}


def expected(count):
    return ROWS["x"][:count] @ PARAMS["w"]


def test_rows_are_cut_over_data_and_fsdp(mesh):
    placed = place_rows(ROWS, mesh)["x"]
    assert placed.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert placed.addressable_shards[0].data.shape == (2, 4)
    np.testing.assert_array_equal(fetch(placed), ROWS["x"])
    again = jax.device_put(ROWS, replicated(mesh))
    assert place_rows(again, mesh)["x"].sharding.is_equivalent_to(placed.sharding, 2)
    assert (row_shards(mesh), row_shards(None)) == (4, 1)


def test_rows_that_do_not_divide_are_named(mesh):
    message = "'x'.*axis 'batch' of size 6 does not divide over 4 devices"
    with pytest.raises(ShardingError, match=message):
        place_rows({"x": ROWS["x"][:6]}, mesh)
    with pytest.raises(ShardingError, match="fewer axes"):
        place_rows(np.float32(1.0), mesh)


def test_a_function_goes_where_its_parameters_are(mesh, params):
    seen = []

    def function(params, rows, factor):
        seen.append(ambient_axes("batch", rows["x"].shape[0]))
        return product(params, rows, factor)

    follow = follow_parameters(function)
    factor = jnp.float32(2.0)
    for _ in range(2):
        found = follow(params, ROWS, factor)["y"]
        assert found.sharding.is_equivalent_to(batch_sharding(mesh), 2)
        np.testing.assert_allclose(found, 2.0 * expected(8))
    assert seen == [("data", "fsdp")]  # traced once, told about the mesh
    alone = follow(PARAMS, ROWS, factor)["y"]
    np.testing.assert_allclose(alone, 2.0 * expected(8))
    assert seen[1:] == [()]


@pytest.mark.parametrize("count", [1, 3, 5, 8])
def test_rows_are_filled_up_and_none_is_dropped(params, count):
    follow = follow_parameters(product, to_host=True)
    found = follow(params, {"x": ROWS["x"][:count]})["y"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, expected(count))


def test_inside_a_jitted_function_nothing_is_placed(params):
    follow = follow_parameters(product)
    found = jax.jit(follow)(params, {"x": ROWS["x"][:3]})["y"]
    np.testing.assert_allclose(found, expected(3))


def test_every_device_does_its_own_rows(mesh, params):
    """With weights that are whole, and rows that are all of them without a mesh."""
    seen = []

    def function(weights, rows):
        seen.append((rows["x"].shape, weights["w"].shape))
        return jax.lax.map(lambda row: row @ weights["w"], rows["x"])

    follow = follow_parameters(functools.partial(on_own_rows, function))
    np.testing.assert_allclose(follow(params, ROWS), expected(8))
    assert seen == [((2, 4), (4, 2))]
    np.testing.assert_allclose(follow(PARAMS, ROWS), expected(8))
    assert seen[1:] == [((8, 4), (4, 2))]


def test_fill_rows_repeats_the_last_row():
    np.testing.assert_array_equal(
        fill_rows({"x": np.array([[1, 2], [3, 4]])}, 4)["x"],
        [[1, 2], [3, 4], [3, 4], [3, 4]],
    )


def test_parameters_on_the_mesh_stay_where_they_are(mesh, params):
    head = {"w": jnp.zeros((4, 2))}
    assert mesh_of(params) == mesh
    assert mesh_of((head, ROWS)) is None
    homes = parameter_shardings({"trunk": params, "head": head}, None, mesh)
    assert homes["trunk"]["w"] == params["w"].sharding
    assert homes["head"]["w"].is_fully_replicated
