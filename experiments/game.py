"""PbKD as a run: anchor, offline game, online rounds.

Per-record quantities that never change (states of the frozen trunk, the anchor's loss)
are tabulated once and looked up by `index`; what changes with the student (its samples
and their states) is computed before every step in `prepare`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.course import Course
from experiments.lab import Lab
from experiments.settings import GameConfig, RewardConfig, SettingsError
from experiments.stages import Desk, train, training_key
from experiments.trainer import Step, constant_rate, record_batches
from rkd_jax.data.packing import is_packed
from rkd_jax.data.pipeline import ZippedBatches
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.losses import bradley_terry, check_epsilon
from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.objectives.reward_model import l2_penalty, make_reward_model, pair_returns
from rkd_jax.packed import Pairs
from rkd_jax.placement import fetch, fill_rows, follow_parameters, on_mesh
from rkd_jax.signals.cache_rows import located
from rkd_jax.training.state import TrainState, step_keys
from rkd_jax.types import GameBatch, GameSignal, Params, PreferenceSignal, Sequences

CHUNK = 32  # rows on the device at once


class TextBook:
    """A frozen model's word on every text, computed once however often it comes.

    The same response stands in many pairs, and pairs accumulate over the rounds; it is
    kept once.

    Example: ``TextBook(lab.features).look_up(batch.sequences)``, ``[*batch, T, D]``.
    """

    def __init__(self, function):
        self._function = function
        self._known: dict[bytes, np.ndarray] = {}

    def learn(self, sequences: Sequences) -> list[bytes]:
        """Take in what is new; the key of every sequence, in order.

        All processes have to call it with the same ones.
        """
        sequences = fetch(sequences)
        flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), sequences)
        keys = [
            tokens.tobytes() + mask.tobytes()
            for tokens, mask in zip(flat.tokens, flat.token_mask, strict=True)
        ]
        first = {key: i for i, key in enumerate(keys) if key not in self._known}
        if first:
            new = np.array(list(first.values()))
            values = in_chunks(self._function, jax.tree.map(lambda x: x[new], flat))
            self._known.update(zip(first, values, strict=True))
        return keys

    def look_up(self, sequences: Sequences) -> np.ndarray:
        """``function`` of every sequence, on the host."""
        values = np.stack([self._known[key] for key in self.learn(sequences)])
        shape = sequences.response_mask.shape[:-1]
        return values.reshape(*shape, *values.shape[1:])


@dataclasses.dataclass(frozen=True)
class Table:
    """What the frozen trunk says about every response of a data set.

    ``sequences`` [n, (2,) P + T] are host arrays in the order of the records;
    ``labels`` [n] is None for demonstrations, ``book`` for reward players that train
    the trunk.
    """

    sequences: Sequences
    labels: np.ndarray | None
    book: TextBook | None

    def __len__(self) -> int:
        return len(self.sequences.response_mask)

    def rows(self, index) -> Sequences:
        """Sequences of some records."""
        return jax.tree.map(lambda x: x[index], self.sequences)

    def states(self, index) -> np.ndarray | None:
        """Features of some records, ``[.., (2,) T, D]``."""
        return None if self.book is None else self.book.look_up(self.rows(index))

    def features(self, batch: Pairs) -> np.ndarray | None:
        """`states` of a batch's pairs; of packed ones at their columns, ``[B, T, D]``.

        There they are the same numbers and 0 in between: nothing is computed again. All
        processes have to call it, for the whole batch.
        """
        if self.book is None or not is_packed(batch):
            return self.states(batch.index)
        batch = fetch(batch)
        records = located(batch)
        states = self.states(np.array([number for number, _ in records]))
        laid = np.zeros(
            (*batch.sequences.response_mask.shape, states.shape[-1]), states.dtype
        )
        for (_, responses), members in zip(records, states, strict=True):
            for response, values in zip(responses, members, strict=True):
                laid[response.columns] = values[: len(response.targets)]
        return laid

    def chunks(self, function) -> np.ndarray:
        """``function(sequences, states, labels)`` of all records, `CHUNK` at a time."""

        def of_some(index):
            labels = None if self.labels is None else self.labels[index]
            return function(self.rows(index), self.states(index), labels)

        return in_chunks(of_some, np.arange(len(self)))


def tabulate(
    lab: Lab,
    book: TextBook,
    records: Sequence[DemonstrationRecord] | Sequence[PreferenceRecord],
) -> Table:
    """Tokenise every record and look its states up."""
    batch = lab.collated(records)
    if not lab.trains_trunk:
        book.learn(batch.sequences)
    labels = getattr(batch, "label", None)
    return Table(batch.sequences, labels, None if lab.trains_trunk else book)


def in_chunks(function, tree) -> np.ndarray:
    """``function`` on `CHUNK` rows of ``tree`` at a time: one shape, compiled once."""
    count = len(jax.tree.leaves(tree)[0])
    parts = []
    for first in range(0, count, CHUNK):
        rows = jax.tree.map(lambda x, i=first: x[i : i + CHUNK], tree)
        kept = min(CHUNK, count - first)
        parts.append(fetch(function(fill_rows(rows, CHUNK)))[:kept])
    return np.concatenate(parts)


class Game:
    """Both players and their updates, compiled once for all courses and phases.

    Example::

        match = Game(lab, config.game, config.reward).open(desk, course, seed=0)
        state = match.play("4-offline", match.begin(), course.pairs, steps=12)
    """

    def __init__(self, lab: Lab, config: GameConfig, reward: RewardConfig):
        self.lab, self.config, self.reward = lab, config, reward
        self.step = Step(
            make_pbkd(
                lab.student,
                lab.token_rewards,
                epsilon=config.epsilon,
                temperature=lab.policy.temperature,
                constraint=config.constraint,
                l2=reward.l2,
                sft_weight=config.sft_weight,
            ),
            student_optimizer=constant_rate(config.learning_rate),
            critic_optimizer=constant_rate(config.critic_learning_rate),
            critic_steps=config.critic_steps,
            accumulation=config.accumulation,
        )
        self.anchor_step = Step(
            make_reward_model(lab.token_rewards, l2=reward.l2),
            student_optimizer=constant_rate(reward.learning_rate),
        )
        parts = config.accumulation
        lab.check_rows("--policy.rollout-prompts", lab.policy.rollout_prompts, parts)
        lab.check_rows("--game.pairs-per-step", config.pairs_per_step, parts)
        lab.check_rows("--reward.batch-size", reward.batch_size)
        self.update = self.step.update_on(lab.mesh, max_traces=lab.widths)
        self.anchor_update = self.anchor_step.update_on(lab.mesh, max_traces=lab.widths)
        self._pair_nll = follow_parameters(jax.jit(self._pair_nll))
        self._held_out = jax.jit(self._held_out)

    def open(self, desk: Desk, course: Course, *, seed: int) -> Match:
        """The game on one course."""
        return Match(self, desk, course, seed)

    def pair_nll(self, params: Params, table: Table) -> np.ndarray:
        """Penalised Bradley-Terry loss of every pair under a head, ``float32[n]``."""
        return table.chunks(lambda *rows: self._pair_nll(params, rows))

    def held_out(self, params: Params, table: Table) -> dict[str, jax.Array]:
        """What held-out pairs say about a reward head."""
        states = table.states(slice(None))
        return self._held_out(params, table.sequences, states, table.labels)

    def _held_out(self, params: Params, sequences: Sequences, features, labels):
        with on_mesh(self.lab.mesh):  # every device reads all of them: they are few
            returns = self._returns(params, sequences, features)
            hit = 0.5 * (1.0 + jnp.sign(returns.chosen - returns.rejected))
            return {
                "held_out/nll": bradley_terry(returns, label=labels).mean(),
                "held_out/accuracy": hit.mean(),
            }

    def _pair_nll(self, params: Params, rows):
        sequences, features, labels = rows
        nll = bradley_terry(self._returns(params, sequences, features), label=labels)
        return nll + self.reward.l2 * l2_penalty(params)

    def _returns(self, params: Params, sequences: Sequences, features):
        rewards = self.lab.token_rewards
        return pair_returns(rewards, params, sequences, features, gamma=1.0)


class Match:
    """One game on one course: its tables and its phases; see `Game`."""

    def __init__(self, game: Game, desk: Desk, course: Course, seed: int):
        self.game, self.desk, self.course, self.seed = game, desk, course, seed
        lab = self.lab = game.lab
        self.book = TextBook(lab.features)
        self.demonstration_table = tabulate(lab, self.book, course.demonstrations)
        self.held_out_table = tabulate(lab, self.book, course.held_out_pairs)
        self._untrained_anchor = game.anchor_step.begin(
            lab.new_reward(jax.random.key(seed)), rng=training_key(seed), mesh=lab.mesh
        )

    def begin(self) -> TrainState:
        """Before the first step: the course's start against an untrained head."""
        return self.game.step.begin(
            self.course.start,
            critic=self.lab.new_reward(jax.random.key(self.seed)),
            dual=self.game.config.dual,
            rng=training_key(self.seed),
            mesh=self.lab.mesh,
        )

    def play(
        self,
        name: str,
        state: TrainState,
        pairs: Sequence[PreferenceRecord],
        *,
        steps: int,
    ) -> TrainState:
        """One phase: fit the anchor on all pairs, then ``steps`` more steps.

        In the first phase the reward player starts at the anchor, later where it was;
        the multiplier is kept.

        Raises:
            SettingsError: too few pairs, or epsilon so large that a constant reward is
                inside the set.
        """
        config = self.game.config
        needed = max(config.pairs_per_step, self.game.reward.batch_size)
        if len(pairs) < needed:
            raise SettingsError(
                f"{name}: {len(pairs)} pairs for batches of {needed}; lower "
                "--game.pairs-per-step and --reward.batch-size or raise "
                "--pairs.offline-prompts"
            )
        table = tabulate(self.lab, self.book, pairs)
        anchor = self._fit_anchor(name, pairs, table)
        anchor_nll = self.game.pair_nll(anchor, table)
        try:
            check_epsilon(config.epsilon, float(anchor_nll.mean()))
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from None
        if int(state.step) == 0:
            critic = dataclasses.replace(
                state.critic, params=jax.tree.map(jnp.copy, anchor)
            )
            state = dataclasses.replace(state, critic=critic)
        return train(
            self.desk,
            name.replace("-", " "),
            self.desk.run.stage(name).path,
            state,
            self.game.update,
            self._batches(pairs),
            steps=int(state.step) + steps,
            config={"game": dataclasses.asdict(config), "seed": self.seed},
            prepare=self._prepare(table, anchor_nll),
            probe=lambda s: self.game.held_out(s.critic.params, self.held_out_table),
        )

    def _fit_anchor(self, name: str, pairs, table: Table) -> Params:
        """Bradley-Terry maximum likelihood on all pairs so far, stopped early."""
        reward = self.game.reward

        def prepare(state, batch):
            del state
            return batch, PreferenceSignal(table.features(batch))

        state = train(
            self.desk,
            f"{name.replace('-', ' ')}: anchor",
            self.desk.run.stage(f"{name}-anchor").path,
            jax.tree.map(jnp.copy, self._untrained_anchor),
            self.game.anchor_update,
            self._pair_batches("--reward", pairs, reward.batch_size, reward.row_length),
            steps=reward.steps,
            config={"reward": dataclasses.asdict(reward), "pairs": len(pairs)},
            prepare=prepare,
            probe=lambda s: self.game.held_out(s.student.params, self.held_out_table),
            checkpoint_every=reward.steps,
        )
        return state.student.params

    def _prepare(self, table: Table, anchor_nll: np.ndarray):
        """Roll out the current student and look everything else up."""
        lab = self.lab

        def prepare(state: TrainState, batch):
            demonstrations, pairs = batch["demonstrations"], batch["preferences"]
            samples = lab.roll_out(
                state.student.params,
                demonstrations.sequences.prompts,
                step_keys(state).prepare,
            )
            signal = GameSignal(
                anchor_nll=anchor_nll[pairs.index],
                demonstrations=self.demonstration_table.states(demonstrations.index),
                rollouts=lab.features(samples.sequences),
                preferences=table.features(pairs),
            )
            return GameBatch(demonstrations, samples.sequences, pairs), signal

        return prepare

    def _batches(self, pairs) -> ZippedBatches:
        lab = self.lab
        demonstrations = lab.batches(
            self.course.demonstrations,
            batch_size=lab.policy.rollout_prompts,
            seed=self.seed,
        )
        config = self.game.config
        preferences = self._pair_batches(
            "--game", pairs, config.pairs_per_step, config.row_length
        )
        return ZippedBatches(
            {"demonstrations": demonstrations, "preferences": preferences}
        )

    def _pair_batches(self, what: str, pairs, batch_size: int, row_length: int):
        return record_batches(
            what,
            self.lab,
            pairs,
            batch_size=batch_size,
            row_length=row_length,
            seed=self.seed,
        )
