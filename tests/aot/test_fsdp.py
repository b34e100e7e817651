"""What a step sends whose parameters are cut over fsdp, counted in its program."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from rkd_jax.aot.collectives import collective_traffic
from rkd_jax.aot.compiling import placed
from rkd_jax.aot.hlo import parse
from rkd_jax.aot.topology import slice_devices
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.objectives.sft import make_sft
from rkd_jax.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    tree_shardings,
)
from rkd_jax.training import init_state, make_update
from rkd_jax.training.state import state_shardings
from rkd_jax.types import DemonstrationBatch, Sequences

ROOT = Path(__file__).parents[2]
ROWS, PROMPT, RESPONSE, VOCABULARY = 16, 16, 48, 1024
MODEL = Decoder(
    DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        max_length=64,
        attention="xla",
        remat="full",
    )
)
PARAMS = jax.eval_shape(MODEL.init, jax.random.key(0))
PARAMETERS = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
LARGEST = VOCABULARY * 256  # the head; it is larger than any matrix of a layer


def measure(devices) -> dict:
    """Bytes by kind, and the numbers in the largest array that is gathered."""
    mesh = make_mesh(MeshConfig(fsdp=8), devices)
    home, optimizer = batch_sharding(mesh), optax.adam(1e-3)
    homes = tree_shardings(MODEL.logical_axes(), mesh, shapes=PARAMS)
    shardings = state_shardings(PARAMS, homes, student_optimizer=optimizer)
    state = jax.eval_shape(
        lambda params, rng: init_state(params, student_optimizer=optimizer, rng=rng),
        PARAMS,
        jax.random.key(0),
    )

    def full(dtype, *shape):
        return jax.ShapeDtypeStruct((ROWS, *shape), dtype, sharding=home)

    length = PROMPT + RESPONSE
    rows = Sequences(
        full(np.int32, length), full(np.bool_, length), full(np.bool_, RESPONSE)
    )
    update = make_update(
        make_sft(MODEL),
        student_optimizer=optimizer,
        state_shardings=shardings,
        batch_sharding=home,
    )
    batch = DemonstrationBatch(rows, rows, full(np.int32))
    lowered = update.lower(placed(state, shardings), None, batch, ())
    program = parse(lowered.compile().as_text())
    gathered = [
        math.prod(array.shape)
        for _, instruction, _ in program.weighted()
        if instruction.opcode.startswith("all-gather")
        for array in instruction.result
    ]
    traffic = collective_traffic(program, 8)
    return {kind: found.bytes for kind, found in traffic.items()} | {
        "largest": max(gathered)
    }


def test_parameters_are_gathered_twice_and_gradients_summed_once():
    """Of states only what embeddings are exchanged by; the head is never cut twice."""
    found = measure(jax.devices())
    once = 7 / 8 * 4 * PARAMETERS
    assert found["largest"] <= LARGEST
    assert once < found["all-gather"] < 1.15 * 2 * once
    # This compiler does not scatter what it reduces: it sends as much again.
    assert once < found["all-reduce"] < 1.15 * 2 * once
    assert found["all-to-all"] < 0.15 * once


@pytest.mark.tpu_compile
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler"
)
def test_on_a_slice_it_sends_what_it_has_to():
    dropped = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, __file__],
        env=environment
        | {"PYTHONPATH": os.pathsep.join(paths), "TPU_SKIP_MDS_QUERY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("largest") <= LARGEST
    assert sum(found.values()) < 1.15 * 3 * 7 / 8 * 4 * PARAMETERS


if __name__ == "__main__":
    print(json.dumps(measure(slice_devices("v5e:2x4"))))
