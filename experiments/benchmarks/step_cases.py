"""The objectives of `experiments.benchmarks.step`, each with what its step reads.

Rows are full: random tokens in every column. What frozen models say of texts that are
new at every step (the teacher on imitated responses and rollouts, the trunk's states of
rollouts) is computed in every step, in `Case.prepare`. What an experiment computes once
per record and looks up (a reference's log-probs, shaping, an oracle's rewards, states
of fixed pairs, a teacher's top k) is random data. Rollouts are given: sampling has a
benchmark of its own.

A new objective is one more function from a `Setting` to a `Case`, entered in `CASES`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.losses import generalized_jsd
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.flops import forward_flops, head_flops, trunk_flops
from rkd_jax.models.heads import (
    TOKEN_HEAD,
    GaussianHead,
    QHead,
    ScalarHead,
    head_q_values,
    head_token_rewards,
)
from rkd_jax.models.surgery import keep_layers
from rkd_jax.objectives.dpo import make_dpo
from rkd_jax.objectives.drdo import make_drdo
from rkd_jax.objectives.gkd import imitated_responses, make_gkd
from rkd_jax.objectives.kd import make_kd
from rkd_jax.objectives.mm_pbkd import make_mm_pbkd
from rkd_jax.objectives.pbkd import make_pbkd
from rkd_jax.objectives.reward_inference import RewardInference
from rkd_jax.objectives.topk_kd import make_topk_kd
from rkd_jax.objectives.tvkd import make_tvkd
from rkd_jax.objectives.xkd import make_xkd_gkd
from rkd_jax.signals.teacher import make_features
from rkd_jax.types import (
    DemonstrationBatch,
    GameBatch,
    GameSignal,
    ImitationBatch,
    Objective,
    Params,
    PreferenceBatch,
    ReferenceSignal,
    Sequences,
    ShapingSignal,
    TeacherStates,
    TopkSignal,
    WhiteBoxSignal,
)

TRUNK_LAYERS = 4  # of the teacher, under the critics
CRITIC_STEPS = 3
CRITIC_WIDTH = 64  # hidden units of the action values
TOP = 50  # tokens of the teacher that a cache keeps at every target


@dataclasses.dataclass(frozen=True)
class Setting:
    """Models and sizes."""

    student: Decoder
    teacher: Decoder
    batch: int  # B: demonstrations, pairs, or prompts of a game
    samples: int  # G, rollouts per prompt of a game
    length: int  # L = P + T
    prompt: int  # P

    @property
    def targets(self) -> int:
        """T."""
        return self.length - self.prompt

    def trained_flops(self, sequences: int) -> int:
        """Of the student, forward and backward: three times the forward pass."""
        return 3 * self._forward(self.student, sequences)

    def teacher_flops(self, sequences: int) -> int:
        """Of the teacher, forward."""
        return self._forward(self.teacher, sequences)

    def _forward(self, model: Decoder, sequences: int) -> int:
        return forward_flops(model.config, sequences, self.length, self.targets)


@dataclasses.dataclass(frozen=True)
class Case:
    """One objective with its players and its data."""

    objective: Objective
    params: Params  # of the student's player
    batch: Any
    prepare: Callable[[Any], Any]  # batch -> signal, at every step
    sequences: int  # that the student is trained on
    flops: int  # of one step, see `experiments.benchmarks.step`
    frozen: Any = None  # what the loss reads and does not train
    critic: Params | None = None
    critic_steps: int = 1


def kd(setting: Setting) -> Case:
    """Forward KL on the teacher's responses."""
    return _taught(
        setting,
        make_kd(setting.student, teacher=setting.teacher),
        student_params(setting),
        demonstrations(setting),
        setting.batch,
    )


def gkd(setting: Setting) -> Case:
    """Generalised JSD (beta 0.5) on responses of which the student wrote a part."""
    return _taught(
        setting,
        make_gkd(
            setting.student,
            functools.partial(generalized_jsd, beta=0.5),
            teacher=setting.teacher,
        ),
        student_params(setting),
        ImitationBatch(demonstrations(setting), demonstrations(setting, seed=1)),
        setting.batch,
    )


def topk_kd(setting: Setting) -> Case:
    """Forward KL to what a cache kept of the teacher, who is not there."""
    batch = demonstrations(setting)
    vocabulary = setting.student.config.vocab_size
    top = min(TOP, vocabulary)
    shape = (setting.batch, setting.targets)
    first = np.random.default_rng(5).integers(0, vocabulary, (*shape, 1))
    ids = (first + np.arange(top)) % vocabulary  # distinct at each target
    scores = np.random.default_rng(6).normal(scale=3.0, size=(*shape, top + 1))
    log_probs = jax.nn.log_softmax(jnp.asarray(scores, jnp.float32))[..., :top]
    signal = TopkSignal(jnp.asarray(ids, jnp.int32), log_probs)
    return Case(
        make_topk_kd(setting.student),
        student_params(setting),
        batch,
        lambda batch: signal,
        setting.batch,
        setting.trained_flops(setting.batch),
    )


def xkd(setting: Setting) -> Case:
    """GKD with a reward inferred from the demonstrations: two sets of responses."""
    head = GaussianHead()
    return _taught(
        setting,
        make_xkd_gkd(
            setting.student,
            RewardInference(head.apply),
            functools.partial(generalized_jsd, beta=0.5),
            teacher=setting.teacher,
        ),
        with_head(setting, head),
        ImitationBatch(demonstrations(setting), demonstrations(setting, seed=1)),
        2 * setting.batch,
    )


def dpo(setting: Setting) -> Case:
    """Pairs; the reference's log-probs are two numbers of each."""
    signal = ReferenceSignal(normal(setting.batch, 2, shift=-100.0))
    return _on_pairs(setting, make_dpo(setting.student), signal)


def tvkd(setting: Setting) -> Case:
    """Pairs; reference and shaping are two numbers each."""
    signal = ShapingSignal(
        normal(setting.batch, 2, shift=-100.0), normal(setting.batch, 2)
    )
    return _on_pairs(setting, make_tvkd(setting.student), signal)


def drdo(setting: Setting) -> Case:
    """Pairs with an oracle's rewards; the student has a reward head."""
    head = ScalarHead()
    params = {
        "policy": student_params(setting),
        "reward_head": head.init(jax.random.key(2), setting.student.config.hidden_size),
    }
    return _on_pairs(setting, make_drdo(setting.student, head), None, params)


def pbkd(setting: Setting) -> Case:
    """The game with a linear reward on the states of the teacher's lower layers."""
    trunk, states = frozen_trunk(setting, "after")
    batch, width = game_batch(setting), trunk.config.hidden_size
    fixed = GameSignal(
        anchor_nll=normal(setting.batch, shift=0.5),
        demonstrations=normal(setting.batch, setting.targets, width),
        preferences=normal(setting.batch, 2, setting.targets, width),
    )
    rollouts = setting.batch * setting.samples
    return Case(
        make_pbkd(setting.student, head_token_rewards(TOKEN_HEAD)),
        student_params(setting),
        batch,
        lambda batch: dataclasses.replace(fixed, rollouts=states(batch.rollouts)),
        rollouts,
        setting.trained_flops(rollouts)
        + trunk_flops(trunk.config, rollouts, setting.length),
        critic=TOKEN_HEAD.init(jax.random.key(2), width),
        critic_steps=CRITIC_STEPS,
    )


def mm_pbkd(setting: Setting) -> Case:
    """The game on action values with the teacher's states on all responses."""
    trunk, states = frozen_trunk(setting, "before")
    width, teacher = trunk.config.hidden_size, teacher_params(setting)
    ask = functools.partial(make_features(setting.teacher, states="before"), teacher)
    vocabulary = setting.student.config.vocab_size
    pairs = (setting.batch, 2, setting.targets)
    fixed = WhiteBoxSignal(
        anchor_nll=normal(setting.batch, shift=0.5),
        preferences=normal(*pairs, setting.teacher.config.hidden_size).astype(
            setting.teacher.config.dtype
        ),
        preference_features=normal(*pairs, width),
    )
    head = QHead(actions=vocabulary, width=CRITIC_WIDTH)
    rollouts = setting.batch * setting.samples

    def prepare(batch: GameBatch) -> WhiteBoxSignal:
        return dataclasses.replace(
            fixed,
            rollouts=ask(batch.rollouts),
            rollout_features=states(batch.rollouts),
        )

    return Case(
        make_mm_pbkd(setting.student, head_q_values(head), teacher=setting.teacher),
        student_params(setting),
        game_batch(setting),
        prepare,
        rollouts,
        setting.trained_flops(rollouts)
        + setting.teacher_flops(rollouts)
        + trunk_flops(trunk.config, rollouts, setting.length)
        + head_flops(setting.teacher.config, math.prod(pairs))
        + _critic_flops(setting, width, vocabulary),
        frozen={"teacher": teacher},
        critic=head.init(jax.random.key(2), width),
        critic_steps=CRITIC_STEPS,
    )


CASES: dict[str, Callable[[Setting], Case]] = {
    "kd": kd,
    "gkd": gkd,
    "topk_kd": topk_kd,
    "dpo": dpo,
    "pbkd": pbkd,
    "mm_pbkd": mm_pbkd,
    "tvkd": tvkd,
    "xkd": xkd,
    "drdo": drdo,
}


def frozen_trunk(setting: Setting, which: str) -> tuple[Decoder, Callable]:
    """The lower layers of the teacher, and their states around each target."""
    params = teacher_params(setting)
    layers = range(min(TRUNK_LAYERS, setting.teacher.config.num_layers))
    config, kept = keep_layers(setting.teacher.config, params, tuple(layers))
    model = Decoder(config)
    return model, functools.partial(make_features(model, states=which), kept)


def student_params(setting: Setting) -> Params:
    """Random float32 parameters."""
    return setting.student.init(jax.random.key(0))


def teacher_params(setting: Setting) -> Params:
    """Random float32 parameters."""
    return setting.teacher.init(jax.random.key(1))


def with_head(setting: Setting, head: GaussianHead | ScalarHead) -> Params:
    """The student with a head on its states."""
    width = setting.student.config.hidden_size
    return {
        "policy": student_params(setting),
        "reward_head": head.init(jax.random.key(2), width),
    }


def sequences(setting: Setting, *batch: int, seed: int) -> Sequences:
    """Full rows of random tokens, ``[*batch, P + T]``."""
    generator = np.random.default_rng(seed)
    shape = (*batch, setting.length)
    vocabulary = setting.student.config.vocab_size
    tokens = generator.integers(0, vocabulary, shape, dtype=np.int32)
    return Sequences(
        jnp.asarray(tokens),
        jnp.ones(shape, bool),
        jnp.ones((*batch, setting.targets), bool),
    )


def demonstrations(setting: Setting, seed: int = 0) -> DemonstrationBatch:
    """B responses, under one prompt for student and teacher."""
    rows = sequences(setting, setting.batch, seed=seed)
    return DemonstrationBatch(rows, rows, jnp.arange(setting.batch, dtype=jnp.int32))


def preferences(setting: Setting) -> PreferenceBatch:
    """B pairs of responses."""
    rows = sequences(setting, setting.batch, 2, seed=2)
    index = jnp.arange(setting.batch, dtype=jnp.int32)
    label = jnp.ones(setting.batch, jnp.float32)
    return PreferenceBatch(rows, rows, label, normal(setting.batch, 2), index)


def game_batch(setting: Setting) -> GameBatch:
    """B prompts with a demonstration and G rollouts each, and B pairs."""
    rollouts = sequences(setting, setting.batch, setting.samples, seed=3)
    return GameBatch(demonstrations(setting), rollouts, preferences(setting))


def normal(*shape: int, shift: float = 0.0) -> jax.Array:
    """Random float32 numbers."""
    drawn = np.random.default_rng(4).normal(shift, size=shape)
    return jnp.asarray(drawn, jnp.float32)


def _taught(
    setting: Setting, objective: Objective, params: Params, batch: Any, trained: int
) -> Case:
    """A divergence to the teacher: its states in the signal, its head in the update."""
    teacher = teacher_params(setting)
    states = make_features(setting.teacher, states="before")

    def prepare(batch: DemonstrationBatch | ImitationBatch) -> TeacherStates:
        return TeacherStates(
            states(teacher, imitated_responses(batch).teacher_sequences)
        )

    return Case(
        objective,
        params,
        batch,
        prepare,
        trained,
        setting.trained_flops(trained) + setting.teacher_flops(setting.batch),
        frozen={"teacher": teacher},
    )


def _on_pairs(
    setting: Setting, objective: Objective, signal: Any, params: Params | None = None
) -> Case:
    return Case(
        objective,
        student_params(setting) if params is None else params,
        preferences(setting),
        lambda batch: signal,
        2 * setting.batch,
        setting.trained_flops(2 * setting.batch),
    )


def _critic_flops(setting: Setting, width: int, vocabulary: int) -> int:
    """Of the action values: in the critic's steps on rollouts and pairs, and once more
    on the rollouts in the student's. The states they read get no gradient."""
    hidden, output = 2 * width * CRITIC_WIDTH, 2 * CRITIC_WIDTH * vocabulary
    rollouts = setting.batch * setting.samples * setting.targets
    pairs = 2 * setting.batch * setting.targets
    trained = CRITIC_STEPS * (rollouts + pairs) * (2 * hidden + 3 * output)
    return trained + rollouts * (hidden + output)
