"""Models and data of the updates that `mesh_check` compares between meshes.

Everything divides over eight devices but for the key-value heads, which are replicated.
What frozen models say is random: of it no more is asked than to be the same everywhere.
"""

import dataclasses
import functools

import jax
import numpy as np

from rkd_jax.data.packing import collate_packed, pack
from rkd_jax.data.tokenize import Tokenized
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.types import (
    DemonstrationBatch,
    GameBatch,
    GameSignal,
    ImitationBatch,
    PreferenceBatch,
    Sequences,
    WhiteBoxSignal,
)

CONFIG = DecoderConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_length=16,
)
MODEL = Decoder(CONFIG)
TEACHER = Decoder(dataclasses.replace(CONFIG, hidden_size=24))
AXES, TEACHER_AXES = MODEL.logical_axes(), TEACHER.logical_axes()
B, G, P, T = 16, 2, 3, 6
V, D = CONFIG.vocab_size, TEACHER.config.hidden_size


@functools.cache
def student():
    return MODEL.init(jax.random.key(0))


@functools.cache
def teacher():
    return TEACHER.init(jax.random.key(1))


def normal(*shape, seed=4, scale=1.0):
    return np.random.default_rng(seed).normal(0.0, scale, shape).astype(np.float32)


def drawn(head, width, seed=5):
    """Random parameters of a head: its own, which are 0, move nobody else."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: head.init(key, width), jax.random.key(0))
    return jax.tree.map(
        lambda x: generator.normal(0.0, 0.3, x.shape).astype(np.float32), shapes
    )


def log_probs(*shape, seed=6):
    """Of a distribution over the last axis."""
    scores = normal(*shape, seed=seed, scale=2.0)
    return np.asarray(jax.nn.log_softmax(scores))


def sequences(*batch, seed=0):
    """Responses of every length from 1 to T."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (*batch, P + T)).astype(np.int32)
    mask = np.arange(T) < rng.integers(1, T + 1, (*batch, 1))
    token_mask = np.concatenate([np.ones((*batch, P), bool), mask], axis=-1)
    return Sequences(tokens, token_mask, mask)


def demonstrations(seed=0):
    rows = sequences(B, seed=seed)
    return DemonstrationBatch(rows, rows, np.arange(B, dtype=np.int32))


def imitation():
    """Demonstrations, and other responses to imitate on."""
    return ImitationBatch(demonstrations(), demonstrations(seed=1))


def preferences():
    rows = sequences(B, 2, seed=2)
    label = np.random.default_rng(7).uniform(0.5, 1.0, B).astype(np.float32)
    index = np.arange(B, dtype=np.int32)
    return PreferenceBatch(rows, rows, label, normal(B, 2, seed=8), index)


def packed_preferences():
    """Pairs of any lengths in B rows, the last of them empty."""
    rng = np.random.default_rng(3)

    def ids(length):
        return rng.integers(0, V, length).tolist()

    lengths = rng.integers(1, 4, (14, 3)).tolist()
    rows = [
        Tokenized(i, ids(p), ids(1), (ids(a), ids(b)))
        for i, (p, a, b) in enumerate(lengths)
    ]
    bins = pack(rows, CONFIG.max_length)
    return collate_packed(bins + [[]] * (B - len(bins)), CONFIG.max_length)


def game(**changes):
    """Demonstrations, rollouts and pairs."""
    whole = GameBatch(demonstrations(), sequences(B, G, seed=3), preferences())
    return dataclasses.replace(whole, **changes)


def game_signal():
    """The pairs' losses under the anchor, and a trunk's states of all responses."""
    return GameSignal(
        anchor_nll=np.full(B, 0.6, np.float32),
        demonstrations=normal(B, T, D, seed=10),
        rollouts=normal(B, G, T, D, seed=11),
        preferences=normal(B, 2, T, D, seed=12),
    )


def white_box_signal(*names, critics=()):
    """The teacher's states of the named responses, and a trunk's of all of them."""
    states = {
        "rollouts": normal(B, G, T, D, seed=13),
        "preferences": normal(B, 2, T, D, seed=14),
        "demonstrations": normal(B, T, D, seed=15),
    }
    features = {
        f"{name[:-1]}_features": normal(*found.shape, seed=16 + i)
        for i, (name, found) in enumerate(states.items())
    }
    return WhiteBoxSignal(
        np.full((B, *critics), 0.6, np.float32),
        **{name: states[name] for name in names},
        **features,
    )
