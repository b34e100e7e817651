"""Every policy on the same held-out prompts, one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.course import Course
from experiments.lab import Lab, Sampler
from experiments.references import pair_log_probs, reference_log_probs
from experiments.settings import EvaluationConfig
from experiments.stages import Desk, as_key, write_responses
from rkd_jax.data.records import PreferenceRecord, Prompt, PromptRecord
from rkd_jax.evaluation.content import (
    Difference,
    Policy,
    Response,
    SamplePrompt,
    policy_from_json,
)
from rkd_jax.evaluation.generation import (
    GenerationResult,
    distinct_n,
    repetition,
    with_prompts,
)
from rkd_jax.evaluation.intervals import Interval, mean_interval, paired_interval
from rkd_jax.evaluation.likelihood import sequence_divergences, teacher_nll
from rkd_jax.evaluation.rewards import gap_closed, win_rate
from rkd_jax.signals.oracles import score
from rkd_jax.signals.retrying_oracle import stopping
from rkd_jax.training.run import RunMismatch, write_json
from rkd_jax.training.together import once
from rkd_jax.types import Params, Sequences
from rkd_jax.untrusted import read_object, refused

TEACHER, START = "teacher (steered)", "warm start"


@dataclasses.dataclass(frozen=True)
class Judged:
    """A policy's row in the report, and its answers with their rewards."""

    policy: Policy
    texts: list[str]  # one per held-out prompt
    rewards: np.ndarray  # float64[prompts]

    def save(self, path: Path) -> None:
        """As JSON, for anyone who wants to check, and for `load`."""
        write_json(
            path,
            {
                "policy": dataclasses.asdict(self.policy),
                "texts": self.texts,
                "rewards": self.rewards.tolist(),
            },
        )

    @classmethod
    def load(cls, path: Path) -> Judged:
        """What `save` wrote.

        Raises:
            RunMismatch: it is damaged.
        """
        hint = f"{path} is damaged; remove it and the same command judges again"
        found = read_object(path, RunMismatch)
        with refused(hint, RunMismatch):
            policy, texts = policy_from_json(found["policy"]), list(found["texts"])
            rewards = np.array(found["rewards"], np.float64)
            if rewards.shape != (len(texts),):
                raise ValueError(f"{len(texts)} texts, rewards {rewards.shape}")
            return cls(policy, texts, rewards)


class Judge:
    """Samples, scores and measures one policy at a time, in one process or several.

    Every policy answers with the same key, so that differences are paired. Likelihoods
    (KL, NLL) are taken on the first ``options.likelihood_prompts`` prompts. The teacher
    and the start come first, because the others are measured against them; a policy
    that an earlier start of the run has judged is read back from its file.

    Every answer needs its reward: an oracle that fails ends the run here even where it
    drops pairs elsewhere, and the same command goes on with this policy.

    Args:
        lab: models and oracle.
        desk: where to write and show; the folder ``6-evaluation`` is used.
        prompts: held out.
        pairs: held-out preference pairs, or none to rank.
        start: parameters every student starts from.
        options: how much to measure.
        rng: of the samples.
    """

    def __init__(
        self,
        lab: Lab,
        desk: Desk,
        prompts: Sequence[PromptRecord],
        pairs: Sequence[PreferenceRecord],
        start: Params,
        options: EvaluationConfig,
        *,
        rng: jax.Array,
    ):
        self.lab, self.desk, self.prompts, self.rng = lab, desk, prompts, rng
        self.options = options
        batch = lab.collated(prompts)
        self._views = self._first((batch.prompts, batch.teacher_prompts))
        self._pairs = pairs if options.preferences else ()
        self._start = start
        self.judged: dict[str, Judged] = {}
        self._teach()
        self.student(START, start)
        teacher = self.judged[TEACHER]
        wins = win_rate(teacher.rewards, self.judged[START].rewards)
        row = dataclasses.replace(teacher.policy, win_rate=wins)
        self.judged[TEACHER] = dataclasses.replace(teacher, policy=row)

    def student(self, name: str, params: Params, **extra) -> Judged:
        """Judge one student; ``extra`` are further cells of its row."""
        path = self._path(name)
        if not once(path.exists):
            result, rewards = self._listen(name, self.lab.sample_student, params)
            found = self._likelihoods(params, result.samples.sequences)
            found |= extra
            teacher = self.judged[TEACHER].rewards
            start = rewards if name == START else self.judged[START].rewards
            found["gap_closed"] = gap_closed(teacher, start, rewards)
            if name != START:
                found["win_rate"] = win_rate(rewards, start)
                if self._pairs:
                    found["preference_accuracy"] = self._ranking(params)
            role = "start" if name == START else "student"
            row = _row(name, role, result, rewards, found)
            judged = Judged(row, result.flat_texts, rewards)
            once(lambda: judged.save(path))
        self.judged[name] = Judged.load(path)
        return self.judged[name]

    def known(self, name: str) -> bool:
        """Whether an earlier start of the run has judged it: its file is read."""
        if once(self._path(name).exists):
            self.judged[name] = Judged.load(self._path(name))
        return name in self.judged

    @property
    def policies(self) -> list[Policy]:
        """The rows of the report's table, in the order of judgement."""
        return [judged.policy for judged in self.judged.values()]

    def _teach(self) -> None:
        lab = self.lab
        result, rewards = self._listen(TEACHER, lab.sample_teacher, lab.teacher_params)
        sequences = self._first(result.samples.sequences)
        self._teacher_rows = (with_prompts(sequences, self._views[0]), sequences)
        nll = teacher_nll(lab.teacher, lab.teacher_params, sequences)
        row = _row(TEACHER, "teacher", result, rewards, {"teacher_nll": nll.per_token})
        self.judged[TEACHER] = Judged(row, result.flat_texts, rewards)

    def _listen(self, name: str, sampler: Sampler, params: Params):
        result = write_responses(
            self.lab,
            self.desk,
            f"6 evaluation: {name}",
            sampler,
            params,
            self.prompts,
            as_teacher=name == TEACHER,
            batch_size=self.lab.policy.batch_size,
            rng=self.rng,
        )
        prompts = [p.prompt for p in self.prompts]
        return result, score(stopping(self.lab.oracle), prompts, result.flat_texts)

    def _likelihoods(self, params: Params, sequences: Sequences) -> dict[str, Interval]:
        lab, temperature = self.lab, self.lab.policy.temperature
        frame = (lab.student, params, lab.teacher, lab.teacher_params)
        own = self._first(sequences)
        as_teacher = with_prompts(own, self._views[1])
        on_own = sequence_divergences(*frame, own, as_teacher, temperature=temperature)
        on_teacher = sequence_divergences(
            *frame, *self._teacher_rows, temperature=temperature
        )
        return {
            "teacher_nll": on_own.teacher_nll.per_token,
            "reverse_kl": on_own.reverse_kl.per_token,
            "forward_kl": on_teacher.forward_kl.per_token,
        }

    def _ranking(self, params: Params) -> Interval:
        """Share of held-out pairs whose preferred response gained more on the start.

        Pairs of one prompt share responses, so the prompt is the unit; ties are left
        out.
        """
        now = pair_log_probs(self.lab, params, self._pairs)
        then = reference_log_probs(self.lab, self.desk, self._start, self._pairs)
        gain = np.diff(now - then, axis=-1)[:, 0]  # of the rejected over the chosen
        hits = dict[str, list[float]]()
        for pair, excess in zip(self._pairs, gain, strict=True):
            if pair.label != 0.5:
                hit = 0.5 * (1.0 - float(np.sign((pair.label - 0.5) * excess)))
                hits.setdefault(as_key(pair), []).append(hit)
        return mean_interval([np.mean(of_prompt) for of_prompt in hits.values()])

    def _first(self, tree):
        return jax.tree.map(lambda x: x[: self.options.likelihood_prompts], tree)

    def _path(self, name: str) -> Path:
        folder = self.desk.run.stage("6-evaluation").path
        return folder / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"


def open_judge(
    lab: Lab,
    desk: Desk,
    course: Course,
    prompts: Sequence[PromptRecord],
    *,
    seed: int,
) -> Judge:
    """The judge of one course, teacher and start judged."""
    return Judge(
        lab,
        desk,
        prompts,
        course.held_out_pairs,
        course.start,
        course.config.evaluation,
        rng=jax.random.fold_in(jax.random.key(seed), 4),
    )


def _row(name: str, role: str, result: GenerationResult, rewards, found) -> Policy:
    texts = result.flat_texts
    return Policy(
        name,
        role=role,
        reward=mean_interval(rewards),
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        repetition=repetition(texts),
        length=result.mean_length,
        ended_share=result.ended_share,
        **found,
    )


def differences(
    judged: Mapping[str, Judged], pairs: Iterable[tuple[str, str]]
) -> list[Difference]:
    """Paired reward differences of the named policies, prompt by prompt."""
    return [
        Difference(a, b, paired_interval(judged[a].rewards, judged[b].rewards))
        for a, b in pairs
    ]


def plain(interval: Interval) -> str:
    """Mean and interval, if one could be told."""
    if np.isnan(interval.low):
        return f"{interval.mean:.3f}"
    return f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def signed(interval: Interval) -> str:
    """Mean and interval with their signs."""
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def side_by_side(
    judged: Mapping[str, Judged], prompts: Sequence[PromptRecord], count: int
) -> list[SamplePrompt]:
    """The first ``count`` held-out prompts with every policy's answer: no choosing."""
    return [
        SamplePrompt(
            as_text(record.prompt),
            [
                Response(name, voice.texts[i], float(voice.rewards[i]))
                for name, voice in judged.items()
            ],
        )
        for i, record in enumerate(prompts[:count])
    ]


def as_text(prompt: Prompt) -> str:
    """A prompt as one string: the content of its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
