"""What a report says: plain records, and the two judgements made from them.

The judgements are which students look as if they exploit the reward (`quality_flags`)
and which cell of a column is the best (`best_policies`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rkd_jax.evaluation.intervals import Interval
from rkd_jax.evaluation.rewards import GapClosed, WinRate


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One line of the summary.

    Example: ``Verdict("PbKD improves on the warm start: +0.12 [0.07, 0.17]", "pass")``.
    """

    text: str
    status: Literal["pass", "fail", "note"] = "note"


@dataclasses.dataclass(frozen=True)
class Policy:
    """One row of the main table; None leaves a cell empty.

    Example: ``Policy("DPO", reward=Interval(0.53, 0.49, 0.57, 200), distinct_2=0.71)``.
    """

    name: str
    role: Literal["teacher", "start", "student"] = "student"
    reward: Interval | None = None  # per prompt, held-out oracle
    gap_closed: GapClosed | None = None
    win_rate: WinRate | None = None  # against the start
    forward_kl: Interval | None = None  # nats per token, on the teacher's samples
    reverse_kl: Interval | None = None  # nats per token, on the policy's own samples
    teacher_nll: Interval | None = None  # nats per token, of the policy's own samples
    distinct_1: float | None = None
    distinct_2: float | None = None
    repetition: float | None = None  # share of repeated 4-grams
    length: Interval | None = None  # tokens per response, EOS included
    ended_share: float | None = None  # share of responses that ended with EOS
    preference_accuracy: Interval | None = None  # share of held-out pairs ranked right
    seconds_per_step: float | None = None  # of training
    peak_gib: float | None = None  # of the compiled step, per device


def policy_from_json(values: Mapping[str, Any]) -> Policy:
    """The `Policy` whose ``dataclasses.asdict`` went through JSON."""

    def cell_of(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if "interval" not in value:
            return Interval(**value)
        kind = WinRate if "rate" in value else GapClosed
        return kind(**{**value, "interval": Interval(**value["interval"])})

    return Policy(**{key: cell_of(value) for key, value in values.items()})


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired comparison, ``first`` minus ``second``, over the same prompts.

    Example: ``Difference("PbKD", "DPO", Interval(0.06, 0.01, 0.11, 200))``.
    """

    first: str
    second: str
    difference: Interval
    quantity: str = "reward"

    @property
    def finding(self) -> str:
        """``"higher"``, ``"lower"`` or ``"not separated"``: where the interval lies."""
        if self.difference.contains_zero:
            return "not separated"
        return "higher" if self.difference.mean > 0 else "lower"


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run that begins at ``start``.

    Example: ``Phase("round 1", start=200)``.
    """

    name: str
    start: float


@dataclasses.dataclass(frozen=True)
class GameCurves:
    """The course of a min-max game, all sequences of one length.

    Example: ``GameCurves(steps=[1, 2], gap=[0.9, 0.7], slack=[-0.01, 0.004], dual=[1.0,
    1.1], epsilon=0.02, phases=[Phase("offline", 1)])``.
    """

    steps: Sequence[float]
    gap: Sequence[float]  # teacher's minus student's return under the reward player
    slack: Sequence[float]  # excess pair NLL minus epsilon; positive: outside the set
    dual: Sequence[float]  # the multiplier
    epsilon: float  # radius of the confidence set, nats per pair
    phases: Sequence[Phase] = ()

    def __post_init__(self) -> None:
        for name in ("gap", "slack", "dual"):
            found = len(getattr(self, name))
            if found != len(self.steps):
                raise ValueError(
                    f"{found} values of {name} for {len(self.steps)} steps"
                )


@dataclasses.dataclass(frozen=True)
class Series:
    """A quantity over steps.

    Example: ``Series(steps=[1, 2], values=[0.69, 0.64])``.
    """

    steps: Sequence[float]
    values: Sequence[float]

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.values):
            raise ValueError(f"{len(self.values)} values for {len(self.steps)} steps")


@dataclasses.dataclass(frozen=True)
class Response:
    """What one policy answered. Example: ``Response("DPO", "Sure!", reward=0.4)``."""

    policy: str
    text: str
    reward: float | None = None


@dataclasses.dataclass(frozen=True)
class SamplePrompt:
    """A prompt with every policy's response.

    Example: ``SamplePrompt("Say hi.", (Response("teacher", "hi", 0.1),))``.
    """

    prompt: str
    responses: Sequence[Response]


@dataclasses.dataclass(frozen=True)
class Incident:
    """Something that happened to records, and the lines or rows where it did first.

    Example: ``Incident("empty response", count=3, places=(17, 40, 41))``.
    """

    reason: str
    count: int
    places: Sequence[int] = ()
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class DataSource:
    """How much of a source was used, what was left out and what was cut.

    Example: ``DataSource("train.jsonl", 997, skipped=(Incident("no prompt", 3),))``.
    """

    name: str
    used: int
    skipped: Sequence[Incident] = ()  # records left out
    changed: Sequence[Incident] = ()  # records used, but not as they were


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything a reader needs to judge a run; every part but the title may be empty.

    Example: ``Report("Quickstart", policies=(Policy("teacher", "teacher"),))``.
    """

    title: str
    created: str = ""  # when, in words
    command: str = ""  # what produces this report
    summary: Sequence[Verdict] = ()
    policies: Sequence[Policy] = ()
    unit: Literal["prompts", "seeds"] = "prompts"  # what intervals are over
    differences: Sequence[Difference] = ()
    games: Mapping[str, GameCurves] = dataclasses.field(default_factory=dict)
    losses: Mapping[str, Series] = dataclasses.field(default_factory=dict)
    samples: Sequence[SamplePrompt] = ()
    data: Sequence[DataSource] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    assets: Mapping[str, str] = dataclasses.field(default_factory=dict)  # name: hash
    # Seconds by stage; "total" has what lies between them too.
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    nll_shift: float = 0.5  # see `quality_flags`
    distinct_drop: float = 0.5  # see `quality_flags`

    def __post_init__(self) -> None:
        names = [policy.name for policy in self.policies]
        repeated = {name for name in names if names.count(name) > 1}
        if repeated:
            raise ValueError(f"two policies are called {sorted(repeated)[0]!r}")


@dataclasses.dataclass(frozen=True)
class Column:
    """How one field of `Policy` is shown.

    Example: ``Column("reward", "reward", "mean per prompt", better="high")``.
    """

    key: str
    label: str
    hint: str
    better: Literal["high", "low"] | None = None
    percent: bool = False


COLUMNS = (
    Column("reward", "reward", "oracle, mean per prompt", "high"),
    Column("gap_closed", "gap closed", "0% start, 100% teacher", "high", percent=True),
    Column("win_rate", "win rate", "against the start", "high", percent=True),
    Column("forward_kl", "forward KL", "nats/token, teacher's samples", "low"),
    Column("reverse_kl", "reverse KL", "nats/token, own samples", "low"),
    Column("teacher_nll", "teacher NLL", "nats/token, own samples"),
    Column("distinct_1", "distinct-1", "of words"),
    Column("distinct_2", "distinct-2", "of word pairs"),
    Column("repetition", "repetition", "4-grams within a response", percent=True),
    Column("length", "length", "tokens"),
    Column("ended_share", "ended", "by EOS", percent=True),
    Column("preference_accuracy", "pairs", "held-out, ranked right", percent=True),
    Column("seconds_per_step", "s/step", "of training"),
    Column("peak_gib", "memory", "GiB of a step"),
)


def cell(policy: Policy, column: Column) -> Interval | None:
    """The policy's value as an `Interval`, or None where there is nothing to show."""
    value = getattr(policy, column.key)
    if isinstance(value, GapClosed | WinRate):
        value = value.interval
    elif value is not None and not isinstance(value, Interval):
        value = Interval(float(value), math.nan, math.nan, 0)
    return value if value is not None and math.isfinite(value.mean) else None


def quality_flags(
    policies: Sequence[Policy], *, nll_shift: float = 0.5, distinct_drop: float = 0.5
) -> dict[str, tuple[str, ...]]:
    """Signs that a student's text collapsed, whatever its reward says.

    Each student is compared with the policy in the role ``"start"``; without one
    nothing is flagged.

    Args:
        policies: the rows of the table.
        nll_shift: flag when the teacher's NLL of the samples moved further than this
            from the start's, nats per token. Up is text the teacher would not write,
            down is text it finds too predictable.
        distinct_drop: in (0, 1); flag when distinct-2 fell below this share of the
            start's.

    Returns:
        Reasons by the name of the policy; clean policies are absent.
    """
    start = next((p for p in policies if p.role == "start"), None)
    flags: dict[str, tuple[str, ...]] = {}
    for policy in policies if start else ():
        if policy.role != "student":
            continue
        reasons = []
        if policy.teacher_nll and start.teacher_nll:
            now, then = policy.teacher_nll.mean, start.teacher_nll.mean
            if abs(now - then) > nll_shift:
                change = "implausible" if now > then else "too predictable"
                reasons.append(
                    f"text {change} to the teacher: NLL {now:.2f}, start {then:.2f}"
                )
        if policy.distinct_2 is not None and start.distinct_2 is not None:
            now, then = policy.distinct_2, start.distinct_2
            if now < distinct_drop * then:
                reasons.append(
                    f"diversity collapsed: distinct-2 {now:.2f}, start {then:.2f}"
                )
        if reasons:
            flags[policy.name] = tuple(reasons)
    return flags


def best_policies(
    policies: Sequence[Policy], flags: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Name of the best student in each column that has a better side.

    Flagged students do not compete, and a single student wins nothing.
    """
    students = [p for p in policies if p.role == "student" and p.name not in flags]
    best: dict[str, str] = {}
    for column in COLUMNS:
        found = [(c.mean, p.name) for p in students if (c := cell(p, column))]
        if column.better and len(found) > 1:
            pick = max if column.better == "high" else min
            best[column.key] = pick(found, key=lambda pair: pair[0])[1]
    return best
