"""A tiny language model that one process trains, or several, each on its own rows.

``python -m tests.training.shared_rows FOLDER STEPS PORT INDEX COUNT`` is one of COUNT
processes of one device each: every large array is cut over all of them. At the end it
writes the whole state as it has it to ``FOLDER/final-INDEX.npz``, and which records it
read to ``FOLDER/read-INDEX.json``.
"""

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from rkd_jax.data.pipeline import make_batches
from rkd_jax.data.records import DemonstrationRecord
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.objectives.sft import make_sft
from rkd_jax.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    replicated,
    shard_batch,
    tree_shardings,
)
from rkd_jax.training import (
    MetricsWriter,
    OptimConfig,
    fit,
    init_state,
    make_optimizer,
    make_update,
)
from rkd_jax.training.checkpoint import CheckpointError, Checkpoints
from rkd_jax.training.interrupt import PeerLost
from rkd_jax.training.state import state_shardings
from tests.faults.damage import accept_views
from tests.training import tiny_game

TOKENIZER = byte_tokenizer()
MODEL = Decoder(
    DecoderConfig(
        vocab_size=TOKENIZER.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_length=16,
    )
)
# A gradient of rounding makes no step.
ADAM = make_optimizer(OptimConfig(1e-2, eps=1e-3, weight_decay=0.1))
ROWS = TokenizeConfig(max_prompt=4, max_response=6)
BATCH = 8


class Watched(Sequence):
    """640 demonstrations of unequal lengths, and the numbers of those looked at."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 640

    def __getitem__(self, number):
        self.read.append(number)
        return DemonstrationRecord(f"{number}:", "yes!!"[: 1 + number % 5])


@functools.cache
def params():
    """Of the model; drawn by NumPy, because there is nothing to compile."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(leaf.dtype),
        jax.eval_shape(MODEL.init, jax.random.key(0)),
    )


@functools.cache
def shardings(mesh):
    """Of the state; None for a single device."""
    if mesh is None:
        return None
    homes = tree_shardings(MODEL.logical_axes(), mesh, shapes=params())
    return state_shardings(params(), homes, student_optimizer=ADAM)


def start(mesh):
    """The state before the first step."""
    return init_state(
        params(),
        student_optimizer=ADAM,
        rng=jax.random.key(1),
        shardings=shardings(mesh),
    )


@functools.cache
def update(mesh):
    """One program per mesh."""
    return make_update(
        make_sft(MODEL),
        student_optimizer=ADAM,
        state_shardings=shardings(mesh),
        batch_sharding=None if mesh is None else batch_sharding(mesh),
    )


def train(folder, steps, mesh=None, shard=(0, 1)):
    """(state, numbers of the records read) after so many steps, the last one saved."""
    records = Watched()
    batches = make_batches(
        records, TOKENIZER, ROWS, batch_size=BATCH, seed=3, shard=shard
    )
    records.read.clear()  # the data's fingerprint is of every tenth, in any process

    def place(state, batch):
        return (batch if mesh is None else shard_batch(batch, mesh)), ()

    with (
        Checkpoints(f"{folder}/checkpoints", config={}) as checkpoints,
        MetricsWriter(folder, tensorboard=False) as metrics,
    ):
        state = fit(
            start(mesh),
            update(mesh),
            batches,
            steps=steps,
            prepare=place,
            checkpoints=checkpoints,
            metrics=metrics,
        )
    return state, records.read


def _main(folder: str, steps: str, port: str, index: str, count: str) -> None:
    shard = int(index), int(count)
    accept_views()
    jax.distributed.initialize(
        f"localhost:{port}",
        shard[1],
        shard[0],
        initialization_timeout=60,
        heartbeat_timeout_seconds=20,
        shutdown_timeout_seconds=20,
    )
    mesh = make_mesh(MeshConfig(fsdp=-1))
    state, read = train(folder, int(steps), mesh, shard)
    everywhere = jax.jit(lambda state: state, out_shardings=replicated(mesh))(state)
    np.savez(f"{folder}/final-{index}.npz", **tiny_game.flat(everywhere))
    Path(folder, f"read-{index}.json").write_text(json.dumps(read))


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except (CheckpointError, PeerLost) as error:
        sys.exit(f"error: {error}")
