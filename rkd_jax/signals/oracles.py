"""Oracles: callables on text that return one reward per response.

An oracle is any ``oracle(prompts, responses) -> rewards`` with one finite float per
response, higher is better. It runs on the host, outside every jitted function; its
rewards enter batches as arrays. One that may be slow or fail is asked through
`rkd_jax.signals.retrying_oracle.RetryingOracle`. To use your own, write the function:

>>> def shortness(prompts, responses):
...     return [-len(text) for text in responses]
>>> score(shortness, ["Say hi."], ["hi"]).tolist()
[-2.0]
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from rkd_jax.data.records import PreferenceRecord, Prompt


class OracleError(ValueError):
    """An oracle broke its protocol; the message says how."""


class Oracle(Protocol):
    """``oracle(prompts, responses)``: one finite reward per response.

    An oracle with a true attribute ``may_abstain`` may return NaN for a response that
    it has no reward for; `label_preferences` drops and counts such pairs.
    """

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> Sequence[float] | np.ndarray: ...


class VaderOracle:
    """Sentiment of the response by VADER's rules, the compound score in [-1, 1].

    It adds up word valences and squashes the sum, so stacking praise drives it up: a
    good test of reward over-optimisation. Deterministic, works offline, ignores the
    prompt. Needs the package ``vaderSentiment``.
    """

    def __init__(self):
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise OracleError(
                "the sentiment oracle needs vaderSentiment: pip install vaderSentiment"
            ) from error
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts, responses):
        del prompts
        return [self._analyzer.polarity_scores(text)["compound"] for text in responses]


def load_oracle(name: str) -> Oracle:
    """The oracle called ``name``: ``"vader"``, or ``"module:attribute"`` of your own.

    A class is instantiated without arguments; anything else is taken as it is.

    Raises:
        OracleError: no such module or attribute, or it is not callable.
    """
    if name == "vader":
        return VaderOracle()
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise OracleError(f"oracle {name!r}: write 'vader' or 'module:attribute'")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise OracleError(f"oracle {name!r} cannot be imported: {error}") from error
    oracle = found() if isinstance(found, type) else found
    if not callable(oracle):
        raise OracleError(f"oracle {name!r} is a {type(oracle).__name__}, not callable")
    return oracle


def score(
    oracle: Oracle,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    abstentions: bool = False,
) -> np.ndarray:
    """Rewards of ``responses``, checked: ``float64[n]``, all finite.

    Args:
        oracle: gives one reward per response.
        prompts, responses: what is judged.
        abstentions: let NaN pass where the oracle ``may_abstain``.

    Raises:
        OracleError: a wrong number of rewards, or one that is not a finite float32; the
            message names the first offending response.
    """
    if len(prompts) != len(responses):
        raise OracleError(f"{len(prompts)} prompts for {len(responses)} responses")
    rewards = np.asarray(oracle(prompts, responses), np.float64)
    if rewards.shape != (len(responses),):
        raise OracleError(
            f"the oracle returned shape {rewards.shape} for {len(responses)} responses;"
            " it has to return one number per response"
        )
    good = np.abs(rewards) <= np.finfo(np.float32).max
    if abstentions and getattr(oracle, "may_abstain", False):
        good |= np.isnan(rewards)
    bad = np.flatnonzero(~good)
    if bad.size:
        raise OracleError(
            f"the oracle returned {rewards[bad[0]]} for response {bad[0]}: "
            f"{responses[bad[0]][:60]!r}"
        )
    return rewards


@dataclasses.dataclass(frozen=True)
class LabelReport:
    """What became of the candidate pairs; nothing disappears uncounted."""

    kept: int
    ties_dropped: int
    ties_halved: int
    identical: int
    empty: int
    unscored: int = 0  # a response that the oracle had no reward for

    def __str__(self) -> str:
        return (
            f"{self.kept} pairs kept ({self.ties_halved} ties at label 0.5), dropped: "
            f"{self.ties_dropped} ties, {self.identical} identical, "
            f"{self.empty} empty, {self.unscored} without a reward"
        )


def label_preferences(
    oracle: Oracle,
    prompts: Sequence[Prompt],
    first: Sequence[str],
    second: Sequence[str],
    *,
    teacher_prompts: Sequence[Prompt | None] | None = None,
    ties: Literal["drop", "half"] = "drop",
    tie_margin: float = 0.0,
) -> tuple[list[PreferenceRecord], LabelReport]:
    """Turn two responses per prompt into preference pairs, the better one chosen.

    Args:
        oracle: gives one reward per response.
        prompts: what both responses answer.
        first, second: the responses; their order carries no meaning.
        teacher_prompts: the teacher's own prompts, or None.
        ties: rewards no further apart than ``tie_margin`` tell nothing: drop the pair,
            or keep it with label 0.5.
        tie_margin: in the oracle's units, >= 0.

    Returns:
        The records, with both rewards, and a count of everything left out: ties,
        identical texts, empty texts, and texts that an oracle which ``may_abstain``
        gave no reward.

    Raises:
        OracleError: see `score`. ValueError: unknown ``ties``.
    """
    if ties not in ("drop", "half"):
        raise ValueError(f"ties is 'drop' or 'half', not {ties!r}")
    teacher_prompts = teacher_prompts or [None] * len(prompts)
    first_rewards = score(oracle, prompts, first, abstentions=True)
    second_rewards = score(oracle, prompts, second, abstentions=True)
    records = []
    reasons = ("ties_dropped", "ties_halved", "identical", "empty", "unscored")
    counts = dict.fromkeys(reasons, 0)
    rows = zip(
        prompts,
        teacher_prompts,
        zip(first, second, strict=True),
        zip(first_rewards.tolist(), second_rewards.tolist(), strict=True),
        strict=True,
    )
    for prompt, teacher_prompt, texts, rewards in rows:
        if not (texts[0].strip() and texts[1].strip()):
            counts["empty"] += 1
            continue
        if texts[0] == texts[1]:
            counts["identical"] += 1
            continue
        if not np.isfinite(rewards).all():
            counts["unscored"] += 1
            continue
        tie = abs(rewards[0] - rewards[1]) <= tie_margin
        if tie and ties == "drop":
            counts["ties_dropped"] += 1
            continue
        counts["ties_halved"] += tie
        best = int(rewards[1] > rewards[0])
        records.append(
            PreferenceRecord(
                prompt=prompt,
                chosen=texts[best],
                rejected=texts[1 - best],
                teacher_prompt=teacher_prompt,
                chosen_reward=rewards[best],
                rejected_reward=rewards[1 - best],
                label=0.5 if tie else 1.0,
            )
        )
    return records, LabelReport(kept=len(records), **counts)
