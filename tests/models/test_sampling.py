"""The sampler against exact distributions, fresh forwards and its own promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import stats

from rkd_jax.models.api import response_logits
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.sampling import SamplingConfig, make_sampler, tempered
from rkd_jax.types import Prompts


@dataclasses.dataclass(frozen=True)
class _BigramConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int = 0
    max_length: int = 64
    logit_softcap: float | None = None


class Bigram:
    """Logits of the next token are a row of a table; it counts traces and steps."""

    def __init__(self, vocab_size):
        self.config = _BigramConfig(vocab_size, vocab_size)
        self.traces = 0
        self.steps = 0

    def _count_step(self):
        self.steps += 1

    def hidden(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        self.traces += 1
        jax.debug.callback(self._count_step)
        hidden = jax.nn.one_hot(tokens, self.config.vocab_size)
        return hidden, cache + tokens.shape[1]

    def unembed(self, params, hidden):
        return hidden @ params

    def init_cache(self, params, batch_size, length):
        return jnp.zeros(batch_size, jnp.int32)


TABLE = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)


def _log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def _prompts(rows, width=None):
    """Left-padded prompts from lists of tokens."""
    width = width or max(len(row) for row in rows)
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return Prompts(jnp.asarray(tokens), jnp.asarray(mask, bool))


def _bigram_samples(config, rows=((3,),), table=TABLE, seed=1):
    sample = make_sampler(Bigram(table.shape[0]), config)
    return sample(jnp.asarray(table), _prompts(rows), jax.random.key(seed))


@pytest.fixture(scope="module")
def decoder():
    config = DecoderConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_length=32,
    )
    model = Decoder(config)
    params = model.init(jax.random.key(0))
    # Sharper than at initialisation, so that a wrong cache or position shows.
    return model, jax.tree.map(lambda x: x * 3.0, params)


UNEQUAL = [[5, 6, 7, 8, 9], [10, 11], [12]]


@pytest.fixture(scope="module")
def decoder_samples(decoder):
    model, params = decoder
    config = SamplingConfig(
        max_new_tokens=6, temperature=0.8, top_k=8, eos_ids=(1, 2), samples_per_prompt=3
    )
    return make_sampler(model, config)(params, _prompts(UNEQUAL), jax.random.key(7))


@pytest.fixture(scope="module")
def forward(decoder):
    """Logits of the responses by one forward over whole rows, without a cache."""
    model, params = decoder
    return jax.jit(lambda sequences: response_logits(model, params, sequences))


@pytest.fixture(scope="module")
def greedy(decoder):
    """Prompts -> greedy samples."""
    model, params = decoder
    config = SamplingConfig(6, temperature=0.0, samples_per_prompt=3)
    sample = make_sampler(model, config)
    return lambda prompts: sample(params, prompts, jax.random.key(0))


def test_two_columns_follow_the_exact_joint_distribution():
    config = SamplingConfig(max_new_tokens=2, temperature=0.7, samples_per_prompt=6000)
    tokens = np.asarray(_bigram_samples(config).sequences.targets)[0]
    step = np.exp(_log_softmax(TABLE / 0.7))
    expected = (step[3][:, None] * step).ravel() * len(tokens)
    observed = np.bincount(tokens[:, 0] * 6 + tokens[:, 1], minlength=36)
    assert expected.min() > 1  # cells are full enough for the approximation
    statistic = np.sum((observed - expected) ** 2 / expected)
    assert statistic < stats.chi2.ppf(0.999, 35)


def test_truncated_support_and_both_log_probs():
    config = SamplingConfig(
        1, temperature=1.5, top_k=4, top_p=0.7, samples_per_prompt=500
    )
    samples = _bigram_samples(config)
    own = _log_softmax(TABLE[3] / 1.5)
    order = np.argsort(-own)
    kept = order[:4]
    mass = np.cumsum(np.exp(own[kept])) / np.sum(np.exp(own[kept]))
    kept = kept[: 1 + np.sum(mass < 0.7)]
    behaviour = own - np.log(np.sum(np.exp(own[kept])))
    assert len(kept) == 3  # both rules cut something
    tokens = np.asarray(samples.sequences.targets).ravel()
    assert set(tokens) == set(kept)
    np.testing.assert_allclose(samples.log_probs.ravel(), own[tokens], atol=1e-5)
    np.testing.assert_allclose(
        samples.behaviour_log_probs.ravel(), behaviour[tokens], atol=1e-5
    )


def test_greedy_takes_the_argmax_at_temperature_one():
    samples = _bigram_samples(SamplingConfig(5, temperature=0.0), rows=[[3], [0, 4]])
    for row, token in enumerate((3, 4)):
        for column in range(5):
            best = int(np.argmax(TABLE[token]))
            assert samples.sequences.targets[row, 0, column] == best
            np.testing.assert_allclose(
                samples.log_probs[row, 0, column],
                _log_softmax(TABLE[token])[best],
                atol=1e-5,
            )
            token = best
    assert not np.any(samples.behaviour_log_probs)
    assert not np.any(samples.ended)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-9, 1e-20, 1e-44])
def test_the_colder_the_nearer_to_greedy(temperature):
    """To the last bit of the largest logit, compiled as users compile it."""
    logits = np.random.default_rng(0).normal(scale=8.0, size=(64, 50))
    logits = jnp.asarray(logits, jnp.float32)
    policy = jax.jit(functools.partial(tempered, temperature=temperature))(logits)
    assert (policy.scaled.max(-1) == 0.0).all()
    np.testing.assert_array_equal(policy.scaled.argmax(-1), logits.argmax(-1))
    wide = np.asarray(logits, np.float64)
    expected = wide - wide.max(-1, keepdims=True)
    if temperature > 1e-30:
        np.testing.assert_allclose(policy.scaled, expected / temperature, rtol=1e-6)
    tokens = make_sampler(Bigram(6), SamplingConfig(4, temperature=temperature))(
        jnp.asarray(TABLE), _prompts([[1], [2]]), jax.random.key(0)
    )
    greedy = make_sampler(Bigram(6), SamplingConfig(4, temperature=0.0))(
        jnp.asarray(TABLE), _prompts([[1], [2]]), jax.random.key(0)
    )
    np.testing.assert_array_equal(tokens.sequences.tokens, greedy.sequences.tokens)
    if temperature < 1e-3:
        np.testing.assert_allclose(tokens.log_probs, 0.0, atol=1e-6)


def test_log_probs_equal_a_fresh_forward(forward, decoder_samples):
    sequences = decoder_samples.sequences
    assert sequences.tokens.shape == (3, 3, 11)
    logits = np.asarray(forward(sequences), np.float64) / 0.8
    mask, targets = np.asarray(sequences.response_mask), np.asarray(sequences.targets)
    own = np.take_along_axis(_log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        np.where(mask, own, 0.0), decoder_samples.log_probs, atol=1e-4
    )
    cut = np.sort(logits, axis=-1)[..., -8, None]  # the eighth largest logit
    inside = np.where(logits >= cut, np.exp(logits), 0.0)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    behaviour = chosen - np.log(np.sum(inside, axis=-1))
    np.testing.assert_allclose(
        np.where(mask, behaviour, 0.0), decoder_samples.behaviour_log_probs, atol=1e-4
    )


def test_layout_of_the_result(decoder_samples):
    sequences = decoder_samples.sequences
    mask, tokens = np.asarray(sequences.response_mask), np.asarray(sequences.targets)
    prompts = _prompts(UNEQUAL)
    for sample in range(3):
        np.testing.assert_array_equal(sequences.tokens[:, sample, :5], prompts.tokens)
        np.testing.assert_array_equal(sequences.token_mask[:, sample, :5], prompts.mask)
    np.testing.assert_array_equal(sequences.token_mask[..., 5:], mask)
    eos = np.isin(tokens, (1, 2)) & mask
    before = np.cumsum(eos, axis=-1) - eos
    np.testing.assert_array_equal(mask, before == 0)
    np.testing.assert_array_equal(decoder_samples.ended, eos.any(-1))
    assert eos.any()
    assert not eos.any(-1).all()  # otherwise this test sees one case only
    assert not tokens[~mask].any()


def test_greedy_with_cache_equals_greedy_without(forward, greedy):
    sequences = greedy(_prompts(UNEQUAL)).sequences
    best = np.argmax(forward(sequences), axis=-1)
    np.testing.assert_array_equal(sequences.targets, best)


def test_right_padded_prompts_and_holes_are_rolled_left(greedy):
    left = _prompts(UNEQUAL)
    order = np.array([[0, 1, 2, 3, 4], [3, 0, 4, 1, 2], [4, 0, 1, 2, 3]])
    other = jax.tree.map(lambda x: jnp.take_along_axis(x, order, axis=1), left)
    assert other.mask.tolist()[1:] == [[1, 0, 1, 0, 0], [1, 0, 0, 0, 0]]
    jax.tree.map(np.testing.assert_array_equal, greedy(left), greedy(other))


def test_eos_at_the_first_token_stops_everything():
    table = np.full((6, 6), -1e9, np.float32)
    table[:, 4] = 0.0  # whatever came before, 4 follows
    model = Bigram(6)
    sample = make_sampler(model, SamplingConfig(8, eos_ids=(5, 4)))
    samples = sample(jnp.asarray(table), _prompts([[1], [2, 3]]), jax.random.key(0))
    jax.effects_barrier()
    assert model.steps == 1  # the prefill; the loop never ran
    assert samples.sequences.targets.tolist() == [[[4] + [0] * 7]] * 2
    assert samples.sequences.response_mask.tolist() == [[[True] + [False] * 7]] * 2
    assert samples.ended.tolist() == [[True]] * 2
    assert not np.any(samples.log_probs)


def test_rows_end_one_by_one_and_token_zero_may_be_eos():
    table = np.full((6, 6), -1e9, np.float32)
    for token, follower in ((1, 2), (2, 3), (3, 0), (0, 5), (5, 5)):
        table[token, follower] = 0.0
    model = Bigram(6)
    sample = make_sampler(model, SamplingConfig(6, eos_ids=(0,)))
    samples = sample(jnp.asarray(table), _prompts([[1], [3], [5]]), jax.random.key(0))
    assert samples.sequences.targets[:, 0].tolist() == [
        [2, 3, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [5, 5, 5, 5, 5, 5],
    ]
    assert np.sum(samples.sequences.response_mask, -1).ravel().tolist() == [3, 1, 6]
    assert samples.ended.ravel().tolist() == [True, True, False]


def test_a_draw_depends_on_neither_batch_nor_group_size():
    rows = [[3], [1, 2], [5]]
    many = _bigram_samples(SamplingConfig(5, samples_per_prompt=4), rows=rows)
    few = _bigram_samples(SamplingConfig(5, samples_per_prompt=2), rows=rows[:2])
    np.testing.assert_array_equal(many.sequences.targets[:2, :2], few.sequences.targets)
    streams = np.asarray(many.sequences.targets).reshape(12, 5)
    assert len({tuple(s) for s in streams}) > 6  # and they are streams of their own


def test_r30_one_compilation_per_shape():
    model = Bigram(6)
    sample = make_sampler(model, SamplingConfig(4))
    table = jnp.asarray(TABLE)
    counts = []
    for seed, rows in enumerate([[[3], [1]], [[2], [5]], [[0], [4]], [[3], [1], [2]]]):
        sample(table * (seed + 1), _prompts(rows), jax.random.key(seed))
        counts.append(model.traces)
    assert counts[0] == counts[1] == counts[2]
    assert counts[3] == 2 * counts[0]


def test_a_batch_spread_over_devices_gives_the_same_samples():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = [[i % 6, (3 * i) % 6] for i in range(jax.device_count())]
    prompts = _prompts(rows)
    sample = make_sampler(Bigram(6), SamplingConfig(5))
    spread = jax.device_put(prompts, NamedSharding(mesh, PartitionSpec("data")))
    table = jax.device_put(TABLE, NamedSharding(mesh, PartitionSpec()))
    here = sample(jnp.asarray(TABLE), prompts, jax.random.key(3))
    there = sample(table, spread, jax.random.key(3))
    np.testing.assert_array_equal(here.sequences.tokens, there.sequences.tokens)
    np.testing.assert_allclose(here.log_probs, there.log_probs, atol=1e-6)


def test_sampling_inside_a_differentiated_function_is_constant():
    sample = make_sampler(Bigram(6), SamplingConfig(3))

    @jax.jit
    def total(table):
        samples = sample(table, _prompts([[3]]), jax.random.key(0))
        return jnp.sum(samples.log_probs) + jnp.sum(jnp.square(table))

    table = jnp.asarray(TABLE)
    np.testing.assert_allclose(jax.grad(total)(table), 2 * TABLE, rtol=1e-6)


def test_keys_of_both_styles_draw_the_same():
    sample, table = make_sampler(Bigram(6), SamplingConfig(5)), jnp.asarray(TABLE)
    found, expected = (
        sample(table, _prompts([[3], [1, 2]]), key)
        for key in (jax.random.PRNGKey(7), jax.random.key(7))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        ({"eos_ids": 5}, "eos_ids must be several ids, got 5"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_bad_configurations_are_named(field, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**({"max_new_tokens": 1} | field))


def test_bad_prompts_are_named():
    model = Bigram(6)
    with pytest.raises(ValueError, match=r"eos_ids \[6\]"):
        make_sampler(model, SamplingConfig(1, eos_ids=(2, 6)))
    sample = make_sampler(model, SamplingConfig(60))
    table, key = jnp.asarray(TABLE), jax.random.key(0)
    with pytest.raises(ValueError, match="context of 64"):
        sample(table, _prompts([[1] * 5]), key)
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        sample(table, _prompts([[1], []]), key)
    with pytest.raises(ValueError, match="there is no prompt in the batch"):
        sample(table, Prompts(jnp.zeros((0, 3), int), jnp.zeros((0, 3), bool)), key)
    with pytest.raises(ValueError, match=r"\[B, P\]"):
        sample(table, Prompts(jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3), bool)), key)
    with pytest.raises(ValueError, match=r"\[B, P\]"):
        sample(table, Prompts(jnp.zeros((2, 3)), jnp.ones((2, 1), bool)), key)
