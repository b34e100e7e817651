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
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from experiments import toy_cache
from experiments.cached_lessons import Lessons, open_lessons
from experiments.cached_methods import METHODS, Method
from experiments.cached_report import START, STUDENT, conclude, show
from experiments.command import run_command
from experiments.devices import open_meshes
from experiments.pupil import Pupil
from experiments.settings import FitConfig, SettingsError
from experiments.stages import Desk
from experiments.system import TOY_FIT, export_student
from experiments.teacher_student import (
    RANDOM_TEACHER,
    as_student,
    check_drop_layers,
    on,
    weights_path,
)
from experiments.trainer import Trainer
from rkd_jax.data.chat_template import named_template
from rkd_jax.data.tokenizer import Tokenizer, byte_tokenizer
from rkd_jax.evaluation.content import Report
from rkd_jax.evaluation.report import summary_table, write_report
from rkd_jax.interop import load_model
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.surgery import keep_layers
from rkd_jax.sharding import MeshConfig
from rkd_jax.signals.cache import Manifest
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from rkd_jax.training.together import once
from rkd_jax.types import Params


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
    remat: Literal["none", "attention", "dots", "full"] = "none"
    """What the blocks compute again in the backward pass; see `DecoderConfig`."""
    seed: int = 0
    """Of a random one."""


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
    random teacher, are written into the output folder first."""
    cache: str = "cache"
    """Folder that `rkd cache` wrote."""
    student: StudentConfig = StudentConfig()
    method: Literal["kd", "dpo", "tvkd", "drdo"] = "kd"
    """kd reads the teacher's lists on demonstrations; dpo the reference's log-probs,
    tvkd the shaping, drdo the oracle's rewards of pairs."""
    beta: float = 0.1
    """Of DPO and TVKD."""
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


def run(config: FromCacheConfig) -> Path:
    """Train, measure and export; returns the path of the report.

    Raises:
        SettingsError, CacheError: the method, the data and the cache do not go
            together.
    """
    mesh, _ = open_meshes(config.mesh, None)
    identity = config.identity()
    if config.data is not None:
        # Another cache may have been written to the same folder since.
        identity |= {"cached": Manifest.load(config.cache).identity()}
    folder = RunFolder.open(
        config.out, identity, name="from_cache", overwrite=config.fresh
    )
    pupil, lessons = open_school(config, folder, mesh)
    with Progress() as progress:
        desk = Desk(folder, progress, config.checkpoint_every, config.checkpoints_kept)
        final = folder.stage("report")
        if not final.done:
            report = learn(config, desk, pupil, lessons)
            page = once(lambda: write_report(final.path, report).name)
            final.finish({"report": page})
            print(summary_table(report))
            print(f"student: {folder.path / 'student'}")
    return final.path / final.result["report"]


def open_school(
    config: FromCacheConfig, folder: RunFolder, mesh: Mesh | None
) -> tuple[Pupil, Lessons]:
    """The student on the mesh, and what it learns from."""
    data, cache, method = config.data, config.cache, METHODS[config.method]
    if data is None:
        toys, seed = folder.path / "toys", config.student.seed
        data, cache = toy_cache.write(toys, method.reads, seed=seed)
    model, params, tokenizer = load_student(config.student, mesh)
    lessons = open_lessons(data, cache, tokenizer, vocabulary=model.config.vocab_size)
    check(config, method, lessons)
    return Pupil(tokenizer, lessons.rows, model, params), lessons


def load_student(
    options: StudentConfig, mesh: Mesh | None
) -> tuple[Decoder, Params, Tokenizer]:
    """The student before training, float32 parameters, on the mesh.

    Raises:
        SettingsError: no tokenizer, or no such layer or template.
    """
    path = weights_path(options.model)
    if path is None:
        model, tokenizer = Decoder(RANDOM_TEACHER), byte_tokenizer()
        params = on(mesh, model, model.init(jax.random.key(options.seed)))
    else:
        model, params, tokenizer = load_model(path, param_dtype="float32", mesh=mesh)
    if tokenizer is None:
        raise SettingsError(f"{path} holds no tokenizer; put tokenizer.json beside it")
    if options.chat_template is not None:
        try:
            template = named_template(options.chat_template)
        except ValueError as error:
            raise SettingsError(f"--student.chat-template: {error}") from error
        tokenizer = tokenizer.with_chat_template(template)
    if options.drop_layers:
        check_drop_layers(options, model.config)
        layers = range(model.config.num_layers)
        kept = tuple(n for n in layers if n not in options.drop_layers)
        shape, params = keep_layers(model.config, params, kept)
        model, params = Decoder(shape), on(mesh, Decoder(shape), params)
    return as_student(model, options), params, tokenizer


def check(config: FromCacheConfig, method: Method, lessons: Lessons) -> None:
    """Raise an error unless the cache holds what the method reads."""
    manifest = lessons.cache.manifest
    if manifest.kind != method.reads.__name__:
        raise SettingsError(
            f"--method {config.method} reads {method.reads.__name__}s, "
            f"{lessons.cache.path} is a cache of {manifest.kind}s"
        )
    # Refused here rather than at the first update, after everything was compiled.
    method.signal(lessons.cache, lessons.tabulate(lessons.taught, 1))


def learn(
    config: FromCacheConfig, desk: Desk, pupil: Pupil, lessons: Lessons
) -> Report:
    """The training, and what came of it."""
    started, method = time.monotonic(), METHODS[config.method]
    trainer = Trainer(
        pupil, method.objective(pupil.student, config, lessons), config.fit
    )
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
    policies = {START: pupil.student_params, STUDENT: params}
    measure = method.measure(pupil, lessons)
    values = {name: measure(policy) for name, policy in policies.items()}
    report = conclude(config, desk, lessons, values)
    samples = show(config, desk, pupil, lessons, policies)
    timings = desk.progress.timings | {"total": time.monotonic() - started}
    return dataclasses.replace(report, samples=samples, timings=timings)


def main() -> None:
    """Command line."""
    run_command(run, config, tiny)


if __name__ == "__main__":
    main()
