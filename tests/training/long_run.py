"""A run with all the work that a kill can hit, and a process that does it.

``python -m tests.training.long_run FOLDER STEPS EVERY`` writes a teacher cache of 24
records, two in a shard, and then distils: every step reads the cache, samples an answer
of the student to each prompt and makes one update. It saves every EVERY steps.

On standard output it says what it is about to do, a word a line: cache, restore,
rollout, step, checkpoint. ``FOLDER/ledger.jsonl`` has which records each step used and
the digest of every state that was saved or restored; ``FOLDER/gauges.jsonl`` what the
process occupied, every ten steps; ``FOLDER/final.npz`` the last state.
"""

import hashlib
import json
import os
import sys
import threading
from pathlib import Path

import jax
import numpy as np

from rkd_jax.data.pipeline import make_batches
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.topk_kd import make_topk_kd
from rkd_jax.signals.cache import CacheSettings
from rkd_jax.signals.teacher import make_teacher_log_probs
from rkd_jax.training import (
    MetricsWriter,
    OptimConfig,
    Progress,
    RunFolder,
    fit,
    init_state,
    make_optimizer,
    make_update,
    step_keys,
)
from rkd_jax.training.checkpoint import Checkpoints
from rkd_jax.types import (
    DemonstrationBatch,
    LossOutput,
    Objective,
    TeacherSignal,
    TopkSignal,
    struct,
)
from tests.signals import tiny_cache
from tests.signals.tiny_cache import ROWS, TOKENIZER, VOCABULARY
from tests.training import tiny_game

RECORDS, BATCH = 24, 4
SETTINGS = CacheSettings(
    top_k=tiny_cache.TOP, log_prob_dtype="float32", oracle="length"
)
STUDENT = Decoder(
    DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=32,
    )
)
OPTIMIZER = make_optimizer(OptimConfig(1e-2))
CACHED, LIVE = make_topk_kd(STUDENT), make_kd(STUDENT)


@struct
class Work:
    """Records, and the student's answers to their prompts."""

    records: DemonstrationBatch
    answers: DemonstrationBatch


@struct
class Words:
    """What the teacher says: of the records out of the cache, of the answers now."""

    cached: TopkSignal
    live: TeacherSignal


def _loss(params, critic, frozen, batch, signal, rng):
    cached = CACHED.student_loss(
        params, critic, frozen, batch.records, signal.cached, rng
    )
    live = LIVE.student_loss(params, critic, frozen, batch.answers, signal.live, rng)
    metrics = {
        "student/cached": cached.metrics["student/divergence"],
        "student/live": live.metrics["student/divergence"],
    }
    return LossOutput(cached.total + live.total, cached.weight + live.weight, metrics)


def say(word: str) -> None:
    """In one piece and at once: a kill leaves whole lines."""
    os.write(1, f"{word}\n".encode())


class Notes:
    """Lines of JSON that are in the file when a call returns."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, **entry) -> None:
        os.write(self._file, f"{json.dumps(entry)}\n".encode())


def digest(state) -> str:
    """Of every array's name and bytes."""
    found = hashlib.sha256()
    for name, array in tiny_game.flat(state).items():
        found.update(name.encode() + array.tobytes())
    return found.hexdigest()


class WatchedCheckpoints(Checkpoints):
    """Says what it does, and notes what goes in and comes out."""

    def __init__(self, *args, note: Notes, **kwargs):
        super().__init__(*args, **kwargs)
        self._note = note

    def save(self, state, data):
        say("checkpoint")
        super().save(state, data)
        # The one before it is finished by now, and this one is begun.
        self._note(saved=int(state.step), digest=digest(state))

    def restore(self, state):
        say("restore")
        state, data = super().restore(state)
        step = int(state.step)
        self._note(restored=step, digest=digest(state), damage=self.damage)
        return state, data


class Gauges:
    """What the process occupies, noted every ten steps."""

    def __init__(self, path: Path):
        self._note, self._compiled = Notes(path), 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def read(self, step: int) -> None:
        """Note it, if it is time."""
        if step % 10 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._note(
                step=step,
                memory=pages * os.sysconf("SC_PAGE_SIZE"),
                handles=len(os.listdir("/proc/self/fd")),
                threads=threading.active_count(),
                arrays=len(jax.live_arrays()),
                compiled=self._compiled,
            )

    def _listen(self, event, duration, **details) -> None:
        self._compiled += event.endswith("backend_compile_duration")


def make_prepare(cache, note: Notes, gauges: Gauges):
    """Answers of the current student, and the teacher's words on everything."""
    sampling = SamplingConfig(ROWS.max_response, eos_ids=(TOKENIZER.eos_id,))
    sample = make_sampler(STUDENT, sampling)
    teacher = tiny_cache.source(1)
    speak = make_teacher_log_probs(teacher.model)

    def prepare(state, batch):
        step = int(state.step)
        gauges.read(step)
        say("rollout")
        samples = sample(
            state.student.params, batch.sequences.prompts, step_keys(state).prepare
        )
        answers = jax.tree.map(lambda x: x[:, 0], samples.sequences)
        live = TeacherSignal(speak(teacher.params, answers))
        signal = Words(cache.topk(batch), jax.block_until_ready(live))
        note(step=step + 1, records=np.asarray(batch.index).tolist())
        say("step")
        return Work(batch, DemonstrationBatch(answers, answers, batch.index)), signal

    return prepare


def _main(folder: str, steps: str, every: str) -> None:
    folder = RunFolder.open(folder, {"steps": steps, "every": every}).path
    note = Notes(folder / "ledger.jsonl")
    note(start=os.getpid())
    records = tiny_cache.demonstrations(RECORDS)

    def oracle(prompts, responses):
        note(asked=prompts)
        say("cache")
        return tiny_cache.length(prompts, responses)

    writer = tiny_cache.writer(
        folder / "cache", records, SETTINGS, oracle=oracle, shard_records=2
    )
    writer.write()
    cache = tiny_cache.open_cache(folder / "cache")
    batches = make_batches(records, TOKENIZER, ROWS, batch_size=BATCH, seed=0)
    start = init_state(
        STUDENT.init(jax.random.key(0)),
        student_optimizer=OPTIMIZER,
        rng=jax.random.key(1),
    )
    objective = Objective("long", _loss, requires=("cached", "live"))
    with (
        WatchedCheckpoints(folder / "checkpoints", config={}, note=note) as checkpoints,
        MetricsWriter(folder, tensorboard=False) as metrics,
        Progress() as progress,
    ):
        state = fit(
            start,
            make_update(objective, student_optimizer=OPTIMIZER),
            batches,
            steps=int(steps),
            prepare=make_prepare(cache, note, Gauges(folder / "gauges.jsonl")),
            checkpoints=checkpoints,
            metrics=metrics,
            progress=progress,
            checkpoint_every=int(every),
        )
    np.savez(folder / "final.npz", **tiny_game.flat(state))
    (folder / "position.json").write_text(json.dumps(batches.get_state()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
