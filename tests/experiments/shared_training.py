"""A method of an experiment, trained by several processes that each read their rows.

``python -m tests.experiments.shared_training --distributed FOLDER`` is one of them. In
FOLDER the process writes to ``seen-INDEX.json`` which records it read, how wide its
batches were, and what it got of rows on meshes where its devices are no neighbours, and
between two meshes.
"""

import dataclasses
import io
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import tvkd
from experiments.baselines import Gkd, GkdConfig
from experiments.game import TextBook, tabulate
from experiments.lab import open_lab
from experiments.several_processes import meet
from experiments.stages import Desk
from experiments.system import TOY_FIT
from experiments.trainer import record_batches
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.placement import fetch, follow_parameters, move, place_rows
from rkd_jax.sharding import (
    AXES,
    MeshConfig,
    mesh_of,
    mesh_shard,
    replicated,
    shard_batch,
)
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder

MESH = MeshConfig(data=2, tensor=2)
RECORDS, STEPS, SEED = 128, 3, 5
WIDE = range(0, RECORDS, 10)  # records with a wide prompt for the teacher
SCATTERED = {"rows": (4, 1, 1), "rows twice": (1, 2, 2)}


class Watched(Sequence):
    """Demonstrations, and which were read."""

    def __init__(self):
        self.read: list[int] = []

    def __len__(self):
        return RECORDS

    def __getitem__(self, i):
        self.read.append(i)
        kind = "Be kind to everybody. " * 6 if i in WIDE else ""
        return DemonstrationRecord(f"{i}?", "yes " * (1 + i % 3), f"{kind}{i}?")


def widths(mesh: MeshConfig) -> list[int]:
    """Columns of the teacher's rows, batch by batch: they are of two lengths."""
    lab = open_lab(dataclasses.replace(tvkd.tiny(), mesh=mesh))
    batches = lab.batches(Watched(), batch_size=TOY_FIT.batch_size, seed=SEED)
    return [next(batches).teacher_sequences.tokens.shape[1] for _ in range(STEPS)]


def train(folder: Path, mesh: MeshConfig) -> list[int]:
    """GKD for some steps, half of the rows sampled; the records read, in order."""
    lab = open_lab(dataclasses.replace(tvkd.tiny(), mesh=mesh))
    records = Watched()
    course = types.SimpleNamespace(start=lab.student_params, demonstrations=records)
    run = RunFolder.open(folder / "run", {})
    with Progress(io.StringIO()) as progress:
        desk = Desk(run, progress, checkpoint_every=100)
        method = Gkd(lab, GkdConfig(fit=TOY_FIT, rho=0.5))
        method.train(desk, "4-gkd", course, steps=STEPS, seed=SEED)
    # Before, the fingerprint of the data was taken, of 64 records in any process.
    return records.read[64:]


def laid(mesh: MeshConfig) -> dict[str, list]:
    """Sums of the features in every column of a packed batch, and its records."""
    lab = open_lab(dataclasses.replace(tvkd.tiny(), mesh=mesh))
    pairs = [PreferenceRecord(f"{i}?", "yes " * (1 + i % 3), "no") for i in range(24)]
    table = tabulate(lab, TextBook(lab.features), pairs)
    batches = record_batches(
        "pairs", lab, pairs, batch_size=4, row_length=700, seed=SEED
    )
    # As `experiments.stages.train` hands it to who prepares a batch.
    batch = shard_batch(next(batches), lab.mesh)
    batch = dataclasses.replace(batch, index=batches.index)
    features = table.features(batch).sum(-1)
    return {"features": features.tolist(), "index": batches.index.tolist()}


def scattered(shape: tuple[int, int, int]) -> tuple[list[int], list[int]]:
    """The blocks of this process where every other device is its own, and all rows."""
    devices = np.array(jax.devices()).reshape(2, 2).T.reshape(shape)
    mesh = Mesh(devices, AXES)
    blocks, count = mesh_shard(mesh)
    mine = np.arange(8).reshape(count, -1)[list(blocks)].reshape(-1)
    return blocks, fetch(shard_batch(mine, mesh)).tolist()


def between() -> list[float]:
    """Rows of one half of the devices, doubled by the other half: all of them."""
    halves = np.array(jax.devices()).reshape(2, 2, 1, 1)
    one, other = (Mesh(halves[:, i], AXES) for i in range(2))
    factor = move(np.float32(2.0), replicated(other))
    rows = place_rows(np.arange(8.0, dtype=np.float32), one)
    doubled = follow_parameters(lambda factor, rows: factor * rows)(factor, rows)
    assert mesh_of(doubled) == other
    return fetch(place_rows(doubled, one)).tolist()


def _main(folder: str) -> None:
    meet()
    seen = {
        "read": train(Path(folder), MESH),
        "widths": widths(MESH),
        "between": between(),
        "laid": laid(MESH),
        "scattered": {name: scattered(shape) for name, shape in SCATTERED.items()},
    }
    Path(folder, f"seen-{jax.process_index()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    _main(sys.argv[-1])
