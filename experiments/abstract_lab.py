"""A `Lab` of shapes: every model of an experiment, and no weights.

What is made from it (objectives, scorers, samplers) is what `open_lab` would make; it
can be traced and compiled, not run.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax

from experiments.lab import Lab, make_lab, row_layout
from experiments.published_shapes import shape_of
from experiments.settings import ExperimentConfig, ModelConfig
from experiments.teacher_student import (
    RANDOM_TEACHER,
    as_student,
    check_drop_layers,
    with_dtype,
)
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.models.attention_kernels import (
    cudnn_has_kernels,
    long_enough_for_splash,
)
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.types import Params


def abstract_lab(
    config: ExperimentConfig, *, accelerator: Literal["tpu", "gpu"] | None = "tpu"
) -> Lab:
    """The equipment of an experiment as shapes.

    The tokenizer is a stand-in: only its end-of-sequence id is looked at. Parameters
    are float32, as `open_lab` loads them.

    Args:
        config: the experiment.
        accelerator: attention is computed as ``"auto"`` computes it there, which it
            cannot know from here; None: as it is legal everywhere.

    Raises:
        SettingsError: a model whose shape is not known, or a layer it does not have.
    """
    models, policy = config.models, config.policy

    def attending(model: Decoder, prompt: int) -> Decoder:
        name = "xla"
        if accelerator == "tpu" and long_enough_for_splash(
            prompt + policy.max_response
        ):
            name = "splash"
        if accelerator == "gpu" and cudnn_has_kernels(model.config):
            name = "cudnn"
        return Decoder(dataclasses.replace(model.config, attention=name))

    shape = _teacher_shape(models)
    teacher = with_dtype(Decoder(shape), models.dtype)
    teacher = attending(teacher, policy.max_teacher_prompt)
    student = as_student(Decoder(_student_shape(models, shape)), models)
    student = attending(student, policy.max_prompt)
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
