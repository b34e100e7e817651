"""Another teacher's cache, half of one, a damaged one: refused, and told apart."""

import dataclasses
import json

import numpy as np
import pytest

from rkd_jax.data.chat_template import CHATML
from rkd_jax.data.collate import collate
from rkd_jax.data.records import DemonstrationRecord, RecordError
from rkd_jax.data.tokenize import TokenizeConfig, tokenize_record
from rkd_jax.data.tokenizer import from_bpe
from rkd_jax.signals import cache_shards
from rkd_jax.signals.cache import (
    CacheError,
    CacheMismatch,
    CacheSettings,
    Manifest,
    ShapingSettings,
    Skipped,
    TeacherCache,
    model_hash,
)
from tests.signals import tiny_cache
from tests.signals.tiny_cache import (
    LISTS,
    REWARDS,
    ROWS,
    TOKENIZER,
    TOP,
    VOCABULARY,
    batch_of,
    demonstrations,
    open_cache,
    preferences,
    source,
    writer,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache of everything."""
    folder = tmp_path_factory.mktemp("cache")
    writer(folder, demonstrations()).write()
    return folder


# Whose cache it is.


def other_tokenizer():
    vocabulary = sorted(TOKENIZER.vocabulary, key=TOKENIZER.vocabulary.get)
    vocabulary[:2] = vocabulary[1::-1]
    return from_bpe(vocabulary, [], special=(256, 257), eos_id=257, bos_id=256)


def test_another_teacher_tokenizer_or_template_is_refused_by_both_hashes(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    mine, theirs = model_hash(*source(1)), model_hash(*source(2))
    assert manifest["teacher"] == mine
    assert manifest["reference"] == theirs
    open_cache(folder, teacher_hash=mine, reference_hash=theirs)
    with pytest.raises(CacheMismatch, match=rf"teacher .* is {mine} there, {theirs} h"):
        open_cache(folder, teacher_hash=theirs)
    with pytest.raises(CacheMismatch, match=rf"reference .* {theirs} there, {mine} h"):
        open_cache(folder, reference_hash=mine)
    strange = other_tokenizer()
    with pytest.raises(CacheMismatch) as error:
        TeacherCache(folder, tokenizer=strange, rows=ROWS)
    for tokenizer in (TOKENIZER, strange):
        assert tokenizer.fingerprint()[:16] in str(error.value)
    templated = TOKENIZER.with_chat_template(CHATML + "{# another #}")
    for tokenizer, rows in (
        (templated, ROWS),
        (TOKENIZER, dataclasses.replace(ROWS, append_eos=False)),
    ):
        with pytest.raises(
            CacheMismatch,
            match=rf"template and row layout .hash. is {manifest['rows']} there, "
            r"[0-9a-f]{16} here",
        ):
            TeacherCache(folder, tokenizer=tokenizer, rows=rows)
    with pytest.raises(CacheMismatch, match="append_eos is True there, False here"):
        open_cache(folder, dataclasses.replace(ROWS, append_eos=False))


def test_a_folder_goes_on_only_with_what_it_was_begun_with(tmp_path):
    records = demonstrations()
    first = writer(tmp_path, records, REWARDS)
    assert first.done == 0
    for changed, message in (
        (
            lambda: writer(tmp_path, demonstrations(8), REWARDS),
            "number of records is",
        ),
        (lambda: writer(tmp_path, records[::-1], REWARDS), "data .hash of all records"),
        (
            lambda: writer(tmp_path, records, LISTS),
            "teacher .* is None there, [0-9]?",
        ),
        (
            lambda: writer(tmp_path, records, CacheSettings(None, oracle="other")),
            "oracle is 'length' there, 'other' here",
        ),
        (
            lambda: writer(
                tmp_path,
                records,
                REWARDS,
                rows=dataclasses.replace(ROWS, max_response=8),
            ),
            "max_response is 9 there, 8 here",
        ),
        (
            lambda: writer(tmp_path, records, REWARDS, shard_records=4),
            "records per shard is 3 there, 4 here",
        ),
    ):
        with pytest.raises(CacheMismatch, match=message):
            changed()
    assert writer(tmp_path, records, REWARDS, batch_size=5).write().complete
    again = writer(tmp_path, records, REWARDS, oracle=lambda *_: 1 / 0)
    assert again.write().complete  # nothing is asked again


def test_rows_that_are_not_the_cached_ones_are_named(folder):
    records = demonstrations()
    cache = open_cache(folder)
    records[3] = DemonstrationRecord("3?", "kX")
    with pytest.raises(CacheMismatch, match="record 3: its prompt or its 3 targets"):
        cache.topk(batch_of(records))
    records[3] = DemonstrationRecord("4?", "kl")
    with pytest.raises(CacheMismatch, match="record 3: its prompt or its 3 targets"):
        cache.rewards(batch_of(records))
    with pytest.raises(CacheError, match="has records 0 to 6, not 7: it was made of"):
        cache.topk(batch_of(demonstrations(8)))
    with pytest.raises(CacheMismatch, match="a cache of DemonstrationRecords"):
        cache.topk(batch_of(preferences(), numbers=[0]))


def test_responses_cut_earlier_have_lists_and_no_sums(folder):
    """max_response is free: what was cached longer is used from its beginning."""
    cache = open_cache(folder)
    shorter = dataclasses.replace(ROWS, max_response=4)
    batch = batch_of(demonstrations(), shorter)
    signal = cache.topk(batch)
    lengths = batch.sequences.response_mask.sum(-1)
    assert signal.ids.shape == (7, 4, TOP)
    for row, (n, record) in enumerate(zip(lengths, cache, strict=True)):
        kept = record.responses[0].topk
        np.testing.assert_array_equal(signal.ids[row, :n], kept.ids[:n])
        np.testing.assert_array_equal(signal.log_probs[row, :n], kept.log_probs[:n])
    assert cache.rewards(batch_of(demonstrations(), shorter, [0])).tolist() == [0.5]
    with pytest.raises(CacheMismatch, match="record 2: the batch has 4 of the 7"):
        cache.reference(batch)
    longer = dataclasses.replace(ROWS, max_response=12)
    with pytest.raises(CacheMismatch, match="record 4: .* is not the cache's 9"):
        cache.topk(batch_of(demonstrations(), longer))


# What is left out, and what is wrong.


def test_skipped_records_keep_their_place_and_are_counted(tmp_path):
    """The tokenizer has no token for anything but ASCII."""
    letters = [chr(i) for i in range(33, 127)]
    tokenizer = from_bpe([*letters, "<eos>"], [], special=(94,), eos_id=94)
    records = [DemonstrationRecord("hi", text) for text in ("ab", "é", "cd", "ß", "ef")]
    rows = TokenizeConfig(max_prompt=4, max_response=4)

    def make(on_error):
        return tiny_cache.CacheWriter(
            tmp_path,
            records,
            tokenizer,
            rows,
            REWARDS,
            oracle=tiny_cache.length,
            shard_records=2,
            on_error=on_error,
        )

    with pytest.raises(RecordError, match="record 1: response: encodes to no token"):
        make("raise").write()
    manifest = make("skip").write()
    assert manifest.skipped == {"response: encodes to no token": 2}
    assert [s.first_skipped for s in manifest.shards] == [1, 3, None]
    assert (manifest.records, manifest.tokens) == (5, 9)
    cache = TeacherCache(tmp_path, tokenizer=tokenizer, rows=rows)
    assert cache[3] == Skipped("response: encodes to no token")
    good = collate([tokenize_record(records[2], tokenizer, rows, 2)], rows)
    assert cache.rewards(good).tolist() == [1.0]
    bad = dataclasses.replace(good, index=np.array([1], np.int32))
    with pytest.raises(CacheError, match=r"record 1 is not in .*: response: enc"):
        cache.rewards(bad)


def test_as_many_reasons_as_records_are_few_in_the_manifest(tmp_path):
    """Each record keeps its own; the manifest names the frequent ones, and counts."""
    template = "{{ raise_exception(messages[0].content) }}"
    tokenizer = TOKENIZER.with_chat_template(template)
    said = [f"{number:02} " + "x" * 200 for number in range(20)] + ["often"] * 9
    ask = [[{"role": "user", "content": text}] for text in said]
    records = [DemonstrationRecord(prompt, "yes") for prompt in ["plain", *ask]]
    manifest = tiny_cache.CacheWriter(
        tmp_path,
        records,
        tokenizer,
        ROWS,
        REWARDS,
        oracle=tiny_cache.length,
        shard_records=10,
        on_error="skip",
    ).write()
    start = "the chat template refuses the messages: "
    for shard in manifest.shards:
        assert max(map(len, shard.skipped)) == 120
        assert sum(shard.skipped.values()) == shard.records - shard.responses
    others = [shard.skipped.get("other reasons") for shard in manifest.shards]
    assert others == [9 - 8, 10 - 8, None]
    assert [len(shard.skipped) for shard in manifest.shards] == [9, 9, 2]
    assert len(manifest.skipped) == 9
    assert list(manifest.skipped.items())[0] == (start + "often", 9)
    assert sum(manifest.skipped.values()) == len(said)
    assert Manifest.load(tmp_path) == manifest
    cache = TeacherCache(tmp_path, tokenizer=tokenizer, rows=ROWS)
    assert cache[1 + 17] == Skipped(start + said[17])


def test_a_manifest_with_any_number_of_reasons_is_read(tmp_path):
    """Those of before had one entry for each."""
    writer(tmp_path, demonstrations(), REWARDS).write()
    path = tmp_path / "manifest.json"
    before = json.loads(path.read_text())
    before["shards"][0]["skipped"] = {f"{number}": 1 for number in range(50)}
    path.write_text(json.dumps(before))
    skipped = open_cache(tmp_path).manifest.skipped
    assert len(skipped) == 9
    assert skipped["other reasons"] == 50 - 8


def test_a_cache_that_is_not_finished_is_refused(tmp_path):
    def stop(records, tokens):
        del records, tokens
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path, demonstrations(), REWARDS).write(stop)
    assert list(tmp_path.glob(".shard*"))
    with pytest.raises(CacheError, match=r"0 of 7 records are there; the command that"):
        open_cache(tmp_path)
    assert writer(tmp_path, demonstrations(), REWARDS).write().complete
    assert not list(tmp_path.glob(".*"))
    assert len(open_cache(tmp_path)) == 7


def test_a_damaged_shard_is_named_and_restored_alone(tmp_path, monkeypatch):
    """In its middle by the reader, at its ends by the manifest."""
    monkeypatch.setattr(cache_shards, "_ENDS", 100)
    asked = []

    def oracle(prompts, responses):
        asked.extend(prompts)
        return tiny_cache.length(prompts, responses)

    writer(tmp_path, demonstrations(), REWARDS, oracle=oracle).write()
    shard = tmp_path / "shard-00001.array_record"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:120] + bytes([whole[120] ^ 0xFF]) + whole[121:])
    cache = open_cache(tmp_path)
    with pytest.raises(CacheError, match="shard-00001.*: damaged: .*hash mism"):
        cache.read([0, 3, 6])
    shard.write_bytes(whole[:20] + bytes([whole[20] ^ 0xFF]) + whole[21:])
    with pytest.raises(CacheError, match="shard-00001.*: damaged: not what the manif"):
        open_cache(tmp_path)
    shard.write_bytes(whole[:1000])
    with pytest.raises(CacheError, match=r"shard-00001.*: damaged|hold 4 records"):
        open_cache(tmp_path)
    restore = writer(tmp_path, demonstrations(), REWARDS, oracle=oracle)
    for gone in (False, True):  # cut, as it is now, and deleted
        asked.clear()
        assert restore.done == 4
        restore.write()
        assert asked == ["3?", "4?", "5?"]
        assert shard.read_bytes() == whole
        assert len(open_cache(tmp_path)) == 7
        if not gone:
            shard.unlink()
            with pytest.raises(FileNotFoundError, match="shard-00001.*gone.*restores"):
                open_cache(tmp_path)


def test_a_manifest_that_is_none(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="write one with `rkd cache`"):
        open_cache(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    for broken, message in (
        ({**manifest, "format": 9}, "format 9, this version reads 2"),
        ({**manifest, "new": 1}, "not the manifest of a cache"),
        ([], "not the manifest of a cache"),
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(CacheError, match=message):
            open_cache(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest)[:100])
    with pytest.raises(CacheError, match=r"\(restore it, or write .* another folder\)"):
        open_cache(tmp_path)


def test_settings_that_came_after_a_manifest_are_the_defaults(tmp_path):
    """It can be read, and gone on with."""
    records = demonstrations()
    settings = CacheSettings(None, shaping=ShapingSettings(gamma=0.5))
    writer(tmp_path, records, settings).write()
    path = tmp_path / "manifest.json"
    before = json.loads(path.read_text())
    for name in ("value_source", "support"):
        del before["settings"]["shaping"][name]
    path.write_text(json.dumps(before))
    assert open_cache(tmp_path).settings == settings
    assert writer(tmp_path, records, settings).done == len(records)
    other = ShapingSettings(gamma=0.5, support=3)
    with pytest.raises(CacheMismatch, match="shaping.support is None there, 3 here"):
        writer(tmp_path, records, CacheSettings(None, shaping=other))


def test_parts_that_were_not_written_are_not_read(tmp_path):
    records = demonstrations()
    writer(tmp_path, records, REWARDS).write()
    cache, batch = open_cache(tmp_path), batch_of(records)
    assert cache.manifest.teacher is None
    assert cache.rewards(batch).tolist() == tiny_cache.length(
        None, [record.response for record in records]
    )
    for read in (cache.topk, cache.reference, cache.shaping):
        with pytest.raises(CacheError, match=r"holds no (top k|reference|shaping); it"):
            read(batch)
    shaped = tmp_path / "shaped"
    settings = CacheSettings(None, shaping=ShapingSettings(gamma=0.5))
    writer(shaped, records, settings).write()
    assert open_cache(shaped).shaping(batch).log_probs is None


def test_what_cannot_be_written_is_said_before_a_model_runs(tmp_path):
    records = demonstrations()
    for arguments, options, message in (
        (
            (records, CacheSettings(VOCABULARY + 1)),
            {},
            "top_k=259 exceeds the teacher's",
        ),
        (([], REWARDS), {}, "no record: a cache is of"),
        (([*records, *preferences()], REWARDS), {}, "DemonstrationRecord, Preference"),
        ((records, REWARDS), {"oracle": None}, "oracle: missing"),
        (
            (records, LISTS),
            {"rows": TokenizeConfig(max_prompt=60, max_response=9)},
            "rows of up to 69 tokens exceed the teacher's context of 64",
        ),
    ):
        with pytest.raises(CacheError, match=message):
            writer(tmp_path, *arguments, **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CacheError, match="holds 'thesis.txt' and no manifest.json"):
        writer(tmp_path, records, REWARDS)


def test_a_teacher_that_says_nan_is_named_with_the_record(tmp_path):
    records = [DemonstrationRecord("0?", "a"), DemonstrationRecord("1?", "b.c")]
    maker = writer(tmp_path, records, LISTS)
    maker._teacher.source().params["table"][ord("."), 3] = np.nan
    with pytest.raises(CacheError, match="record 1: log-probs of the teacher are NaN"):
        maker.write()


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    for name in ("file", "link"):
        path = tmp_path / name
        path.symlink_to("nowhere") if name == "link" else path.write_text("mine")
        with pytest.raises(CacheError, match=f"{name}: is no folder; write"):
            writer(path, demonstrations(2), REWARDS)


def test_one_process_writes_at_a_time(tmp_path):
    records = demonstrations()

    def meanwhile(prompts, responses):
        with pytest.raises(CacheError, match="another process is writing"):
            writer(tmp_path, records, REWARDS).write()
        return tiny_cache.length(prompts, responses)

    assert writer(tmp_path, records, REWARDS, oracle=meanwhile).write().complete


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be positive"),
        ({"top_k": None}, "nothing to cache"),
        ({"log_prob_dtype": "int4"}, "log_prob_dtype must be one of float32, float16"),
        ({"temperature": 0.0}, "temperature must lie in"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        CacheSettings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gamma": 1.0}, "is plain DPO"), ({"power": 1.0}, "power = 1 on normalised")],
)
def test_shapings_that_shape_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShapingSettings(**options)


def test_a_student_with_fewer_ids_than_the_lists_is_refused(folder):
    assert open_cache(folder, vocabulary=258).manifest.vocabulary == 258
    with pytest.raises(CacheMismatch, match="with 258 vocabulary entries, .* has 257"):
        open_cache(folder, vocabulary=257)
