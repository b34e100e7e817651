"""One of two processes that train the tiny game together on four devices.

``python -m tests.training.two_processes FOLDER STEPS PORT INDEX [EVERY]`` says "ready"
at step 1 and "between steps" at every other, and takes its time there, so that a
signal finds it. It saves every EVERY steps, half of each large array by either process,
and takes a silent process for dead after ten seconds. At the end each writes the
players as it has them to ``FOLDER/final-INDEX.npz``.
"""

import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from rkd_jax.sharding import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    replicated,
    shard_batch,
    tree_shardings,
)
from rkd_jax.training import Interrupted, MetricsWriter, fit, leave
from rkd_jax.training.checkpoint import CheckpointError, Checkpoints
from rkd_jax.training.interrupt import PeerLost
from rkd_jax.training.state import state_shardings
from tests.faults.damage import accept_views, mind_the_disk
from tests.training import tiny_game

WIDTH = 512


def _main(folder: str, steps: str, port: str, index: str, every: str = "500") -> None:
    accept_views()
    mind_the_disk(index)
    jax.distributed.initialize(
        f"localhost:{port}", 2, int(index), heartbeat_timeout_seconds=10
    )
    mesh = make_mesh(MeshConfig(fsdp=4))
    student, critic, frozen = tiny_game.params(WIDTH)
    shardings = state_shardings(
        student,
        tree_shardings({"w": (None, "embed"), "b": (None, "embed")}, mesh),
        student_optimizer=tiny_game.STUDENT,
        critic_params=critic,
        critic_shardings=tree_shardings({"v": (None, "embed")}, mesh),
        critic_optimizer=tiny_game.CRITIC,
    )

    def prepare(state, batch):
        print("ready" if int(state.step) == 1 else "between steps", flush=True)
        time.sleep(0.1)
        mine = slice(8 * int(index), 8 * int(index) + 8)
        batch = {name: rows[mine] for name, rows in batch.items()}
        noise = tiny_game.Signal(0.0 * batch["x"])
        return shard_batch(batch, mesh), shard_batch(noise, mesh)

    with (
        Checkpoints(f"{folder}/checkpoints", config={}) as checkpoints,
        MetricsWriter(folder, tensorboard=False) as metrics,
    ):
        state = fit(
            tiny_game.start(width=WIDTH, shardings=shardings),
            tiny_game.make(
                state_shardings=shardings, batch_sharding=batch_sharding(mesh)
            ),
            tiny_game.Rows(width=WIDTH),
            steps=int(steps),
            frozen=jax.device_put(frozen, replicated(mesh)),
            prepare=prepare,
            checkpoints=checkpoints,
            metrics=metrics,
            checkpoint_every=int(every),
        )
    players = (state.student, state.critic)
    everywhere = multihost_utils.process_allgather(players, tiled=True)
    np.savez(f"{folder}/final-{index}.npz", **tiny_game.flat(everywhere))


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except (CheckpointError, PeerLost) as error:
        print(f"error: {error}", file=sys.stderr)
        leave(1)
