"""One update against arithmetic by hand, a known saddle, and every refusal."""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.training import OptimConfig, init_state, make_optimizer, make_update
from rkd_jax.types import LossOutput, Mean, Objective, Sequences, struct


def one(value, **metrics):
    """A `LossOutput` of weight 1."""
    means = {k: Mean(v, jnp.float32(1)) for k, v in metrics.items()}
    return LossOutput(value, jnp.float32(1), means)


def pull(params, critic, frozen, batch, signal, rng):
    """0.5 |x - target|^2, the target from the batch."""
    return one(0.5 * jnp.sum((params["x"] - jnp.mean(batch)) ** 2))


def sgd_state(x, y=None, rate=0.1, **kwargs):
    sgd = optax.sgd(rate)
    if y is None:
        return init_state({"x": x}, student_optimizer=sgd, **kwargs), {
            "student_optimizer": sgd
        }
    both = {"student_optimizer": sgd, "critic_optimizer": sgd}
    return init_state({"x": x}, critic_params={"y": y}, **both, **kwargs), both


BATCH = jnp.ones((4, 3))


def test_one_round_by_hand(rng):
    """k critic steps at fixed theta, the dual on the last of them, then theta."""

    def critic_loss(critic, params, dual, frozen, batch, signal, rng):
        x, y = params["x"], critic["y"]
        loss = jnp.sum(0.5 * dual * y**2 - frozen * x * y)
        return one(loss, **{"critic/slack": jnp.sum(y)})

    def student_loss(params, critic, frozen, batch, signal, rng):
        return one(jnp.sum(params["x"] * critic["y"]), **{"student/x": params["x"][0]})

    def dual_step(dual, metrics):
        assert all(value.shape == () for value in metrics.values())
        return dual + metrics["critic/slack"]

    objective = Objective("hand", student_loss, critic_loss, dual_step)
    state, optimizers = sgd_state(jnp.array([2.0]), jnp.array([1.0]), dual=3.0, rng=rng)
    update = make_update(objective, critic_steps=3, **optimizers)
    state, metrics = update(state, jnp.float32(5.0), BATCH, ())

    x, y, dual, seen = 2.0, 1.0, 3.0, []
    for _ in range(3):
        seen.append((0.5 * dual * y**2 - 5 * x * y, y, dual * y - 5 * x))
        y -= 0.1 * (dual * y - 5 * x)
    loss, slack, grad = seen[-1]
    expected = {
        "critic/loss": loss,
        "critic/slack": slack,
        "critic/grad_norm": abs(grad),
        "critic/param_norm": abs(y),
        "dual": dual + slack,
        "student/loss": x * y,
        "student/x": x,
        "student/grad_norm": abs(y),
        "skipped": 0.0,
        "tokens": 0.0,
    }
    chex.assert_trees_all_close(
        {k: float(v) for k, v in metrics.items()}, expected, rtol=1e-5
    )
    np.testing.assert_allclose(state.critic.params["y"], [y], rtol=1e-6)
    np.testing.assert_allclose(state.student.params["x"], [x - 0.1 * y], rtol=1e-6)
    np.testing.assert_allclose(state.dual, dual + slack, rtol=1e-6)
    assert (int(state.step), int(state.skipped)) == (1, 0)
    assert {v.dtype for v in metrics.values()} == {jnp.dtype("float32")}


def test_known_saddle_is_reached_in_one_trace(rng):
    """f = x'Ay + |x|^2/2 - |y|^2/2 + c'x - d'y, minimised by x, maximised by y."""
    matrix = np.array([[1.0, -2.0], [0.5, 1.5]])
    c, d = np.array([0.3, -1.0]), np.array([0.7, 0.2])
    # Stationarity: x + A y + c = 0 and A'x - y - d = 0.
    system = np.block([[np.eye(2), matrix], [matrix.T, -np.eye(2)]])
    x, y = np.split(np.linalg.solve(system, np.concatenate([-c, d])), 2)

    def game(x, y, frozen):
        a, c, d = frozen
        return x @ a @ y + 0.5 * (x @ x) - 0.5 * (y @ y) + jnp.dot(c, x) - jnp.dot(d, y)

    objective = Objective(
        "saddle",
        lambda p, c, f, b, s, r: one(game(p["x"], c["y"], f)),
        lambda c, p, dual, f, b, s, r: one(-game(p["x"], c["y"], f)),
    )
    frozen = tuple(jnp.asarray(v, jnp.float32) for v in (matrix, c, d))
    state, optimizers = sgd_state(jnp.ones(2), -jnp.ones(2), rate=0.15, rng=rng)
    # A second trace would raise: max_traces is 1.
    update = make_update(objective, critic_steps=3, **optimizers)
    for _ in range(300):
        state, metrics = update(state, frozen, (), ())
        jax.block_until_ready(metrics)
    np.testing.assert_allclose(state.student.params["x"], x, atol=1e-5)
    np.testing.assert_allclose(state.critic.params["y"], y, atol=1e-5)


def test_dual_ascent_finds_the_multiplier(rng):
    """max y subject to y^2 <= 1 has y = 1 and multiplier 1/2."""

    def critic_loss(critic, params, dual, frozen, batch, signal, rng):
        slack = jnp.sum(critic["y"] ** 2) - 1.0
        return one(dual * slack - jnp.sum(critic["y"]), slack=slack)

    objective = Objective(
        "constrained",
        lambda p, c, f, b, s, r: one(jnp.sum(p["x"] ** 2)),
        critic_loss,
        lambda dual, metrics: jnp.maximum(dual + 0.1 * metrics["slack"], 0.0),
    )
    state, optimizers = sgd_state(jnp.ones(1), jnp.zeros(1), rng=rng)
    update = make_update(objective, critic_steps=2, **optimizers)
    for _ in range(200):
        state, metrics = update(state, None, (), ())
        jax.block_until_ready(metrics)
    np.testing.assert_allclose(state.critic.params["y"], 1.0, atol=1e-4)
    np.testing.assert_allclose(state.dual, 0.5, atol=1e-4)


def test_r16_nan_and_empty_batches_are_skipped_and_counted(rng):
    def loss(params, critic, frozen, batch, signal, rng):
        kept = jnp.where(batch["mask"], batch["x"] * params["x"], 0.0)
        weight = jnp.sum(batch["mask"], dtype=jnp.float32)
        return LossOutput(jnp.sum(kept), weight, {"kept": Mean(jnp.sum(kept), weight)})

    adam = make_optimizer(OptimConfig(0.1))
    state = init_state({"x": jnp.ones(())}, student_optimizer=adam, rng=rng)
    update = make_update(Objective("linear", loss), student_optimizer=adam)
    x, mask = jnp.ones((4, 3)), jnp.ones((4, 3), bool)
    good = {"x": x, "mask": mask}
    nan = {"x": x.at[0, 0].set(jnp.nan), "mask": mask}
    empty = {"x": jnp.full((4, 3), jnp.nan, jnp.float32), "mask": ~mask}

    state, _ = update(state, None, good, ())
    before = jax.tree.map(np.array, state.student)
    for batch, finite in ((nan, False), (empty, True)):
        state, metrics = update(state, None, batch, ())
        chex.assert_trees_all_equal(jax.tree.map(np.array, state.student), before)
        assert float(metrics["skipped"]) == 1.0
        assert all(np.isfinite(float(v)) for v in metrics.values()) == finite
    assert float(metrics["student/loss"]) == 0.0
    assert (int(state.skipped), int(state.step)) == (2, 3)
    state, metrics = update(state, None, good, ())
    assert float(metrics["skipped"]) == 0.0
    # Adam counts the steps that were really taken.
    counts = optax.tree.get_all_with_path(state.student.opt_state, "count")
    assert {int(count) for _, count in counts} == {2}


@pytest.mark.parametrize("broken", ["value", "gradient"])
def test_a_broken_critic_step_leaves_critic_and_dual_alone(rng, broken):
    """sqrt at 0 has a finite value and an infinite slope."""

    def critic_loss(critic, params, dual, frozen, batch, signal, rng):
        y = jnp.sum(critic["y"])
        bad = y * jnp.inf if broken == "value" else jnp.sqrt(y - 1.0)
        return one(bad, slack=jnp.float32(1))

    objective = Objective(
        "broken", pull, critic_loss, lambda dual, metrics: dual + metrics["slack"]
    )
    state, optimizers = sgd_state(jnp.zeros(2), jnp.ones(1), dual=0.25, rng=rng)
    update = make_update(objective, critic_steps=2, **optimizers)
    state, metrics = update(state, None, BATCH, ())
    np.testing.assert_array_equal(state.critic.params["y"], [1.0])
    assert float(state.dual) == 0.25
    assert float(metrics["skipped"]) == 2.0
    # The student's step does not depend on it and was taken: 0 -> 0.1.
    np.testing.assert_allclose(state.student.params["x"], 0.1, rtol=1e-6)


def test_a_dual_step_that_is_not_finite_is_not_taken(rng):
    objective = Objective(
        "dual",
        pull,
        lambda c, p, dual, f, b, s, r: one(jnp.sum(c["y"])),
        lambda dual, metrics: dual / 0.0,
    )
    state, optimizers = sgd_state(jnp.zeros(2), jnp.ones(1), dual=0.25, rng=rng)
    state, metrics = make_update(objective, **optimizers)(state, None, BATCH, ())
    assert (float(state.dual), float(metrics["dual"])) == (0.25, 0.25)


def test_several_multipliers_are_moved_refused_and_reported_one_by_one(rng):
    objective = Objective(
        "two",
        pull,
        lambda c, p, dual, f, b, s, r: one(jnp.sum(c["y"])),
        lambda dual, metrics: dual / jnp.array([0.0, 2.0]),
    )
    start = (jnp.zeros(2), jnp.ones(1))
    state, optimizers = sgd_state(*start, dual=(0.25, 3.0), rng=rng)
    state, metrics = make_update(objective, **optimizers)(state, None, BATCH, ())
    np.testing.assert_array_equal(state.dual, [0.25, 1.5])
    assert (float(metrics["dual/0"]), float(metrics["dual/1"])) == (0.25, 1.5)
    assert "dual" not in metrics


def test_bfloat16_gradients_add_up_in_float32(rng):
    """1 + 255 x 2^-8 is 1.996; summed in bfloat16 it would stay 1."""

    def loss(params, critic, frozen, batch, signal, rng):
        total = jnp.sum(params["x"] * batch.astype(jnp.bfloat16))
        return LossOutput(total.astype(jnp.float32), jnp.float32(1 / 256), {})

    sgd = optax.sgd(1.0)
    params = {"x": jnp.zeros((), jnp.bfloat16)}
    state = init_state(params, student_optimizer=sgd, rng=rng)
    update = make_update(
        Objective("sum", loss), student_optimizer=sgd, accumulation=256
    )
    batch = jnp.full(256, 2.0**-8).at[0].set(1.0)
    state, _ = update(state, None, batch, ())
    assert float(state.student.params["x"]) == pytest.approx(-1.996, rel=2**-8)
    assert state.student.params["x"].dtype == jnp.bfloat16


def test_every_micro_batch_draws_its_own_noise(rng):
    def loss(params, critic, frozen, batch, signal, rng):
        noise = jax.random.normal(rng)
        count = jnp.float32(batch.shape[0])
        squared = Mean(count * noise**2, count)
        return LossOutput(count * noise * params["x"], count, {"squared": squared})

    sgd = optax.sgd(1.0)
    state = init_state({"x": jnp.zeros(())}, student_optimizer=sgd, rng=rng)
    update = make_update(
        Objective("noise", loss), student_optimizer=sgd, accumulation=2
    )
    state, metrics = update(state, None, jnp.zeros(8), ())
    mean, square = -float(state.student.params["x"]), float(metrics["squared"])
    # Equal draws would have mean^2 == mean of squares.
    assert square - mean**2 > 1e-3


def test_tokens_count_the_students_sequences_once(rng):
    @struct
    class Batch:
        sequences: Sequences
        teacher_sequences: Sequences

    def rows(lengths):
        mask = jnp.asarray(np.arange(5) < np.array(lengths)[:, None])
        return Sequences(jnp.zeros((2, 5), jnp.int32), mask, mask[:, 2:])

    def loss(params, critic, frozen, batch, signal, rng):
        return one(jnp.sum(params["x"] ** 2))

    state, optimizers = sgd_state(jnp.ones(1), rng=rng)
    update = make_update(Objective("tokens", loss), **optimizers)
    _, metrics = update(state, None, Batch(rows([2, 5]), rows([5, 5])), ())
    assert float(metrics["tokens"]) == 7.0


class Named(NamedTuple):
    values: jax.Array
    index: jax.Array | None = None


@struct
class Struct:
    values: jax.Array
    index: jax.Array | None = None


@pytest.mark.parametrize("make", [Named, Struct, lambda values: {"values": values}])
def test_missing_signals_are_named(rng, make):
    # "index" is also a method of every tuple, which must not pass for a field.
    objective = Objective("tvkd", pull, requires=("values", "index"))
    state, optimizers = sgd_state(jnp.ones(1), rng=rng)
    update = make_update(objective, **optimizers)
    message = "objective 'tvkd' requires the signal {}; got {}"
    with pytest.raises(ValueError, match=message.format("index", "values")):
        update(state, None, BATCH, make(jnp.ones(4)))
    with pytest.raises(ValueError, match=message.format("values, index", "none")):
        update(state, None, BATCH, ())


def test_present_signals_pass(rng):
    objective = Objective("tvkd", pull, requires=("values", "index"))
    state, optimizers = sgd_state(jnp.ones(1), rng=rng)
    signal = Struct(jnp.ones(4), jnp.ones(4))
    state, _ = make_update(objective, **optimizers)(state, None, BATCH, signal)
    assert int(state.step) == 1


def test_batches_that_cannot_be_cut_are_named(rng):
    state, optimizers = sgd_state(jnp.ones(1), rng=rng)
    update = make_update(Objective("p", pull), **optimizers, accumulation=4)
    with pytest.raises(ValueError, match=r"batch\['x'\] of shape \(6, 2\) .*=4 micro"):
        update(state, None, {"x": jnp.ones((6, 2))}, ())
    with pytest.raises(ValueError, match=r"signal\.values of shape \(\) .*"):
        update(state, None, {"x": jnp.ones((4, 2))}, Struct(jnp.float32(1)))


def test_r30_another_shape_fails_the_run(rng):
    state, optimizers = sgd_state(jnp.ones(1), rng=rng)
    update = make_update(Objective("pull", pull), **optimizers, max_traces=2)
    for rows in (4, 8, 4, 8):
        state, _ = update(state, None, jnp.ones((rows, 3)), ())
    with pytest.raises(RuntimeError, match="traced for 3 .* max_traces=2"):
        update(state, None, jnp.ones((5, 3)), ())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"critic_optimizer": optax.sgd(1.0)}, "'pull' has no critic: drop critic_opt"),
        ({"accumulation": 0}, "at least 1"),
        ({"critic_steps": 0}, "at least 1"),
    ],
)
def test_impossible_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_update(Objective("pull", pull), student_optimizer=optax.sgd(1.0), **kwargs)


def test_a_critic_must_be_complete(rng):
    objective = Objective("game", pull, lambda *args: one(jnp.float32(0)))
    sgd = optax.sgd(1.0)
    with pytest.raises(ValueError, match="'game' has a critic: give critic_optimizer"):
        make_update(objective, student_optimizer=sgd)
    update = make_update(objective, student_optimizer=sgd, critic_optimizer=sgd)
    state, _ = sgd_state(jnp.ones(1), rng=rng)
    with pytest.raises(ValueError, match="give critic_params to init_state"):
        update(state, None, BATCH, ())


def test_randomness_depends_on_root_and_step_only(rng):
    def loss(params, critic, frozen, batch, signal, rng):
        return one(jax.random.normal(rng) * jnp.sum(params["x"]))

    state, optimizers = sgd_state(jnp.ones(1), rng=rng)
    update = make_update(Objective("noise", loss), **optimizers)
    norms = []
    for step in (0, 1, 0):
        state = dataclasses.replace(state, step=jnp.int32(step))
        state, metrics = update(state, None, BATCH, ())
        norms.append(float(metrics["student/grad_norm"]))
    assert norms[0] == norms[2]
    assert abs(norms[0] - norms[1]) > 1e-3
