"""A two-player game small enough to train in a test, and a process that trains it.

``python -m tests.training.tiny_game FOLDER STEPS [TROUBLE=N]`` trains to STEPS in
FOLDER with a checkpoint every 2 steps and writes the final state to
``FOLDER/final.npz``. At step N it kills itself (kill), or says "ready" and waits a
second for a signal (wait), or makes files above 2 KiB fail as a full disk does (disk,
and dearth, which is over two steps later).
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.training import (
    Interrupted,
    MetricsWriter,
    OptimConfig,
    Progress,
    fit,
    init_state,
    make_optimizer,
    make_update,
    step_keys,
)
from rkd_jax.types import LossOutput, Mean, Objective, struct


@struct
class Signal:
    """Noise drawn on the current student."""

    noise: jax.Array  # float32[B, T]


class Rows:
    """Endless batches ``{"x": float32[B, T], "mask": bool[B, T]}``, unequal lengths."""

    def __init__(self, rows: int = 16, width: int = 6):
        self.position, self._shape = 0, (rows, width)

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng(self.position)
        self.position += 1
        lengths = rng.integers(1, self._shape[1] + 1, self._shape[0])
        mask = np.arange(self._shape[1]) < lengths[:, None]
        x = rng.normal(size=self._shape).astype(np.float32)
        return {"x": x, "mask": mask}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def _summed(values, mask, **metrics):
    weight = jnp.sum(mask, dtype=jnp.float32)
    total = jnp.sum(jnp.where(mask, values, 0.0))
    sums = {
        k: Mean(jnp.sum(jnp.where(mask, v, 0.0)), weight) for k, v in metrics.items()
    }
    return LossOutput(total, weight, sums)


def _student_loss(params, critic, frozen, batch, signal, rng):
    noise = 0.1 * jax.random.normal(rng)
    output = jnp.tanh(batch["x"] * params["w"] + params["b"]) + noise
    error = (output - batch["x"] * frozen["w"] + signal.noise) ** 2
    return _summed(
        error + critic["v"] * output, batch["mask"], **{"student/error": error}
    )


def _critic_loss(critic, params, dual, frozen, batch, signal, rng):
    output = jnp.tanh(batch["x"] * params["w"] + params["b"])
    gap = critic["v"] * (batch["x"] * frozen["w"] - output)
    loss = gap + dual * 0.5 * critic["v"] ** 2
    return _summed(loss, batch["mask"], **{"critic/gap": gap})


def _dual_step(dual, metrics):
    return jnp.clip(dual + 0.1 * metrics["critic/gap"], 0.1, 10.0)


GAME = Objective("tiny", _student_loss, _critic_loss, _dual_step, ("noise",))
STUDENT = make_optimizer(OptimConfig(1e-2, "cosine", 2, 50, weight_decay=0.1))
CRITIC = make_optimizer(OptimConfig(2e-2))


def params(width: int = 6):
    """Student, critic and frozen parameters."""
    w = jnp.linspace(-1.0, 1.0, width, dtype=jnp.float32).reshape(1, width)
    return {"w": w, "b": jnp.zeros((1, width))}, {"v": 0.5 * w}, {"w": w + 1.0}


def start(seed: int = 0, width: int = 6, **kwargs):
    """The initial state."""
    student, critic, _ = params(width)
    return init_state(
        student,
        student_optimizer=STUDENT,
        critic_params=critic,
        critic_optimizer=CRITIC,
        rng=jax.random.key(seed),
        **kwargs,
    )


def make(**kwargs):
    """The update of the game, two critic steps per student step."""
    return make_update(
        GAME,
        student_optimizer=STUDENT,
        critic_optimizer=CRITIC,
        critic_steps=2,
        **kwargs,
    )


@jax.jit
def _noise(state, x):
    noise = jax.random.normal(step_keys(state).prepare, x.shape)
    return Signal(noise * jnp.mean(state.student.params["w"] ** 2))


def prepare(state, batch):
    """Noise that depends on the student and on the step's own key."""
    return batch, _noise(state, batch["x"])


def flat(state) -> dict[str, np.ndarray]:
    """Every array of a state by name, keys as their raw bits."""
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _main(folder: str, steps: str, trouble: str = "none=-1") -> None:
    from rkd_jax.training.checkpoint import CheckpointError, Checkpoints

    kind, at = trouble.split("=")
    folder = Path(folder)
    plenty = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def troubled(state, batch):
        if int(state.step) == int(at):
            checkpoints.wait()
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "wait":
                print("ready", flush=True)
                time.sleep(1.0)
            if kind == "disk":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
            if kind == "dearth":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2048, plenty))
        if kind == "dearth" and int(state.step) == int(at) + 2:
            time.sleep(2.0)  # the checkpoint in between has failed by now
            resource.setrlimit(resource.RLIMIT_FSIZE, (plenty, plenty))
        return prepare(state, batch)

    batches = Rows()
    try:
        with (
            Checkpoints(folder / "checkpoints", config={"seed": 0}) as checkpoints,
            MetricsWriter(folder, tensorboard=False) as metrics,
            Progress() as progress,
        ):
            state = fit(
                start(),
                make(),
                batches,
                steps=int(steps),
                frozen=params()[2],
                prepare=troubled,
                checkpoints=checkpoints,
                metrics=metrics,
                progress=progress,
                checkpoint_every=2,
                in_flight=0,  # so that a kill leaves log entries past the checkpoint
            )
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    np.savez(folder / "final.npz", **flat(state))
    (folder / "position.json").write_text(json.dumps(batches.get_state()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
