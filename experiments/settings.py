"""The options of an experiment; `--help` shows every field with its default."""

from __future__ import annotations

import dataclasses
from typing import Literal


class SettingsError(ValueError):
    """Options that do not fit together; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Who teaches whom."""

    teacher: str = "smollm2"
    """`smollm2` (the packaged SmolLM2-135M-Instruct Q4_1), a Hugging Face folder, a
    .gguf file, or `random` (a toy, for trying the wiring)."""
    student: str | None = None
    """A Hugging Face folder or .gguf file; by default the teacher without
    `drop_layers`."""
    drop_layers: tuple[int, ...] = (17, 4, 5, 6, 26, 25, 14, 15, 16, 18)
    """Teacher layers the student lacks. The default is the order of greedy removal by
    held-in loss (`rkd_jax.models.surgery.greedy_depth_prune`)."""
    reward_layers: int = 4
    """The reward player reads the states of the teacher's first layers."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters stay float32."""
    seed: int = 0
    """Of the random teacher."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Prompts. Files hold one JSON record per line: prompt, teacher_prompt."""

    train_file: str | None = None
    """JSON Lines of training prompts; by default the sentiment task's own."""
    held_out_file: str | None = None
    """JSON Lines of held-out prompts; needed with `train_file`."""
    train_prompts: int = 144
    held_out_prompts: int = 128
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """How every policy speaks. The policy is softmax(logits / temperature)."""

    temperature: float = 0.5
    max_prompt: int = 24
    """Tokens of the student's prompt; longer ones are cut on the left and counted."""
    max_teacher_prompt: int = 48
    max_response: int = 32
    batch_size: int = 48
    """Prompts sampled at once."""


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Stage 2: forward KL to the teacher on the teacher's text."""

    steered: bool = False
    """Whether the teacher reads its own prompt here. False: it reads the student's,
    and what the other prompt makes it value is left to the game."""
    prompts: int = 144
    """Training prompts the plain teacher answers for it."""
    steps: int = 28
    batch_size: int = 16
    learning_rate: float = 2e-4
    warmup_steps: int = 4


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Stage 3, and each online round: pairs labelled by the oracle.

    For every prompt the candidates are the steered teacher's answer, the plain one's if
    there is one, and the student's samples; every two of them make a pair.
    """

    offline_prompts: int = 64
    round_prompts: int = 16
    """Fresh prompts per online round."""
    held_out_prompts: int = 8
    """Prompts whose pairs nobody trains on: the reward player is measured on them."""
    ties: Literal["drop", "half"] = "drop"


@dataclasses.dataclass(frozen=True)
class GameConfig:
    """Stages 4 and 5: the min-max game. Names and defaults as `make_pbkd`."""

    offline_steps: int = 10
    rounds: int = 3
    round_steps: int = 4
    prompts_per_step: int = 8
    samples_per_prompt: int = 4
    pairs_per_step: int = 128
    critic_steps: int = 5
    accumulation: int = 4
    """Micro-batches per step: less memory, the same numbers."""
    learning_rate: float = 1e-5
    critic_learning_rate: float = 3e-4
    anchor_steps: int = 80
    anchor_learning_rate: float = 1e-3
    reward_bound: float = 1.0
    """Largest reward of one token."""
    l2: float = 10.0
    """Penalty on the reward head, in the anchor's likelihood and in the set's."""
    epsilon: float = 0.05
    """Radius of the confidence set, nats per pair."""
    dual: float = 50.0
    """Where the multiplier starts: about the slope of the gap in epsilon."""
    sft_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class DpoConfig:
    """The baseline: as many updates on as many sequences, all pairs of the game."""

    learning_rate: float = 1e-5
    beta: float = 0.1
    pairs_per_step: int = 16
    accumulation: int = 4


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Stage 6."""

    likelihood_prompts: int = 64
    """Held-out prompts on whose answers KL and teacher NLL are measured."""
    samples_shown: int = 12


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """Distil a steered teacher into a smaller student, guided by an oracle's reward."""

    out: str = "runs/quickstart"
    """Output folder; the same command again resumes."""
    fresh: bool = False
    """Discard the run the output folder holds."""
    oracle: str = "vader"
    """`vader`, or `module:attribute` of a callable (prompts, responses) -> rewards."""
    seed: int = 0
    checkpoint_every: int = 16
    models: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    policy: PolicyConfig = PolicyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    pairs: PairsConfig = PairsConfig()
    game: GameConfig = GameConfig()
    dpo: DpoConfig = DpoConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
