"""Reward models fitted to a course's pairs: heads on one frozen trunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from experiments.course import Course
from experiments.game import TextBook, tabulate
from experiments.lab import Lab
from experiments.settings import FitConfig, RewardConfig
from experiments.stages import Desk
from experiments.trainer import Trainer
from rkd_jax.data.records import PreferenceRecord
from rkd_jax.losses import reward_scale, trajectory_return
from rkd_jax.objectives.reward_model import init_members, make_reward_ensemble
from rkd_jax.placement import follow_parameters
from rkd_jax.signals.resampling import bootstrap_weights
from rkd_jax.signals.reward_oracle import RewardModelOracle
from rkd_jax.types import Pair, Params, PreferenceSignal


class RewardSource(Protocol):
    """Who says what the two responses of every pair are worth."""

    members: int  # K rewards of each

    def of_pairs(
        self, desk: Desk, stage: str, course: Course, *, seed: int
    ) -> np.ndarray:
        """``float32[n, 2, K]`` of the course's pairs; trained first where need be."""
        ...


class OracleRewards:
    """What the oracle said when it labelled the pairs."""

    members = 1

    def of_pairs(
        self, desk: Desk, stage: str, course: Course, *, seed: int
    ) -> np.ndarray:
        """As the records carry it."""
        del desk, stage, seed
        found = [(pair.chosen_reward, pair.rejected_reward) for pair in course.pairs]
        return np.array(found, np.float32)[:, :, None]


class RewardModels:
    """An ensemble of heads, each fitted to its own bootstrap resample of the pairs.

    A single member is fitted to the pairs as they are.
    """

    def __init__(self, lab: Lab, options: RewardConfig, members: int):
        self.lab, self.members = lab, members
        fit = FitConfig(
            options.learning_rate,
            options.batch_size,
            accumulation=1,
            row_length=options.row_length,
        )
        objective = make_reward_ensemble(lab.token_rewards, members, l2=options.l2)
        self.trainer, self.steps = Trainer(lab, objective, fit), options.steps
        members = jax.vmap(self._return, in_axes=(0, None), out_axes=-1)
        self._returns = follow_parameters(jax.jit(members))

    def train(self, desk: Desk, stage: str, course: Course, *, seed: int) -> Params:
        """The fitted heads, stacked."""
        lab = self.lab
        book = TextBook(lab.features)
        table = tabulate(lab, book, course.pairs)
        start = init_members(lab.new_reward, jax.random.key(seed), self.members)

        def prepare(state, batch):
            del state
            weights = None
            if self.members > 1:
                weights = self._weights(jnp.asarray(batch.index), seed)
            return batch, PreferenceSignal(table.features(batch), weights)

        return self.trainer.train(
            desk,
            stage,
            start,
            course.pairs,
            steps=self.steps,
            seed=seed,
            prepare=prepare,
        )

    def of_pairs(
        self, desk: Desk, stage: str, course: Course, *, seed: int
    ) -> np.ndarray:
        """Fitted to the course's pairs in ``{stage}-rewards``."""
        params = self.train(desk, f"{stage}-rewards", course, seed=seed)
        return self.rewards(params, course.pairs)

    def rewards(self, params: Params, pairs: Sequence[PreferenceRecord]) -> np.ndarray:
        """Return of both responses of every pair, ``float32[n, 2, K]``."""
        table = tabulate(self.lab, TextBook(self.lab.features), pairs)

        def returns(sequences, states, labels):
            del labels
            return self._returns(params, (sequences, states))

        return table.chunks(returns)

    def oracle(
        self, params: Params, *, reduce: Literal["mean", "min"] = "mean"
    ) -> RewardModelOracle:
        """The ensemble as one oracle on text."""
        lab = self.lab
        return RewardModelOracle(
            lab.text_rewards,
            lab.whole_reward(params),
            lab.tokenizer,
            lab.rows,
            member_axes=0 if lab.trains_trunk else {"trunk": None, "head": 0},
            reduce=reduce,
        )

    def _weights(self, index: jax.Array, seed: int) -> jax.Array:
        """``[*index, K]``; numbers without meaning where a packed row has no record."""
        flat = bootstrap_weights(index.reshape(-1), members=self.members, seed=seed)
        return flat.reshape(*index.shape, self.members)

    def _return(self, params: Params, rows) -> jax.Array:
        sequences, features = rows
        rewards = self.lab.token_rewards(params, sequences, features)
        return trajectory_return(rewards, sequences.response_mask)


def scaled(rewards: np.ndarray) -> np.ndarray:
    """Every reward model's differences have root mean square 1, ``[n, 2, K]``."""
    chosen, rejected = rewards[:, 0].T, rewards[:, 1].T
    scale = reward_scale(Pair(chosen, rejected), how="rms_pair")
    return (rewards / scale).astype(np.float32)


def with_rewards(
    pairs: Sequence[PreferenceRecord], rewards: np.ndarray
) -> list[PreferenceRecord]:
    """The same pairs carrying other rewards, ``[n, 2]``."""
    return [
        dataclasses.replace(
            pair, chosen_reward=float(chosen), rejected_reward=float(rejected)
        )
        for pair, (chosen, rejected) in zip(pairs, rewards, strict=True)
    ]
