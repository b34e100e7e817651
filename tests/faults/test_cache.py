"""Writing a cache and being killed, stopped, or left without disk."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rkd_jax.signals.cache import Manifest, TeacherCache
from tests.signals.tiny_cache import ROWS, TOKENIZER

ROOT = Path(__file__).parents[2]


def write(folder, *arguments, status=0):
    """One process that writes the cache; what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.signals.tiny_cache", str(folder), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stderr


def asked(folder):
    """Prompts that the oracle was asked about, in all processes so far."""
    return Path(f"{folder}.asked").read_text().split()


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "whole"
    write(folder)
    assert asked(folder) == [f"{i}?" for i in range(7)]
    return folder


# Events of a process. In an empty folder two for the manifest, which is about to be
# moved and moved. For each shard of three records one for either of its two batches,
# two for the shard and two for the manifest. For a shard that nobody listed, two for
# the manifest.
KILLS = {
    "in the first shard": 4,
    "before a shard has its name": 3,
    "before the manifest lists it": 4,
    "in the next shard": 4,
    "after the manifest lists it": 6,
}


def test_killed_at_every_kind_of_moment_it_goes_on_without_loss_or_repetition(
    tmp_path, uninterrupted
):
    """The same folder is killed five times and then left alone."""
    folder = tmp_path / "cache"
    seen = []
    for kill in KILLS.values():
        write(folder, f"kill={kill}", status=-signal.SIGKILL)
        seen.append((Manifest.load(folder).done, len(asked(folder))))
    # Records in listed shards, and how many records were asked about in total.
    assert seen == [(0, 3), (0, 6), (0, 9), (3, 12), (6, 15)]
    write(folder)
    # Each shard was asked about until it had its name, and never again.
    numbers = [int(prompt[:-1]) for prompt in asked(folder)]
    assert numbers == [0, 1, 2] * 3 + [3, 4, 5] * 2 + [6]
    assert files(folder) == files(uninterrupted)
    cache = TeacherCache(folder, tokenizer=TOKENIZER, rows=ROWS)
    digests = [record.responses[0].digest for record in cache]
    assert len(set(digests)) == len(digests) == 7


def test_killed_from_outside_at_any_time(tmp_path, uninterrupted):
    """Whenever after the first shard the signal arrives, the next start goes on."""
    folder = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.signals.tiny_cache", str(folder)], cwd=ROOT
    )
    try:
        first = folder / "shard-00000.array_record"
        while not first.exists() and process.poll() is None:
            pass
    finally:
        process.kill()
        process.wait()
    write(folder)
    assert files(folder) == files(uninterrupted)


def test_a_full_disk_costs_the_shard_that_did_not_fit(tmp_path, uninterrupted):
    """No file of the process may exceed 70 kB; a shard has 131."""
    folder = tmp_path / "cache"
    (line,) = write(folder, "disk=70000", status=1).splitlines()
    assert line.startswith(f"error: {folder}/shard-00000.array_record: cannot be writ")
    assert "File too large" in line
    assert "free some space or choose another folder, and start again" in line
    assert Manifest.load(folder).done == 0
    assert not list(folder.glob("shard*"))
    write(folder)
    assert files(folder) == files(uninterrupted)
