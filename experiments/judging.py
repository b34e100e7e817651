"""Stage 6: every policy on the same held-out prompts, and what to conclude."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from experiments.lab import Lab, Sampler
from experiments.stages import Desk, write_responses
from rkd_jax.data.collate import collate
from rkd_jax.data.records import Prompt, PromptRecord
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.evaluation.content import (
    Difference,
    Policy,
    Response,
    SamplePrompt,
    Verdict,
    quality_flags,
)
from rkd_jax.evaluation.generation import (
    GenerationResult,
    distinct_n,
    repetition,
    with_prompts,
)
from rkd_jax.evaluation.intervals import mean_interval, paired_interval
from rkd_jax.evaluation.likelihood import sequence_divergences, teacher_nll
from rkd_jax.evaluation.rewards import gap_closed, win_rate
from rkd_jax.signals.oracles import score
from rkd_jax.training.run import write_json
from rkd_jax.types import Params

TEACHER, START, DPO = "teacher (steered)", "warm start", "DPO"
OFFLINE, ONLINE = "PbKD offline", "PbKD online"


@dataclasses.dataclass(frozen=True)
class Heard:
    """One policy's answers to the held-out prompts and their oracle rewards."""

    result: GenerationResult
    rewards: np.ndarray  # float64[prompts]


def listen(
    lab: Lab,
    desk: Desk,
    students: Mapping[str, Params],
    prompts: Sequence[PromptRecord],
    *,
    batch_size: int,
    rng: jax.Array,
) -> dict[str, Heard]:
    """Sample the teacher and every student with the same key, and score the text."""

    def hear(name: str, sampler: Sampler, params: Params) -> Heard:
        result = write_responses(
            lab,
            desk,
            f"6 evaluation: {name}",
            sampler,
            params,
            prompts,
            as_teacher=name == TEACHER,
            batch_size=batch_size,
            rng=rng,
        )
        rewards = score(lab.oracle, [p.prompt for p in prompts], result.flat_texts)
        return Heard(result, rewards)

    heard = {TEACHER: hear(TEACHER, lab.sample_teacher, lab.teacher_params)}
    for name, params in students.items():
        heard[name] = hear(name, lab.sample_student, params)
    return heard


def measure(
    lab: Lab,
    desk: Desk,
    students: Mapping[str, Params],
    heard: Mapping[str, Heard],
    prompts: Sequence[PromptRecord],
    *,
    temperature: float,
    likelihood_prompts: int,
) -> list[Policy]:
    """The rows of the report's table, the teacher first.

    Likelihoods (KL, NLL) are taken on the first ``likelihood_prompts`` prompts.
    """
    rows = [
        tokenize_record(p, lab.tokenizer, lab.rows, i) for i, p in enumerate(prompts)
    ]
    batch = collate(rows, lab.rows)
    prompts_seen, teachers_seen = jax.tree.map(
        lambda x: x[:likelihood_prompts], (batch.prompts, batch.teacher_prompts)
    )

    def own(name: str):
        sequences = heard[name].result.samples.sequences
        return jax.tree.map(lambda x: x[:likelihood_prompts], sequences)

    teacher_rows = (with_prompts(own(TEACHER), prompts_seen), own(TEACHER))
    desk.progress.stage("6 evaluation: likelihoods", len(heard))
    policies = []
    for name, voice in heard.items():
        sequences = own(name)
        as_teacher = with_prompts(sequences, teachers_seen)
        found = {}
        if name == TEACHER:
            nll = teacher_nll(lab.teacher, lab.teacher_params, as_teacher)
        else:
            frame = (lab.student, students[name], lab.teacher, lab.teacher_params)
            on_own = sequence_divergences(
                *frame, sequences, as_teacher, temperature=temperature
            )
            on_teacher = sequence_divergences(
                *frame, *teacher_rows, temperature=temperature
            )
            nll = on_own.teacher_nll
            found = {
                "forward_kl": on_teacher.forward_kl.per_token,
                "reverse_kl": on_own.reverse_kl.per_token,
                "gap_closed": gap_closed(
                    heard[TEACHER].rewards, heard[START].rewards, voice.rewards
                ),
            }
        if name != START:
            found["win_rate"] = win_rate(voice.rewards, heard[START].rewards)
        policies.append(_row(name, voice, nll.per_token, found))
        desk.progress.advance()
    return policies


def _row(name: str, voice: Heard, nll, found) -> Policy:
    texts = voice.result.flat_texts
    return Policy(
        name,
        role={TEACHER: "teacher", START: "start"}.get(name, "student"),
        reward=mean_interval(voice.rewards),
        teacher_nll=nll,
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        repetition=repetition(texts),
        length=voice.result.mean_length,
        ended_share=voice.result.ended_share,
        **found,
    )


def differences(heard: Mapping[str, Heard]) -> list[Difference]:
    """Paired reward differences, prompt by prompt."""
    pairs = [
        (ONLINE, START),
        (ONLINE, DPO),
        (ONLINE, OFFLINE),
        (OFFLINE, START),
        (DPO, START),
        (TEACHER, START),
        (TEACHER, ONLINE),
    ]
    return [
        Difference(a, b, paired_interval(heard[a].rewards, heard[b].rewards))
        for a, b in pairs
    ]


def verdicts(
    policies: Sequence[Policy], compared: Sequence[Difference], rounds: int
) -> list[Verdict]:
    """What the run shows, and what it does not."""
    by_name = {policy.name: policy for policy in policies}
    online = by_name[ONLINE]
    gain = next(d for d in compared if (d.first, d.second) == (ONLINE, START))
    rival = next(d for d in compared if (d.first, d.second) == (ONLINE, DPO))
    closed = online.gap_closed
    flags = quality_flags(policies).get(ONLINE, ())
    return [
        Verdict(
            f"Online PbKD ({rounds} rounds) against the warm start, "
            f"{gain.difference.n} held-out prompts: reward "
            f"{_signed(gain.difference)}, {gain.finding}.",
            "pass" if gain.finding == "higher" else "fail",
        ),
        Verdict(
            f"Share of the gap from warm start to teacher closed: {closed.note}"
            if closed.note
            else f"Share of the gap from warm start to teacher closed: "
            f"{closed.value:.0%} [{closed.interval.low:.0%}, "
            f"{closed.interval.high:.0%}]; the goal is 50%.",
            "pass" if closed.value >= 0.5 else "fail",
        ),
        Verdict(
            "Fluency: " + ("; ".join(flags) if flags else "no sign of collapse") + ".",
            "fail" if flags else "pass",
        ),
        Verdict(
            f"Online PbKD against DPO on the same pairs, with as many updates: reward "
            f"{_signed(rival.difference)}, {rival.finding}."
        ),
    ]


def _signed(interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def side_by_side(
    heard: Mapping[str, Heard], prompts: Sequence[PromptRecord], count: int
) -> list[SamplePrompt]:
    """The first ``count`` held-out prompts with every policy's answer: no choosing."""
    return [
        SamplePrompt(
            as_text(record.prompt),
            [
                Response(name, voice.result.flat_texts[i], float(voice.rewards[i]))
                for name, voice in heard.items()
            ],
        )
        for i, record in enumerate(prompts[:count])
    ]


def save_responses(path, heard: Mapping[str, Heard], prompts) -> None:
    """Every held-out answer with its reward, for anyone who wants to check."""
    write_json(
        path,
        {
            name: [
                {"prompt": as_text(p.prompt), "response": text, "reward": reward}
                for p, text, reward in zip(
                    prompts, v.result.flat_texts, v.rewards.tolist(), strict=True
                )
            ]
            for name, v in heard.items()
        },
    )


def as_text(prompt: Prompt) -> str:
    """A prompt as one string: the content of its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
