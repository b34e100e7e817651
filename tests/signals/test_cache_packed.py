"""A teacher's words kept on disk, read for packed rows: those for a row per record."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.data.packing import collate_packed, pack
from rkd_jax.data.records import DemonstrationRecord
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.data.tokenizer import from_bpe
from rkd_jax.data.windows import make_packed_batches
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.topk_kd import make_topk_kd
from rkd_jax.objectives.tvkd import make_tvkd
from rkd_jax.packed import PackedPreferenceBatch
from rkd_jax.signals.cache import (
    CacheError,
    CacheMismatch,
    CacheWriter,
    TeacherCache,
)
from rkd_jax.signals.teacher import make_pair_scorer
from rkd_jax.training import init_state, make_update
from rkd_jax.types import ReferenceSignal, TopkSignal
from tests.signals.tiny_cache import (
    KINDS,
    REWARDS,
    ROWS,
    TOKENIZER,
    TOP,
    VOCABULARY,
    batch_of,
    demonstrations,
    length,
    open_cache,
    preferences,
    source,
)

ROW = 34  # a pair of the longest has 32 columns


def packed_of(records, rows=ROWS, numbers=None, spare=1):
    """Some records in packed rows, and ``spare`` empty ones."""
    numbers = range(len(records)) if numbers is None else numbers
    found = [tokenize_record(records[i], TOKENIZER, rows, i) for i in numbers]
    return collate_packed(pack(found, ROW) + [[]] * spare, ROW)


def entries(batch):
    """``(row, entry, number)`` of every record."""
    places = np.argwhere(batch.index >= 0).tolist()
    return [(row, m, int(batch.index[row, m])) for row, m in places]


def segments_of(batch, m):
    """Ids of the segments of entry m."""
    members = 2 if isinstance(batch, PackedPreferenceBatch) else 1
    return [members * m + n + 1 for n in range(members)]


def where(batch, number):
    """Row and first segment of a record."""
    row, m = next((row, m) for row, m, i in entries(batch) if i == number)
    return row, segments_of(batch, m)[0]


# What comes out.


@pytest.mark.parametrize("kind", KINDS)
def test_lists_are_those_of_plain_rows_record_by_record(folders, kind):
    """Bitwise, at the columns of the record's own targets; nothing is anywhere else."""
    records, cache = KINDS[kind](), open_cache(folders / kind)
    batch, plain = packed_of(records), batch_of(records)
    assert max((batch.index >= 0).sum(-1)) > 1
    found, expected = cache.topk(batch), cache.topk(plain)
    mask = batch.sequences.response_mask
    assert found.ids.shape == found.log_probs.shape == (*mask.shape, TOP)
    assert (found.ids.dtype, found.log_probs.dtype) == (np.int32, np.float32)
    assert np.all(np.isneginf(found.log_probs[~mask]))
    assert not found.ids[~mask].any()
    seen = []
    for row, m, number in entries(batch):
        for n, segment in enumerate(segments_of(batch, m)):
            at = (number, n) if kind == "preferences" else (number,)
            mine = mask[row] & (batch.sequences.segment_ids[row, 1:] == segment)
            there = plain.sequences.response_mask[at]
            assert mine.sum() == there.sum() > 0
            for name in ("ids", "log_probs"):
                np.testing.assert_array_equal(
                    getattr(found, name)[row][mine], getattr(expected, name)[at][there]
                )
        seen.append(number)
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_per_response_are_those_of_plain_rows(folders, kind):
    """Bitwise; 0 log-probs and shaping and NaN rewards where no record is."""
    records, cache = KINDS[kind](), open_cache(folders / kind)
    batch, plain = packed_of(records), batch_of(records)
    none = batch.index < 0
    pair = (2,) if kind == "preferences" else ()
    for found, expected, filler in (
        (cache.reference(batch).log_probs, cache.reference(plain).log_probs, 0.0),
        (cache.shaping(batch).log_probs, cache.shaping(plain).log_probs, 0.0),
        (cache.shaping(batch).shaping, cache.shaping(plain).shaping, 0.0),
        (cache.rewards(batch), cache.rewards(plain), np.nan),
    ):
        assert found.shape == (*batch.index.shape, *pair)
        assert found.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(found[none], np.full(found[none].shape, filler))
        for row, m, number in entries(batch):
            np.testing.assert_array_equal(found[row, m], expected[number])


def test_the_reference_is_what_the_scorer_of_packed_pairs_says(folders):
    """The same shape and the same filler, from a model that is run on the rows."""
    batch = packed_of(preferences())
    reference = source(2)
    live = make_pair_scorer(reference.model)(reference.params, batch)
    kept = open_cache(folders / "preferences").reference(batch).log_probs
    np.testing.assert_allclose(kept, live, rtol=1e-5)
    np.testing.assert_array_equal(kept[batch.index < 0], 0.0)


def test_rewards_take_the_place_of_those_in_the_batch(folders):
    """Records that carry the oracle's rewards are packed into the same array."""
    plain, cache = preferences(), open_cache(folders / "preferences")
    rewarded = [
        dataclasses.replace(
            record,
            chosen_reward=0.5 * len(record.chosen),
            rejected_reward=0.5 * len(record.rejected),
        )
        for record in plain
    ]
    found = cache.rewards(packed_of(plain))
    np.testing.assert_array_equal(found, packed_of(rewarded).rewards)


def test_rows_without_any_record_have_fillers_only(folders):
    """As a process whose shard of a last batch is empty has them."""
    cache, whole = open_cache(folders / "demonstrations"), packed_of(demonstrations())
    batch = jax.tree.map(lambda x: x[-1:], whole)
    assert np.all(batch.index == -1)
    assert np.all(np.isneginf(cache.topk(batch).log_probs))
    assert not cache.reference(batch).log_probs.any()


def test_responses_cut_earlier_have_lists_and_no_sums(folders):
    """As of plain rows: their beginnings, and for sums an error; longer ones never."""
    records, cache = demonstrations(), open_cache(folders / "demonstrations")
    shorter = dataclasses.replace(ROWS, max_response=4)
    batch = packed_of(records, shorter)
    signal = cache.topk(batch)
    for row, m, number in entries(batch):
        mine = batch.sequences.segment_ids[row, 1:] == m + 1
        mine = mine & batch.sequences.response_mask[row]
        kept = cache[number].responses[0].topk
        assert mine.sum() == min(len(kept.ids), 4)
        np.testing.assert_array_equal(signal.ids[row][mine], kept.ids[:4])
        np.testing.assert_array_equal(signal.log_probs[row][mine], kept.log_probs[:4])
    for read in (cache.reference, cache.shaping, cache.rewards):
        with pytest.raises(CacheMismatch, match=r"record \d: the batch has 4 of the"):
            read(batch)
    longer = dataclasses.replace(ROWS, max_response=12)
    with pytest.raises(CacheMismatch, match="record 4: .* is not the cache's 9"):
        cache.topk(packed_of(records, longer))


# What is refused.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("who", "part"),
    [
        ("sequences", "prompt"),
        ("sequences", "target"),
        ("teacher_sequences", "prompt"),
    ],
)
def test_a_token_changed_in_one_segment_names_its_record(folders, kind, who, part):
    """In every segment in turn; its neighbours in the row are whole."""
    records, cache = KINDS[kind](), open_cache(folders / kind)
    batch = packed_of(records)
    for row, m, number in entries(batch):
        for segment in segments_of(batch, m):
            sequences = getattr(batch, who)
            mine = np.flatnonzero(sequences.segment_ids[row] == segment)
            tokens = sequences.tokens.copy()
            tokens[row, mine[0 if part == "prompt" else -1]] += 1
            changed = dataclasses.replace(sequences, tokens=tokens)
            changed = dataclasses.replace(batch, **{who: changed})
            for read in (cache.topk, cache.reference, cache.shaping, cache.rewards):
                with pytest.raises(CacheMismatch, match=f"^record {number}: its pr"):
                    read(changed)


def test_the_same_texts_in_another_layout_name_the_record(folders):
    """Without the last token; with a prompt of the teacher's own."""
    other = dataclasses.replace(ROWS, append_eos=False)
    batch = packed_of(demonstrations(), other, numbers=[2, 3])
    cache = open_cache(folders / "demonstrations")
    with pytest.raises(CacheMismatch, match="record 2: the batch has 6 of the 7"):
        cache.rewards(batch)
    hinted = [dataclasses.replace(r, teacher_prompt="?") for r in demonstrations()]
    with pytest.raises(CacheMismatch, match="record 3: its prompt or its 3 targets"):
        cache.topk(packed_of(hinted, numbers=[3]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_is_another_records_is_named(folders, kind):
    records, cache = KINDS[kind](), open_cache(folders / kind)
    batch = packed_of(records)
    row = int(np.argmax((batch.index >= 0).sum(-1)))
    first, second = batch.index[row, :2].tolist()
    swapped = batch.index.copy()
    swapped[row, :2] = second, first
    batch = dataclasses.replace(batch, index=swapped)
    for read in (cache.topk, cache.reference, cache.shaping, cache.rewards):
        with pytest.raises(CacheMismatch, match=rf"record ({first}|{second}): its"):
            read(batch)


def test_a_record_that_the_cache_lacks_is_named(folders):
    cache = open_cache(folders / "demonstrations")
    with pytest.raises(CacheError, match="has records 0 to 6, not 7: it was made of"):
        cache.topk(packed_of(demonstrations(8)))
    with pytest.raises(CacheMismatch, match="cache of DemonstrationRecords, .* has 2"):
        cache.topk(packed_of(preferences(), numbers=[0]))


def test_a_record_that_was_skipped_is_named(tmp_path):
    """The tokenizer has no token for anything but ASCII."""
    letters = [chr(i) for i in range(33, 127)]
    tokenizer = from_bpe([*letters, "<eos>"], [], special=(94,), eos_id=94)
    records = [DemonstrationRecord("hi", text) for text in ("ab", "é", "cd")]
    CacheWriter(
        tmp_path, records, tokenizer, ROWS, REWARDS, oracle=length, on_error="skip"
    ).write()
    cache = TeacherCache(tmp_path, tokenizer=tokenizer, rows=ROWS)
    good = [tokenize_record(records[i], tokenizer, ROWS, i) for i in (0, 2)]
    batch = collate_packed([good], 16)
    np.testing.assert_array_equal(cache.rewards(batch)[0, :3], [1.0, 1.0, np.nan])
    batch.index[0, 1] = 1
    with pytest.raises(CacheError, match=r"record 1 is not in .*: response: encodes"):
        cache.rewards(batch)


def test_rows_and_index_that_do_not_belong_together_are_refused(folders):
    cache, batch = open_cache(folders / "demonstrations"), packed_of(demonstrations())
    row, segment = where(batch, 2)
    index = batch.index.copy()
    index[row, segment - 1] = -1
    hidden = dataclasses.replace(batch, index=index)
    with pytest.raises(
        CacheMismatch, match=f"row {row} has targets in segment {segment}, where"
    ):
        cache.topk(hidden)
    narrow = dataclasses.replace(batch, index=batch.index[:, :1])
    with pytest.raises(CacheMismatch, match="has targets in segment 2, where its"):
        cache.rewards(narrow)
    mask = batch.sequences.response_mask.copy()
    mask[-1, 0] = True  # in a row of padding
    padded = dataclasses.replace(batch.sequences, response_mask=mask)
    with pytest.raises(CacheMismatch, match="has targets in segment 0, where its"):
        cache.reference(dataclasses.replace(batch, sequences=padded))
    index = batch.index.copy()
    index[-1, 0] = 5  # of the empty row
    absent = dataclasses.replace(batch, index=index)
    with pytest.raises(
        CacheMismatch, match=f"record 5: segment 1 of row {len(index) - 1}"
    ):
        cache.topk(absent)


@pytest.mark.parametrize("who", ["sequences", "teacher_sequences"])
def test_segments_that_are_no_prompt_with_a_response_are_refused(folders, who):
    """The same ids in another order would otherwise be recognised."""
    cache, batch = open_cache(folders / "demonstrations"), packed_of(demonstrations())
    row, segment = where(batch, 2)
    sequences = getattr(batch, who)
    mine = np.flatnonzero(sequences.segment_ids[row] == segment)
    tokens, mask = sequences.tokens.copy(), sequences.response_mask.copy()
    # One column of the prompt and one target change places.
    places = mine[[-8, -7]]
    assert mask[row, places - 1].tolist() == [False, True]
    tokens[row, places] = tokens[row, places[::-1]]
    mask[row, places - 1] = [True, False]
    changed = dataclasses.replace(sequences, tokens=tokens, response_mask=mask)
    with pytest.raises(CacheMismatch, match=f"record 2: segment {segment} of row"):
        cache.topk(dataclasses.replace(batch, **{who: changed}))


def test_packed_rows_need_an_index_of_their_records(folders):
    cache, plain = open_cache(folders / "demonstrations"), batch_of(demonstrations())
    segments = np.asarray(plain.sequences.token_mask, np.int32)
    packed = dataclasses.replace(plain.sequences, segment_ids=segments)
    batch = packed_of(demonstrations())
    one_sided = dataclasses.replace(batch.teacher_sequences, segment_ids=None)
    for bad in (
        dataclasses.replace(plain, sequences=packed, teacher_sequences=packed),
        dataclasses.replace(batch, teacher_sequences=one_sided),
    ):
        for read in (cache.topk, cache.reference, cache.shaping, cache.rewards):
            with pytest.raises(ValueError, match=r"packed rows have an index \[B, M\]"):
                read(bad)


# Trainings.

CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=64,
)


def value_and_gradient(objective, params, batch, signal):
    def total(params):
        out = objective.student_loss(params, None, None, batch, signal, None)
        return out.total, out

    (_, out), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return out, gradient


def wide(tree):
    """All numbers in float64."""
    return jax.tree.map(
        lambda x: (
            np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        ),
        tree,
    )


def assert_same(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
        found,
        expected,
    )


def double():
    """A student in float64, and its parameters."""
    student = Decoder(dataclasses.replace(CONFIG, dtype="float64"))
    return student, wide(student.init(jax.random.key(0)))


@pytest.mark.usefixtures("x64")
def test_distillation_from_the_cache_reads_packed_and_plain_rows_alike(folders):
    """Loss and gradient, in float64."""
    cache = open_cache(folders / "demonstrations")
    student, params = double()
    objective = make_topk_kd(student)
    found, expected = (
        value_and_gradient(
            objective, params, batch, TopkSignal(s.ids, wide(s.log_probs))
        )
        for batch in (packed_of(demonstrations()), batch_of(demonstrations()))
        for s in [cache.topk(batch)]
    )
    assert float(found[0].weight) == cache.manifest.tokens
    assert float(found[0].total) > 1.0
    assert_same(found, expected)


@pytest.mark.usefixtures("x64")
def test_dpo_from_the_cache_reads_packed_and_plain_pairs_alike(folders):
    """Loss and gradient, in float64."""
    cache = open_cache(folders / "preferences")
    student, params = double()
    objective = make_dpo(student, beta=0.3)
    found, expected = (
        value_and_gradient(
            objective,
            params,
            dataclasses.replace(batch, label=wide(batch.label)),
            ReferenceSignal(wide(cache.reference(batch).log_probs)),
        )
        for batch in (packed_of(preferences()), batch_of(preferences()))
    )
    assert float(found[0].weight) == 7.0
    # A margin that ignored the reference would differ by more than rounding.
    assert np.ptp(cache.reference(batch_of(preferences())).log_probs) > 1.0
    assert_same(found, expected)


@pytest.mark.usefixtures("x64")
def test_tvkd_from_the_cache_reads_packed_and_plain_pairs_alike(folders):
    """Loss and gradient, in float64."""
    cache = open_cache(folders / "preferences")
    student, params = double()
    objective = make_tvkd(student, beta=0.3, alpha=0.5)
    found, expected = (
        value_and_gradient(
            objective,
            params,
            dataclasses.replace(batch, label=wide(batch.label)),
            wide(cache.shaping(batch)),
        )
        for batch in (packed_of(preferences()), batch_of(preferences()))
    )
    assert float(found[0].weight) == 7.0
    # A margin that ignored the shaping would differ by more than rounding.
    assert np.ptp(cache.shaping(batch_of(preferences())).shaping) > 1.0
    assert_same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_on_packed_rows_is_the_update_on_plain_ones(folders, kind):
    """Batches of `make_packed_batches`, in two micro-batches, in float32."""
    records, cache = KINDS[kind](), open_cache(folders / kind)
    student, optimizer = Decoder(CONFIG), optax.sgd(0.5)
    pairs = kind == "preferences"
    objective = make_dpo(student, beta=0.3) if pairs else make_topk_kd(student)
    read = cache.reference if pairs else cache.topk
    rows = len(pack([tokenize_record(r, TOKENIZER, ROWS, 0) for r in records], ROW))
    packed = next(
        make_packed_batches(
            records,
            TOKENIZER,
            ROWS,
            row_length=ROW,
            batch_size=rows + rows % 2,
            seed=0,
            epochs=1,
        )
    )
    assert sorted(n for _, _, n in entries(packed)) == list(range(7))
    states, metrics = [], []
    for batch, accumulation in ((packed, 2), (batch_of(records), 1)):
        update = make_update(
            objective, student_optimizer=optimizer, accumulation=accumulation
        )
        state = init_state(
            student.init(jax.random.key(0)),
            student_optimizer=optimizer,
            rng=jax.random.key(1),
        )
        state, found = update(state, None, batch, read(batch))
        states.append(state.student.params)
        metrics.append(found)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *states
    )
    start = student.init(jax.random.key(0))["embed"]["embedding"]
    moved = np.asarray(states[0]["embed"]["embedding"]) - np.asarray(start)
    assert np.abs(moved).max() > 1e-3
    for name in ("student/loss", "student/grad_norm", "tokens"):
        np.testing.assert_allclose(metrics[0][name], metrics[1][name], rtol=1e-5)
