"""What a training on a teacher cache is given: parts of it, and what is refused."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import from_cache, toy_cache
from experiments.cached_lessons import Part, open_lessons
from experiments.settings import SettingsError
from experiments.stages import as_key
from rkd_jax.data.collate import collate
from rkd_jax.data.packing import collate_packed
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.sources import read_jsonl, write_jsonl
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.interop import save_model
from rkd_jax.losses import generalized_jsd, topk_divergence
from rkd_jax.models.api import response_logits
from rkd_jax.signals.cache import CacheError, CacheSettings, CacheWriter, Source
from tests.experiments.toy_school import (
    SEED,
    cached_pairs,
    options,
    report_of,
    toy_models,
)

pytestmark = pytest.mark.usefixtures("compiled_programs")
PICKY = (
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
    "{{ messages[0].content }}"
)


@pytest.fixture(scope="module")
def toys(compiled_programs, tmp_path_factory):
    """Folders with toy data of either kind and the cache of them, by method."""
    root = tmp_path_factory.mktemp("toys")
    kinds = {"kd": DemonstrationRecord, "dpo": PreferenceRecord}
    for method, kind in kinds.items():
        toy_cache.write(root / method, kind, seed=SEED)
    return {"kd": root / "kd", "dpo": root / "dpo", "tvkd": root / "dpo"}


def skipping_cache(folder: Path) -> tuple[Path, Path]:
    """Ten records of which the fourth is refused by the template."""
    records = [DemonstrationRecord(f"say {n}", "see") for n in range(10)]
    records[3] = DemonstrationRecord([{"role": "user", "content": "refuse"}], "see")
    model, teacher, _ = toy_models()
    tokenizer = byte_tokenizer().with_chat_template(PICKY)
    data, cache = folder / "data.jsonl", folder / "cache"
    write_jsonl(data, records)
    (folder / "template").write_text(PICKY)
    manifest = CacheWriter(
        cache,
        records,
        tokenizer,
        toy_cache.ROWS,
        CacheSettings(top_k=3),
        teacher=Source(model, teacher),
        on_error="skip",
    ).write()
    assert sum(manifest.skipped.values()) == 1
    return data, cache


def test_what_the_cache_skipped_is_left_out_and_counted(tmp_path):
    data, cache = skipping_cache(tmp_path)
    student = dataclasses.replace(
        from_cache.tiny().student, chat_template=str(tmp_path / "template")
    )
    config = dataclasses.replace(
        from_cache.tiny(),
        out=str(tmp_path / "run"),
        data=str(data),
        cache=str(cache),
        student=student,
        samples_shown=0,
    )
    lessons = from_cache.open_school(config).lessons
    assert sorted(lessons.taught.numbers) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert list(lessons.held_out.numbers) == [9]
    records = [
        dataclasses.replace(r, response="see " * 9) for r in lessons.taught.records
    ]
    part = dataclasses.replace(lessons.taught, records=records)
    (cut,) = dataclasses.replace(lessons, taught=part).sources("")[0].changed
    assert (cut.reason, cut.places) == ("response truncated", (0, 1, 2, 4, 5))
    from_cache.run(config)
    trained, held_out = report_of(tmp_path / "run")["data"]
    assert held_out["skipped"] == []  # said once
    (incident,) = trained["skipped"]
    assert incident["reason"].startswith("not in the cache (records, from 0): ")
    assert (incident["count"], incident["places"]) == (1, [3])


def test_prompts_are_trained_on_or_held_out_never_both(tmp_path):
    """The last tenth, with all that has its prompts."""
    records = [PreferenceRecord(f"p{n % 7}", "see", f"no. {n}") for n in range(20)]
    files = cached_pairs(tmp_path / "cached", records)
    tokenizer = byte_tokenizer()
    lessons = open_lessons(*files, tokenizer, vocabulary=tokenizer.vocab_size)
    assert list(lessons.held_out.numbers) == [4, 5, 11, 12, 18, 19]
    prompts = [
        set(map(as_key, part.records)) for part in (lessons.taught, lessons.held_out)
    ]
    assert not prompts[0] & prompts[1]
    assert len(lessons.taught.records) == 14
    assert [records[n] for n in lessons.taught.numbers] == lessons.taught.records


def test_numbers_of_packed_rows_leave_their_gaps_alone():
    records = [DemonstrationRecord("a", "b" * n) for n in (1, 2, 3)]
    rows = [
        tokenize_record(r, byte_tokenizer(), toy_cache.ROWS, i)
        for i, r in enumerate(records)
    ]
    part = Part(records, np.array([5, 7, 9], np.int32))
    packed = collate_packed([rows[:2], rows[2:]], row_length=16)
    found = part.numbered(packed).index
    expected = {0: 5, 1: 7, 2: 9}
    for before, after in zip(packed.index.ravel(), found.ravel(), strict=True):
        assert after == expected.get(int(before), before)
    assert (found < 0).any()
    plain = collate(rows, toy_cache.ROWS)
    assert part.numbered(plain).index.tolist() == [5, 7, 9]


def test_of_other_data_is_refused_with_both_hashes(toys, tmp_path, refused_line):
    folder = toys["kd"]
    records = read_jsonl(folder / "data.jsonl", DemonstrationRecord)[0]
    write_jsonl(tmp_path / "data.jsonl", records[::-1])
    line = refused_line(
        *("--data", tmp_path / "data.jsonl", "--cache", folder / "cache"),
        *("--out", tmp_path / "run"),
    )
    manifest = json.loads((folder / "cache" / "manifest.json").read_text("utf-8"))
    assert "a cache of other data" in line
    assert manifest["data"] in line
    assert str(tmp_path / "data.jsonl") in line


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("kd", ("--method", "dpo"), "dpo reads PreferenceRecords"),
        ("dpo", ("--method", "kd"), "kd reads DemonstrationRecords"),
        ("kd", ("--student.drop-layers", "7"), "names layer 7"),
        ("kd", ("--student.chat-template", __file__), "template and row layout"),
        ("kd", ("--student.chat-template", "/nowhere"), "/nowhere"),
        ("kd", ("--student.drop-layers", "0", "1", "2"), "names every layer"),
        ("kd", ("--fit.batch-size", "64"), "22 records for batches of 64"),
        ("kd", ("--fit.accumulation", "3"), "4 rows in 3 micro-batches"),
        ("kd", ("--updates", "-1"), "--updates -1 must not be negative"),
        ("dpo", ("--beta", "0"), "--method dpo: beta"),
        ("kd", ("--cache", "/nowhere"), "/nowhere"),
        ("kd", ("--kd.beta", "1"), "kd: generalized_jsd(beta=1.0) is infinite where"),
        ("kd", ("--kd.beta", "-1"), "--method kd: beta must lie in"),
        ("tvkd", ("--fit.row-length", "20"), "the longest record allowed"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    method, arguments, said, toys, tmp_path, refused_line
):
    folder = toys[method]
    own = ("--data", folder / "data.jsonl", "--cache", folder / "cache")
    own += ("--out", tmp_path / "run", "--method", method)
    assert said in refused_line(*own, *arguments)


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_kd_has_the_divergence_that_is_asked_for(beta, toys, tmp_path):
    folder, kd = toys["kd"], from_cache.ListDivergence(beta)
    data, cache = folder / "data.jsonl", folder / "cache"
    config = options(tmp_path / "run", "kd", data=data, cache=cache, kd=kd)
    pupil, lessons, method, trainer = from_cache.open_school(config)
    batch = lessons.tabulate(lessons.taught, 2)
    _, teacher = method.signal(lessons.cache, batch)
    sequences, params = batch.sequences, pupil.student_params
    logits = response_logits(pupil.student, params, sequences)
    divergence = functools.partial(generalized_jsd, beta=beta)
    expected = topk_divergence(
        logits, teacher.ids, teacher.log_probs, divergence=divergence
    )
    loss = trainer.objective.student_loss
    found = loss(params, {}, (), batch, teacher, jax.random.key(0))
    expected = expected[sequences.response_mask].sum()
    np.testing.assert_allclose(found.total, expected, rtol=1e-5)


def test_a_part_that_the_cache_lacks_is_said_before_anything_is_compiled(tmp_path):
    records = [PreferenceRecord(f"p{n}", "see", "no") for n in range(10)]
    data, cache = cached_pairs(tmp_path / "cached", records)
    config = options(tmp_path / "run", "tvkd", data=data, cache=cache)
    with pytest.raises(CacheError, match="holds no shaping"):
        from_cache.run(config)
    assert not (tmp_path / "run").exists()  # a command that is refused claims nothing
    data, cache = cached_pairs(tmp_path / "one", records[:1] * 3)
    config = options(tmp_path / "run", "dpo", data=data, cache=cache)
    with pytest.raises(SettingsError, match="none is left to hold out"):
        from_cache.run(config)


def test_a_label_says_which_response_is_right(tmp_path):
    """The rejected ones here, and in ties neither."""
    labels = [0.0, 0.0, 0.5]
    records = [
        PreferenceRecord(f"p{n}", "see", f"no. {n}", label=labels[n % 3])
        for n in range(30)
    ]
    data, cache = cached_pairs(tmp_path / "cached", records)
    config = options(
        tmp_path / "run", "dpo", data=data, cache=cache, updates=12, samples_shown=0
    )
    from_cache.run(config)
    report = report_of(tmp_path / "run")
    assert [row["preference_accuracy"]["mean"] for row in report["policies"]] == [1.0]
    difference = report["differences"][0]["difference"]
    assert difference["mean"] > 1.0
    assert difference["n"] == 2  # of three that are held out


def test_rewards_that_tell_nothing_apart_and_a_short_context_are_one_line(
    tmp_path, refused_line
):
    records = [PreferenceRecord(f"p{n}", "see", f"no. {n}") for n in range(10)]

    def same(prompts, responses):
        return [1.0] * len(responses)

    data, cache = cached_pairs(tmp_path / "cached", records, oracle=same)
    own = ("--data", data, "--cache", cache, "--out", tmp_path / "run")
    line = refused_line(*own, "--method", "drdo")
    assert "--method drdo: reward models [0] give all responses the same" in line
    model, _, params = toy_models()
    short = dataclasses.replace(model.config, max_length=40)
    save_model(tmp_path / "short", short, params, tokenizer=byte_tokenizer())
    line = refused_line(*own, "--method", "dpo", "--student.model", tmp_path / "short")
    assert "prompts of up to 96 tokens and responses of 12" in line
    assert "the student's context 40" in line
