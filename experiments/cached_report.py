"""What became of a student that was trained on a teacher cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import jax
import numpy as np

from experiments import ledger
from experiments.cached_lessons import Lessons
from experiments.cached_methods import METHODS
from experiments.judging import as_text, plain
from experiments.pupil import Pupil
from experiments.stages import Desk, as_key, write_responses
from rkd_jax.data.records import PreferenceRecord, to_prompt
from rkd_jax.evaluation.content import (
    Difference,
    Policy,
    Report,
    Response,
    SamplePrompt,
    Verdict,
)
from rkd_jax.evaluation.intervals import mean_interval, paired_interval
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.placement import follow_parameters
from rkd_jax.types import Params

if TYPE_CHECKING:
    from experiments.from_cache import FromCacheConfig

START, STUDENT = "start", "student"
_SHOWN_AT_ONCE = 8
_ROUNDING = 0.01  # of summed log-probs, in bfloat16


def conclude(
    config: FromCacheConfig,
    desk: Desk,
    lessons: Lessons,
    values: Mapping[str, np.ndarray],
    notes: Sequence[Verdict],
) -> Report:
    """The held-out values, record by record, as a report."""
    method, manifest = METHODS[config.method], lessons.cache.manifest
    records = lessons.held_out.records
    told = [getattr(record, "label", 1.0) != 0.5 for record in records]  # or a tie
    prompts = [as_key(record) for record in records]
    means = {name: by_prompt(prompts, found, told) for name, found in values.items()}
    compared = Difference(
        STUDENT, START, paired_interval(means[STUDENT], means[START]), method.unit
    )
    found = [
        Verdict(f"{name}: {method.unit} {plain(mean_interval(mean))}")
        for name, mean in means.items()
    ]
    gain = values[STUDENT] - values[START]
    ranked = mean_interval(by_prompt(prompts, 0.5 + 0.5 * np.sign(gain), told))
    of_pairs = manifest.kind == PreferenceRecord.__name__
    table = [Policy(STUDENT, preference_accuracy=ranked)] if of_pairs else ()
    return Report(
        title=f"{config.method.upper()} from a teacher cache",
        created=datetime.now().strftime("%Y-%m-%d %H:%M"),
        command=command(config),
        summary=[*found, *notes],
        policies=table,
        differences=[compared],
        losses={method.metric: ledger.series(desk.run, ["1-training"], method.metric)},
        data=lessons.sources(config.data or "toy data"),
        settings=dataclasses.asdict(config),
        versions=ledger.package_versions(),
        assets=ledger.asset_hashes(config.student.model)
        | {
            f"{role} of the cache": name
            for role in ("teacher", "reference", "data")
            if (name := getattr(manifest, role))
        },
    )


def command(config: FromCacheConfig) -> str:
    """What produces the report, but for options that the settings show."""
    read = f"--data {config.data} --cache {config.cache}"
    read += f" --student.model {config.student.model}"
    return (
        f"python -m experiments.from_cache {'--tiny' if config.data is None else read} "
        f"--method {config.method} --out {config.out}"
    )


def other_reference(lessons: Lessons, start: np.ndarray) -> list[Verdict]:
    """A note where the reference in the cache is another model than the start.

    Args:
        lessons: of pairs.
        start: its margins on those that are held out.
    """
    if not lessons.cache.settings.reference:
        return []
    batch = lessons.tabulate(lessons.held_out)
    reference = lessons.cache.reference(batch).log_probs
    apart = np.abs(lessons.margins(reference) - start).mean()
    if apart <= _ROUNDING * np.abs(reference).mean():
        return []
    text = (
        "The reference in the cache is another model than the start: margins differ by "
        f"{apart:.3g} nats on the mean."
    )
    return [Verdict(text)]


def by_prompt(
    prompts: Sequence[str], values: np.ndarray, counted: Sequence[bool]
) -> list[float]:
    """The mean of every prompt's records that count: they are not independent."""
    found: dict[str, list[float]] = {}
    for prompt, value, counts in zip(prompts, values.tolist(), counted, strict=True):
        if counts:
            found.setdefault(prompt, []).append(value)
    return [float(np.mean(of_prompt)) for of_prompt in found.values()]


def show(
    config: FromCacheConfig,
    desk: Desk,
    pupil: Pupil,
    lessons: Lessons,
    policies: Mapping[str, Params],
) -> list[SamplePrompt]:
    """What start and student answer to the first held-out prompts."""
    # Several records may have one prompt.
    unlike = {as_key(record): record for record in lessons.held_out.records}
    records = list(unlike.values())[: config.samples_shown]
    if not records:
        return []
    sampling = SamplingConfig(
        max_new_tokens=lessons.rows.max_response,
        temperature=lessons.cache.settings.temperature,
        eos_ids=() if pupil.tokenizer.eos_id is None else (pupil.tokenizer.eos_id,),
    )
    sampler = follow_parameters(make_sampler(pupil.student, sampling), to_host=True)
    texts = [
        write_responses(
            pupil,
            desk,
            f"2 samples: {name}",
            sampler,
            params,
            [to_prompt(record) for record in records],
            as_teacher=False,
            batch_size=_SHOWN_AT_ONCE,
            rng=jax.random.key(config.seed),
        ).flat_texts
        for name, params in policies.items()
    ]
    return [
        SamplePrompt(as_text(record.prompt), list(map(Response, policies, said)))
        for record, said in zip(records, zip(*texts, strict=True), strict=True)
    ]
