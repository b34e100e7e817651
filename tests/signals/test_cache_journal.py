"""What was kept of a shard is read back, up to where it is not whole."""

import pytest

from rkd_jax.signals.cache_format import CacheError
from rkd_jax.signals.cache_journal import Journal

IDENTITY = {"teacher": "0123456789abcdef", "settings": {"top_k": 5}}
BATCHES = [[b"ab", b"", b"\0why"], [b"c" * 300], [b"d", b"e"]]


def journal(path, identity=IDENTITY, first=4):
    return Journal(path, identity, first=first)


@pytest.fixture
def path(tmp_path):
    """A journal of three batches."""
    kept = journal(tmp_path / "journal")
    for batch in BATCHES:
        kept.append(batch)
    assert kept.records == 6
    return kept.path


def flat(batches):
    return [payload for batch in batches for payload in batch]


def test_nothing_is_there_before_the_first_batch(tmp_path):
    new = journal(tmp_path / "journal")
    assert (list(new.replay()), new.records, new.count()) == ([], 0, 0)
    assert not new.path.exists()


def test_it_gives_back_what_was_kept_and_goes_on(path):
    again = journal(path)
    assert again.count() == 6
    assert list(again.replay()) == flat(BATCHES)
    again.append([b"f"])
    assert list(journal(path).replay()) == [*flat(BATCHES), b"f"]


def entry_ends(path):
    return [end for end, _ in journal(path)._entries()]


def test_of_a_file_cut_anywhere_the_whole_batches_are_left(path):
    whole, ends = path.read_bytes(), entry_ends(path)
    assert ends[-1] == len(whole)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        batches = sum(end <= size for end in ends)
        cut = journal(path)
        assert list(cut.replay()) == flat(BATCHES[:batches])
        for batch in BATCHES[batches:]:
            cut.append(batch)
        assert path.read_bytes() == whole


def test_a_batch_with_any_bit_changed_ends_it(path):
    whole, ends = path.read_bytes(), entry_ends(path)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        batches = sum(end <= place for end in ends)
        assert list(journal(path).replay()) == flat(BATCHES[:batches])
        # What cannot be trusted is gone, so that nothing is added behind it.
        assert path.read_bytes() == whole[: ends[batches - 1] if batches else 0]


def test_that_of_another_cache_or_shard_has_nothing_to_say(path):
    other = {**IDENTITY, "teacher": "fedcba9876543210"}
    assert journal(path, other).count() == journal(path, first=5).count() == 0
    assert list(journal(path, other).replay()) == []


def test_a_disk_that_takes_no_more_is_named(tmp_path):
    gone = journal(tmp_path / "gone" / "journal")
    with pytest.raises(CacheError, match=r"journal: cannot be written: .*free some sp"):
        gone.append([b"a"])
    assert gone.records == 0
