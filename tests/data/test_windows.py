"""Batches packed or sorted by length: every record once, and exact resume."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from rkd_jax.data.inspection import check_end_of_turn
from rkd_jax.data.packing import padding_waste, unpack
from rkd_jax.data.pipeline import make_batches
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord, PromptRecord
from rkd_jax.data.sources import read_jsonl
from rkd_jax.data.tokenize import TokenizeConfig, tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.data.windows import make_bucketed_batches, make_packed_batches

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TOKENIZER = byte_tokenizer()
CONFIG = TokenizeConfig(4, 12)
BUCKETS = TokenizeConfig(
    16, 16, prompt_buckets=(2, 4, 8, 16), response_buckets=(4, 8, 16)
)
RECORDS = [
    DemonstrationRecord("p" * (1 + i % 5), "r" * (1 + i * 7 % 11)) for i in range(23)
]
PAIRS = [
    PreferenceRecord("p" * (1 + i % 3), "good", "b" * (1 + i % 6), label=i % 5 / 4)
    for i in range(9)
]


def packed_batches(records=RECORDS, config=CONFIG, *, batch_size=2, seed=3, **options):
    options = {"row_length": 32, "window": 8} | options
    return make_packed_batches(
        records, TOKENIZER, config, batch_size=batch_size, seed=seed, **options
    )


def bucketed_batches(
    records=RECORDS, config=BUCKETS, *, batch_size=4, seed=3, **options
):
    options = {"window_batches": 2} | options
    return make_bucketed_batches(
        records, TOKENIZER, config, batch_size=batch_size, seed=seed, **options
    )


MAKERS = [packed_batches, bucketed_batches]


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def numbers(batch):
    return [i for i in batch.index.ravel().tolist() if i >= 0]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("records", [RECORDS, PAIRS])
@pytest.mark.parametrize("window", [1, 4, 100])
def test_every_packed_epoch_holds_every_record_once(records, window):
    options = {"window": window, "batch_size": 1}
    rows = list(packed_batches(records, epochs=3, **options))
    assert len({tuple(numbers(row)) for row in rows}) > len(records) // 8
    # A row never holds records of two epochs, so that epochs are runs of rows.
    seen = []
    for row in rows:
        seen += numbers(row)
    epochs = [seen[i : i + len(records)] for i in range(0, len(seen), len(records))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(len(records)))] * 3
    assert epochs[0] != epochs[1]


def test_all_packed_batches_have_one_shape_and_the_last_is_filled_with_empty_rows():
    steps = list(packed_batches(epochs=1, batch_size=8))
    assert len({str(jax.tree.map(np.shape, step)) for step in steps}) == 1
    counts = [[len(numbers_) for numbers_ in per_row(step)] for step in steps]
    assert counts[-1][-1] == 0
    assert sorted(i for step in steps for i in numbers(step)) == list(range(23))
    filled = padding_waste(steps)
    records = [tokenize_record(r, TOKENIZER, CONFIG) for r in RECORDS]
    assert filled.tokens == sum(len(r.prompt) + len(r.responses[0]) for r in records)


def per_row(batch):
    return [[i for i in row.tolist() if i >= 0] for row in batch.index]


def test_packed_rows_belong_to_the_records_their_index_names():
    for batch in take(packed_batches(PAIRS, TokenizeConfig(4, 8)), 6):
        for row in unpack(batch):
            record = PAIRS[row.index]
            texts = [TOKENIZER.decode(ids) for ids in row.responses]
            assert texts == [record.chosen, record.rejected]
            assert row.label == record.label


def test_without_shuffling_rows_come_in_the_order_of_the_source():
    steps = list(packed_batches(shuffle=False, epochs=1, batch_size=1, window=6))
    firsts = [numbers(step)[0] for step in steps]
    assert firsts == sorted(firsts)
    windows = [{i // 6 for i in numbers(step)} for step in steps]
    assert all(len(window) == 1 for window in windows)


def test_the_longest_records_do_not_come_first():
    """First-fit decreasing sorts a window; its rows are shuffled afterwards."""
    counts = np.zeros(4)
    for seed in range(40):
        steps = list(packed_batches(window=23, epochs=1, batch_size=1, seed=seed))
        counts += np.array([len(numbers(step)) for step in steps[:4]])
    fixed = list(packed_batches(window=23, epochs=1, batch_size=1, shuffle=False))
    assert len(fixed) >= 4
    assert counts.max() < 1.25 * counts.min()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("records", [RECORDS, PAIRS])
def test_seed_and_settings_fix_the_order(make, records):
    first = take(make(records), 6)
    for again in (make(records), make(records, num_threads=2)):
        for a, b in zip(first, take(again, 6), strict=True):
            assert_same(a, b)
    other = take(make(records, seed=4), 6)
    assert [numbers(b) for b in other] != [numbers(b) for b in first]


@pytest.mark.parametrize("make", MAKERS)
def test_resume_in_the_middle_of_an_epoch_gives_the_same_batches(make):
    reference = take(make(), 12)
    iterator = make()
    for step in range(11):
        state = json.loads(json.dumps(iterator.get_state()))
        restored = make()
        restored.set_state(state)
        for a, b in zip(take(restored, 12 - step), reference[step:], strict=True):
            assert_same(a, b)
        next(iterator)
    iterator.set_state(make().get_state())  # back to the start
    assert_same(next(iterator), reference[0])


@pytest.mark.parametrize("make", MAKERS)
def test_the_end_of_a_run_survives_resume(make):
    iterator = make(epochs=1)
    count = len(list(make(epochs=1)))
    take(iterator, count)
    restored = make(epochs=1)
    restored.set_state(iterator.get_state())
    for finished in (iterator, restored):
        with pytest.raises(StopIteration):
            next(finished)
    used = make(epochs=1)
    next(used)
    used.set_state(iterator.get_state())
    with pytest.raises(StopIteration):
        next(used)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("records", [RECORDS, PAIRS])
def test_blocks_of_all_processes_make_the_global_batch(make, records):
    options = {"epochs": 2}
    whole = list(make(records, **options))
    parts = [list(make(records, shard=(k, 2), **options)) for k in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
        assert_same(joined, batch)


@pytest.mark.parametrize("make", MAKERS)
def test_a_run_may_go_on_with_another_number_of_processes(make):
    reference = take(make(), 6)
    part = make(shard=(1, 2))
    take(part, 3)
    whole = make()
    whole.set_state(part.get_state())
    for a, b in zip(take(whole, 3), reference[3:], strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("make", MAKERS)
def test_report_counts_the_records_handed_out(make):
    iterator = make(epochs=1)
    steps = list(iterator)
    assert iterator.report.rows == sum(len(numbers(step)) for step in steps)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (packed_batches, {"seed": 4}, "seed was 3, is 4"),
        (packed_batches, {"row_length": 64}, "row_length was 32, is 64"),
        (packed_batches, {"window": 9}, "window was 8, is 9"),
        (packed_batches, {"config": TokenizeConfig(4, 11)}, "tokens was"),
        (packed_batches, {"records": RECORDS[1:]}, "records was 23, is 22"),
        (bucketed_batches, {"window_batches": 3}, "window_batches was 2, is 3"),
    ],
)
def test_a_state_of_another_run_is_refused(make, change, message):
    state = make().get_state()
    with pytest.raises(ValueError, match=message):
        make(**change).set_state(state)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": []}, "no records"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"shard": (2, 2)}, r"shard \(2, 2\)"),
        ({"shard": (0, 3)}, "does not divide into 3 parts"),
    ],
)
def test_impossible_sizes_are_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_what_only_one_of_them_needs_is_refused_there():
    with pytest.raises(ValueError, match="row_length 1 and window 8"):
        packed_batches(row_length=1)
    with pytest.raises(ValueError, match="window 0"):
        packed_batches(window=0)
    with pytest.raises(ValueError, match="one width for all batches"):
        bucketed_batches(config=CONFIG)
    with pytest.raises(ValueError, match="window_batches is 0"):
        bucketed_batches(window_batches=0)
    with pytest.raises(ValueError, match="batch_size 24 exceeds the 23 records"):
        bucketed_batches(batch_size=24)
    with pytest.raises(ValueError, match="longer than a row.*row_length is 16"):
        list(packed_batches(PAIRS, row_length=16, epochs=1))
    with pytest.raises(ValueError, match="prompts are not packed"):
        next(packed_batches([PromptRecord("p")]))


def test_buckets_hold_every_record_once_and_narrow_batches():
    steps = list(bucketed_batches(epochs=2, drop_remainder=False))
    assert [len(step.index) for step in steps] == [4] * 11 + [2]
    assert sorted(i for step in steps for i in numbers(step)) == sorted(
        2 * list(range(23))
    )
    for step in steps:
        assert unpack_widths(step) == needed_widths(step)
    assert bucketed_batches(epochs=2, drop_remainder=False).num_batches == 12
    dropped = bucketed_batches(epochs=2)
    assert dropped.num_batches == 11 == len(list(dropped))
    assert bucketed_batches().num_batches is None
    assert packed_batches(epochs=1).num_batches is None  # packing decides it


def unpack_widths(step):
    sequences = step.sequences
    return sequences.prompt_width, sequences.response_mask.shape[-1]


def needed_widths(step):
    rows = [tokenize_record(RECORDS[i], TOKENIZER, BUCKETS) for i in numbers(step)]
    longest = (
        max(len(row.prompt) for row in rows),
        max(len(row.responses[0]) for row in rows),
    )
    return tuple(
        min(width for width in buckets if width >= length)
        for buckets, length in zip(
            (BUCKETS.prompt_buckets, BUCKETS.response_buckets), longest, strict=True
        )
    )


def test_unshuffled_buckets_take_batches_in_order():
    steps = list(bucketed_batches(shuffle=False, epochs=1, drop_remainder=False))
    windows = [{i // 8 for i in numbers(step)} for step in steps]
    assert windows == [{0}, {0}, {1}, {1}, {2}, {2}]


def test_sorting_and_packing_leave_less_padding():
    options = {"batch_size": 4, "seed": 0, "epochs": 1, "drop_remainder": False}
    plain = make_batches(RECORDS, TOKENIZER, BUCKETS, **options)
    whole = padding_waste(plain)
    sorted_ = padding_waste(bucketed_batches(window_batches=6, **options))
    same = TokenizeConfig(16, 16)
    packed = padding_waste(
        packed_batches(config=same, window=23, epochs=1, batch_size=1)
    )
    assert whole.tokens == sorted_.tokens == packed.tokens
    assert packed.waste < sorted_.waste < whole.waste
    assert packed.shapes == 1


@pytest.mark.assets
def test_real_text_packs_to_a_few_percent_of_padding():
    path = SHARED / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip("shared GSM8K data are absent")
    columns = {"prompt": "question", "response": "answer"}
    records, _ = read_jsonl(path, DemonstrationRecord, columns)
    records, config = records[:600], TokenizeConfig(1024, 1280)
    steps = packed_batches(
        records, config, row_length=4096, window=600, epochs=1, batch_size=1
    )
    seen, found = [], []
    for step in steps:
        check_end_of_turn(TOKENIZER, step)
        seen += numbers(step)
        found.append(padding_waste([step]))
    assert sorted(seen) == list(range(600))
    assert steps.report.counts == {}  # nothing was cut
    text = sum(len((r.prompt + r.response).encode()) + 1 for r in records)
    assert sum(part.tokens for part in found) == text
    columns = sum(part.columns for part in found)
    assert columns == 4096 * len(found)
    # No packing needs fewer rows than this.
    assert len(found) == math.ceil(text / 4096)
