"""The options of an experiment; `--help` shows every field with its default."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from rkd_jax.sharding import MeshConfig
from rkd_jax.signals.retrying_oracle import RetryConfig


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
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters stay float32."""
    remat: Literal["none", "attention", "dots", "full"] = "dots"
    """What the student's blocks compute again in the backward pass, from most memory to
    least; see `DecoderConfig`."""
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
    demonstrations_file: str | None = None
    """JSON Lines of the teacher's answers (prompt, response, teacher_prompt), in place
    of sampling them."""
    pairs_file: str | None = None
    """JSON Lines of preference pairs (prompt, chosen, rejected, chosen_reward,
    rejected_reward), in place of sampling and labelling them."""
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
    samples_per_prompt: int = 4
    """Of a student, wherever several are compared."""
    rollout_prompts: int = 8
    """Prompts of one on-policy step, and of one batch of candidates."""
    gather_weights: bool | None = None
    """On a mesh: whether weights that are cut over fsdp are put together before a
    response, rather than at every token. If not given: where that takes 4 GiB of a
    device at most."""


@dataclasses.dataclass(frozen=True)
class WarmStartConfig:
    """Stage 2: forward KL to the teacher on the teacher's text."""

    steered: bool = False
    """Whether the teacher reads its own prompt here. False: it reads the student's,
    and what the other prompt makes it value is left to the game."""
    prompts: int = 144
    """Training prompts the plain teacher answers for it."""
    steps: int = 24
    batch_size: int = 16
    learning_rate: float = 2e-4
    warmup_steps: int = 4
    row_length: int = 0
    """As in `FitConfig`."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Reward models: a linear head on the states of the teacher's first layers, fitted
    to the pairs by maximum likelihood."""

    layers: int = 4
    """Of the teacher."""
    trunk: Literal["frozen", "trained"] = "frozen"
    """Whether these layers are trained with the head. Set `l2` to 0 then: the penalty
    is on everything trained."""
    level: Literal["token", "sequence"] = "token"
    """A reward for every token, or one for the response, credited to its last."""
    bound: float = 1.0
    """Largest reward of one token, or of the response."""
    l2: float = 10.0
    """Penalty on the head, nats per pair."""
    steps: int = 80
    batch_size: int = 128
    """Pairs; packed rows where there is a `row_length`."""
    learning_rate: float = 1e-3
    row_length: int = 0
    """As in `FitConfig`."""


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """Stage 3, and each online round: pairs labelled by the oracle.

    For every prompt the candidates are the steered teacher's answer, the plain one's if
    there is one, and the student's samples; every two of them make a pair.
    """

    offline_prompts: int = 64
    rounds: int = 3
    """Online rounds."""
    round_prompts: int = 16
    """Fresh prompts per online round."""
    held_out_prompts: int = 8
    """Prompts whose pairs nobody trains on: the reward player is measured on them."""
    ties: Literal["drop", "half"] = "drop"


@dataclasses.dataclass(frozen=True)
class GameConfig:
    """Stages 4 and 5: the min-max game. Names and defaults as `make_pbkd`."""

    offline_steps: int = 8
    """Of quickstart; elsewhere the updates that the rounds leave."""
    round_steps: int = 3
    pairs_per_step: int = 128
    """Packed rows of pairs where there is a `row_length`."""
    row_length: int = 0
    """Of the reward player's pairs, as in `FitConfig`. Prompts have a row each."""
    critic_steps: int = 5
    accumulation: int = 4
    """Micro-batches per step: less memory, the same numbers."""
    learning_rate: float = 1e-5
    critic_learning_rate: float = 3e-4
    epsilon: float = 0.05
    """Radius of the confidence set, nats per pair."""
    dual: float = 50.0
    """Where the multiplier starts: about the slope of the gap in epsilon."""
    constraint: Literal["dual", "fixed_lambda"] = "dual"
    """Whether the multiplier climbs on the slack or stays where it starts."""
    sft_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """One player trained by `fit`: how large a step, on how much."""

    learning_rate: float = 1e-5
    batch_size: int = 16
    """Records per update; packed rows where there is a `row_length`."""
    accumulation: int = 4
    """Micro-batches per update: less memory, the same numbers."""
    row_length: int = 0
    """Columns of a packed row, which holds as many records as fit; 0 for a row to each
    record. SFT, SeqKD, KD, DPO, TVKD, DRDO and the d-DPO beside it read packed
    rows."""
    bucket: int = 0
    """Records of like length share a batch, whose widths are multiples of this; 0 for
    batches as wide as --policy allows. Every width that occurs is compiled. For those
    that read packed rows, in their place."""


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Stage 6."""

    likelihood_prompts: int = 32
    """Held-out prompts on whose answers KL and teacher NLL are measured."""
    samples_shown: int = 12
    preferences: bool = False
    """Whether to measure how well every student ranks the held-out pairs."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """What every experiment has: models, task, data, evaluation."""

    out: str = "runs/experiment"
    """Output folder; the same command again resumes."""
    fresh: bool = False
    """Discard the run the output folder holds."""
    oracle: str = "vader"
    """`vader`, or `module:attribute` of a callable (prompts, responses) -> rewards."""
    oracle_calls: RetryConfig = RetryConfig()
    """What happens when the oracle is slow or fails."""
    seed: int = 0
    checkpoint_every: int = 16
    """Updates."""
    checkpoints_kept: int = 1
    """Of each stage. With 2, a damaged one costs the updates since the one before; with
    1, the stage has to be made again."""
    mesh: MeshConfig = MeshConfig()
    """Devices that share the run. It may go on with others than it began with."""
    teacher_mesh: tuple[int, int, int] | None = None
    """Other devices for the teacher alone: data, fsdp, tensor. None: it is where the
    student is."""
    models: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    policy: PolicyConfig = PolicyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    pairs: PairsConfig = PairsConfig()
    reward: RewardConfig = RewardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def identity(self) -> dict[str, Any]:
        """What makes a run this run: every option that its numbers depend on.

        Not how patiently the oracle is asked: a run that stopped because it failed may
        go on with other bounds, and pairs that are dropped are counted. Not how often
        it is saved. Not on which devices: they round differently and compute the same.
        """
        options = dataclasses.asdict(self)
        saving = ("checkpoint_every", "checkpoints_kept")
        for name in ("out", "fresh", "oracle_calls", "mesh", "teacher_mesh", *saving):
            del options[name]
        del options["policy"]["gather_weights"]
        return options


def toy() -> dict[str, Any]:
    """What every ``tiny()`` shares: a random toy teacher, and seconds on a CPU."""
    return {
        "oracle": "experiments.sentiment_task:letter_share",
        "models": ModelConfig(teacher="random", drop_layers=(1,)),
        "task": TaskConfig(train_prompts=24, held_out_prompts=8),
        "policy": PolicyConfig(
            temperature=1.0,
            max_prompt=96,
            max_teacher_prompt=320,
            max_response=12,
            batch_size=8,
            samples_per_prompt=2,
            rollout_prompts=2,
        ),
        "warm_start": WarmStartConfig(
            prompts=16, steps=3, batch_size=4, warmup_steps=1
        ),
        "pairs": PairsConfig(
            offline_prompts=8, round_prompts=4, held_out_prompts=2, ties="half"
        ),
        "reward": RewardConfig(
            layers=2, steps=60, batch_size=8, learning_rate=0.03, l2=1e-3
        ),
    }
