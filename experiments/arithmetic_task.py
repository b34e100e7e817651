"""The arithmetic task: right or wrong, verified, and a teacher trained in the run.

Three sets of problems have no problem in common (`experiments.arithmetic_problems`):
*lessons*, whose right answers the teacher learns; *train*, the prompts of distillation,
where methods see answers and the verifier's word on them but never the right answer
itself; *held out*, for evaluation. So the teacher errs on training prompts as often as
on held-out ones, and a method that asks the verifier can do better than one that
copies. The student is the teacher without its last layer.

`prepare` writes teacher and prompts into a folder; `experiment` gives the options with
which any system runs on them, unchanged::

    task = ArithmeticConfig()
    prepare(task)
    config = SystemConfig(**experiment(task), out="runs/dpo", updates=200)

    python -m experiments.arithmetic_task          # prepare alone
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from experiments.arithmetic_problems import (
    CHARACTERS,
    Problem,
    ProblemsConfig,
    make_problems,
    make_tokenizer,
    row_layout,
)
from experiments.command import run_command
from experiments.settings import (
    EvaluationConfig,
    ModelConfig,
    PairsConfig,
    PolicyConfig,
    RewardConfig,
    SettingsError,
    TaskConfig,
    WarmStartConfig,
)
from rkd_jax.data.collate import collate
from rkd_jax.data.records import DemonstrationRecord, PromptRecord
from rkd_jax.data.sources import write_jsonl
from rkd_jax.data.tokenize import TokenizeConfig, tokenize_record
from rkd_jax.interop import save_model
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.objectives.sft import make_sft
from rkd_jax.signals.teacher import make_sequence_scorer
from rkd_jax.training.loop import fit
from rkd_jax.training.optim import OptimConfig, make_optimizer
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from rkd_jax.training.state import init_state
from rkd_jax.training.update import make_update
from rkd_jax.types import DemonstrationBatch, Params

HEAD = 32  # width of an attention head


@dataclasses.dataclass(frozen=True)
class LessonsConfig:
    """The teacher, and its supervised training on right answers."""

    layers: int = 3
    width: int = 128
    """A multiple of 32: heads of 32, an MLP of twice the width."""
    steps: int = 1800
    batch_size: int = 64
    learning_rate: float = 2e-3
    """The peak; linear warm-up, then a cosine to a tenth of it."""
    warmup_steps: int = 50
    weight_decay: float = 0.1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Problems, the teacher that learns to solve them, and where both are kept."""

    out: str = "runs/arithmetic"
    """Output folder; what it holds already is not made again."""
    fresh: bool = False
    """Discard what the output folder holds."""
    problems: ProblemsConfig = ProblemsConfig()
    lessons: LessonsConfig = LessonsConfig()
    warm_start_steps: int = 400
    """Of the student, in every experiment on the task."""
    ties: Literal["drop", "half"] = "drop"
    """Pairs of two right or two wrong answers."""

    def identity(self) -> dict[str, Any]:
        """What makes the folder's contents what they are."""
        return {
            "problems": dataclasses.asdict(self.problems),
            "lessons": dataclasses.asdict(self.lessons),
        }


def prepare(config: ArithmeticConfig) -> Path:
    """Make problems and teacher, unless the folder holds them.

    The folder then has ``teacher`` (as of Hugging Face, with tokenizer),
    ``train.jsonl`` and ``held_out.jsonl``.

    Returns:
        The path of a JSON file with the teacher's accuracy.

    Raises:
        RunMismatch: the folder holds another task.
        SettingsError: nothing is there yet, and this is one of several processes.
        ValueError, OracleError: see `make_problems`.
    """
    folder = RunFolder.open(
        config.out, config.identity(), name="arithmetic_task", overwrite=config.fresh
    )
    stage = folder.stage("lessons")
    if not stage.done:
        if jax.process_count() > 1:
            raise SettingsError(
                "the arithmetic teacher is trained by one process; run python -m "
                "experiments.arithmetic_task without --distributed first"
            )
        problems = make_problems(config.problems)
        for name in ("train", "held_out"):
            records = [PromptRecord(p.prompt) for p in getattr(problems, name)]
            write_jsonl(folder.path / f"{name}.jsonl", records)
        rows = row_layout(config.problems)
        with Progress() as progress:
            model, params = teach(config.lessons, rows, problems.lessons, progress)
        save_model(
            folder.path / "teacher",
            model.config,
            params,
            tokenizer=make_tokenizer(),
            overwrite=True,
        )
        right = right_probability(model, params, rows, problems.held_out)
        stage.finish({"held_out_accuracy": float(right.mean())})
    return stage.path / "done.json"


def experiment(config: ArithmeticConfig) -> dict[str, Any]:
    """The fields of an `ExperimentConfig` that runs on what `prepare` has made.

    Of the training prompts half make the offline pairs, a tenth goes to each of three
    online rounds, and a tenth is held out for the reward player. The last tenth stands
    in for prompts to which the teacher says nothing.
    """
    folder, rows = Path(config.out), row_layout(config.problems)
    count, size = config.problems.train, config.lessons.batch_size
    return {
        "oracle": "experiments.arithmetic_problems:Verifier",
        "checkpoint_every": 1000,
        "models": ModelConfig(
            teacher=str(folder / "teacher"), drop_layers=(config.lessons.layers - 1,)
        ),
        "task": TaskConfig(
            train_file=str(folder / "train.jsonl"),
            held_out_file=str(folder / "held_out.jsonl"),
            train_prompts=count,
            held_out_prompts=config.problems.held_out,
        ),
        "policy": PolicyConfig(
            temperature=1.0,
            max_prompt=rows.max_prompt,
            max_teacher_prompt=rows.max_prompt,
            max_response=rows.max_response,
            batch_size=size,
            samples_per_prompt=4,
            rollout_prompts=size // 4,
        ),
        "warm_start": WarmStartConfig(
            prompts=count // 2,
            steps=config.warm_start_steps,
            batch_size=size,
            learning_rate=3e-3,
            warmup_steps=min(10, config.warm_start_steps // 2),
        ),
        "pairs": PairsConfig(
            offline_prompts=count // 2,
            rounds=3,
            round_prompts=count // 10,
            held_out_prompts=count // 10,
            ties=config.ties,
        ),
        "reward": RewardConfig(
            layers=config.lessons.layers,
            bound=10.0,
            l2=1e-3,
            steps=300,
            batch_size=size,
            learning_rate=5e-3,
        ),
        "evaluation": EvaluationConfig(preferences=True, likelihood_prompts=size),
    }


def tiny() -> ArithmeticConfig:
    """One-digit problems and a teacher trained in seconds."""
    return ArithmeticConfig(
        out="runs/arithmetic-tiny",
        problems=ProblemsConfig(digits=1, lessons=72, train=48, held_out=16),
        lessons=LessonsConfig(
            layers=2, width=32, steps=80, batch_size=8, warmup_steps=5
        ),
        warm_start_steps=4,
        ties="half",
    )


def teach(
    config: LessonsConfig,
    rows: TokenizeConfig,
    lessons: Sequence[Problem],
    progress: Progress | None = None,
) -> tuple[Decoder, Params]:
    """A decoder trained by maximum likelihood of the lessons' answers.

    Raises:
        ValueError: fewer lessons than one batch, or a width that is no multiple of 32.
    """
    model = make_decoder(config)
    optimizer = make_optimizer(
        OptimConfig(
            learning_rate=config.learning_rate,
            schedule="cosine",
            warmup_steps=config.warmup_steps,
            total_steps=config.steps,
            end_factor=0.1,
            weight_decay=config.weight_decay,
        )
    )
    keys = jax.random.split(jax.random.key(config.seed))
    state = fit(
        init_state(model.init(keys[0]), student_optimizer=optimizer, rng=keys[1]),
        make_update(make_sft(model), student_optimizer=optimizer),
        _epochs(_tabulate(lessons, rows), config.batch_size, config.seed),
        steps=config.steps,
        progress=progress,
        name="the teacher's lessons",
    )
    return model, state.student.params


def make_decoder(config: LessonsConfig) -> Decoder:
    """The teacher before its lessons."""
    if config.width % HEAD:
        raise ValueError(f"width {config.width} is no multiple of {HEAD}, a head's")
    heads = config.width // HEAD
    return Decoder(
        DecoderConfig(
            vocab_size=len(CHARACTERS) + 1,
            hidden_size=config.width,
            intermediate_size=2 * config.width,
            num_layers=config.layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=HEAD,
            max_length=64,
        )
    )


def right_probability(
    model: Decoder, params: Params, rows: TokenizeConfig, problems: Sequence[Problem]
) -> np.ndarray:
    """How probable the right answer of every problem is, ``float32[n]``.

    That is how often sampling finds it, without the noise of sampling; short only of
    other spellings the verifier accepts.
    """
    log_probs = make_sequence_scorer(model)(params, _tabulate(problems, rows).sequences)
    return np.exp(np.asarray(log_probs))


def _tabulate(problems: Sequence[Problem], rows: TokenizeConfig) -> DemonstrationBatch:
    """All right answers as one batch of numpy arrays, in the order of the problems."""
    tokenizer = make_tokenizer()
    records = [DemonstrationRecord(p.prompt, p.answer) for p in problems]
    return collate(
        [tokenize_record(r, tokenizer, rows, i) for i, r in enumerate(records)], rows
    )


def _epochs(
    batch: DemonstrationBatch, size: int, seed: int
) -> Iterator[DemonstrationBatch]:
    """``size`` rows at a time of one large batch, every epoch in a new order.

    Rows left over at the end of an epoch are skipped in that epoch. The rows were
    tokenised once; at these model sizes doing it for every batch takes longer than the
    update.
    """
    count = len(batch.index)
    if size > count:
        raise ValueError(f"batch_size {size} exceeds the {count} lessons")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(count)
        for first in range(0, count - size + 1, size):
            rows = order[first : first + size]
            yield jax.tree.map(lambda x, rows=rows: x[rows], batch)


def main() -> None:
    """Command line."""
    run_command(prepare, ArithmeticConfig, tiny)


if __name__ == "__main__":
    main()
