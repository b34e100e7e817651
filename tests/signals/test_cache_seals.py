"""A shard is tied to the cache, the place and the settings that it was written for."""

import dataclasses
import json

import pytest

from rkd_jax.signals.cache import CacheError
from rkd_jax.signals.cache_manifest import MANIFEST
from tests.signals import tiny_cache
from tests.signals.tiny_cache import (
    LISTS,
    REWARDS,
    demonstrations,
    open_cache,
    writer,
)


def test_a_shard_of_another_cache_is_neither_read_nor_gone_on_with(tmp_path):
    """Of the same size: of another temperature, or another place."""
    own, other = tmp_path / "own", tmp_path / "other"
    hot = dataclasses.replace(LISTS, temperature=2.0)
    for folder, settings in ((own, LISTS), (other, hot)):
        writer(folder, demonstrations(), settings).write()
    one, two = (own / f"shard-0000{number}.array_record" for number in (0, 1))
    whole = one.read_bytes()
    for stranger in (other / one.name, two):
        one.write_bytes(stranger.read_bytes())
        assert one.stat().st_size == len(whole)
        with pytest.raises(CacheError, match="shard-00000.*not what the manifest"):
            open_cache(own)
        writer(own, demonstrations(), LISTS).write()
        assert one.read_bytes() == whole
    manifest = own / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace('"temperature": 1.0', '"temperature": 2.0'))
    with pytest.raises(CacheError, match="or the manifest was edited"):
        open_cache(own)
    listed = json.loads(text)
    for shard in listed["shards"]:
        del shard["seal"]  # as versions before this one wrote it
    manifest.write_text(json.dumps(listed))
    assert len(open_cache(own)) == 7


def test_a_shard_that_nobody_listed_is_not_taken_for_ones_own(tmp_path):
    """A file of that name is there before the cache is."""
    whole = tmp_path / "whole"
    writer(whole, demonstrations(), LISTS).write()
    begun = writer(tmp_path / "begun", demonstrations(), LISTS)
    name = "shard-00000.array_record"
    (begun.folder / name).write_bytes((whole / "shard-00001.array_record").read_bytes())
    begun.write()
    assert (begun.folder / name).read_bytes() == (whole / name).read_bytes()


def test_a_cache_is_read_from_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer("cache", demonstrations(), REWARDS, oracle=tiny_cache.length).write()
    expected = list(open_cache(tmp_path / "cache"))
    cache = open_cache("cache")
    monkeypatch.chdir("/")
    assert list(cache) == expected
