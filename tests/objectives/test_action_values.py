"""Moments read from states and heads, in slices, against those of whole arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.losses import anchored_advantages, centered_q, moment_gap, one_step
from rkd_jax.masking import fill_masked
from rkd_jax.models.api import response_hidden
from rkd_jax.models.heads import QHead, head_q_values
from rkd_jax.objectives import action_values, position_slices
from rkd_jax.objectives.action_values import (
    MOMENTS,
    FrozenPolicy,
    QFunction,
    Rows,
    action_moments,
    policy_rows,
    student_rows,
)
from rkd_jax.objectives.mm_pbkd import make_mm_pbkd
from rkd_jax.objectives.mmkd import make_mmkd
from rkd_jax.objectives.q_anchor import make_q_anchor
from rkd_jax.types import Sequences, WhiteBoxSignal
from tests.jaxprs import outputs
from tests.objectives.game_batch import (
    DEMONSTRATIONS,
    MODEL,
    PAIRS,
    ROLLOUTS,
    game_batch,
)
from tests.tabular.bed import BED_E, STUDENT, TEACHER, TabularConfig
from tests.tabular.white_box import log_prob_rows

pytestmark = pytest.mark.usefixtures("x64")

TEMPERATURE, BOUND, WIDTH = 2.0, 0.7, 6
HEAD = QHead(actions=3, width=5)
Q = QFunction(head_q_values(HEAD), center=True, bound=BOUND)
# All moments of 2 x 3 responses of 5 columns, 90 logits: in 1, 3 and 5 slices.
SLICES = {"whole": None, "padded": 40, "one by one": 1}


def policy(table):
    """Parameters of `MODEL` that are the table at the temperature here."""
    return {"logits": TEMPERATURE * jnp.asarray(table)}


def critic():
    zeros = HEAD.init(jax.random.key(0), WIDTH)
    generator = np.random.default_rng(3)
    return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape)), zeros)


def features_of(responses):
    values = np.random.default_rng(8).normal(size=(*responses[0].shape, 4, WIDTH))
    real = BED_E.mask[responses[1]][..., None]
    return jnp.asarray(np.where(real, values, np.nan))


def states_of(table, sequences):
    """States of `MODEL`, NaN in padding."""
    states = response_hidden(MODEL, policy(table), sequences)
    return jnp.where(jnp.expand_dims(sequences.response_mask, -1), states, jnp.nan)


def longer(sequences):
    """One more column, of padding."""
    return jax.tree.map(
        lambda x: np.pad(np.asarray(x), [(0, 0)] * (x.ndim - 1) + [(0, 1)]), sequences
    )


def longer_rows(values):
    """The same for float[.., T, D]."""
    widths = [(0, 0)] * (values.ndim - 2) + [(0, 1), (0, 0)]
    return jnp.pad(values, widths, constant_values=jnp.nan)


def along(params, sequences):
    return student_rows(MODEL, params, sequences, temperature=TEMPERATURE)


@functools.cache
def sliced(anchor, logits):
    """Jitted: all moments, and the gradients of a weighted sum of all."""

    @jax.jit
    def of_all(params, critic, features, sequences, teacher):
        def total(params, critic, features):
            rows = FrozenPolicy("teacher", MODEL, TEMPERATURE)
            moments = action_moments(
                MOMENTS,
                Q,
                Q.along(critic, sequences, features),
                sequences,
                anchor=anchor,
                student=along(params, sequences),
                teacher=rows({"teacher": policy(TEACHER)}, teacher),
                logits=logits,
            )
            return weighted(moments), moments

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(
            params, critic, features
        )

    return of_all


def weighted(moments):
    """A sum in which every position of every moment counts differently."""
    shape = next(iter(moments.values())).shape
    weights = np.random.default_rng(1).normal(size=(len(MOMENTS), *shape))
    return sum(jnp.sum(w * moments[k]) for w, k in zip(weights, MOMENTS, strict=True))


@functools.cache
def whole(anchor):
    """The same out of dense log-probs by the public losses."""

    @jax.jit
    def of_all(params, critic, features, sequences, teacher):
        def total(params, critic, features):
            mask, targets = sequences.response_mask, sequences.targets
            hidden = response_hidden(MODEL, params, sequences)
            logits = MODEL.unembed(params, hidden) / TEMPERATURE
            student = jax.nn.log_softmax(fill_masked(logits, mask))
            rho = student if anchor == "student" else teacher
            q = fill_masked(HEAD.apply(critic, fill_masked(features, mask)), mask)
            q = BOUND * jnp.tanh(centered_q(q, rho, mask) / BOUND)
            chosen = jnp.expand_dims(fill_masked(targets, mask), -1)
            taken = jnp.take_along_axis(student, chosen, -1)[..., 0]
            moments = {
                "gap": moment_gap(q, student, teacher, mask),
                "advantages": anchored_advantages(q, rho, targets, mask),
                "one_step": one_step(q, student, mask),
                "log_probs": fill_masked(taken, mask),
            }
            return weighted(moments), moments

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(
            params, critic, features
        )

    return of_all


@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("anchor", ["student", "teacher"])
def test_slices_of_states_say_what_whole_arrays_say(anchor, slices):
    sequences = longer(game_batch().rollouts)
    features = longer_rows(features_of(ROLLOUTS))
    given = (policy(STUDENT), critic(), features, sequences)
    found = sliced(anchor, SLICES[slices])(*given, states_of(TEACHER, sequences))
    teacher = longer_rows(log_prob_rows(TEACHER, *ROLLOUTS))
    expected = whole(anchor)(*given, teacher)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(close, found, expected)
    for gradient in jax.tree.leaves(found[0]):
        assert np.abs(gradient).max() > 1e-3


class Capped:
    """A head alone, with a bias and a soft cap."""

    config = TabularConfig(logit_softcap=1.5)

    def head(self, params):
        return params["head"]

    def head_bias(self, params):
        return params["bias"]


def test_a_policy_is_read_with_its_bias_and_its_soft_cap():
    generator = np.random.default_rng(4)
    params = {"head": generator.normal(size=(4, 6)), "bias": generator.normal(size=6)}
    states = generator.normal(size=(2, 3, 4))
    rows = policy_rows(
        Capped(),
        jax.tree.map(jnp.asarray, params),
        jnp.asarray(states),
        temperature=0.5,
    )
    logits = 1.5 * np.tanh((states @ params["head"] + params["bias"]) / 1.5) / 0.5
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = rows.read(rows.weights, rows.states)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert rows.vocabulary == 6


def test_no_array_over_the_vocabulary_exists_as_a_whole():
    batch, length, width, vocabulary = 2, 8, 4, 100
    mask = np.ones((batch, length), bool)
    sequences = Sequences(
        tokens=np.zeros((batch, length + 1), np.int32),
        token_mask=np.ones((batch, length + 1), bool),
        response_mask=mask,
    )
    q_function = QFunction(
        head_q_values(QHead(actions=vocabulary)), center=True, bound=1.0
    )
    states = jnp.ones((batch, length, width))

    def total(kernel, critic, logits):
        def rows(states):
            return Rows(states, lambda w, x: jax.nn.log_softmax(x @ w), kernel)

        moments = action_moments(
            MOMENTS,
            q_function,
            q_function.along(critic, sequences, states),
            sequences,
            anchor="teacher",
            student=rows(states),
            teacher=rows(2 * states),
            logits=logits,
        )
        return sum(x.sum() for x in moments.values())

    critic = QHead(actions=vocabulary).init(jax.random.key(0), width)
    kernel = jnp.ones((width, vocabulary))

    def largest(logits):
        function = jax.grad(functools.partial(total, logits=logits), argnums=(0, 1))
        return max(
            aval.size
            for aval in outputs(jax.make_jaxpr(function)(kernel, critic).jaxpr)
        )

    assert largest(None) >= batch * length * vocabulary
    # Two positions at a time; kernel and gradients are the largest arrays left.
    assert largest(2 * batch * vocabulary) <= width * vocabulary
    assert largest(3 * batch * vocabulary - 1) <= width * vocabulary


GAPS = ["on", "mixed"]  # mixed is both on and off


def given_signal(whole_arrays):
    """Dense log-probs, or the states that a head turns into them."""
    batch = game_batch()
    responses = {
        "rollouts": (ROLLOUTS, batch.rollouts),
        "preferences": (PAIRS, batch.preferences.sequences),
        "demonstrations": (DEMONSTRATIONS, batch.demonstrations.sequences),
    }
    teacher = {
        name: log_prob_rows(TEACHER, *where)
        if whole_arrays
        else states_of(TEACHER, sequences)
        for name, (where, sequences) in responses.items()
    }
    return WhiteBoxSignal(
        anchor_nll=jnp.asarray([0.4, 0.5, 0.6, 0.2]),
        rollout_features=features_of(ROLLOUTS),
        preference_features=features_of(PAIRS),
        demonstration_features=features_of(DEMONSTRATIONS),
        **teacher,
    )


def both_losses(objective, critics, frozen, signal, dual):
    """Totals and gradients of both players."""

    @jax.jit
    def evaluate(params, critics, signal):
        def critic_total(critics):
            return objective.critic_loss(
                critics, params, dual, frozen, game_batch(), signal, None
            ).total

        def student_total(params):
            return objective.student_loss(
                params, critics, frozen, game_batch(), signal, None
            ).total

        return (
            jax.value_and_grad(critic_total)(critics),
            jax.value_and_grad(student_total)(params),
        )

    return evaluate(policy(STUDENT), critics, signal)


@pytest.mark.parametrize("game", [*GAPS, "mmkd"])
def test_a_game_against_a_model_is_that_against_its_log_probs(game, monkeypatch):
    monkeypatch.setattr(action_values, "LOGITS", 20)
    critics, dual = critic(), jnp.asarray(2.0)
    signals = [given_signal(whole_arrays) for whole_arrays in (True, False)]
    if game in ("mixed", "mmkd"):
        critics = {"off": critics, "on": jax.tree.map(jnp.negative, critics)}
    if game == "mixed":
        dual = jnp.asarray([2.0, 0.5])
        signals = [
            dataclasses.replace(s, anchor_nll=jnp.stack([s.anchor_nll] * 2, -1))
            for s in signals
        ]
    make = make_mmkd if game == "mmkd" else functools.partial(make_mm_pbkd, gap=game)
    dense, fused = (
        make(MODEL, head_q_values(HEAD), teacher=teacher, temperature=TEMPERATURE)
        for teacher in (None, MODEL)
    )
    frozen = {"teacher": policy(TEACHER)}
    expected = both_losses(dense, critics, None, signals[0], dual)
    found = both_losses(fused, critics, frozen, signals[1], dual)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        found,
        expected,
    )
    with pytest.raises(ValueError, match='frozen={"teacher"'):
        both_losses(fused, critics, None, signals[1], dual)


@pytest.mark.parametrize("game", [*GAPS, "mmkd", "mmkd, sampled"])
def test_a_critic_foresees_the_gradient_of_its_gap(game, monkeypatch):
    """With a discount too: what the backward pass would compute again is not asked."""
    monkeypatch.setattr(action_values, "LOGITS", 20)
    critics, dual, signal = critic(), jnp.asarray(0.0), given_signal(False)
    if game != "on":
        critics = {"off": critics, "on": jax.tree.map(jnp.negative, critics)}
    if game == "mixed":
        dual = jnp.zeros(2)
        both = jnp.stack([signal.anchor_nll] * 2, -1)
        signal = dataclasses.replace(signal, anchor_nll=both)
    make = functools.partial(make_mm_pbkd, gap=game)
    if "mmkd" in game:
        kind = "sampled" if "sampled" in game else "all_actions"
        make = functools.partial(make_mmkd, moments=kind)
    objective = make(
        MODEL, head_q_values(HEAD), teacher=MODEL, temperature=TEMPERATURE, gamma=0.9
    )

    def slopes():
        frozen = {"teacher": policy(TEACHER)}
        (_, found), _ = both_losses(objective, critics, frozen, signal, dual)
        return found

    expected, asked = slopes(), []
    whole = position_slices.scaled_or_again

    def never_again(ahead, foreseen, cotangent, again):
        asked.append(1)
        nothing = jax.tree.map(lambda x: jnp.nan * x, ahead)
        return whole(ahead, foreseen, cotangent, lambda: nothing)

    monkeypatch.setattr(position_slices, "scaled_or_again", never_again)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    jax.tree.map(compare, slopes(), expected)
    assert len(asked) == (1 if game == "on" else 2)  # once for every side


def test_an_anchor_that_is_a_model():
    dense, fused = (
        make_q_anchor(head_q_values(HEAD), anchor=anchor, temperature=TEMPERATURE)
        for anchor in (None, MODEL)
    )

    @functools.partial(jax.jit, static_argnums=0)
    def loss(objective, critic, frozen, signal):
        def total(critic):
            pairs = game_batch().preferences
            return objective.student_loss(
                critic, None, frozen, pairs, signal, None
            ).total

        return jax.value_and_grad(total)(critic)

    expected = loss(dense, critic(), None, given_signal(True))
    frozen = {"anchor": policy(TEACHER)}
    found = loss(fused, critic(), frozen, given_signal(False))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12),
        found,
        expected,
    )
