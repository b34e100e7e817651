"""X-KD's heads and options: what is watched, weighted, trained and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from rkd_jax.models.heads import GaussianHead, QHead
from rkd_jax.objectives.reward_inference import RewardInference
from rkd_jax.objectives.xkd import make_xkd_gkd, make_xkd_minillm, make_xkd_sequence
from rkd_jax.training import init_state, make_update
from rkd_jax.types import ImitationBatch, ImitationSignal, TeacherSignal
from tests.objectives.imitation import (
    FIXED,
    LOG_STD,
    MODEL,
    NUMBERS,
    PARTS,
    SAMPLED,
    evaluate,
    imitation,
    params,
    responses,
    signal,
)
from tests.tabular.bed import BED_E, STUDENT, TabularLM, single
from tests.tabular.posterior import tabular_action_values

pytestmark = pytest.mark.usefixtures("x64")


def test_moments_of_log_sum_exp_and_log_std():
    objective = make_xkd_sequence(MODEL, PARTS(q_source="raw_logits"))
    out, _ = evaluate(objective, responses(FIXED), ())
    lse = np.log(np.exp(STUDENT).sum(-1))
    visited, widths = [], []
    for x, i in zip(NUMBERS, FIXED, strict=True):
        states, actions = BED_E.states[i], BED_E.sequences[i]
        visited.append([lse[x, k] for k in states[: len(actions)]])
        widths.append([LOG_STD[x, states[t], actions[t]] for t in range(len(actions))])
    widths = [row[:-1] for row in widths if len(row) > 1]
    for name, rows in (("student/lse_q", visited), ("student/log_std", widths)):
        flat = np.concatenate(rows)
        np.testing.assert_allclose(
            out.metrics[name], (flat.sum(), len(flat)), rtol=1e-12
        )
        variances = [np.var(row) for row in rows]
        np.testing.assert_allclose(
            out.metrics[f"{name}_variance"], (sum(variances), len(rows)), rtol=1e-10
        )


def test_reward_weights_multiply_what_both_heads_say():
    def loss(weights, table_scale=1.0):
        inference = PARTS(
            q_source="q_head", q_head=tabular_action_values, reward_weights=weights
        )
        tables = params()
        for name in ("reward_head", "q_head"):
            tables[name] = jax.tree.map(lambda x: table_scale * x, tables[name])
        objective = make_xkd_sequence(MODEL, inference)
        return float(evaluate(objective, responses(FIXED), (), tables)[0].total)

    def constant(value):
        def weights(policy, sequences):
            del policy
            return jnp.where(sequences.response_mask, value, jnp.nan)

        return weights

    assert loss(constant(1.0)) == loss(None)
    np.testing.assert_allclose(loss(constant(0.3)), loss(None, 0.3), rtol=1e-12)


def test_the_librarys_heads_train_through_the_update():
    """A linear Q head and a reward head with a hidden layer."""
    reward, values = GaussianHead(width=5), QHead(actions=3)
    dim = MODEL.config.hidden_size
    inference = RewardInference(
        reward.apply,
        q_source="q_head",
        q_head=values.apply,
        prior_mean=0.5,  # at 0 all temporal differences would be 0, and stay it
    )
    objective = make_xkd_gkd(TabularLM(), inference)
    optimizer = optax.sgd(0.1)
    start = {
        "policy": {"logits": jnp.asarray(STUDENT, jnp.float32)},
        "reward_head": reward.init(jax.random.key(0), dim),
        "q_head": values.init(jax.random.key(1), dim),
    }
    state = init_state(
        rng=jax.random.key(2), student_params=start, student_optimizer=optimizer
    )
    update = make_update(objective, student_optimizer=optimizer)
    batch, given = single((imitation(), signal()))
    losses = []
    for _ in range(3):
        state, metrics = update(state, None, batch, given)
        losses.append(float(metrics["student/loss"]))
    assert losses[2] < losses[1] < losses[0]
    for part, before in start.items():
        moved = ravel_pytree(before)[0] - ravel_pytree(state.student.params[part])[0]
        assert np.abs(moved).max() > 1e-4, part


def test_one_pass_serves_both_where_the_responses_are_the_same():
    class Counting(TabularLM):
        passes = 0

        def hidden(self, *args, **options):
            self.passes += 1
            return super().hidden(*args, **options)

    for batch, passes in ((ImitationBatch(responses(FIXED)), 1), (imitation(), 2)):
        model = Counting()
        objective = make_xkd_gkd(model, PARTS())
        evaluate(objective, batch, signal(FIXED if passes == 1 else SAMPLED))
        assert model.passes == passes


def test_what_is_missing_or_unknown_is_named():
    expected = PARTS(next_value="expected")
    log_probs = signal().log_probs
    for taught in (TeacherSignal(log_probs), ImitationSignal(log_probs)):
        with pytest.raises(ValueError, match="demonstration_log_probs"):
            evaluate(make_xkd_gkd(MODEL, expected), imitation(), taught)
    with pytest.raises(ValueError, match="drop `imitated`"):
        evaluate(make_xkd_sequence(MODEL, PARTS()), imitation(), ())
    assert make_xkd_sequence(MODEL, PARTS()).requires == ()
    assert make_xkd_sequence(MODEL, expected).requires == ("log_probs",)
    assert make_xkd_gkd(MODEL, PARTS()).requires == ("log_probs",)
    for bad, name in (
        ({"q_source": "values"}, "q_source"),
        ({"q_source": "q_head"}, "q_head"),
        ({"q_head": tabular_action_values}, "q_head"),
        ({"next_value": "greedy"}, "next_value"),
        ({"stop_gradient": "all"}, "stop_gradient"),
        ({"terminal": "zero"}, "terminal"),
        ({"gamma": 1.5}, "gamma"),
        ({"td_weight": -0.1}, "td_weight"),
        ({"prior_std": 0.0}, "prior_std"),
    ):
        with pytest.raises(ValueError, match=name):
            PARTS(**bad)
    for make, bad in (
        (make_xkd_sequence, {"w_x": -1.0}),
        (make_xkd_sequence, {"normalise": "batch"}),
        (make_xkd_gkd, {"normalise": "sum"}),
        (make_xkd_gkd, {"td_sequences": "student"}),
        (make_xkd_minillm, {"temperature": 0.0}),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            make(MODEL, PARTS(), **bad)
