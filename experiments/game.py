"""PbKD as a run: anchor, offline game, online rounds (stages 4 and 5).

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

from experiments.lab import Lab
from experiments.settings import GameConfig, SettingsError
from experiments.stages import Desk, train
from rkd_jax.data.collate import collate
from rkd_jax.data.pipeline import ZippedBatches, make_batches
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.evaluation.generation import fill_rows
from rkd_jax.losses import bradley_terry, check_epsilon
from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.objectives.reward_model import l2_penalty, make_reward_model, pair_returns
from rkd_jax.training.optim import OptimConfig, make_optimizer
from rkd_jax.training.state import TrainState, init_state, step_keys
from rkd_jax.training.update import make_update
from rkd_jax.types import GameBatch, GameSignal, Params, PreferenceSignal, Sequences

CHUNK = 32  # rows on the device at once


@dataclasses.dataclass(frozen=True)
class Table:
    """What the frozen trunk says about every response of a data set.

    ``sequences`` [n, (2,) P + T] and ``features`` [n, (2,) T, D] are host arrays in the
    order of the records; ``labels`` [n] is None for demonstrations.
    """

    sequences: Sequences
    features: np.ndarray
    labels: np.ndarray | None


class TextBook:
    """A frozen model's word on every text, computed once however often it comes.

    The same response stands in many pairs, and pairs accumulate over the rounds.

    Example: ``TextBook(lab.features).look_up(batch.sequences)``, ``[*batch, T, D]``.
    """

    def __init__(self, function):
        self._function = function
        self._known: dict[bytes, np.ndarray] = {}

    def look_up(self, sequences: Sequences) -> np.ndarray:
        """``function`` of every sequence, on the host."""
        shape = sequences.response_mask.shape[:-1]
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
        values = np.stack([self._known[key] for key in keys])
        return values.reshape(*shape, *values.shape[1:])


def tabulate(
    lab: Lab,
    book: TextBook,
    records: Sequence[DemonstrationRecord] | Sequence[PreferenceRecord],
) -> Table:
    """Tokenise every record and look its states up."""
    rows = [
        tokenize_record(r, lab.tokenizer, lab.rows, i) for i, r in enumerate(records)
    ]
    batch = collate(rows, lab.rows)
    states = book.look_up(batch.sequences)
    return Table(batch.sequences, states, getattr(batch, "label", None))


def in_chunks(function, tree) -> np.ndarray:
    """``function`` on `CHUNK` rows of ``tree`` at a time: one shape, compiled once."""
    count = len(jax.tree.leaves(tree)[0])
    parts = []
    for first in range(0, count, CHUNK):
        rows = jax.tree.map(lambda x, i=first: x[i : i + CHUNK], tree)
        kept = min(CHUNK, count - first)
        parts.append(np.asarray(function(fill_rows(rows, CHUNK)))[:kept])
    return np.concatenate(parts)


class Game:
    """Both players, their updates and tables; one instance for all phases of a run.

    Example::

        game = Game(lab, desk, config, demonstrations, held_out_pairs, seed=0)
        state = game.begin(warm_start_params)
        state = game.play("4-offline", state, pairs, steps=12)
    """

    def __init__(
        self,
        lab: Lab,
        desk: Desk,
        config: GameConfig,
        demonstrations: Sequence[DemonstrationRecord],
        held_out: Sequence[PreferenceRecord],
        *,
        temperature: float,
        seed: int,
    ):
        self.lab, self.desk, self.config = lab, desk, config
        self.temperature, self.seed = temperature, seed
        self.demonstrations = demonstrations
        self.book = TextBook(lab.features)
        self.demonstration_table = tabulate(lab, self.book, demonstrations)
        self.held_out_table = tabulate(lab, self.book, held_out)
        self.student_optimizer = make_optimizer(
            OptimConfig(learning_rate=config.learning_rate, weight_decay=0.0)
        )
        self.critic_optimizer = make_optimizer(
            OptimConfig(
                learning_rate=config.critic_learning_rate,
                weight_decay=0.0,
            )
        )
        self.anchor_optimizer = make_optimizer(
            OptimConfig(
                learning_rate=config.anchor_learning_rate,
                weight_decay=0.0,
            )
        )
        self.update = make_update(
            make_pbkd(
                lab.student,
                lab.token_rewards,
                epsilon=config.epsilon,
                temperature=temperature,
                l2=config.l2,
                sft_weight=config.sft_weight,
            ),
            student_optimizer=self.student_optimizer,
            critic_optimizer=self.critic_optimizer,
            critic_steps=config.critic_steps,
            accumulation=config.accumulation,
        )
        self.anchor_update = make_update(
            make_reward_model(lab.token_rewards, l2=config.l2),
            student_optimizer=self.anchor_optimizer,
        )
        self._compiled_pair_nll = jax.jit(self._pair_nll)
        self._compiled_held_out = jax.jit(self._held_out)
        self._untrained_anchor = init_state(
            self._new_head(),
            student_optimizer=self.anchor_optimizer,
            rng=jax.random.key(seed),
        )

    def begin(self, student_params: Params) -> TrainState:
        """The game before its first step: the warm start against an untrained head."""
        rng = jax.random.key(self.seed)
        return init_state(
            student_params,
            student_optimizer=self.student_optimizer,
            critic_params=self._new_head(),
            critic_optimizer=self.critic_optimizer,
            dual=self.config.dual,
            rng=rng,
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
            SettingsError: epsilon so large that a constant reward is inside the set.
        """
        folder = self.desk.run.stage(name).path
        if len(pairs) < self.config.pairs_per_step:
            raise SettingsError(
                f"{name}: {len(pairs)} pairs for --game.pairs-per-step "
                f"{self.config.pairs_per_step}; lower it or raise "
                "--pairs.offline-prompts"
            )
        table = tabulate(self.lab, self.book, pairs)
        anchor = self._fit_anchor(name, pairs, table)
        anchor_nll = self.pair_nll(anchor, table)
        try:
            check_epsilon(self.config.epsilon, float(anchor_nll.mean()))
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
            folder,
            state,
            self.update,
            self._batches(pairs),
            steps=int(state.step) + steps,
            config={"game": dataclasses.asdict(self.config), "seed": self.seed},
            prepare=self._prepare(table, anchor_nll),
            probe=lambda state: self._probe(state.critic.params),
        )

    def pair_nll(self, params: Params, table: Table) -> np.ndarray:
        """Penalised Bradley-Terry loss of every pair under a head, ``float32[n]``."""
        arrays = (table.sequences, table.features, table.labels)
        return in_chunks(lambda x: self._compiled_pair_nll(params, *x), arrays)

    def _fit_anchor(self, name: str, pairs, table: Table) -> Params:
        """Bradley-Terry maximum likelihood on all pairs so far, stopped early."""

        def prepare(state, batch):
            del state
            return batch, PreferenceSignal(table.features[batch.index])

        state = train(
            self.desk,
            f"{name.replace('-', ' ')}: anchor",
            self.desk.run.stage(f"{name}-anchor").path,
            jax.tree.map(jnp.copy, self._untrained_anchor),
            self.anchor_update,
            self._pair_batches(pairs),
            steps=self.config.anchor_steps,
            config={"game": dataclasses.asdict(self.config), "pairs": len(pairs)},
            prepare=prepare,
            probe=lambda state: self._probe(state.student.params),
            checkpoint_every=self.config.anchor_steps,
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
                demonstrations=self.demonstration_table.features[demonstrations.index],
                rollouts=lab.features(samples.sequences),
                preferences=table.features[pairs.index],
            )
            return GameBatch(demonstrations, samples.sequences, pairs), signal

        return prepare

    def _batches(self, pairs) -> ZippedBatches:
        demonstrations = make_batches(
            self.demonstrations,
            self.lab.tokenizer,
            self.lab.rows,
            batch_size=self.config.prompts_per_step,
            seed=self.seed,
        )
        return ZippedBatches(
            {
                "demonstrations": demonstrations,
                "preferences": self._pair_batches(pairs),
            }
        )

    def _pair_batches(self, pairs):
        return make_batches(
            pairs,
            self.lab.tokenizer,
            self.lab.rows,
            batch_size=self.config.pairs_per_step,
            seed=self.seed,
        )

    def _new_head(self) -> Params:
        width = self.lab.trunk.config.hidden_size
        return self.lab.reward_head.init(jax.random.key(self.seed), width)

    def _probe(self, params: Params) -> dict[str, jax.Array]:
        """What the held-out pairs say about a reward head."""
        table = self.held_out_table
        return self._compiled_held_out(
            params, table.sequences, table.features, table.labels
        )

    def _held_out(self, params: Params, sequences: Sequences, features, labels):
        returns = pair_returns(
            self.lab.token_rewards, params, sequences, features, gamma=1.0
        )
        hit = 0.5 * (1.0 + jnp.sign(returns.chosen - returns.rejected))
        return {
            "held_out/nll": bradley_terry(returns, label=labels).mean(),
            "held_out/accuracy": hit.mean(),
        }

    def _pair_nll(self, params: Params, sequences: Sequences, features, labels):
        returns = pair_returns(
            self.lab.token_rewards, params, sequences, features, gamma=1.0
        )
        nll = bradley_terry(returns, label=labels)
        return nll + self.config.l2 * l2_penalty(params)
