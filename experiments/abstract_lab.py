"""A `Lab` of shapes: every model of an experiment, and no weights.

What is made from it (objectives, scorers, samplers) is what `open_lab` would make; it
can be traced and compiled, not run.
"""

from __future__ import annotations

import dataclasses

import jax

from experiments.lab import Lab, make_lab, row_layout
from experiments.published_shapes import shape_of
from experiments.settings import ExperimentConfig, ModelConfig
from experiments.teacher_student import RANDOM_TEACHER, as_student, check_drop_layers
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.models.attention_kernels import long_enough_for_splash
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.types import Params


def abstract_lab(config: ExperimentConfig, *, for_tpu: bool = True) -> Lab:
    """The equipment of an experiment as shapes.

    The tokenizer is a stand-in: only its end-of-sequence id is looked at. Parameters
    are float32, as `open_lab` loads them.

    Args:
        config: the experiment.
        for_tpu: attention is then computed as ``"auto"`` computes it on a TPU, which it
            cannot know from here.

    Raises:
        SettingsError: a model whose shape is not known, or a layer it does not have.
    """
    models, policy = config.models, config.policy

    def attention(prompt: int) -> str:
        long = long_enough_for_splash(prompt + policy.max_response)
        return "splash" if for_tpu and long else "xla"

    shape = _teacher_shape(models)
    teacher = Decoder(
        dataclasses.replace(
            shape,
            dtype=models.dtype,
            attention=attention(policy.max_teacher_prompt),
        )
    )
    own = dataclasses.replace(
        _student_shape(models, shape), attention=attention(policy.max_prompt)
    )
    student = as_student(Decoder(own), models)
    return make_lab(
        teacher,
        abstract_params(teacher),
        student,
        abstract_params(student),
        tokenizer=byte_tokenizer(),
        rows=row_layout(policy),
        oracle=_silent,
        policy=policy,
        reward=config.reward,
    )


def abstract_params(model: Decoder) -> Params:
    """The parameters' shapes and types."""
    return jax.eval_shape(model.init, jax.random.key(0))


def _teacher_shape(config: ModelConfig) -> DecoderConfig:
    return RANDOM_TEACHER if config.teacher == "random" else shape_of(config.teacher)


def _student_shape(config: ModelConfig, teacher: DecoderConfig) -> DecoderConfig:
    """Of a named student, or of the teacher without the dropped layers."""
    if config.student is not None:
        return shape_of(config.student)
    check_drop_layers(config, teacher)
    kept = teacher.num_layers - len(set(config.drop_layers))
    return dataclasses.replace(teacher, num_layers=kept)


def _silent(prompts, responses):
    raise RuntimeError("an abstract lab has no oracle: nothing is run")
