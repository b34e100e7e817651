"""Ground truth: token MDPs small enough to enumerate, in float64 numpy.

`BED_E` has variable length: vocabulary a = 0, b = 1, EOS = 2, horizon 4 (EOS ends the
episode, the fourth action always does), two prompts. `MINI` has one prompt, two tokens
and two steps, so that a whole game can be solved by brute force.

Prefixes are numbered in heap order: the empty one is k = 0, appending token 0 gives
2k + 1, appending token 1 gives 2k + 2. A table over (x, k, a) is a whole model:
logits, rewards or action values. Nothing numeric here uses the library under test;
`TabularLM` and `tabular_rewards` put a table behind the library's interfaces.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.types import Prompts, Sequences

A, B, EOS = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Bed:
    """One tree of responses, shared by all prompts; every policy is a logit table."""

    horizon: int
    vocabulary: int
    eos: int | None
    prompt_weights: tuple[float, ...]  # d_0, sums to 1

    @functools.cached_property
    def prefixes(self) -> int:
        """Number K of non-terminal prefixes."""
        return 2**self.horizon - 1

    @functools.cached_property
    def table_shape(self) -> tuple[int, int, int]:
        """(X, K, V)."""
        return len(self.prompt_weights), self.prefixes, self.vocabulary

    @functools.cached_property
    def sequences(self) -> list[tuple[int, ...]]:
        """All N responses in lexicographic order."""

        def extend(prefix):
            if len(prefix) == self.horizon or (prefix and prefix[-1] == self.eos):
                return [prefix]
            branches = (extend((*prefix, a)) for a in range(self.vocabulary))
            return list(itertools.chain(*branches))

        return extend(())

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """bool[N, T]."""
        lengths = [[len(y)] for y in self.sequences]
        return np.arange(self.horizon) < np.array(lengths)

    @functools.cached_property
    def actions(self) -> np.ndarray:
        """int32[N, T], 0 in padding."""
        pad = [y + (0,) * (self.horizon - len(y)) for y in self.sequences]
        return np.array(pad, np.int32)

    @functools.cached_property
    def states(self) -> np.ndarray:
        """int32[N, T], the prefix before each action, 0 in padding."""
        rows = np.zeros((len(self.sequences), self.horizon), np.int32)
        for i, y in enumerate(self.sequences):
            for t in range(1, len(y)):
                rows[i, t] = 2 * rows[i, t - 1] + 1 + y[t - 1]
        return rows

    def index(self, *sequence: int) -> int:
        """Position of a response in the enumeration."""
        return self.sequences.index(sequence)

    def rows(self, table: np.ndarray) -> np.ndarray:
        """[X, N, T, V]: the table's row at every visited prefix."""
        return table[:, self.states]

    def taken(self, table: np.ndarray) -> np.ndarray:
        """[X, N, T]: the table's entry of every action, 0 in padding."""
        return np.where(self.mask, table[:, self.states, self.actions], 0.0)

    def sequence_log_probs(self, logits: np.ndarray) -> np.ndarray:
        """[X, N]."""
        return self.taken(log_softmax(logits)).sum(-1)

    def weights(self, logits: np.ndarray) -> np.ndarray:
        """[X, N]: d_0(x) pi(y | x), sums to 1."""
        d0 = np.array(self.prompt_weights)[:, None]
        return d0 * np.exp(self.sequence_log_probs(logits))

    def returns(self, rewards: np.ndarray, gamma: float = 1.0) -> np.ndarray:
        """[X, N]: discounted return of every response."""
        return self.taken(rewards) @ gamma ** np.arange(self.horizon)

    def expected_return(self, logits, rewards, gamma: float = 1.0) -> float:
        """J(pi, r)."""
        return float((self.weights(logits) * self.returns(rewards, gamma)).sum())

    def expected_length(self, logits: np.ndarray) -> float:
        return float((self.weights(logits) * self.mask.sum(-1)).sum())

    def occupancy(self, logits: np.ndarray, gamma: float = 1.0) -> np.ndarray:
        """[X, K, V]: J(pi, r) is its inner product with r."""
        measure = np.zeros(self.table_shape)
        weights = self.weights(logits)
        for x, (i, y) in itertools.product(
            range(len(weights)), enumerate(self.sequences)
        ):
            for t, a in enumerate(y):
                measure[x, self.states[i, t], a] += gamma**t * weights[x, i]
        return measure

    def policy_gradient(self, logits, rewards, gamma: float = 1.0) -> np.ndarray:
        """[X, K, V]: gradient of J in the logits, as total score times total return."""
        gradient = np.zeros(self.table_shape)
        probs, states = np.exp(log_softmax(logits)), self.states
        credit = self.weights(logits) * self.returns(rewards, gamma)
        for x, (i, y) in itertools.product(
            range(len(credit)), enumerate(self.sequences)
        ):
            for t, a in enumerate(y):
                score = np.eye(self.vocabulary)[a] - probs[x, states[i, t]]
                gradient[x, states[i, t]] += credit[x, i] * score
        return gradient


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def preference_nll(margins: np.ndarray, labels: np.ndarray) -> float:
    """Mean Bradley-Terry loss of reward differences under soft labels, nats."""
    wins, losses = np.logaddexp(0.0, -margins), np.logaddexp(0.0, margins)
    return float(np.mean(labels * wins + (1.0 - labels) * losses))


BED_E = Bed(horizon=4, vocabulary=3, eos=EOS, prompt_weights=(0.6, 0.4))
_X, _K, _V = np.meshgrid(*(np.arange(n) for n in BED_E.table_shape), indexing="ij")
TEACHER = 1.5 * np.sin(0.9 * _K + 2.1 * _V + 0.4 + 1.1 * _X)
STUDENT = np.cos(1.7 * _K - 0.8 * _V + 0.6 + 0.5 * _X)
REFERENCE = 0.5 * np.sin(2.3 * _K + 1.9 * _V + 1.0 - 0.7 * _X)
REWARD = np.sin(1.1 * _K - 2.7 * _V + 0.3 + 0.9 * _X)
CHOSEN, REJECTED = BED_E.index(A, B, EOS), BED_E.index(B, EOS)  # of prompt 0

# The 84 comparisons of the PbKD game: prompt x, responses i < j.
PAIRS = np.array(
    [
        (x, i, j)
        for x, i, j in itertools.product(range(2), range(31), range(31))
        if i < j and (7 * i + 3 * j + x) % 11 == 0
    ]
)

MINI = Bed(horizon=2, vocabulary=2, eos=None, prompt_weights=(1.0,))
MINI_TEACHER = np.array([0.2, 0.4, 0.1, 0.3])  # probabilities of 00, 01, 10, 11
MINI_REWARD = np.array([[[0.3, -0.2], [0.4, -0.1], [-0.5, 0.2]]])
MINI_PAIRS = np.array([(0, 0, 1), (0, 0, 2), (0, 1, 3), (0, 2, 3)])


# Nodes of the tree, terminal ones included: 0 is the prompt, 1 + V k + a is what
# action a leads to from prefix k. A state before a target and a state after one are
# then both nodes, and a one-hot of the node is a hidden state that loses nothing.
_NODES = 1 + BED_E.prefixes * BED_E.vocabulary
# Prefix k > 0 is action (k - 1) % 2 from its parent. As int32, an index means the same
# in both precisions: jax keeps what it traced in one of them for the other.
_PREFIX_NODES = np.array(
    [0, *(1 + 3 * ((k - 1) // 2) + (k - 1) % 2 for k in range(1, BED_E.prefixes))],
    np.int32,
)
_CHILDREN = np.tile(np.arange(_NODES)[:, None], 3)  # a terminal node stays where it is
_CHILDREN[_PREFIX_NODES] = 1 + np.arange(BED_E.prefixes * 3).reshape(-1, 3)


@dataclasses.dataclass(frozen=True)
class TabularConfig:
    vocab_size: int = 3
    hidden_size: int = 2 * _NODES
    max_length: int = 16
    logit_softcap: float | None = None
    num_layers: int = 1


class TabularLM:
    """A logit table of `BED_E` behind the library's `CausalLM` interface.

    The prompt is one token whose id is the prompt number x (so 0 or 1), left-padded as
    usual. Parameters are ``{"logits": float[2, 15, 3]}``. The hidden state is the
    one-hot of the tree node, the head holds the table's rows, so gradients reach the
    table through ``head``. Padding has the zero hidden state. The cache is the node
    reached by each row, -1 before the prompt.
    """

    config = TabularConfig()

    def init(self, rng: jax.Array) -> dict[str, jax.Array]:
        return {"logits": jax.random.normal(rng, BED_E.table_shape)}

    def init_cache(self, params, batch_size: int, length: int) -> dict[str, jax.Array]:
        del params, length
        return {"node": jnp.full((batch_size,), -1, jnp.int32)}

    def hidden(self, params, tokens, *, positions=None, segment_ids=None, cache=None):
        del positions
        real = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        start = cache or self.init_cache(params, tokens.shape[0], tokens.shape[1])
        children = jnp.asarray(_CHILDREN, jnp.int32)

        def step(node, column):
            token, is_real = column
            child = children[node % _NODES, token % 3] + node // _NODES * _NODES
            following = jnp.where(node < 0, token * _NODES, child)
            node = jnp.where(is_real > 0, following, node)
            return node, jnp.where(is_real > 0, node, -1)

        last, nodes = jax.lax.scan(step, start["node"], (tokens.T, real.T))
        width, dtype = self.config.hidden_size, params["logits"].dtype
        hidden = jax.nn.one_hot(nodes.T, width, dtype=dtype)
        return hidden if cache is None else (hidden, {"node": last})

    def head(self, params) -> jax.Array:
        table = jnp.zeros((2, _NODES, 3), params["logits"].dtype)
        return table.at[:, _PREFIX_NODES].set(params["logits"]).reshape(-1, 3)

    def head_bias(self, params) -> None:
        del params

    def unembed(self, params, hidden: jax.Array) -> jax.Array:
        return hidden @ self.head(params)

    def logits(self, params, tokens, *, positions=None, segment_ids=None):
        return self.unembed(
            params, self.hidden(params, tokens, segment_ids=segment_ids)
        )


def tabular_rewards(params, sequences: Sequences, features=None) -> jax.Array:
    """A reward table as a reward player: ``[*batch, T]``, 0 in padding.

    Parameters are ``{"rewards": float[2, 15, 3]}``; ``sequences`` as `bed_sequences`.
    """
    del features
    x = sequences.tokens[..., sequences.prompt_width - 1]
    prefix, columns = jnp.zeros_like(x), []
    for t in range(sequences.targets.shape[-1]):
        action = sequences.targets[..., t]
        columns.append(params["rewards"][x, prefix, action])
        prefix = jnp.minimum(2 * prefix + 1 + action, BED_E.prefixes - 1)
    return jnp.where(sequences.response_mask, jnp.stack(columns, axis=-1), 0.0)


def bed_prompts(numbers, width: int = 2) -> Prompts:
    """Prompts of `BED_E` by number, left-padded to ``width`` columns: [B, width]."""
    tokens = jnp.zeros((len(numbers), width), jnp.int32)
    tokens = tokens.at[:, -1].set(jnp.asarray(numbers, jnp.int32))
    mask = jnp.broadcast_to(jnp.arange(width) == width - 1, tokens.shape)
    return Prompts(tokens, mask)


def bed_sequences(numbers, indices, width: int = 2) -> Sequences:
    """Enumerated responses ``indices`` after prompts ``numbers``: [*batch, width + 4].

    Both are integer arrays of one shape.
    """
    numbers, indices = np.asarray(numbers), np.asarray(indices)
    tokens = np.zeros((*indices.shape, width + BED_E.horizon), np.int32)
    tokens[..., width - 1] = numbers
    tokens[..., width:] = BED_E.actions[indices]
    mask = np.zeros(tokens.shape, bool)
    mask[..., width - 1] = True
    mask[..., width:] = BED_E.mask[indices]
    arrays = (jnp.asarray(x) for x in (tokens, mask, BED_E.mask[indices]))
    return Sequences(*arrays)


def single(tree):
    """Float32 where float64, as in training."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, tree
    )
