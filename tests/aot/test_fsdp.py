"""What a step sends whose parameters are cut over fsdp, counted in its program."""

import math

import jax

from rkd_jax.aot.collectives import collective_traffic
from rkd_jax.aot.hlo import parse
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.sharding import MeshConfig, make_mesh
from tests.aot.abstract_updates import lowered_sft

VOCABULARY = 1024
CONFIG = DecoderConfig(
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
PARAMS = jax.eval_shape(Decoder(CONFIG).init, jax.random.key(0))
PARAMETERS = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
LARGEST = VOCABULARY * 256  # the head; it is larger than any matrix of a layer


def measure(devices) -> dict:
    """Bytes by kind, and the numbers in the largest array that is gathered."""
    mesh = make_mesh(MeshConfig(fsdp=8), devices)
    lowered = lowered_sft(CONFIG, mesh, rows=16, prompt=16, response=48)
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
