"""A teacher's words kept on disk: the same as from its mouth, and nobody else's."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.data.pipeline import make_batches
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.losses import forward_kl, topk_forward_kl
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.objectives.topk_kd import make_topk_kd
from rkd_jax.signals.cache import (
    CacheSettings,
)
from rkd_jax.signals.cache_scores import make_teacher_scores
from rkd_jax.signals.teacher import make_teacher_log_probs
from rkd_jax.signals.topk import make_topk
from rkd_jax.training import init_state, make_update
from rkd_jax.types import TopkSignal
from tests.signals.tiny_cache import (
    KINDS,
    LISTS,
    ROWS,
    SETTINGS,
    TOKENIZER,
    TOP,
    VOCABULARY,
    batch_of,
    demonstrations,
    open_cache,
    source,
    table,
    writer,
)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def by_hand(prompt, targets):
    """Of one response, in float64."""
    visited = [prompt[-1], *targets]
    teacher = log_softmax(table(1))[visited]
    ids = np.argsort(-teacher[:-1], axis=-1)
    listed = np.take_along_axis(teacher[:-1], ids, -1)
    values = np.log(np.exp(0.7 * teacher).sum(-1))
    values[-1] = 0.0
    return {
        "ids": ids[:, :TOP],
        "log_probs": listed[:, :TOP],
        "log_tail": np.log(np.exp(listed[:, TOP:]).sum(-1)),
        "shaping": (0.7 * values[1:] - values[:-1]).sum(),
        "reference": log_softmax(table(2))[visited[:-1], targets].sum(),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_by_hand(folders, kind):
    records, cache = KINDS[kind](), open_cache(folders / kind)
    assert len(cache) == len(records)
    for i, record in enumerate(records):
        row = tokenize_record(record, TOKENIZER, ROWS, i)
        texts = record.to_json()
        texts = [texts[k] for k in ("response", "chosen", "rejected") if k in texts]
        for response, targets, text in zip(
            cache[i].responses, row.responses, texts, strict=True
        ):
            expected = by_hand(row.teacher_prompt, targets)
            expected["reference"] = by_hand(row.prompt, targets)["reference"]
            np.testing.assert_array_equal(response.topk.ids, expected.pop("ids"))
            for name in ("log_probs", "log_tail"):
                found = getattr(response.topk, name)
                np.testing.assert_allclose(found, expected.pop(name), rtol=1e-5)
            assert response.values.pop("reward") == 0.5 * len(text)
            assert response.values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_signals_of_a_batch_in_any_order_and_width(folders, kind):
    records, cache = KINDS[kind](), open_cache(folders / kind)
    numbers = [5, 0, 3]
    for width in (9, 11):
        rows = dataclasses.replace(ROWS, max_response=9, response_buckets=())
        batch = batch_of(records, rows, numbers)
        if width > 9:
            batch = jax.tree.map(
                lambda x: (
                    np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 2)])
                    if x.dtype != np.float32 and x.ndim > 1
                    else x
                ),
                batch,
            )
        mask = batch.sequences.response_mask
        signal = cache.topk(batch)
        assert signal.ids.shape == signal.log_probs.shape == (*mask.shape, TOP)
        assert np.all(np.isneginf(signal.log_probs[~mask]))
        for row, number in enumerate(numbers):
            stack = zip(
                np.reshape(signal.ids[row], (-1, width, TOP)),
                np.reshape(signal.log_probs[row], (-1, width, TOP)),
                cache[number].responses,
                strict=True,
            )
            for ids, log_probs, response in stack:
                np.testing.assert_array_equal(ids[: response.length], response.topk.ids)
                np.testing.assert_array_equal(
                    log_probs[: response.length], response.topk.log_probs
                )
        values = [[r.values for r in cache[n].responses] for n in numbers]
        shape = mask.shape[:-1]
        for found, name in (
            (cache.reference(batch).log_probs, "reference"),
            (cache.shaping(batch).log_probs, "reference"),
            (cache.shaping(batch).shaping, "shaping"),
            (cache.rewards(batch), "reward"),
        ):
            expected = np.reshape([[v[name] for v in row] for row in values], shape)
            np.testing.assert_array_equal(found, expected.astype(np.float32))


STUDENT = Decoder(
    DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=32,
    )
)


@pytest.fixture(scope="module")
def distillation():
    """Loss and gradient of a student, and its parameters."""
    objective = make_topk_kd(STUDENT)

    @jax.jit
    def step(params, batch, signal):
        def total(params):
            return objective.student_loss(params, None, None, batch, signal, None).total

        return jax.value_and_grad(total)(params)

    return step, STUDENT.init(jax.random.key(0))


def test_distillation_from_the_cache_is_that_from_the_live_teacher(
    folders, distillation
):
    """Exactly: the same bits in, the same bits out."""
    batch = batch_of(demonstrations(), numbers=[0, 1])  # as the writer batched them
    mask = batch.sequences.response_mask
    model, params = source(1)
    live = make_teacher_scores(model, SETTINGS)(params, batch.teacher_sequences).topk
    kept = open_cache(folders / "demonstrations").topk(batch)
    np.testing.assert_array_equal(kept.ids[mask], np.asarray(live.ids)[mask])
    np.testing.assert_array_equal(
        kept.log_probs[mask], np.asarray(live.log_probs)[mask]
    )
    step, student = distillation
    for found, expected in zip(
        jax.tree.leaves(step(student, batch, kept)),
        jax.tree.leaves(step(student, batch, TopkSignal(live.ids, live.log_probs))),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)
    # Another program for the same numbers rounds them differently.
    other = make_topk(model, top_k=TOP)(params, batch.teacher_sequences)
    np.testing.assert_array_equal(kept.ids, other.ids)
    np.testing.assert_allclose(kept.log_probs, other.log_probs, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 5e-4), ("uint8", 5e-3)])
def test_coarser_log_probs_change_the_loss_within_their_rounding(
    tmp_path, folders, distillation, dtype, bound
):
    """The loss is sum p (log p - log q): relative errors of p, times log p / q."""
    records = demonstrations()
    writer(tmp_path, records, CacheSettings(TOP, dtype)).write()
    batch = batch_of(records)
    exact = open_cache(folders / "demonstrations").topk(batch)
    kept = open_cache(tmp_path).topk(batch)
    step, params = distillation
    (found, gradient), (expected, slope) = (
        step(params, batch, signal) for signal in (kept, exact)
    )
    tokens = float(batch.sequences.response_mask.sum())
    assert abs(found - expected) / tokens < bound
    off = sum(
        np.sum((np.asarray(a) - np.asarray(b)) ** 2)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True)
    )
    size = sum(np.sum(np.asarray(b) ** 2) for b in jax.tree.leaves(slope))
    assert np.sqrt(off / size) < 4 * bound


def test_training_from_a_cache_needs_no_teacher(folders):
    """Steps through `make_update` on what is in the folder alone; the loss falls."""
    cache = open_cache(folders / "demonstrations")
    objective = make_topk_kd(STUDENT, temperature=cache.settings.temperature)
    optimizer = optax.adam(1e-2)
    state = init_state(
        STUDENT.init(jax.random.key(0)),
        student_optimizer=optimizer,
        rng=jax.random.key(1),
    )
    update = make_update(objective, student_optimizer=optimizer)
    batches = make_batches(demonstrations(), TOKENIZER, ROWS, batch_size=7, seed=0)
    losses = []
    for _ in range(8):
        batch = next(batches)
        state, metrics = update(state, None, batch, cache.topk(batch))
        losses.append(float(metrics["student/loss"]))
    assert losses[-1] < 0.9 * losses[0]


def test_the_bucket_costs_less_the_longer_the_list():
    """0 <= KL of the buckets <= KL, growing with k, and equal at k = V - 1."""
    teacher, batch = source(1), batch_of(demonstrations())
    sequences, mask = batch.sequences, batch.sequences.response_mask
    p = make_teacher_log_probs(teacher.model)(teacher.params, sequences)[mask]
    q = log_softmax(table(3))[np.asarray(sequences.targets)[mask]]
    q = jnp.asarray(q, jnp.float32)
    full = np.asarray(forward_kl(q, p))
    found = []
    for k in (1, 20, VOCABULARY - 1):
        log_probs, ids = jax.lax.top_k(p, k)
        kl = jax.jit(topk_forward_kl)(q, ids, log_probs)
        assert np.all(kl <= full + 1e-5)
        found.append(float(np.mean(kl)))
    assert found == sorted(found)
    assert found[0] >= 0.0
    assert found[-1] == pytest.approx(float(full.mean()), rel=1e-5)


def test_grain_reads_the_shards_at_random(folders):
    """The files are ordinary: any grain pipeline can take them."""
    files = sorted((folders / "preferences").glob("*.array_record"))
    assert len(files) == 3
    data = grain.sources.ArrayRecordDataSource([str(file) for file in files])
    shuffled = grain.MapDataset.source(data).shuffle(seed=3)
    cache = open_cache(folders / "preferences")
    digests = {r.responses[0].digest for r in cache}
    assert len(digests) == len(cache) == len(data) == 7
    from rkd_jax.signals.cache_format import unpack_record

    found = [unpack_record(shuffled[i], SETTINGS) for i in range(7)]
    assert {record.responses[0].digest for record in found} == digests
    assert unpack_record(data[4], SETTINGS).responses[1].values == (
        cache[4].responses[1].values
    )


def test_the_teacher_is_asked_in_one_shape_and_pads_nothing_into_the_data(tmp_path):
    """The last batch of a shard has one record; the sizes are those of the others."""
    maker = writer(tmp_path, demonstrations(), LISTS)
    advanced = []
    maker.write(lambda records, tokens: advanced.append((records, tokens)))
    assert maker._teacher.source().model.traces == 1
    assert [records for records, _ in advanced] == [2, 1, 2, 1, 1]
    tokens = [len(r.response) + 1 for r in demonstrations()]
    tokens = [min(n, 9) for n in tokens]
    assert sum(n for _, n in advanced) == sum(tokens) == maker.manifest.tokens


@pytest.mark.parametrize("options", [{"batch_size": 7}, {"shard_records": 100}])
def test_batches_and_shards_do_not_change_the_numbers(tmp_path, folders, options):
    writer(tmp_path, demonstrations(), **options).write()
    pairs = zip(
        open_cache(tmp_path), open_cache(folders / "demonstrations"), strict=True
    )
    for found, expected in pairs:
        for a, b in zip(found.responses, expected.responses, strict=True):
            assert (a.digest, a.length) == (b.digest, b.length)
            np.testing.assert_array_equal(a.topk.ids, b.topk.ids)
            np.testing.assert_allclose(a.topk.log_probs, b.topk.log_probs, rtol=1e-5)
            assert a.values == pytest.approx(b.values, rel=1e-5)


def test_top_k_out_of_range_and_temperature():
    batch = batch_of(demonstrations())
    teacher = source(1)
    with pytest.raises(ValueError, match="top_k=0 must lie between 1 and the 258"):
        make_topk(teacher.model, top_k=0)(teacher.params, batch.sequences)
    with pytest.raises(ValueError, match="temperature"):
        make_topk(teacher.model, temperature=0.0)
    found = make_topk(teacher.model, top_k=3, temperature=0.5)(
        teacher.params, batch.sequences
    )
    mask = batch.sequences.response_mask
    last = np.concatenate([batch.sequences.tokens[:, 5:6], batch.sequences.targets], 1)
    expected = np.sort(log_softmax(table(1) / 0.5)[last[:, :-1][mask]], -1)[:, :-4:-1]
    np.testing.assert_allclose(found.log_probs[mask], expected, rtol=1e-4, atol=1e-5)
