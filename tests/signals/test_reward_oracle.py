"""Reward models as oracles, on a trunk whose states say which byte was read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.data.tokenize import RESPONSE_CUT, TokenizeConfig
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.models.heads import RewardModel, ScalarHead
from rkd_jax.signals.oracles import LabelReport, OracleError, label_preferences, score
from rkd_jax.signals.reward_oracle import RewardModelOracle, make_return_scorer
from rkd_jax.types import Sequences

TOKENIZER = byte_tokenizer()
SIZE = TOKENIZER.vocab_size
ROWS = TokenizeConfig(max_prompt=4, max_response=8, response_buckets=(4, 8))
PROMPTS = ["p", "qqqq", "r", "s", "t"]
TEXTS = ["z", "abz", "zzzz", "hello", "aaaaaaaaaaaa"]  # the last one is cut at 8 bytes


@dataclasses.dataclass(frozen=True)
class BytesConfig:
    vocab_size: int = SIZE
    hidden_size: int = SIZE
    max_length: int = 64
    num_layers: int = 1


class Bytes:
    """The state after a byte is its one-hot, times a scale; counts what is traced."""

    config = BytesConfig()

    def __init__(self):
        self.shapes = []

    def hidden(self, params, tokens, *, positions=None, segment_ids=None):
        del positions, segment_ids
        self.shapes.append(tokens.shape)
        return params["scale"] * jax.nn.one_hot(tokens, SIZE)


def values(k=0):
    """What every byte, and the end of text, is worth to member k."""
    table = np.random.default_rng(k).normal(size=SIZE).astype(np.float32)
    table[ord("z")] = 3.0
    return table


def params(*members, scale=1.0):
    kernel = np.stack([values(k) for k in members])[..., None]
    output = {"kernel": kernel, "bias": np.zeros((len(members), 1), np.float32)}
    return {"trunk": {"scale": jnp.float32(scale)}, "head": {"output": output}}


def one(tree):
    """The only member's parameters."""
    head = jax.tree.map(lambda x: x[0], tree["head"])
    return {"trunk": tree["trunk"], "head": head}


def worth(text, k=0):
    """By hand: the bytes' values, and the end's where the text was not cut."""
    ids = [*text.encode(), TOKENIZER.eos_id][: ROWS.max_response]
    return values(k).astype(np.float64)[ids].sum()


def make(tree, credit="token_rewards", **kwargs):
    model = RewardModel(Bytes(), ScalarHead())
    reward = getattr(model, credit)
    kwargs.setdefault("batch_size", 2)
    return model.trunk, RewardModelOracle(reward, tree, TOKENIZER, ROWS, **kwargs)


def test_rewards_are_the_texts_worth_in_order_one_compilation_per_bucket():
    trunk, oracle = make(one(params(0)))
    expected = [worth(text) for text in TEXTS]
    np.testing.assert_allclose(score(oracle, PROMPTS, TEXTS), expected, rtol=1e-5)
    assert trunk.shapes == [(2, 8), (2, 12)]
    assert oracle.rewards(PROMPTS[:3], TEXTS[:3]).shape == (3, 1)
    assert len(trunk.shapes) == 2  # other numbers of texts compile nothing
    assert oracle.report.counts == {RESPONSE_CUT: 1}


def test_a_reward_depends_on_no_other_text():
    _, oracle = make(one(params(0)), batch_size=3)
    together = oracle(PROMPTS, TEXTS)
    apart = [oracle([p], [t])[0] for p, t in zip(PROMPTS, TEXTS, strict=True)]
    np.testing.assert_array_equal(together, apart)


def test_a_sequence_reward_is_read_after_the_last_target():
    _, oracle = make(one(params(0)), credit="sequence_rewards")
    end, last = values()[TOKENIZER.eos_id], values()[ord("a")]
    found = oracle(PROMPTS[3:], TEXTS[3:])
    np.testing.assert_allclose(found, [end, last], rtol=1e-6)


def test_a_discount_counts_response_tokens():
    _, oracle = make(one(params(0)), gamma=0.5)
    a, b, z, end = values()[[*b"abz", TOKENIZER.eos_id]]
    expected = a + b / 2 + z / 4 + end / 8
    np.testing.assert_allclose(oracle(["p"], ["abz"]), [expected], rtol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "min"])
def test_k_heads_on_one_trunk_give_k_rewards(reduce):
    trunk, oracle = make(
        params(0, 1, 2), member_axes={"trunk": None, "head": 0}, reduce=reduce
    )
    expected = np.array([[worth(text, k) for k in range(3)] for text in TEXTS])
    np.testing.assert_allclose(oracle.rewards(PROMPTS, TEXTS), expected, rtol=1e-5)
    reduced = getattr(expected, reduce)(axis=1)
    np.testing.assert_allclose(oracle(PROMPTS, TEXTS), reduced, rtol=1e-5)
    assert trunk.shapes == [(2, 8), (2, 12)]  # not once per member


def test_k_whole_models_give_k_rewards():
    stacked = params(0, 1)
    stacked["trunk"] = {"scale": jnp.array([1.0, -2.0])}
    _, oracle = make(stacked, member_axes=0)
    expected = np.array([[worth(t, 0), -2 * worth(t, 1)] for t in TEXTS])
    np.testing.assert_allclose(oracle.rewards(PROMPTS, TEXTS), expected, rtol=1e-5)


def test_the_scorer_gives_pairs_the_shape_of_an_ensemble_signal_and_no_gradient():
    tokens = np.array([[[0, 5, 7, 9], [0, 5, 8, 0]]], np.int32)
    mask = np.array([[[1, 1], [1, 0]]], bool)
    token_mask = np.array([[[0, 1, 1, 1], [0, 1, 1, 0]]], bool)
    pairs = Sequences(*map(jnp.asarray, (tokens, token_mask, mask)))
    model = RewardModel(Bytes(), ScalarHead())
    axes = {"trunk": None, "head": 0}
    returns = make_return_scorer(model.token_rewards, member_axes=axes)
    found = returns(params(0, 1), pairs)
    expected = [
        [values(k)[[7, 9]].sum() for k in range(2)],
        [values(k)[8] for k in range(2)],
    ]
    np.testing.assert_allclose(found, [expected], rtol=1e-6)
    gradient = jax.grad(lambda p: returns(p, pairs).sum())(params(0, 1))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_it_labels_pairs_like_any_oracle():
    """Empty answers included: they are scored, as an end of text, and then counted."""
    _, oracle = make(one(params(0)))
    first, second = ["z", "aaa", "same", " ", "zz"], ["zzz", "azz", "same", "z", "b"]
    records, report = label_preferences(oracle, PROMPTS, first, second)
    assert report == LabelReport(
        kept=3, ties_dropped=0, ties_halved=0, identical=1, empty=1
    )
    assert [(r.chosen, r.rejected) for r in records] == [
        ("zzz", "z"),
        ("azz", "aaa"),
        ("zz", "b"),
    ]
    for record in records:
        assert record.chosen_reward == pytest.approx(worth(record.chosen), rel=1e-5)
        assert record.rejected_reward == pytest.approx(worth(record.rejected), rel=1e-5)
    np.testing.assert_allclose(oracle(["p"], [""]), [worth("")], rtol=1e-6)


def test_nothing_to_score_and_wrong_arguments():
    trunk, oracle = make(one(params(0)))
    assert oracle([], []).shape == (0,)
    assert not trunk.shapes
    with pytest.raises(OracleError, match="2 prompts for 1 responses"):
        oracle(["p", "q"], ["a"])
    with pytest.raises(ValueError, match="'mean' or 'min', not 'max'"):
        make(one(params(0)), reduce="max")
    with pytest.raises(ValueError, match="batch_size=0"):
        make(one(params(0)), batch_size=0)
