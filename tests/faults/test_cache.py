"""Writing a cache and being killed, stopped, or left without disk."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rkd_jax.signals import (
    cache_answers,
    cache_journal,
    cache_manifest,
    cache_shards,
)
from rkd_jax.signals.cache import Manifest, TeacherCache
from rkd_jax.signals.cache_scores import make_teacher_scores
from rkd_jax.signals.teacher import make_sequence_scorer as make_scorer
from tests.signals import tiny_cache
from tests.signals.tiny_cache import (
    REWARDS,
    ROWS,
    TOKENIZER,
    demonstrations,
    preferences,
)

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
# unless it was kept, two for the shard and two for the manifest. A shard that nobody
# listed is written again, from what was kept.
KILLS = {
    "in the first batch": 3,
    "in the second one": 2,
    "before a shard has its name": 2,
    "before the manifest lists it": 2,
    "in the next shard": 5,
    "after the manifest lists it": 6,
}


def test_killed_at_every_kind_of_moment_it_goes_on_without_loss_or_repetition(
    tmp_path, uninterrupted
):
    """The same folder is killed six times and then left alone."""
    folder = tmp_path / "cache"
    seen = []
    for kill in KILLS.values():
        write(folder, f"kill={kill}", status=-signal.SIGKILL)
        seen.append((Manifest.load(folder).done, len(asked(folder))))
    # Records in listed shards, and how many records were asked about in total.
    assert seen == [(0, 2), (0, 5), (0, 6), (0, 6), (3, 8), (6, 11)]
    write(folder)
    # What was being asked about at a kill was asked about again, and nothing else.
    numbers = [int(prompt[:-1]) for prompt in asked(folder)]
    assert numbers == [0, 1] + [0, 1, 2] + [2] + [3, 4] + [3, 4, 5] + [6]
    assert files(folder) == files(uninterrupted)
    cache = TeacherCache(folder, tokenizer=TOKENIZER, rows=ROWS)
    digests = [record.responses[0].digest for record in cache]
    assert len(set(digests)) == len(digests) == 7


class Watched:
    """`os`; ``event`` is called before and after it changes what is on the disk."""

    def __init__(self, event):
        self._event = event

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, descriptor):
        self._event()
        os.fsync(descriptor)

    def replace(self, *names):
        self._event()
        os.replace(*names)
        self._event()


class Counted:
    """Numbers of the records that the oracle was asked about, batches of the models."""

    def __init__(self, monkeypatch):
        self.numbers, self.passes = [], {"reference": 0, "cache": 0}
        self._watch(monkeypatch, "cache", "make_teacher_scores", make_teacher_scores)
        self._watch(monkeypatch, "reference", "make_sequence_scorer", make_scorer)

    def _watch(self, monkeypatch, name, function, original):
        def make(*arguments, **options):
            ask = original(*arguments, **options)

            def counting(*arguments):
                self.passes[name] += 1
                return ask(*arguments)

            return counting

        monkeypatch.setattr(cache_answers, function, make)

    def oracle(self, prompts, responses):
        self.numbers += [int(prompt[:-1]) for prompt in prompts[::2]]  # of pairs
        return tiny_cache.length(prompts, responses)


def test_whatever_a_kill_leaves_nothing_that_was_kept_is_asked_for_again(
    tmp_path, monkeypatch
):
    """The folder is copied at every change of it: what a SIGKILL would leave there."""
    whole, records = tmp_path / "whole", preferences()
    left = []

    def event():
        copy = tmp_path / f"{len(left)}"
        shutil.copytree(whole, copy)
        left.append((copy, len(first.numbers)))

    def first_oracle(prompts, responses):
        event()
        rewards = first.oracle(prompts, responses)
        event()
        return rewards

    first = Counted(monkeypatch)
    with monkeypatch.context() as patch:
        for module in (cache_journal, cache_manifest, cache_shards):
            patch.setattr(module, "os", Watched(event))
        tiny_cache.writer(whole, records, oracle=first_oracle).write()
    assert first.numbers == list(range(7))
    assert first.passes == {"reference": 5, "cache": 5}
    assert len(left) > 25
    journals, again, seen = 0, set(), []
    for copy, before in left:
        journals += any(copy.glob("*.journal"))
        second = Counted(monkeypatch)
        writer = tiny_cache.writer(copy, records, oracle=second.oracle)
        kept = writer.done
        batches = {}

        def begin(name, total, done, batches=batches):
            batches[name] = [done]
            assert total == 7

        def advance(n, tokens, batches=batches):
            list(batches.values())[-1].append(n)

        writer.write(advance, begin=begin)
        assert all(sum(numbers) == 7 for numbers in batches.values())
        assert batches["cache"][0] == kept
        assert second.numbers == list(range(kept, 7))
        assert second.passes == {
            name: len(batches.get(name, [0])) - 1 for name in ("reference", "cache")
        }
        seen.append(batches.get("reference", [7])[0])
        assert files(copy) == files(whole)
        again.add(before - kept)
    assert sorted(set(seen)) == [0, 2, 3, 5, 6, 7]  # what was kept of the reference
    assert journals > 10
    assert again == {0, 1, 2}  # a batch has two records, or one at a shard's end


def test_a_shard_of_which_half_a_batch_was_kept_is_what_it_would_have_been(tmp_path):
    """The journal is cut and damaged; the records behind that are asked for again."""
    records, options = demonstrations(), {"batch_size": 2, "shard_records": 7}
    whole = tmp_path / "whole"
    tiny_cache.writer(whole, records, REWARDS, **options).write()
    begun = tmp_path / "begun"

    def stop(prompts, responses):
        if "6?" in prompts:
            raise KeyboardInterrupt
        return tiny_cache.length(prompts, responses)

    with pytest.raises(KeyboardInterrupt):
        tiny_cache.writer(begun, records, REWARDS, oracle=stop, **options).write()
    (journal,) = begun.glob("*.journal")
    content = journal.read_bytes()
    size, rest = divmod(len(content), 3)  # entries
    assert rest == 0
    damaged = bytearray(content)
    damaged[size + 40] ^= 1
    cases = {b"": 0, content[:5]: 0, content[:-1]: 4, content: 6, bytes(damaged): 2}
    for n, (text, kept) in enumerate(cases.items()):
        folder, asked = tmp_path / f"{n}", []
        shutil.copytree(begun, folder)
        (folder / journal.name).write_bytes(text)

        def oracle(prompts, responses, asked=asked):
            asked += prompts
            return tiny_cache.length(prompts, responses)

        writer = tiny_cache.writer(folder, records, REWARDS, oracle=oracle, **options)
        assert writer.done == kept
        writer.write()
        assert asked == [f"{i}?" for i in range(kept, 7)]
        assert files(folder) == files(whole)


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


def test_a_full_disk_costs_the_shard_and_not_what_is_in_it(tmp_path, uninterrupted):
    """No file of the process may exceed 70 kB; a shard has 131."""
    folder = tmp_path / "cache"
    (line,) = write(folder, "disk=70000", status=1).splitlines()
    assert line.startswith(f"error: {folder}/shard-00000.array_record: cannot be writ")
    assert "File too large" in line
    assert "free some space or choose another folder, and start again" in line
    assert Manifest.load(folder).done == 0
    assert not list(folder.glob("shard*"))
    assert asked(folder) == ["0?", "1?", "2?"]
    write(folder)
    assert asked(folder) == asked(uninterrupted)
    assert files(folder) == files(uninterrupted)
