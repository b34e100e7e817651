"""Models that are loaded when they are needed, one at a time."""

import weakref

import jax
import jax.numpy as jnp
import pytest

from rkd_jax.signals.cache import CacheError, CacheWriter, Source
from tests.signals.tiny_cache import (
    LISTS,
    ROWS,
    SETTINGS,
    TOKENIZER,
    demonstrations,
    length,
    source,
    writer,
)


class Shelf:
    """Loads models, and looks which are still there when it loads one."""

    def __init__(self):
        self.loaded, self._there = [], []

    def loader(self, seed):
        def load():
            self._there = [name for name in self._there if name() is not None]
            assert not self._there, "another model is still in memory"
            model, params = source(seed)
            table = jnp.asarray(params["table"])
            self._there.append(weakref.ref(table))
            self.loaded.append(seed)
            return Source(model, {"table": table})

        return load


def make(folder, settings, teacher=None, reference=None, oracle=None):
    return CacheWriter(
        folder,
        demonstrations(),
        TOKENIZER,
        ROWS,
        settings,
        teacher=teacher,
        reference=reference,
        oracle=oracle,
        batch_size=2,
        shard_records=3,
    )


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_model_is_in_memory_at_a_time(tmp_path):
    writer(tmp_path / "given", demonstrations()).write()
    shelf, folder = Shelf(), tmp_path / "loaded"

    def start(oracle=length):
        models = (shelf.loader(1), shelf.loader(2))
        return make(folder, SETTINGS, *models, oracle)

    def stop(prompts, responses):
        if "4?" in prompts or "5?" in prompts:
            raise KeyboardInterrupt
        return length(prompts, responses)

    with pytest.raises(KeyboardInterrupt):
        start(stop).write()
    # The teacher's hash has to be known before anything is begun.
    assert shelf.loaded == [1, 2, 1]
    shelf.loaded.clear()
    start().write()
    assert shelf.loaded == [1, 2, 1]
    assert files(folder) == files(tmp_path / "given")
    shelf.loaded.clear()
    start().write()
    assert shelf.loaded == [1, 2]  # there is nothing left to ask


def test_a_teacher_alone_is_loaded_once(tmp_path):
    shelf = Shelf()
    make(tmp_path, LISTS, shelf.loader(1)).write()
    assert shelf.loaded == [1]


def test_a_model_that_changes_while_it_is_out_of_memory_is_refused(tmp_path):
    seeds = iter((1, 3))
    changing = make(
        tmp_path, SETTINGS, lambda: source(next(seeds)), lambda: source(2), length
    )
    with pytest.raises(CacheError, match="the teacher's weights have changed since th"):
        changing.write()
    assert changing.done == 0


def test_a_model_that_cannot_be_loaded_is_not_taken_for_a_full_disk(tmp_path):
    answers = iter((source(1), None))

    def load():
        if (found := next(answers)) is None:
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory")
        return found

    failing = make(tmp_path, SETTINGS, load, lambda: source(2), length)
    with pytest.raises(RuntimeError, match="^RESOURCE_EXHAUSTED: no memory$"):
        failing.write()


def test_what_is_missing_is_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    shelf = Shelf()
    with pytest.raises(CacheError, match="oracle: missing"):
        make(tmp_path, SETTINGS, shelf.loader(1), shelf.loader(2))
    with pytest.raises(CacheError, match="reference: not asked for"):
        make(tmp_path, LISTS, shelf.loader(1), shelf.loader(2))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(CacheError, match="written by one process, .* these are 4; st"):
        make(tmp_path, SETTINGS, shelf.loader(1), shelf.loader(2), length)
    assert shelf.loaded == []
