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


def conclude(
    config: FromCacheConfig,
    desk: Desk,
    lessons: Lessons,
    values: Mapping[str, np.ndarray],
) -> Report:
    """The held-out values, record by record, as a report."""
    method, manifest = METHODS[config.method], lessons.cache.manifest
    prompts = [as_key(record) for record in lessons.held_out.records]
    means = {name: by_prompt(prompts, found) for name, found in values.items()}
    compared = Difference(
        STUDENT, START, paired_interval(means[STUDENT], means[START]), method.unit
    )
    told = [
        Verdict(f"{name}: {method.unit} {plain(mean_interval(found))}")
        for name, found in means.items()
    ]
    gain = values[STUDENT] - values[START]
    ranked = mean_interval(by_prompt(prompts, 0.5 + 0.5 * np.sign(gain)))
    of_pairs = manifest.kind == PreferenceRecord.__name__
    table = [Policy(STUDENT, preference_accuracy=ranked)] if of_pairs else ()
    return Report(
        title=f"{config.method.upper()} from a teacher cache",
        created=datetime.now().strftime("%Y-%m-%d %H:%M"),
        command=command(config),
        summary=told,
        policies=table,
        differences=[compared],
        losses={method.metric: ledger.series(desk.run, ["1-training"], method.metric)},
        data=[
            lessons.source(f"{name} ({config.data or 'toy data'})", part)
            for name, part in (
                ("trained on", lessons.taught),
                ("held out", lessons.held_out),
            )
        ],
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


def by_prompt(prompts: Sequence[str], values: np.ndarray) -> list[float]:
    """The mean of every prompt's records: they are not independent."""
    found: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values.tolist(), strict=True):
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
