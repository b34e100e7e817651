"""What every loss must satisfy, one table for all of them (G1, G2, G3, G6, G7, U6).

A case maps (x, y, mask) to one number per row: x is what the loss trains, y is data.
Losses that take no mask have their inputs filled, as the objectives do it.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rkd_jax import losses
from rkd_jax.losses import bradley_terry, confidence_slack, trajectory_return
from rkd_jax.masking import fill_masked, sequence_mean, sequence_sum
from rkd_jax.types import Pair

pytestmark = pytest.mark.usefixtures("x64")

ROWS, PAIR, STEPS, VOCABULARY = 3, 2, 4, 5


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    rows: Callable  # (x, y, mask) -> [B]
    kind: str  # "logits": x [B, T, V]; "pair": x [B, 2, T]
    data: str = "float"  # what y is: "float" like x, "tokens", "topk" or "none"
    numeric: bool = True  # the value's derivative is the gradient

    def __repr__(self):
        return self.name


def divergence(name, **options):
    def rows(x, y, mask):
        loss = partial(getattr(losses, name), **options)
        return sequence_sum(loss(fill_masked(x, mask), fill_masked(y, mask)), mask)

    label = ",".join([name, *(f"{k}={v}" for k, v in options.items())])
    return Case(label, rows, "logits")


def topk(loss):
    def rows(x, y, mask):
        ids, log_probs = (fill_masked(part, mask) for part in y)
        return sequence_sum(loss(fill_masked(x, mask), ids, log_probs), mask)

    return rows


def likelihood(x, y, mask):
    return sequence_sum(losses.token_log_probs(fill_masked(x, mask), y), mask)


def per_pair(values, mask):
    """A pair without any token is padding: its constant loss is dropped as well."""
    return fill_masked(values, mask.any((-1, -2)))


def members(values):
    return Pair(values[:, 0], values[:, 1])


def with_reference(loss, reduce):
    def rows(x, y, mask):
        student, reference = (members(reduce(z, mask)) for z in (x, y))
        return per_pair(loss(student, reference), mask)

    return rows


def tvkd(x, y, mask):
    """y is the reference's log-probs, and its own stand-in for a teacher's values."""
    student, reference = (members(sequence_sum(z, mask)) for z in (x, y))
    shaping = members(losses.potential_shaping(y, mask, gamma=0.7))
    return per_pair(losses.tvkd(student, reference, shaping, alpha=0.6), mask)


def buckets(x, y, mask):
    """The entropy over the buckets, and the log-prob of the likeliest of them."""
    ids = fill_masked(y[0], mask)
    merged = losses.bucket_log_probs(fill_masked(x, mask), ids)
    picked = losses.target_bucket_log_probs(merged, ids, ids[..., 0])
    return sequence_sum(picked + losses.bucket_entropy(merged), mask)


def release(x, y, mask):
    sums = losses.tvkd_release.ReleaseSums(
        student=sequence_sum(x, mask),
        reference=sequence_sum(y, mask),
        next_values=losses.next_value_sum(y, mask, terminal="last_prefix"),
    )
    returns = losses.release_return(sums, variant="tpkd_ref", gamma=0.7, beta=0.5)
    return per_pair(bradley_terry(members(returns)), mask)


def simpo(x, y, mask):
    return per_pair(losses.simpo(members(sequence_mean(x, mask))), mask)


def distillation(x, y, mask):
    """y is the reference, and two reward models."""
    student, reference = (members(sequence_sum(z, mask)) for z in (x, y))
    rewards = Pair(*(jnp.stack([2.0 * r, jnp.sin(r)]) for r in reference))
    values = losses.reward_distillation(student, reference, rewards, beta=0.4)
    return per_pair(values[0] + values[1], mask)


def drdo(x, y, mask):
    """x is log-probs, negative, and a reward; y is the oracle."""
    x = -jnp.square(fill_masked(x, mask))
    terms = losses.drdo(
        members(sequence_mean(x, mask)),
        members(sequence_sum(jnp.cos(x), mask)),
        members(sequence_sum(y, mask)),
    )
    return per_pair(sum(terms), mask)


def comparison(rewards, mask):
    return bradley_terry(members(trajectory_return(rewards, mask)), label=0.8)


def slack(x, y, mask):
    values = confidence_slack(comparison(x, mask), comparison(y, mask), epsilon=0.1)
    return per_pair(values, mask)


def reward_player(x, y, mask):
    returns = members(trajectory_return(x, mask, gamma=0.9))
    gap = losses.reward_gap(returns.chosen, returns.rejected)
    return losses.reward_player_loss(gap, slack(x, y, mask), jnp.float64(1.7))


def weighted(function):
    """Per-token outputs, weighted so that their sum is no trivial constant."""

    def rows(x, y, mask):
        values = function(x, mask)
        each = jnp.cos(jnp.arange(values.shape[-1], dtype=values.dtype))
        difference = values[:, 0] - 0.5 * values[:, 1]
        return jnp.sum(difference * jnp.expand_dims(each, 0), axis=1)

    return rows


def leave_one_out(x, y, mask):
    return losses.leave_one_out(trajectory_return(x, mask))[:, 0]


def some_tokens(mask):
    """As responses: which ones does not matter here."""
    return jnp.broadcast_to(jnp.arange(mask.shape[-1]) % VOCABULARY, mask.shape)


def sampled_sequences(x, y, mask):
    tokens = some_tokens(mask)
    return sequence_sum(losses.sequence_reverse_kl(x, y, tokens, mask), mask)


def soft_value(x, y, mask):
    return sequence_sum(losses.soft_value(fill_masked(x, mask), power=0.7), mask)


def imitated(terms):
    regularizer = terms.kl - 0.5 * terms.td_log_likelihood
    return jnp.sum(terms.nll + regularizer, axis=-1)


def avril(x, y, mask):
    """Two columns of x are the posterior as well; y is the actions."""
    posterior = x[..., 0], 0.3 * x[..., 1]
    terms = losses.avril(x, y, *posterior, mask, gamma=0.9, terminal="anchor")
    return imitated(terms)


def ava_demonstration(x, y, mask):
    posterior = x[..., 0], 0.3 * x[..., 1]
    return imitated(losses.ava_demonstration(x, y, *posterior, mask, alpha=1.3))


def ava_preference(x, y, mask):
    logits = jnp.stack([x, jnp.sin(fill_masked(x, mask)), -x], axis=-1)
    tokens = jnp.broadcast_to(jnp.arange(mask.shape[-1]) % 3, mask.shape)
    terms = losses.ava_preference(logits, tokens, x, 0.3 * x, mask, label=0.8)
    return jnp.sum(imitated(terms) + jnp.sum(terms.reject, -1), -1) - terms.contrast


def regularizer(x, y, mask):
    """y is the teacher."""
    options = {"next_value": "expected", "teacher_log_probs": jax.nn.log_softmax(y)}
    heads = x, some_tokens(mask), x[..., 0], 0.3 * x[..., 1]
    terms = losses.experiential_regularizer(*heads, mask, **options)
    return jnp.sum(terms.loss, axis=-1)


def surrogate(loss):
    return lambda x, y, mask: jnp.sum(loss(x, y, mask), axis=(1, 2))


topk_jsd = partial(losses.topk_divergence, divergence=losses.generalized_jsd)
to_go = weighted(partial(losses.reward_to_go, gamma=0.9))
per_step = weighted(losses.leave_one_out_per_step)

CASES = [
    divergence("forward_kl"),
    divergence("forward_kl", temperature=2.0),
    divergence("reverse_kl"),
    divergence("generalized_jsd", beta=0.3),
    divergence("skew_forward_kl", alpha=0.2),
    divergence("skew_reverse_kl", alpha=0.2),
    divergence("total_variation"),
    Case("topk_forward_kl", topk(losses.topk_forward_kl), "logits", "topk"),
    Case("topk_divergence", topk(topk_jsd), "logits", "topk"),
    Case("token_log_probs", likelihood, "logits", "tokens"),
    Case("dpo", with_reference(losses.dpo, sequence_sum), "pair"),
    Case("ipo", with_reference(losses.ipo, sequence_mean), "pair"),
    Case("simpo", simpo, "pair", "none"),
    Case("reward_distillation", distillation, "pair"),
    Case("drdo", drdo, "pair"),
    Case("tvkd", tvkd, "pair"),
    Case("avril", avril, "logits", "tokens"),
    Case("ava_demonstration", ava_demonstration, "logits", "tokens"),
    Case("ava_preference", ava_preference, "pair", "none"),
    Case("experiential_regularizer", regularizer, "logits"),
    Case("release_return", release, "pair"),
    Case("bucket_log_probs", buckets, "logits", "topk"),
    Case(
        "potential_shaping",
        lambda x, y, mask: losses.potential_shaping(x, mask, gamma=0.7)[:, 0],
        "pair",
        "none",
    ),
    Case(
        "bradley_terry",
        lambda x, y, mask: per_pair(comparison(x, mask), mask),
        "pair",
        "none",
    ),
    Case("confidence_slack", slack, "pair"),
    Case("reward_player_loss", reward_player, "pair"),
    Case(
        "trajectory_return",
        lambda x, y, mask: trajectory_return(x, mask, gamma=0.9)[:, 0],
        "pair",
        "none",
    ),
    Case("reward_to_go", to_go, "pair", "none"),
    Case("leave_one_out", leave_one_out, "pair", "none"),
    Case("leave_one_out_per_step", per_step, "pair", "none"),
    Case("reinforce", surrogate(partial(losses.reinforce, gamma=0.9)), "pair"),
    # Its value holds a detached copy of x, so the gradient is not its derivative; the
    # tabular bed checks it against the true divergence.
    Case(
        "on_policy_distillation",
        surrogate(partial(losses.on_policy_distillation, gamma=0.9)),
        "pair",
        numeric=False,
    ),
    # Here the value is that of the single-step part alone.
    Case("sequence_reverse_kl", sampled_sequences, "logits", numeric=False),
    Case("soft_value", soft_value, "logits", "none"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=repr)


def inputs(case, dtype=np.float64):
    """x, y, and a mask of ragged responses, none of them empty."""
    generator = np.random.default_rng(3)
    lengths = np.array([[4, 2], [1, 3], [3, 4]])
    if case.kind == "logits":
        shape, lengths = (ROWS, STEPS, VOCABULARY), lengths[:, 0]
    else:
        shape = (ROWS, PAIR, STEPS)
    mask = np.arange(STEPS) < lengths[..., None]
    x, y = generator.normal(size=(2, *shape)).astype(dtype)
    if case.data == "tokens":
        y = np.argmax(y, axis=-1)
    if case.data == "topk":
        ids = np.argsort(-y, axis=-1)[..., :2]
        log_probs = y - np.log(np.exp(y).sum(-1, keepdims=True))
        y = (ids, np.take_along_axis(log_probs, ids, -1))
    return x, None if case.data == "none" else y, mask


def poison(tree, mask):
    """Garbage, in rotation, wherever the mask is not set."""

    def replace(leaf):
        integer = np.issubdtype(leaf.dtype, np.integer)
        garbage = [-100, 10**6] if integer else [np.nan, np.inf, -np.inf, 1e30]
        outside = ~mask.reshape(mask.shape + (1,) * (leaf.ndim - mask.ndim))
        return np.where(outside, np.resize(garbage, leaf.shape), leaf)

    return jax.tree.map(replace, tree)


@functools.cache
def compiled(case):
    """Jitted (x, y, mask) -> rows, gradients of their sum in x and y."""

    def total(x, y, mask):
        rows = case.rows(x, y, mask)
        return jnp.sum(rows), rows

    gradients = jax.grad(total, argnums=(0, 1), has_aux=True, allow_int=True)

    @jax.jit
    def evaluate(x, y, mask):
        (in_x, in_y), rows = gradients(x, y, mask)
        integer = jax.tree.map(lambda leaf: leaf.dtype == jax.dtypes.float0, in_y)
        in_y = jax.tree.map(lambda leaf, i: None if i else leaf, in_y, integer)
        return rows, in_x, in_y

    return lambda x, y, mask: jax.tree.map(np.asarray, evaluate(x, y, mask))


def padded(case, x, y, mask):
    """Two more columns, and garbage in all that the mask excludes."""
    axis = mask.ndim - 1

    def widen(leaf):
        width = [(0, 2 if i == axis else 0) for i in range(leaf.ndim)]
        return np.pad(leaf, width)

    x, y, mask = jax.tree.map(widen, (x, y, mask))
    return poison(x, mask), poison(y, mask), mask


@each_case
def test_g1_g3_padding_changes_nothing_and_data_gets_no_gradient(case):
    x, y, mask = inputs(case)
    rows, in_x, in_y = compiled(case)(x, y, mask)
    padded_rows, padded_in_x, _ = compiled(case)(*padded(case, x, y, mask))

    np.testing.assert_allclose(padded_rows, rows, rtol=1e-12)
    kept, added = np.split(padded_in_x, [STEPS], axis=mask.ndim - 1)
    np.testing.assert_allclose(kept, in_x, rtol=1e-12)
    np.testing.assert_array_equal(added, np.zeros(added.shape))
    assert np.abs(in_x).max() > 1e-3
    for leaf in jax.tree.leaves(in_y):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


@each_case
def test_g2_an_empty_row_gives_zero_and_zero_gradient(case):
    x, y, mask = inputs(case)
    mask[1] = False
    rows, in_x, _ = compiled(case)(*padded(case, x, y, mask))
    assert rows[1] == 0.0
    np.testing.assert_array_equal(in_x[1], np.zeros(in_x[1].shape))
    assert np.isfinite(in_x).all()


@each_case
def test_g6_rows_are_independent(case):
    x, y, mask = inputs(case)
    rows, in_x, _ = compiled(case)(x, y, mask)
    order = np.array([2, 0, 1])
    x, y, mask = jax.tree.map(lambda leaf: leaf[order], (x, y, mask))
    permuted, permuted_in_x, _ = compiled(case)(x, y, mask)
    np.testing.assert_allclose(permuted, rows[order], rtol=1e-12)
    np.testing.assert_allclose(permuted_in_x, in_x[order], rtol=1e-12)


@each_case
def test_g6_jit_changes_nothing(case):
    x, y, mask = inputs(case)
    rows, _, _ = compiled(case)(x, y, mask)
    arrays = jax.tree.map(jnp.asarray, (x, y, mask))
    np.testing.assert_allclose(case.rows(*arrays), rows, rtol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c.numeric], ids=repr)
def test_g7_gradients_are_derivatives(case):
    x, y, mask = inputs(case)

    @jax.custom_vjp  # what is checked is the very gradient of the tests above
    def total(x):
        return compiled(case)(x, y, mask)[0].sum()

    def forward(x):
        rows, in_x, _ = compiled(case)(x, y, mask)
        return rows.sum(), in_x

    total.defvjp(forward, lambda in_x, scale: (scale * in_x,))
    check_grads(total, (x,), order=1, modes=["rev"], rtol=1e-6, atol=1e-8)


@each_case
def test_u6_half_precision_in_float32_out(case):
    x, y, mask = inputs(case, jnp.bfloat16)
    assert jax.eval_shape(case.rows, x, y, mask).dtype == jnp.float32
