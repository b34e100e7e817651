"""The training update itself, driven on the mini bed until it solves the game.

Nothing here stands in for the library: `make_pbkd` and `make_update` as an experiment
uses them, a logit table as the student, a bounded reward table as the reward player,
rollouts sampled from the current student. The convex solver and the brute force of
`test_pbkd_game` say what the value of the game is.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.training.state import init_state, step_keys
from rkd_jax.training.update import make_update
from rkd_jax.types import (
    DemonstrationBatch,
    GameBatch,
    GameSignal,
    PreferenceBatch,
    Sequences,
)
from tests.tabular.bed import MINI, MINI_PAIRS, MINI_REWARD, preference_nll
from tests.tabular.game import SMALL

STEPS, AVERAGED = 2500, 1500  # steps, and how many of the last ones are averaged
SAMPLES = 64  # per prompt row and step
# The teacher's law (0.2, 0.4, 0.1, 0.3) as ten demonstrations.
TAUGHT = np.repeat(np.arange(4), (2, 4, 1, 3))


@dataclasses.dataclass(frozen=True)
class MiniConfig:
    vocab_size: int = 2
    hidden_size: int = 3
    max_length: int = 3
    num_layers: int = 1
    logit_softcap: float | None = None


class MiniLM:
    """Logits by prefix of the mini bed: empty, after 0, after 1. The prompt is 0."""

    config = MiniConfig()

    def hidden(self, params, tokens, *, positions=None, segment_ids=None):
        del params, positions, segment_ids
        first = tokens[:, 1]
        nodes = jnp.stack([jnp.zeros_like(first), 1 + first, 1 + first], axis=1)
        return jax.nn.one_hot(nodes, 3)

    def head(self, params):
        return params["logits"]

    def head_bias(self, params):
        del params

    def unembed(self, params, hidden):
        return hidden @ params["logits"]


def mini_sequences(indices) -> Sequences:
    """Responses 00, 01, 10, 11 by number, behind the one-token prompt."""
    indices = jnp.asarray(indices)
    actions = jnp.asarray(MINI.actions)[indices]
    tokens = jnp.concatenate([jnp.zeros_like(actions[..., :1]), actions], axis=-1)
    return Sequences(tokens, tokens >= 0, actions >= 0)


def mini_rewards(params, sequences: Sequences, features=None):
    """A bounded reward table [3, 2] as the reward player."""
    del features
    first, second = sequences.targets[..., 0], sequences.targets[..., 1]
    table = jnp.tanh(params["rewards"])
    rewards = [table[jnp.zeros_like(first), first], table[1 + first, second]]
    return jnp.stack(rewards, axis=-1)


def response_probs(logits):
    """[4]: probabilities of the four responses."""
    probs = jax.nn.softmax(logits, axis=-1)
    return (jnp.expand_dims(probs[0], 1) * probs[1:]).reshape(4)


def pairs() -> PreferenceBatch:
    """The four soft-labelled comparisons."""
    sequences = mini_sequences(MINI_PAIRS[:, 1:])
    return PreferenceBatch(
        sequences,
        sequences,
        jnp.asarray(SMALL.labels, jnp.float32),
        jnp.full((4, 2), jnp.nan),
        jnp.arange(4),
    )


def anchor_nll():
    """float32[4]: the loss of every comparison under the true reward."""
    margins = SMALL.differences @ SMALL.anchor
    each = [
        preference_nll(m, label) for m, label in zip(margins, SMALL.labels, strict=True)
    ]
    return jnp.asarray(each, jnp.float32)


def play(epsilon):
    """Averages over the last steps: policy, reward table, slack."""
    student, critic = optax.sgd(0.05), optax.sgd(0.05)
    update = make_update(
        make_pbkd(MiniLM(), mini_rewards, epsilon=epsilon),
        student_optimizer=student,
        critic_optimizer=critic,
        critic_steps=5,
    )
    state = init_state(
        {"logits": jnp.zeros((3, 2))},
        student_optimizer=student,
        critic_params={"rewards": jnp.asarray(np.arctanh(MINI_REWARD[0]), jnp.float32)},
        critic_optimizer=critic,
        rng=jax.random.key(0),
    )
    taught = mini_sequences(TAUGHT)
    demonstrations = DemonstrationBatch(taught, taught, jnp.arange(len(TAUGHT)))
    preferences, signal = pairs(), GameSignal(anchor_nll())

    def step(state, _):
        probs = response_probs(state.student.params["logits"])
        drawn = jax.random.categorical(
            step_keys(state).prepare, jnp.log(probs), shape=(len(TAUGHT), SAMPLES)
        )
        batch = GameBatch(demonstrations, mini_sequences(drawn), preferences)
        state, metrics = update(state, None, batch, signal)
        table = jnp.tanh(state.critic.params["rewards"])
        return state, (probs, table, metrics["critic/slack"])

    _, history = jax.jit(lambda s: jax.lax.scan(step, s, length=STEPS))(state)
    return tuple(np.asarray(x[-AVERAGED:], np.float64).mean(0) for x in history)


@pytest.mark.parametrize(("epsilon", "value"), [(0.01, -0.172103), (0.05, -0.021269)])
def test_the_update_converges_to_the_value_of_the_game(epsilon, value):
    policy, table, slack = play(epsilon)

    # The student: against its worst reward in the set it does as well as any can.
    worst, _ = SMALL.inner(policy[None], epsilon)
    uniform, _ = SMALL.inner(np.full((1, 4), 0.25), epsilon)
    assert worst >= value - 1e-6  # no policy does better than the value
    assert worst <= value + 0.03
    assert uniform >= value + 0.3  # where it came from is far away

    # The reward player: its average reward is in the set, and holds the student there.
    rewards = table.ravel()
    assert SMALL.excess(rewards) <= 1.1 * epsilon
    assert abs(slack) <= 0.1 * epsilon
    returns = (SMALL.features @ rewards)[0]
    best_answer = float(SMALL.teacher[0] @ returns - returns.max())
    assert value - 0.03 <= best_answer <= value + 1e-3 + 0.1 * epsilon
