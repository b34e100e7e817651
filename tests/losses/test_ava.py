"""AVA's terms from demonstrations and preferences, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import ava_demonstration, ava_preference, avril
from tests.tabular.bed import log_softmax

pytestmark = pytest.mark.usefixtures("x64")

LENGTHS = np.array([[4, 2], [1, 3]])


def arrays(*values):
    return tuple(jnp.asarray(value) for value in values)


def pairs(seed=0):
    """logits [2, 2, 4, 5]; actions, mean, log_std, mask [2, 2, 4]."""
    generator = np.random.default_rng(seed)
    logits = 2.0 * generator.normal(size=(2, 2, 4, 5))
    actions = generator.integers(0, 5, size=(2, 2, 4))
    mean, log_std = generator.normal(size=(2, 2, 2, 4)) * 0.5
    return logits, actions, mean, log_std, np.arange(4) < LENGTHS[..., None]


def taken(values, actions):
    return np.take_along_axis(values, actions[..., None], -1)[..., 0]


def softmax(logits):
    return np.exp(log_softmax(logits))


# Demonstrations


@pytest.mark.parametrize("drop_last", ["all_terms", "irl_only"])
@pytest.mark.parametrize("q_source", ["raw_logits", "q_head"])
def test_a_plain_q_makes_it_avril(q_source, drop_last):
    inputs = arrays(*pairs())
    options = {"gamma": 0.9, "beta": 0.7, "drop_last": drop_last}
    found = ava_demonstration(*inputs, q_source=q_source, **options)
    jax.tree.map(np.testing.assert_array_equal, found, avril(*inputs, **options))


@pytest.mark.parametrize(("q_source", "alpha"), [("log_probs", 1.7), ("prob", 10.0)])
def test_a_pretrained_policy_is_its_own_q(q_source, alpha):
    logits, actions, mean, log_std, mask = inputs = pairs()
    scores = logits if q_source == "log_probs" else softmax(logits)
    q_taken = taken(log_softmax(alpha * scores), actions)
    options = {"q_source": q_source, "alpha": alpha, "beta": 0.6, "gamma": 0.9}
    terms = ava_demonstration(*arrays(*inputs), **options)
    # beta stands before the log-softmax, not inside it.
    np.testing.assert_allclose(terms.nll, np.where(mask, -0.6 * q_taken, 0), rtol=1e-12)
    delta = q_taken[..., :-1] - 0.9 * q_taken[..., 1:]
    kept = mask[..., :-1] & mask[..., 1:]
    found = np.asarray(terms.delta)[..., :-1]
    np.testing.assert_allclose(found[kept], delta[kept], rtol=1e-12)
    score = (found - mean[..., :-1]) / np.exp(log_std[..., :-1])
    td = -0.5 * np.log(2 * np.pi) - log_std[..., :-1] - 0.5 * score**2
    found = np.asarray(terms.td_log_likelihood)[..., :-1]
    np.testing.assert_allclose(found[kept], td[kept], rtol=1e-12)


def test_log_probs_by_default_is_the_sft_loss_with_the_last_token():
    logits, actions, *_, mask = inputs = pairs()
    terms = ava_demonstration(*arrays(*inputs))
    sft = -taken(log_softmax(logits), actions)
    np.testing.assert_allclose(terms.nll, np.where(mask, sft, 0.0), rtol=1e-12)
    np.testing.assert_array_equal(terms.mask, mask)


def test_another_source_of_q_changes_the_temporal_difference_alone():
    """The ablation of the pretrained Q: raw logits where log-probs were."""
    logits, actions, *_, mask = inputs = pairs()
    plain = ava_preference(*arrays(*inputs), gamma=0.9)
    raw = ava_preference(*arrays(*inputs), gamma=0.9, q_source="raw_logits")
    for name in ("nll", "reject", "kl", "contrast"):
        one, other = getattr(raw, name), getattr(plain, name)
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
    shift = np.where(mask, np.log(np.exp(logits).sum(-1)), 0.0)
    moved = np.where(plain.transition_mask[..., :-1], 1.0, 0.0)
    moved = moved * (shift[..., :-1] - 0.9 * shift[..., 1:])
    found = (raw.delta - plain.delta)[..., :-1]
    np.testing.assert_allclose(found, moved, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("alpha", "implied"), [(1, 4.9e-5), (10, 0.139), (100, 1.0)])
def test_v1_the_softmax_of_probabilities_over_a_large_vocabulary(alpha, implied):
    vocabulary, p = 50257, 0.9
    probs = np.full((1, 1, vocabulary), (1 - p) / (vocabulary - 1))
    probs[0, 0, 7] = p
    one = np.zeros((1, 1))
    inputs = arrays(np.log(probs), np.full((1, 1), 7), one, one, np.ones((1, 1), bool))
    terms = ava_demonstration(*inputs, q_source="prob", alpha=float(alpha))
    assert np.exp(-float(terms.nll[0, 0])) == pytest.approx(implied, rel=1e-2)


def test_prob_spans_at_most_alpha_nats():
    logits, *rest = pairs()
    span = []
    for action in (logits.argmax(-1), logits.argmin(-1)):
        inputs = arrays(logits, action, *rest[1:3], np.ones((2, 2, 4), bool))
        span.append(ava_demonstration(*inputs, q_source="prob").nll)
    probs = softmax(logits)
    expected = probs.max(-1) - probs.min(-1)
    np.testing.assert_allclose(span[1] - span[0], expected, rtol=1e-10)


@pytest.mark.parametrize("q_source", ["log_probs", "prob", "raw_logits"])
def test_reward_weights_multiply_what_both_heads_say(q_source):
    logits, actions, mean, log_std, mask = inputs = pairs()
    weights = np.random.default_rng(4).uniform(0.2, 0.9, size=mask.shape)
    q_values = {
        "log_probs": log_softmax(logits),
        "prob": log_softmax(softmax(logits)),
        "raw_logits": logits,
    }[q_source] * weights[..., None]
    rest = arrays(actions, weights * mean, weights * log_std, mask)
    expected = avril(jnp.asarray(q_values), *rest, gamma=0.9, drop_last="irl_only")
    found = ava_demonstration(
        *arrays(*inputs),
        q_source=q_source,
        gamma=0.9,
        reward_weights=jnp.asarray(np.where(mask, weights, np.nan)),
    )
    for name in ("nll", "kl", "td_log_likelihood", "delta"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-10, atol=1e-14
        )


def test_weights_of_one_change_nothing():
    inputs = arrays(*pairs())
    ones = jnp.ones(inputs[-1].shape)
    for q_source in ("log_probs", "raw_logits"):
        found = ava_preference(*inputs, q_source=q_source, reward_weights=ones)
        plain = ava_preference(*inputs, q_source=q_source)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found, plain
        )


def test_impossible_tokens_and_padding_spoil_no_gradient():
    logits, actions, mean, log_std, mask = pairs()
    logits[np.arange(5) == (actions[..., None] + 1) % 5] = -np.inf
    weights = np.full(mask.shape, 0.5)
    floats = [logits, mean, log_std, weights]
    outside = [~mask.reshape(mask.shape + (1,) * (x.ndim - 3)) for x in floats]
    garbage = [np.where(o, np.nan, x) for o, x in zip(outside, floats, strict=True)]
    ids = np.where(mask, actions, -100)

    def total(logits, mean, log_std, weights, actions):
        terms = ava_preference(
            logits,
            jnp.asarray(actions),
            mean,
            log_std,
            jnp.asarray(mask),
            reward_weights=weights,
        )
        tokens = terms.nll + terms.reject + terms.kl - terms.td_log_likelihood
        return tokens.sum() - terms.contrast.sum()

    gradient = jax.value_and_grad(total, argnums=(0, 1, 2, 3))
    clean = gradient(*arrays(*floats), actions)
    dirty = gradient(*arrays(*garbage), ids)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dirty))
    for leaf, out in zip(dirty[1], outside, strict=True):
        assert not np.where(out, leaf, 0.0).any()


# Preferences


def test_terms_of_both_members():
    logits, actions, mean, log_std, mask = inputs = pairs()
    terms = ava_preference(*arrays(*inputs), beta=0.7, gamma=0.9)
    log_probs = np.where(mask, taken(log_softmax(logits), actions), 0.0)
    expected = -0.7 * log_probs
    np.testing.assert_allclose(terms.nll[:, 0], expected[:, 0], rtol=1e-12)
    np.testing.assert_allclose(terms.reject[:, 1], -expected[:, 1], rtol=1e-12)
    assert not np.asarray(terms.nll[:, 1]).any()
    assert not np.asarray(terms.reject[:, 0]).any()
    both = ava_demonstration(*arrays(*inputs), beta=0.7, gamma=0.9)
    np.testing.assert_array_equal(terms.kl, both.kl)
    np.testing.assert_array_equal(terms.td_log_likelihood, both.td_log_likelihood)
    last = np.take_along_axis(mean, LENGTHS[..., None] - 1, -1)[..., 0]
    gap = last[:, 0] - last[:, 1]
    np.testing.assert_allclose(terms.contrast, 1 / (1 + np.exp(-gap)), rtol=1e-12)


def test_contrast_is_a_sigmoid_antisymmetric_about_a_half():
    *inputs, mask = arrays(*pairs())
    swapped = [x[:, ::-1] for x in (*inputs, mask)]
    one = ava_preference(*inputs, mask).contrast
    other = ava_preference(*swapped).contrast
    np.testing.assert_allclose(one + other, 1.0, rtol=1e-12)
    assert ((one > 0) & (one < 1)).all()
    logits, actions, mean, log_std = inputs
    tie = ava_preference(logits, actions, jnp.zeros_like(mean), log_std, mask)
    np.testing.assert_array_equal(tie.contrast, [0.5, 0.5])

    def contrast(mean):
        return ava_preference(logits, actions, mean, log_std, mask).contrast.sum()

    # Only the last token of a response feels it, with slope c (1 - c), not 1 - c.
    found = np.asarray(jax.grad(contrast)(mean))
    expected = np.zeros(found.shape)
    for pair, member in np.ndindex(2, 2):
        slope = float(one[pair] * (1 - one[pair]))
        expected[pair, member, LENGTHS[pair, member] - 1] = (1 - 2 * member) * slope
    np.testing.assert_allclose(found, expected, atol=1e-15)


@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
def test_soft_labels_mix_both_orders(label):
    inputs = arrays(*pairs())
    swapped = [x[:, ::-1] for x in inputs]

    def summary(inputs, **options):
        terms = ava_preference(*inputs, **options)
        parts = (terms.nll, terms.reject, terms.kl, terms.td_log_likelihood)
        return np.array([*(float(x.sum()) for x in parts), float(terms.contrast.sum())])

    expected = label * summary(inputs) + (1 - label) * summary(swapped)
    found = summary(inputs, label=jnp.full(2, label))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    np.testing.assert_allclose(summary(inputs, label=label), expected, rtol=1e-10)


def rejection(log_prob, **options):
    """Cost and gradient of one rejected token of the given log-prob."""
    _, _, mean, log_std, mask = arrays(*pairs())
    others = np.full((2, 2, 4, 4), np.log(-np.expm1(log_prob) / 4))

    def cost(own):
        own = jnp.broadcast_to(own, (2, 2, 4, 1))
        logits = jnp.concatenate([own, jnp.asarray(others)], axis=-1)
        ids = jnp.zeros(mask.shape, int)
        terms = ava_preference(logits, ids, mean, log_std, mask, **options)
        return terms.reject[0, 1, 0]

    value, slope = jax.value_and_grad(cost)(jnp.asarray(log_prob))
    return float(value), float(slope)


def test_the_floor_ends_the_force_of_a_rejected_token():
    # d log p / d logit = 1 - p
    assert rejection(-3.0) == pytest.approx((-3.0, 1 - np.exp(-3.0)), rel=1e-9)
    assert rejection(-19.9) == pytest.approx((-19.9, 1.0), rel=1e-6)
    assert rejection(-20.1) == (-20.0, 0.0)
    assert rejection(-3.0, reject_floor=-2.0, beta=0.5) == (-1.0, 0.0)
    assert rejection(-30.0, reject_floor=None) == pytest.approx((-30.0, 1.0))


def test_the_other_rejections():
    p = np.exp(-1.2)
    found = rejection(-1.2, reject_term="log1mexp", beta=2.0)
    # -log(1 - p) has the slope p in the logit: it fades as p does.
    assert found == pytest.approx((-2 * np.log(1 - p), 2 * p), rel=1e-9)
    assert rejection(-1.2, reject_term="none") == (0.0, 0.0)


def test_an_empty_pair_is_nothing_even_with_a_nan_label():
    logits, actions, mean, log_std, mask = pairs()
    mask[1] = False
    label = jnp.asarray([1.0, jnp.nan])

    def total(mean, logits):
        terms = ava_preference(
            logits, *arrays(actions), mean, *arrays(log_std, mask), label=label
        )
        rows = (terms.nll + terms.reject + terms.kl - terms.td_log_likelihood).sum(-1)
        return rows.sum() + terms.contrast.sum(), (rows, terms.contrast)

    gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
    (to_mean, to_logits), (rows, contrast) = gradient(*arrays(mean, logits))
    assert not np.asarray(rows[1]).any()
    assert float(contrast[1]) == 0.0
    assert float(contrast[0]) > 0.0
    assert not np.asarray(to_mean[1]).any()
    assert not np.asarray(to_logits[1]).any()


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.0},
        {"beta": -1.0},
        {"gamma": 1.5},
        {"label": 1.2},
        {"reject_floor": 0.0},
        {"reject_term": "quadratic"},
        {"q_source": "logits"},
        {"drop_last": "never"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_domains_and_switches(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ava_preference(*arrays(*pairs()), **options)


def test_a_pair_has_two_members():
    with pytest.raises(AssertionError):
        ava_preference(*(x[:, :1] for x in arrays(*pairs())))


@pytest.mark.usefixtures("x64")
def test_log_probs_of_the_targets_are_all_that_is_read():
    """``taken`` is ``log_probs``: values of both losses, and slopes through them."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(3, 2, 4, 5))
    actions = rng.integers(0, 5, (3, 2, 4))
    mean, log_std = rng.normal(size=(2, 3, 2, 4))
    mask = np.arange(4) < rng.integers(0, 5, (3, 2, 1))

    def rows(logits, q_source):
        outputs = jnp.asarray(logits)
        if q_source == "taken":
            log_probs = jax.nn.log_softmax(1.3 * outputs)
            outputs = jnp.take_along_axis(log_probs, actions[..., None], axis=-1)
        alone = ava_demonstration(
            outputs,
            actions,
            mean,
            log_std,
            mask,
            q_source=q_source,
            alpha=1.3,
            beta=2.0,
        )
        paired = ava_preference(
            outputs, actions, mean, log_std, mask, q_source=q_source, alpha=1.3
        )
        return [x for x in (*alone, *paired) if x.dtype != bool]

    compare = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    jax.tree.map(compare, rows(logits, "taken"), rows(logits, "log_probs"))
    slopes = [
        jax.grad(lambda x, q=q: sum(jnp.sum(jnp.sin(y)) for y in rows(x, q)))(logits)
        for q in ("taken", "log_probs")
    ]
    compare(*slopes)
    with pytest.raises(ValueError, match='q_source="taken" has those of the targets'):
        ava_demonstration(
            jnp.zeros((3, 2, 4, 1)),
            actions,
            mean,
            log_std,
            mask,
            q_source="taken",
            reward_weights=jnp.ones((3, 2, 4)),
        )
