"""What is read of a program that was compiled here, for eight devices of the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rkd_jax.aot.collectives import Traffic
from rkd_jax.aot.compiling import compile_step, placed
from rkd_jax.aot.flops import matmul_flops
from rkd_jax.models.attention_kernels import splash_attention
from rkd_jax.sharding import MeshConfig, device_bytes, make_mesh, parameter_shardings

LAYERS, WIDTH, ROWS = 5, 64, 16


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=8))


def abstract(mesh, shape, *spec):
    home = NamedSharding(mesh, PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=home)


def sharded_layers(mesh, state, x):
    """FSDP by hand: each layer gathers its weights; the mean is reduced."""

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(None, "fsdp"), PartitionSpec("fsdp")),
        out_specs=(PartitionSpec(None, "fsdp"), PartitionSpec()),
        check_vma=False,
    )
    def body(stack, x):
        def layer(x, mine):
            whole = jax.lax.all_gather(mine, "fsdp", axis=0, tiled=True)
            return jnp.tanh(x @ whole), None

        x, _ = jax.lax.scan(layer, x, stack)
        return stack * 2, jax.lax.pmean(x.mean(), "fsdp")

    return body(state, x)


def test_a_program_that_was_compiled(mesh):
    state = abstract(mesh, (LAYERS, WIDTH, WIDTH), None, "fsdp")
    x = abstract(mesh, (ROWS, WIDTH), "fsdp")
    unused = abstract(mesh, (24, 10))
    step = jax.jit(
        lambda state, x, unused: sharded_layers(mesh, state, x), donate_argnums=0
    )
    found = compile_step(step, (state, x, unused), mesh, beside=1000.0)
    shard = WIDTH // 8 * WIDTH * 4
    gathered = found.work.collectives["all-gather"]
    assert gathered == Traffic(LAYERS, LAYERS * 7 * shard)
    assert found.work.collectives["all-reduce"] == Traffic(1, 2 * 4 * 7 / 8)
    assert found.work.flops == LAYERS * 2 * (ROWS // 8) * WIDTH * WIDTH
    memory = found.memory
    assert memory.compiled
    assert memory.arguments == LAYERS * shard + ROWS // 8 * WIDTH * 4
    assert memory.aliased >= LAYERS * shard  # donated
    assert memory.beside == 1000 + 24 * 10 * 4  # what is not read is there all the same
    assert memory.peak < memory.arguments + memory.outputs + memory.temporaries + 10**6
    # All layers are read, and each gathered layer is written and read.
    assert found.work.hbm_bytes > LAYERS * (shard + 2 * 8 * shard)


def test_an_error_that_is_not_about_memory_is_an_error(mesh):
    def broken(x):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such luck")

    class Lowered:
        compile = broken

    class Traced:
        jaxpr = jax.make_jaxpr(jnp.sin)(1.0)
        lower = staticmethod(Lowered)

    class Jitted:
        trace = staticmethod(lambda *arguments: Traced)

    x = abstract(mesh, (1024,))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such luck"):
        compile_step(Jitted, (x,), mesh)

    for message in (
        "Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded",
        "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required "
        "for HLO temporaries (17.50G) exceeds available HBM (15.75G). HLO module: jit",
    ):

        def refused(self, message=message):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

        Lowered.compile = refused
        memory = compile_step(Jitted, (x,), mesh, beside=2.0**20).memory
        assert not memory.compiled
        assert memory.arguments == 4096
        assert memory.peak == 17.5 * 2**30 + 2**20


def test_products_are_counted_as_often_as_they_are_made():
    w, x = np.ones((LAYERS, WIDTH, WIDTH), np.float32), np.ones((ROWS, WIDTH), "f4")
    one = 2 * ROWS * WIDTH * WIDTH

    def forward(w, x, *, remat):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        layer = jax.checkpoint(layer) if remat else layer
        return jax.lax.scan(layer, x, w)[0].sum()

    def count(function, *arguments, devices=1, **options):
        jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
        return matmul_flops(jaxpr, devices=devices, **options)

    plain = functools.partial(forward, remat=False)
    again = functools.partial(forward, remat=True)
    assert count(plain, w, x) == LAYERS * one
    assert count(plain, w, x, devices=4) == LAYERS * one / 4
    assert count(jax.grad(plain, (0, 1)), w, x) == 3 * LAYERS * one
    assert count(jax.grad(again, (0, 1)), w, x) == 4 * LAYERS * one

    def either(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: plain(w, x), lambda: (x @ w[0]).sum())

    assert count(either, w, x) == one  # the branch with less work

    def rows(x, w, count):
        def body(i, out):
            part = jax.lax.dynamic_slice_in_dim(x, i * 4, 4)
            return jax.lax.dynamic_update_slice_in_dim(out, part @ w, i * 4, 0)

        return jax.lax.fori_loop(0, count, body, jnp.zeros_like(x))

    assert count(rows, x, w[0], np.int32(3)) == one  # all rows, four at a time

    def until(w, x):
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w[0], x)

    assert count(until, w, x) == one
    assert count(until, w, x, unknown=9) == 9 * one


@pytest.mark.parametrize(
    ("length", "window", "seen"),
    [  # blocks of 512, or of 384, at and below the diagonal
        (512, None, 1),
        (768, None, 3 / 4),
        (2048, None, 10 / 16),
        (2048, 512, 7 / 16),  # of each row of blocks the last two
    ],
)
def test_blocks_that_splash_attention_leaves_out_are_no_products(length, window, seen):
    """Two products forward; backward three for queries, four for keys and values."""
    query = jax.ShapeDtypeStruct((3, length, 8, 64), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((3, length, 2, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((3, length), jnp.int32)

    def loss(query, key, value, segments):
        mixed = splash_attention(query, key, value, segments, window=window)
        return mixed.astype(jnp.float32).sum()

    def products(function):
        jaxpr = jax.make_jaxpr(function)(query, key, key, segments).jaxpr
        return matmul_flops(jaxpr, devices=1) / (2 * 3 * 8 * 64 * length**2)

    assert products(loss) == 2 * seen
    # Beside these a sum over head_dim for each query, as a product.
    assert products(jax.grad(loss, (0, 1, 2))) == pytest.approx(9 * seen, rel=1e-3)


def test_products_inside_of_some_axes_are_cut_over_the_others():
    """What `jax.shard_map` says of some axes leaves the rest to the partitioner."""
    both = make_mesh(MeshConfig(fsdp=4, tensor=2))
    x, w = jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH))

    def over(names):
        product = jax.shard_map(
            jnp.matmul,
            in_specs=(PartitionSpec("fsdp"), PartitionSpec()),
            out_specs=PartitionSpec("fsdp"),
            axis_names=names,
        )
        with jax.set_mesh(both):
            jaxpr = jax.make_jaxpr(product)(x, w).jaxpr
        return matmul_flops(jaxpr, devices=8)

    all_rows = 2 * ROWS * WIDTH * WIDTH
    assert over({"fsdp"}) == all_rows / 8
    assert over({"fsdp", "tensor"}) == all_rows / 4  # every column on both devices


def test_parameters_without_axes_are_cut_where_it_matters(mesh):
    params = {
        "wide": jax.ShapeDtypeStruct((12, 2**17), np.float32),
        "first": jax.ShapeDtypeStruct((2**17, 12), np.float32),
        "small": jax.ShapeDtypeStruct((8, 8), np.float32),
    }
    homes = parameter_shardings(params, None, mesh)
    assert homes["wide"].spec == PartitionSpec(None, "fsdp")
    assert homes["first"].spec == PartitionSpec("fsdp", None)
    assert homes["small"].is_fully_replicated
    there = placed(params, homes)
    expected = 4 * (2 * 12 * 2**17 // 8 + 64)
    assert device_bytes(there) == expected
    assert device_bytes({"key": jax.eval_shape(lambda: jax.random.key(0))}) == 0
    with pytest.raises(ValueError, match="axis 'embed' of size 12"):
        parameter_shardings({"w": params["wide"]}, {"w": ("embed", None)}, mesh)
