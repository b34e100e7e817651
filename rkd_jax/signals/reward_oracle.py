"""Trained reward models as oracles: text in, rewards out.

`make_return_scorer` works on sequences, `RewardModelOracle` on text. With the latter
what a reward model learned labels new pairs, ranks samples or fills caches wherever an
`Oracle` is asked for. Both take one model or K of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from rkd_jax.data.collate import batch_widths, collate
from rkd_jax.data.records import DemonstrationRecord, Prompt, PromptRecord
from rkd_jax.data.tokenize import (
    TokenizeConfig,
    Tokenized,
    TokenizeReport,
    tokenize_record,
)
from rkd_jax.losses import trajectory_return
from rkd_jax.packed import refuse_packed
from rkd_jax.placement import fetch, follow_parameters
from rkd_jax.signals.oracles import OracleError
from rkd_jax.signals.teacher import Scorer
from rkd_jax.types import Params, Sequences

if TYPE_CHECKING:
    from rkd_jax.data.tokenizer import Tokenizer


def make_return_scorer(
    token_rewards: Callable[[Params, Sequences], jax.Array],
    *,
    gamma: float = 1.0,
    member_axes: Any = None,
) -> Scorer:
    """The return of every response under a frozen reward model, or under K of them.

    Args:
        token_rewards: ``(params, sequences [*batch]) -> [*batch, T]``, such as
            ``RewardModel(...).token_rewards`` or ``.sequence_rewards``. A head trained
            on a frozen trunk is a `RewardModel` of both.
        gamma: discount in (0, 1], the one it was trained with.
        member_axes: where the parameters carry the K members, as ``in_axes`` of
            `jax.vmap`: None for one model, 0 where every leaf is ``[K, ...]``,
            ``{"trunk": None, "head": 0}`` for K heads on one trunk, which then runs
            once.

    Returns:
        Jitted ``(params, sequences [*batch]) -> float32[*batch]``, or
        ``float32[*batch, K]`` with members. On the pairs of a `PreferenceBatch` that is
        `EnsembleSignal.rewards`.

    Gradient:
        None: stopped at the parameters.
    """

    def returns(params: Params, sequences: Sequences) -> jax.Array:
        refuse_packed(sequences, "a return scorer")
        rewards = token_rewards(jax.lax.stop_gradient(params), sequences)
        return trajectory_return(rewards, sequences.response_mask, gamma=gamma)

    if member_axes is None:
        return jax.jit(returns)
    return jax.jit(jax.vmap(returns, in_axes=(member_axes, None), out_axes=-1))


class RewardModelOracle:
    """A reward model, or an ensemble, as an `Oracle`; for K rewards see `rewards`.

    Texts are tokenized as in training, put into batches of one fixed size, one shape
    per length bucket, and scored by one compiled function per shape. A reward depends
    on no other text of the call. An answer without a visible character is scored as an
    immediate end of text.

    Example::

        model = RewardModel(Decoder(config), TOKEN_HEAD)
        oracle = RewardModelOracle(model.token_rewards, params, tokenizer, rows)
        pairs, report = label_preferences(oracle, prompts, first, second)

    Attributes:
        report: what truncation did to the texts scored so far.
    """

    def __init__(
        self,
        token_rewards: Callable[[Params, Sequences], jax.Array],
        params: Params,
        tokenizer: Tokenizer,
        config: TokenizeConfig,
        *,
        gamma: float = 1.0,
        member_axes: Any = None,
        reduce: Literal["mean", "min"] = "mean",
        batch_size: int = 32,
    ):
        """Compile nothing yet; the first call does.

        Args:
            token_rewards, gamma, member_axes: see `make_return_scorer`.
            params: of the reward model or models; kept, not copied. On a mesh the texts
                are cut over it.
            tokenizer, config: those the reward model was trained with.
            reduce: one reward from K: their mean, or the least, which is pessimistic.
            batch_size: texts on the device at once.

        Raises:
            ValueError: unknown ``reduce``, or ``batch_size`` not positive.
        """
        if reduce not in ("mean", "min"):
            raise ValueError(f"reduce is 'mean' or 'min', not {reduce!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self._score = follow_parameters(
            make_return_scorer(token_rewards, gamma=gamma, member_axes=member_axes)
        )
        self._params, self._tokenizer, self._config = params, tokenizer, config
        self._reduce, self._batch_size = reduce, batch_size
        self.report = TokenizeReport()

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> np.ndarray:
        """One reward per response, ``float64[n]``: the reduction of `rewards`."""
        rewards = self.rewards(prompts, responses)
        return rewards.mean(-1) if self._reduce == "mean" else rewards.min(-1)

    def rewards(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> np.ndarray:
        """The reward of every response under every member, ``float64[n, K]``.

        K is 1 for a single model. No text gives ``[0, 1]``.

        Raises:
            OracleError: as many prompts as responses are needed.
            RecordError: a prompt that breaks the format of a record.
        """
        if len(prompts) != len(responses):
            raise OracleError(f"{len(prompts)} prompts for {len(responses)} responses")
        rows = [self._row(*text) for text in zip(prompts, responses, strict=True)]
        found: dict[int, np.ndarray] = {}
        for numbers in self._groups(rows):
            full = numbers + numbers[-1:] * (self._batch_size - len(numbers))
            batch = collate([rows[i] for i in full], self._config)
            scores = fetch(self._score(self._params, batch.sequences))
            scores = scores.astype(np.float64).reshape(len(full), -1)
            found |= zip(numbers, scores, strict=False)
        if not rows:
            return np.zeros((0, 1))
        return np.stack([found[i] for i in range(len(rows))])

    def _row(self, prompt: Prompt, response: str) -> Tokenized:
        if response.strip():
            record = DemonstrationRecord(prompt, response)
            row = tokenize_record(record, self._tokenizer, self._config)
        else:
            record = PromptRecord(prompt)
            row = tokenize_record(record, self._tokenizer, self._config)
            end = [self._tokenizer.eos_id] if self._config.append_eos else []
            row = dataclasses.replace(row, responses=(end,))
        self.report.add(row)
        return row

    def _groups(self, rows: Sequence[Tokenized]) -> list[list[int]]:
        """Numbers of rows that share a bucket, at most ``batch_size`` at a time."""
        buckets: dict[tuple[int, int], list[int]] = {}
        for i, row in enumerate(rows):
            widths = batch_widths([row], self._config)
            buckets.setdefault((widths.prompt, widths.response), []).append(i)
        return [
            numbers[first : first + self._batch_size]
            for _, numbers in sorted(buckets.items())
            for first in range(0, len(numbers), self._batch_size)
        ]
