"""One order of records for any number of processes, and exact resume."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rkd_jax.data.collate import Widths
from rkd_jax.data.inspection import check_end_of_turn
from rkd_jax.data.pipeline import ZippedBatches, make_batches
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord, PromptRecord
from rkd_jax.data.sources import read_jsonl
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.data.tokenizer import byte_tokenizer

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TOKENIZER = byte_tokenizer()
CONFIG = TokenizeConfig(4, 6)
BUCKETS = TokenizeConfig(
    16, 16, prompt_buckets=(2, 4, 16), response_buckets=(2, 4, 8, 16)
)
RECORDS = [DemonstrationRecord("p" * (1 + i % 9), "r" * (1 + i)) for i in range(10)]
PAIRS = [PreferenceRecord(f"p{i}", "good", "bad" * (1 + i)) for i in range(7)]


def batches(records=RECORDS, config=CONFIG, *, batch_size=4, seed=3, **options):
    return make_batches(
        records, TOKENIZER, config, batch_size=batch_size, seed=seed, **options
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def order(steps):
    return [i for batch in steps for i in batch.index.tolist()]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_epoch_holds_every_record_once_though_batches_cross_its_end():
    seen = order(take(batches(), 15))  # 6 epochs of 10 records in batches of 4
    epochs = [seen[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6  # each its own permutation
    assert order(take(batches(), 15)) == seen


def test_rows_belong_to_the_records_their_index_names():
    for batch in take(batches(config=BUCKETS), 5):
        for row, i in enumerate(batch.index):
            sequences = batch.sequences
            ids = sequences.targets[row][sequences.response_mask[row]]
            assert TOKENIZER.decode(ids) == RECORDS[i].response


def test_without_shuffling_the_order_is_the_source():
    iterator = batches(shuffle=False, epochs=1, drop_remainder=False)
    assert iterator.num_batches == 3
    steps = list(iterator)
    assert [batch.index.tolist() for batch in steps] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert len(list(batches(shuffle=False, epochs=1))) == 2
    assert batches(epochs=2).num_batches == 5
    assert batches().num_batches is None


def test_fewer_records_than_a_batch_are_one_short_batch_on_request():
    steps = list(batches(batch_size=64, epochs=1, drop_remainder=False))
    assert sorted(order(steps)) == list(range(10))
    assert len(steps) == 1


@pytest.mark.parametrize("config", [CONFIG, BUCKETS])
@pytest.mark.parametrize("records", [RECORDS, PAIRS])
def test_blocks_of_all_processes_make_the_global_batch(config, records):
    whole = take(batches(records, config), 8)
    parts = [take(batches(records, config, shard=(k, 2)), 8) for k in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
        assert_same(joined, batch)


@pytest.mark.parametrize("config", [CONFIG, BUCKETS])
def test_a_process_may_take_several_blocks(config):
    """Blocks that are not neighbours, and the same ones as another process."""
    whole = take(batches(config=config), 6)
    shards = {((0, 3), 4): [0, 3], ((1, 2), 4): [1, 2], ((0, 1), 2): [0, 1, 2, 3]}
    for shard, rows in shards.items():
        part = take(batches(config=config, shard=shard), 6)
        for mine, batch in zip(part, whole, strict=True):
            assert_same(mine, jax.tree.map(lambda x, rows=rows: x[rows], batch))


def test_processes_agree_on_widths_and_read_only_their_own():
    """Each tells what its rows need; here the other one's word is known before."""
    whole = take(batches(config=BUCKETS), 8)
    others = []
    options = {"config": BUCKETS, "shard": (1, 2)}
    take(batches(**options, agree=lambda widths: others.append(widths) or widths), 8)
    options["shard"] = (0, 2)
    mine = []

    def agree(widths):
        mine.append(widths)
        return Widths(*map(max, widths, others[len(mine) - 1]))

    records = Watched(RECORDS)
    iterator = batches(records, **options, agree=agree)
    records.read.clear()
    found = take(iterator, 8)
    half = [jax.tree.map(lambda x: x[:2], batch) for batch in whole]
    for batch, expected in zip(found, half, strict=True):
        assert_same(batch, expected)
    assert records.read == order(found)
    assert any(one != other for one, other in zip(mine, others, strict=True))
    with pytest.raises(ValueError, match="agree needs num_threads=0"):
        batches(**options, agree=agree, num_threads=2)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (((), 2), "at least one block"),
        (((1, 1), 2), "each once"),
        (((0, 2), 2), r"lies in \[0, 2\)"),
        ((-1, 2), r"lies in \[0, 2\)"),
        (((0, 1), 3), "does not divide into 3"),
    ],
)
def test_blocks_that_are_not_there_are_refused(shard, message):
    with pytest.raises(ValueError, match=message):
        batches(shard=shard)


def test_short_last_batch_is_divided_among_processes():
    options = {"epochs": 1, "drop_remainder": False}
    whole = list(batches(**options))
    parts = [list(batches(shard=(k, 2), **options)) for k in range(2)]
    assert [len(b.index) for b in parts[0]] == [2, 2, 1]
    joined = [i for pair in zip(*parts, strict=True) for i in order(pair)]
    assert joined == order(whole)


class Watched(list):
    """Records that remember who was read."""

    def __init__(self, records):
        super().__init__(records)
        self.read = []

    def __getitem__(self, i):
        self.read.append(i)
        return super().__getitem__(i)


def test_a_process_reads_its_own_records_only_and_only_when_due():
    records = Watched(RECORDS)
    iterator = batches(records, shard=(1, 2))
    records.read.clear()
    batch = next(iterator)
    assert records.read == batch.index.tolist()
    assert len(records.read) == 2


@pytest.mark.parametrize("config", [CONFIG, BUCKETS])
def test_t7_restored_state_gives_identical_next_batches(config):
    reference = take(batches(config=config), 9)
    iterator = batches(config=config)
    for step in range(8):
        state = json.loads(json.dumps(iterator.get_state()))
        restored = batches(config=config)
        restored.set_state(state)
        assert_same(take(restored, 9 - step), reference[step:])
        next(iterator)
    iterator.set_state(batches(config=config).get_state())  # back to the start
    assert_same(take(iterator, 9), reference)


def test_the_end_of_a_run_survives_resume():
    iterator = batches(epochs=1)
    take(iterator, 2)
    restored = batches(epochs=1)
    restored.set_state(iterator.get_state())
    with pytest.raises(StopIteration):
        next(restored)


def test_a_run_may_go_on_with_another_number_of_processes():
    reference = take(batches(config=BUCKETS), 6)
    part = batches(config=BUCKETS, shard=(1, 4))
    take(part, 3)
    whole = batches(config=BUCKETS)
    whole.set_state(part.get_state())
    assert_same(take(whole, 3), reference[3:])


CHILD = """
import json, sys
from rkd_jax.data.pipeline import ZippedBatches, make_batches
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.data.tokenizer import byte_tokenizer

records = [DemonstrationRecord("p" * (1 + i % 9), "r" * (1 + i)) for i in range(10)]
pairs = [PreferenceRecord(f"p{i}", "good", "bad" * (1 + i)) for i in range(7)]
options = dict(config=TokenizeConfig(4, 6), tokenizer=byte_tokenizer(), seed=3)
zipped = ZippedBatches({
    "demonstrations": make_batches(records, batch_size=4, **options),
    "preferences": make_batches(pairs, batch_size=2, **options),
})
zipped.set_state(json.load(sys.stdin))
step = [next(zipped) for _ in range(3)]
print(json.dumps([
    {name: [b.index.tolist(), b.sequences.tokens.tolist()] for name, b in s.items()}
    for s in step
]))
"""


def zipped():
    return ZippedBatches(
        {
            "demonstrations": batches(),
            "preferences": batches(PAIRS, batch_size=2),
        }
    )


def test_t7_a_new_process_goes_on_where_the_old_one_stopped():
    iterator = zipped()
    take(iterator, 5)
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(iterator.get_state()),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert child.returncode == 0, child.stderr
    expected = [
        {
            name: [batch.index.tolist(), batch.sequences.tokens.tolist()]
            for name, batch in step.items()
        }
        for step in take(iterator, 3)
    ]
    assert json.loads(child.stdout) == expected


def test_threads_change_nothing():
    reference = batches(config=BUCKETS)
    threaded = batches(config=BUCKETS, num_threads=2)
    take(reference, 2), take(threaded, 2)
    state = threaded.get_state()
    assert state == reference.get_state()
    following = take(reference, 4)
    assert_same(take(threaded, 4), following)
    assert threaded.report == reference.report
    threaded.set_state(state)
    assert_same(take(threaded, 4), following)


def test_report_counts_the_rows_handed_out():
    iterator = batches(shuffle=False)  # 6 columns hold 5 letters and EOS
    assert iterator.report.rows == 0
    take(iterator, 2)
    assert iterator.report.rows == 8
    assert iterator.report.counts["response truncated"] == 3
    assert iterator.report.first["response truncated"] == [5, 6, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"batch_size": 2}, "batch_size was 4, is 2"),
        ({"records": RECORDS[1:]}, "digest was .*records was 10, is 9"),
        ({"records": [*RECORDS[:9], DemonstrationRecord("x", "y")]}, "digest was"),
    ],
)
def test_a_state_of_another_run_is_refused(change, message):
    state = batches().get_state()
    with pytest.raises(ValueError, match=message):
        batches(**change).set_state(state)


def test_what_is_no_state_is_refused():
    with pytest.raises(ValueError, match="not a state"):
        batches().set_state({"next_index": 3})
    with pytest.raises(ValueError, match="parts .*'demonstrations'"):
        zipped().set_state(batches().get_state())
    state = zipped().get_state()
    state["preferences"] = state["demonstrations"]
    with pytest.raises(ValueError, match="preferences: the saved data position"):
        zipped().set_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": []}, "no records"),
        ({"batch_size": 11}, "batch_size 11 exceeds the 10 records"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seed": -1}, "[Ss]eed"),
        ({"shard": (2, 2)}, r"shard \(2, 2\): the index lies in \[0, 2\)"),
        ({"shard": (0, 3)}, "batch_size 4 does not divide into 3 parts"),
        (
            {"shard": (0, 4), "epochs": 1, "drop_remainder": False},
            "last batch of 2 rows does not divide into 4",
        ),
    ],
)
def test_impossible_sizes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        batches(**change)


def test_mixed_kinds_are_refused_when_met():
    with pytest.raises(ValueError, match="one pipeline per kind"):
        next(batches([PromptRecord("p"), DemonstrationRecord("p", "r")], batch_size=2))


def test_zip_ends_with_the_shortest_and_needs_parts():
    parts = {"a": batches(epochs=1), "b": batches(epochs=3)}
    assert [sorted(step) for step in ZippedBatches(parts)] == [["a", "b"]] * 2
    with pytest.raises(ValueError, match="name at least one"):
        ZippedBatches({})


@pytest.mark.assets
def test_real_text_arrives_whole_or_cut_where_the_report_says():
    path = SHARED / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip("shared GSM8K data are absent")
    columns = {"prompt": "question", "response": "answer"}
    records, _ = read_jsonl(path, DemonstrationRecord, columns)
    config = TokenizeConfig(1024, 256, chat=True)
    iterator = batches(records, config, batch_size=64)
    cut = 0
    for batch in take(iterator, 3):
        check_end_of_turn(TOKENIZER, batch)
        sequences = batch.sequences
        for row, i in enumerate(batch.index):
            ids = sequences.targets[row][sequences.response_mask[row]]
            text = records[i].response.encode()
            cut += len(text) >= 256
            assert bytes(ids[ids < 256].tolist()) == text[:256]
    assert 0 < cut < 192
    assert iterator.report.counts == {"response truncated": cut}
