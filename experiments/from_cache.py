"""A student trained on what its teacher said once, without the teacher.

`rkd cache` lets the teacher, and the student as its own reference, read a data set;
everything after that is done with the student alone. KD learns from demonstrations,
the other methods from preference pairs.

    rkd cache --data pairs.jsonl --teacher TEACHER --out cache --top-k None \\
        --shaping.keep --reference STUDENT
    python -m experiments.from_cache --data pairs.jsonl --cache cache \\
        --student.model STUDENT --method tvkd
    python -m experiments.from_cache --tiny
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from experiments import toy_cache
from experiments.cached_lessons import Lessons, open_lessons
from experiments.cached_methods import METHODS, Method
from experiments.cached_report import (
    START,
    STUDENT,
    conclude,
    other_reference,
    show,
)
from experiments.command import run_command
from experiments.devices import open_meshes
from experiments.pupil import Pupil
from experiments.references import checksums
from experiments.settings import FitConfig, SettingsError
from experiments.stages import Desk
from experiments.system import TOY_FIT, export_student
from experiments.teacher_student import (
    as_student,
    load_weights,
    without_layers,
)
from experiments.trainer import Trainer
from rkd_jax.data.chat_template import named_template
from rkd_jax.data.tokenizer import Tokenizer
from rkd_jax.evaluation.content import Report
from rkd_jax.evaluation.report import summary_table, write_report
from rkd_jax.models.decoder import Decoder
from rkd_jax.placement import on_mesh
from rkd_jax.sharding import MeshConfig
from rkd_jax.signals.cache import CacheError
from rkd_jax.signals.cache_identity import name_of
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from rkd_jax.training.together import once
from rkd_jax.types import LossOutput, Objective, Params
from rkd_jax.untrusted import refused


@dataclasses.dataclass(frozen=True)
class StudentConfig:
    """Who learns."""

    model: str = "student"
    """A Hugging Face folder or .gguf file with its tokenizer, `smollm2` (the packaged
    SmolLM2-135M-Instruct Q4_1), or `random` (a toy)."""
    drop_layers: tuple[int, ...] = ()
    """Layers of it the student does without."""
    chat_template: str | None = None
    """chatml, or a file with a Jinja template, in place of the tokenizer's own: that of
    the cache."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters stay float32."""
    remat: Literal["none", "attention", "dots", "full"] = "dots"
    """What the blocks compute again in the backward pass; see `DecoderConfig`."""
    seed: int = 0
    """Of a random one."""


@dataclasses.dataclass(frozen=True)
class ListDivergence:
    """Of KD; see `make_topk_kd`."""

    beta: float = 0.0
    """Of the generalised JSD, as in GKD: 0 is forward KL. Below 1: reverse KL is
    infinite where a rounded list leaves no mass to other tokens."""


@dataclasses.dataclass(frozen=True)
class ShapingWeight:
    """Of TVKD; see `make_tvkd`. What the shaping is the cache says."""

    alpha: float | None = None
    """Weight of the shaping; as `beta` if not given."""
    sign: Literal[1, -1] = 1
    """1: shaping is a margin already granted; -1: it pulls towards what it favours."""


@dataclasses.dataclass(frozen=True)
class DrdoWeights:
    """Of DRDO; see `make_drdo`. Rewards are scaled as in `experiments.drdo`."""

    alpha: float = 0.1
    gamma: float = 2.0


@dataclasses.dataclass(frozen=True)
class FromCacheConfig:
    """A student trained on a teacher cache."""

    out: str = "runs/from-cache"
    """Output folder; the same command again resumes."""
    fresh: bool = False
    """Discard the run the output folder holds."""
    data: str | None = "data.jsonl"
    """JSON Lines that the cache was made of. None: toy data and a cache of them, by a
    random teacher, are written beside the output folder first."""
    cache: str = "cache"
    """Folder that `rkd cache` wrote."""
    student: StudentConfig = StudentConfig()
    method: Literal["kd", "dpo", "tvkd", "drdo"] = "kd"
    """kd reads the teacher's lists on demonstrations; dpo the reference's log-probs,
    tvkd the shaping, drdo the oracle's rewards of pairs."""
    beta: float = 0.1
    """Of DPO and TVKD."""
    kd: ListDivergence = ListDivergence()
    tvkd: ShapingWeight = ShapingWeight()
    drdo: DrdoWeights = DrdoWeights()
    updates: int = 100
    fit: FitConfig = FitConfig(accumulation=1)
    samples_shown: int = 8
    """Held-out prompts whose answers the report shows, before and after."""
    seed: int = 0
    checkpoint_every: int = 50
    """Updates."""
    checkpoints_kept: int = 1
    """With 2, a damaged one costs the updates since the one before."""
    mesh: MeshConfig = MeshConfig()
    """Devices that share the run. It may go on with others than it began with."""

    def identity(self) -> dict[str, Any]:
        """What makes a run this run, but for what is in the cache."""
        options = dataclasses.asdict(self)
        for name in ("out", "fresh", "checkpoint_every", "checkpoints_kept", "mesh"):
            del options[name]
        return options


def config() -> FromCacheConfig:
    """One hundred updates on your own data."""
    return FromCacheConfig()


def tiny() -> FromCacheConfig:
    """The same wiring with toy data and a random teacher's cache of them."""
    return FromCacheConfig(
        out="runs/from-cache-tiny",
        data=None,
        student=StudentConfig(model="random"),
        updates=4,
        fit=TOY_FIT,
        samples_shown=2,
        checkpoint_every=2,
    )


class School(NamedTuple):
    """A student, what it learns from, and how."""

    pupil: Pupil
    lessons: Lessons
    method: Method
    trainer: Trainer


def run(config: FromCacheConfig) -> Path:
    """Train, measure and export; returns the path of the report.

    Raises:
        SettingsError, CacheError: the method, the data and the cache do not go
            together.
    """
    # All that may be refused comes first: a folder is claimed, or emptied, by its run.
    school = open_school(config)
    folder = RunFolder.open(
        config.out, identity(config, school), name="from_cache", overwrite=config.fresh
    )
    with Progress() as progress:
        desk = Desk(folder, progress, config.checkpoint_every, config.checkpoints_kept)
        final = folder.stage("report")
        if not final.done:
            report = learn(config, desk, school)
            page = once(lambda: write_report(final.path, report).name)
            final.finish({"report": page})
            print(summary_table(report))
            print(f"student: {folder.path / STUDENT}")
    return final.path / final.result["report"]


def identity(config: FromCacheConfig, school: School) -> dict[str, Any]:
    """What makes a run this run: other files may be under the same names by now."""
    return config.identity() | {
        "cached": school.lessons.cache.manifest.identity(),
        "weights": name_of(checksums(school.pupil.student_params)),
    }


def open_school(config: FromCacheConfig) -> School:
    """Everything that a run needs, and whether it goes together.

    Raises:
        SettingsError, CacheError: it does not.
    """
    if config.updates < 0:
        raise SettingsError(f"--updates {config.updates} must not be negative")
    mesh, _ = open_meshes(config.mesh, None)
    data, cache, method = config.data, config.cache, METHODS[config.method]
    if data is None:
        toys, seed = Path(f"{config.out}-toys-{config.method}"), config.student.seed
        data, cache = toy_cache.write(toys, method.reads, seed=seed)
    model, params, tokenizer = load_student(config.student, mesh)
    lessons = open_lessons(data, cache, tokenizer, vocabulary=model.config.vocab_size)
    pupil = Pupil(tokenizer, lessons.rows, model, params)
    check(config, pupil, lessons)
    try:
        objective = method.objective(model, config, lessons)
        trace(objective, method, pupil, lessons)
    except CacheError:
        raise
    except ValueError as error:
        raise SettingsError(f"--method {config.method}: {error}") from error
    return School(pupil, lessons, method, Trainer(pupil, objective, config.fit))


def load_student(
    options: StudentConfig, mesh: Mesh | None
) -> tuple[Decoder, Params, Tokenizer]:
    """The student before training, float32 parameters, on the mesh.

    Raises:
        SettingsError: no tokenizer, or no such layer or template.
    """
    model, params, tokenizer = load_weights(options.model, options.seed, mesh)
    if options.chat_template is not None:
        with refused("--student.chat-template", SettingsError):
            template = named_template(options.chat_template)
        tokenizer = tokenizer.with_chat_template(template)
    if options.drop_layers:
        model, params = without_layers(options, model, params, mesh)
    return as_student(model, options), params, tokenizer


def check(config: FromCacheConfig, pupil: Pupil, lessons: Lessons) -> None:
    """Raise an error unless student, cache and method fit."""
    manifest, rows = lessons.cache.manifest, lessons.rows
    method = METHODS[config.method]
    if manifest.kind != method.reads.__name__:
        raise SettingsError(
            f"--method {config.method} reads {method.reads.__name__}s, "
            f"{lessons.cache.path} is a cache of {manifest.kind}s"
        )
    columns = rows.max_prompt + rows.max_response
    if columns > pupil.context:
        raise SettingsError(
            f"{lessons.cache.path} has prompts of up to {rows.max_prompt} tokens and "
            f"responses of {rows.max_response}, the student's context {pupil.context}"
        )


def trace(objective: Objective, method: Method, pupil: Pupil, lessons: Lessons) -> None:
    """Raise here what the first update would raise, of one record and nothing computed.

    Raises:
        CacheError: the cache lacks what the method reads.
        ValueError: the loss refuses an option.
    """
    batch, signal = method.signal(lessons.cache, lessons.tabulate(lessons.taught, 1))
    rng = jax.random.key(0)

    def loss(params: Params) -> LossOutput:
        return objective.student_loss(params, {}, (), batch, signal, rng)

    with on_mesh(pupil.mesh):
        jax.eval_shape(loss, jax.eval_shape(lambda: method.begin(pupil, rng)))


def learn(config: FromCacheConfig, desk: Desk, school: School) -> Report:
    """The training, and what came of it."""
    started, (pupil, lessons, method, trainer) = time.monotonic(), school
    measure = method.measure(pupil, lessons)
    values = {START: measure(pupil.student_params)}
    notes = other_reference(lessons, values[START]) if method.refers else []
    for note in notes:
        desk.progress.note(note.text)
    params = trainer.train(
        desk,
        "1-training",
        method.begin(pupil, jax.random.key(config.seed)),
        lessons.taught.records,
        steps=config.updates,
        seed=config.seed,
        look_up=lessons.look_up(method.signal),
    )
    params = method.policy(params)
    export_student(pupil, desk.run.path / STUDENT, params)
    values[STUDENT] = measure(params)
    report = conclude(config, desk, lessons, values, notes)
    policies = {START: pupil.student_params, STUDENT: params}
    samples = show(config, desk, pupil, lessons, policies)
    timings = desk.progress.timings | {"total": time.monotonic() - started}
    return dataclasses.replace(report, samples=samples, timings=timings)


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
