"""Programs compiled for TPU slices that are not here, and what is read of them.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m tests.aot.tpu_programs dense fsdp

prints a JSON line for each. It is a program because the TPU's compiler wants a process
of its own: flags of the CPU's compiler end it.
"""

import collections
import functools
import json
import re
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from rkd_jax.aot.compiling import text_of
from rkd_jax.aot.hlo import parse
from rkd_jax.aot.topology import slice_devices
from rkd_jax.losses import generalized_jsd, token_log_probs
from rkd_jax.losses.fused import (
    Tiles,
    linear_divergence,
    linear_expectation,
    linear_soft_value,
    linear_token_log_probs,
    linear_topk_divergence,
)
from rkd_jax.models.decoder import DecoderConfig
from rkd_jax.sharding import MeshConfig, batch_sharding, make_mesh
from tests.aot import test_fsdp
from tests.aot.abstract_updates import lowered_sft

SLICES = {
    "v5e": "v5e:2x4",
    "v5p": "v5p:2x2x2",
    "v6e": "v6e:2x4",
    "tpu7x": "tpu7x:2x2x1",
}
"""Eight devices each."""
LENGTH, LAYERS, CHUNK = 300, 3, 384
"""Columns of a row; splash attention pads them to whole chunks of 128."""
MODEL = DecoderConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=1,
    head_dim=64,
    max_length=LENGTH,
    dtype="bfloat16",
    attention="splash",
)
KERNEL = re.compile(r"splash_mha_(fwd|dq|dkv)")

BATCH, TARGETS, WIDTH, VOCABULARY, TOP = 16, 512, 128, 32768, 8
ROWS, COLUMNS = BATCH * TARGETS // 4, VOCABULARY // 2  # of one device
SMALL = Tiles(logits=2**20, block=512, columns=2048)


def splash(chip: str) -> dict:
    """An update of a decoder: how often each kernel runs, and arrays of scores."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), slice_devices(SLICES[chip]))
    lowered = lowered_sft(MODEL, mesh, rows=8, prompt=44, response=LENGTH - 44)
    program = parse(text_of(lowered, lowered.compile()))
    kernels, scores = collections.Counter(), []
    for _, one, weight in program.weighted():
        if one.opcode == "custom-call" and "tpu_custom_call" in one.attributes:
            kernels[KERNEL.search(one.name + one.attributes)[1]] += weight
        square = ([LENGTH] * 2, [CHUNK] * 2)
        scores += [a.shape for a in one.result if list(a.shape[-2:]) in square]
    return {"kernels": kernels, "scores": scores}


LOSSES = {
    "token log-probs": lambda x, head, given, **options: linear_token_log_probs(
        x, head, given["targets"], **options
    ),
    "divergence": lambda x, head, given, **options: linear_divergence(
        x,
        head,
        given["teacher"],
        given["teacher_head"],
        divergence=generalized_jsd,
        **options,
    ),
    "top-k divergence": lambda x, head, given, **options: linear_topk_divergence(
        x, head, given["ids"], given["log_probs"], **options
    ),
    "soft value": lambda x, head, given, **options: linear_soft_value(
        x, head, **options
    ),
    "expectation": lambda x, head, given, **options: linear_expectation(
        x, head, given["teacher"], given["teacher_head"], trains="policy", **options
    ),
}


def fused(name: str) -> dict:
    """A loss out of states and head on a mesh; its value and both gradients."""

    def loss(x, head, given):
        return LOSSES[name](x, head, given, mask=given["mask"], tiles=SMALL)

    return _of_value_and_gradient(loss)


def dense() -> dict:
    """The same with all logits there: what the memory of the others is held against."""

    def loss(x, head, given):
        values = token_log_probs(x.astype(np.float32) @ head, given["targets"])
        return jnp.where(given["mask"], values, 0)

    return _of_value_and_gradient(loss)


def _of_value_and_gradient(loss) -> dict:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2), slice_devices(SLICES["v5e"]))
    home = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))

    def row(dtype, *shape):
        shape = (BATCH, TARGETS, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    def head(width):
        return jax.ShapeDtypeStruct((width, VOCABULARY), np.float32, sharding=home)

    given = {
        "targets": row(np.int32),
        "mask": row(np.bool_),
        "ids": row(np.int32, TOP),
        "log_probs": row(np.float32, TOP),
        "teacher": row(jnp.bfloat16, 2 * WIDTH),
        "teacher_head": head(2 * WIDTH),
    }
    arguments = (row(jnp.bfloat16, WIDTH), head(WIDTH))
    step = jax.jit(
        jax.value_and_grad(lambda *x: loss(*x).sum(), (0, 1)),
        out_shardings=(None, tuple(x.sharding for x in arguments)),
    )
    with jax.set_mesh(mesh):
        compiled = step.trace(*arguments, given).lower().compile()
    return {"temporaries": compiled.memory_analysis().temp_size_in_bytes}


def fsdp() -> dict:
    """See `tests.aot.test_fsdp`."""
    return test_fsdp.measure(slice_devices(SLICES["v5e"]))


def part() -> dict:
    """A product over half of every host, which is no block of the slice.

    For v5e and v6e the compiler takes blocks of one host, and whole slices.
    """
    hosts = collections.defaultdict(list)
    for device in slice_devices("v5p:2x4x4"):
        hosts[device.process_index].append(device)
    halves = [device for devices in hosts.values() for device in devices[:2]]
    mesh = make_mesh(MeshConfig(fsdp=-1, tensor=2), halves)
    rows, width = (
        jax.ShapeDtypeStruct((64, 64), np.float32, sharding=NamedSharding(mesh, spec))
        for spec in (PartitionSpec("fsdp"), PartitionSpec(None, "tensor"))
    )
    product = jax.jit(lambda x, y: (x @ y).sum()).lower(rows, width).compile()
    return {
        "hosts": len(hosts),
        "mesh": [device.id for device in mesh.devices.flat],
        "given": [device.id for device in halves],
        "reduces": "all-reduce" in product.as_text(),
    }


PROGRAMS = {
    "part": part,
    **{f"splash {chip}": functools.partial(splash, chip) for chip in SLICES},
    **{f"fused {name}": functools.partial(fused, name) for name in LOSSES},
    "dense": dense,
    "fsdp": fsdp,
}


def main() -> None:
    """What cannot be compiled says why; the others are compiled all the same."""
    for name in sys.argv[1:]:
        try:
            found = PROGRAMS[name]()
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main()
