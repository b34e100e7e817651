"""MM-PbKD and MMKD through the training update, on the mini bed until they settle.

As `test_pbkd_update`, with a bounded table of action values as the critic and the
teacher's distribution as the signal. Rewards that a bounded Q implies are linear in Q,
so the same convex solver says what the value of the game is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.objectives.mm_pbkd import make_mm_pbkd
from rkd_jax.objectives.mmkd import make_mmkd
from rkd_jax.training.state import init_state, step_keys
from rkd_jax.training.update import make_update
from rkd_jax.types import DemonstrationBatch, GameBatch, WhiteBoxSignal
from tests.tabular.bed import MINI, MINI_PAIRS, MINI_REWARD
from tests.tabular.game import SMALL, Game
from tests.tabular.test_pbkd_update import (
    TAUGHT,
    MiniLM,
    anchor_nll,
    mini_sequences,
    pairs,
    response_probs,
)

STEPS, AVERAGED = 1500, 1000  # steps, and how many of the last ones are averaged
SAMPLES = 32  # per prompt row and step
SGD = optax.sgd(0.05)
# The teacher by prefix: empty, after 0, after 1.
TEACHER = np.array([[0.6, 0.4], [1 / 3, 2 / 3], [0.25, 0.75]])
# r = Q - V(s'), V the teacher's mean: what one unit of each Q adds to each reward.
REWARD_OF_Q = np.eye(6)
REWARD_OF_Q[0, 2:4] -= TEACHER[1]
REWARD_OF_Q[1, 4:6] -= TEACHER[2]


class MomentGame(Game):
    """The mini game over action values |Q| <= 1 anchored by the teacher."""

    @functools.cached_property
    def features(self) -> np.ndarray:
        return SMALL.features @ REWARD_OF_Q

    @property
    def anchor(self) -> np.ndarray:
        return np.linalg.solve(REWARD_OF_Q, MINI_REWARD.ravel())

    def value(self, epsilon) -> float:
        """-min over the set of SubOpt(teacher), the best return as an unknown."""
        returns = self.features[0]
        rows = np.hstack([-returns, np.ones((len(returns), 1))])
        slope = np.append(self.teacher[0] @ returns, -1.0)
        return self.maximise(slope, epsilon, rows, [(returns @ self.anchor).max()])[0]


GAME = MomentGame(MINI, SMALL.teacher, MINI_REWARD, MINI_PAIRS)


def mini_q(params, sequences, features=None):
    """A bounded table of action values [3, 2] as the critic."""
    del features
    first = sequences.targets[..., 0]
    states = jnp.stack([jnp.zeros_like(first), 1 + first], axis=-1)
    return params["q"][states]


def teacher_rows(sequences):
    table = jnp.asarray(np.log(TEACHER), jnp.float32)
    return mini_q({"q": table}, sequences)


def anchor():
    """The critic's start, whose Q implies the true reward."""
    return {"q": jnp.asarray(np.arctanh(GAME.anchor.reshape(3, 2)), jnp.float32)}


@functools.cache
def compiled(make_objective):
    """Jitted (state, anchor_nll, on_weight): policies, bounded critics, metrics."""
    taught = mini_sequences(TAUGHT)
    demonstrations = DemonstrationBatch(taught, taught, jnp.arange(len(TAUGHT)))
    preferences = pairs()

    def history(state, nll, on_weight):
        update = make_update(
            make_objective(on_weight),
            student_optimizer=SGD,
            critic_optimizer=SGD,
            critic_steps=5,
        )

        def step(state, _):
            probs = response_probs(state.student.params["logits"])
            drawn = jax.random.categorical(
                step_keys(state).prepare, jnp.log(probs), shape=(len(TAUGHT), SAMPLES)
            )
            rollouts = mini_sequences(drawn)
            batch = GameBatch(demonstrations, rollouts, preferences)
            signal = WhiteBoxSignal(
                anchor_nll=nll,
                rollouts=teacher_rows(rollouts),
                preferences=teacher_rows(preferences.sequences),
                demonstrations=teacher_rows(taught),
            )
            state, metrics = update(state, None, batch, signal)
            critics = jax.tree.map(jnp.tanh, state.critic.params)
            return state, (probs, critics, metrics)

        return jax.lax.scan(step, state, length=STEPS)[1]

    return jax.jit(history)


def play(make_objective, start, *, on_weight=0.5, nll=None):
    """Averages of policy [4], both bounded critics and metrics; the policies."""
    state = init_state(
        {"logits": jnp.zeros((3, 2))},
        student_optimizer=SGD,
        critic_params={"off": start, "on": start},
        critic_optimizer=SGD,
        dual=(1.0, 1.0),
        rng=jax.random.key(0),
    )
    history = compiled(make_objective)(state, nll, on_weight)
    averages = jax.tree.map(
        lambda x: np.asarray(x[-AVERAGED:], np.float64).mean(0), history
    )
    return *averages, history[0]


def test_the_solver_knows_the_same_rewards():
    """The teacher's Q of the true reward implies it, and loses nothing on the pairs."""
    np.testing.assert_allclose(REWARD_OF_Q @ GAME.anchor, MINI_REWARD.ravel())
    assert np.abs(GAME.anchor).max() < 1
    assert GAME.anchor_nll == pytest.approx(SMALL.anchor_nll, abs=1e-12)
    # A moment gap is a performance difference: for every policy and every Q.
    policy = np.array([[0.1, 0.2, 0.3, 0.4]])
    q = np.array([[0.3, -0.9], [0.2, 0.5], [-0.4, 0.8]])
    first = policy[0].reshape(2, 2).sum(1)
    own = np.vstack([first, policy[0].reshape(2, 2) / first[:, None]])
    gap = ((TEACHER - own) * q).sum(1) @ np.append(1.0, first)
    assert GAME.gap_slope(policy) @ q.ravel() == pytest.approx(gap, abs=1e-12)


EPSILON = 0.01


def assert_solved(policy):
    """Against its worst Q in the set the student does as well as any can."""
    value, (worst, _) = GAME.value(EPSILON), GAME.inner(policy[None], EPSILON)
    uniform, _ = GAME.inner(np.full((1, 4), 0.25), EPSILON)
    assert worst >= value - 1e-6
    assert worst <= value + 0.03
    assert uniform >= value + 0.3  # where it came from is far away


def assert_holds_the_student(q):
    """An average Q that is in the set and leaves no policy more than the value."""
    assert GAME.excess(q.ravel()) <= 1.1 * EPSILON
    value, returns = GAME.value(EPSILON), (GAME.features @ q.ravel())[0]
    best_answer = float(GAME.teacher[0] @ returns - returns.max())
    assert value - 0.03 <= best_answer <= value + 1e-3 + 0.1 * EPSILON


def mm_pbkd(on_weight):
    return make_mm_pbkd(
        MiniLM(),
        mini_q,
        gap="mixed",
        on_weight=on_weight,
        epsilon=EPSILON,
        center_q=False,
        q_bound=1.0,
    )


def mmkd(on_weight):
    del on_weight
    return make_mmkd(MiniLM(), mini_q)


@pytest.mark.parametrize("on_weight", [1.0, 0.5], ids=["on", "mixed"])
def test_the_update_converges_to_the_value_of_the_game(on_weight):
    """With all weight on one side the other one's critic and multiplier are idle."""
    nll = jnp.stack([anchor_nll(), anchor_nll()], axis=-1)
    policy, critics, metrics, _ = play(mm_pbkd, anchor(), on_weight=on_weight, nll=nll)
    assert_solved(policy)
    assert_holds_the_student(critics["on"]["q"])
    for side, i in ({"on": 1} if on_weight == 1 else {"off": 0, "on": 1}).items():
        assert abs(metrics[f"critic/{side}_slack"]) <= 0.1 * EPSILON
        assert metrics[f"dual/{i}"] > 5.0
    assert metrics["student/on_gap"] <= GAME.value(EPSILON) + 0.03


def test_mmkd_converges_to_the_teacher():
    """The value of its game is 0, and only the teacher attains it."""
    policy, _, metrics, policies = play(mmkd, {"q": jnp.zeros((3, 2))})
    np.testing.assert_allclose(policies[0], np.full(4, 0.25), atol=1e-6)
    np.testing.assert_allclose(policy, SMALL.teacher[0], atol=0.02)
    assert abs(metrics["critic/distance"]) < 0.02
