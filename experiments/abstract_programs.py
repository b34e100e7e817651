"""The programs of one step on a mesh, ready to be compiled; see `compile_ahead`.

``update`` is the whole update of the method. ``teacher`` is the pass of the teacher
over as many sequences as the student is trained on, as its states are read before a
step, and ``sampler`` what writes the student's responses to the prompts of a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.abstract_inputs import Inputs, full, rows
from experiments.lab import Lab
from experiments.settings import SettingsError
from rkd_jax.aot.compiling import placed
from rkd_jax.models.decoder import Decoder
from rkd_jax.models.decoding import stage_ends
from rkd_jax.models.flops import forward_flops, trunk_flops
from rkd_jax.placement import jit_on
from rkd_jax.sharding import (
    batch_sharding,
    device_bytes,
    parameter_shardings,
    replicated,
)
from rkd_jax.training.state import TrainState
from rkd_jax.types import GameBatch, Params, Prompts


@dataclasses.dataclass(frozen=True)
class Held:
    """What an experiment keeps in HBM, each array with its place on the mesh.

    The trunk is below the reward players, copied from the teacher; ``starts`` are
    copies of the student from before training and from before the method.
    """

    state: TrainState
    teacher: Params
    trunk: Params
    starts: tuple[Params, ...]

    @property
    def bytes(self) -> float:
        """On one device."""
        return device_bytes((self.state, self.teacher, self.trunk, self.starts))


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and what it is called with."""

    jitted: Any
    arguments: tuple[Any, ...]
    beside: float  # bytes on a device that are held and no argument
    tokens: int  # columns it works on, or draws
    model_flops: float  # of these, backward pass included where there is one
    turns: int = 1  # of each loop that ends when the data says so, at most


def hold(lab: Lab, inputs: Inputs, mesh: Mesh, *, warmed: bool) -> Held:
    """Place everything.

    Args:
        lab: abstract.
        inputs: of the method.
        mesh: the mesh.
        warmed: whether the student is trained before the method begins.

    Raises:
        SettingsError: an axis of a model does not divide over the mesh.
    """

    def own(model: Decoder, params: Params) -> Params:
        homes = parameter_shardings(params, model.logical_axes(), mesh)
        return placed(params, homes)

    try:
        start = own(lab.student, lab.student_params)
        return Held(
            _state(inputs, mesh),
            own(lab.teacher, lab.teacher_params),
            own(lab.trunk, lab.trunk_params),
            (start, start) if warmed else (start,),
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error


def update_program(lab: Lab, inputs: Inputs, held: Held, mesh: Mesh) -> Program:
    """The update; nothing of it is left out."""
    home, state = batch_sharding(mesh), held.state
    frozen = None if inputs.frozen is None else {"teacher": held.teacher}
    update = inputs.step.update_for(state)
    data, signal = (placed(x, home) for x in (inputs.batch, inputs.signal))
    policy, count = lab.policy, inputs.sequences
    length = policy.max_prompt + policy.max_response
    forward = forward_flops(lab.student.config, count, length, policy.max_response)
    return Program(
        update,
        (state, frozen, data, signal),
        held.bytes - device_bytes((state, frozen)),
        tokens=count * length,
        model_flops=3.0 * forward,
    )


def teacher_program(lab: Lab, inputs: Inputs, held: Held, mesh: Mesh) -> Program:
    """The teacher's states before every target."""
    policy, count = lab.policy, inputs.sequences
    length = policy.max_teacher_prompt + policy.max_response
    sequences = placed(rows(lab, count, teacher=True), batch_sharding(mesh))
    return Program(
        jit_on(mesh, lab.teacher_states),
        (held.teacher, sequences),
        held.bytes - device_bytes(held.teacher),
        tokens=count * length,
        model_flops=float(trunk_flops(lab.teacher.config, count, length)),
    )


def sampler_program(lab: Lab, inputs: Inputs, held: Held, mesh: Mesh) -> Program:
    """One response to every prompt, or in a game the samples of a step."""
    if getattr(inputs.batch, "importance_weights", None) is not None:
        raise SettingsError(
            "there is no program of a sampler in which student and teacher write "
            "together; choose --program update, or an alpha of 0"
        )
    policy, count = lab.policy, inputs.records
    game = isinstance(inputs.batch, GameBatch)
    params = held.state.student.params
    params = params.get("policy", params)
    width = (count, policy.max_prompt)
    prompts = placed(
        Prompts(full(np.int32, *width), full(bool, *width)), batch_sharding(mesh)
    )
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    total = count * (policy.samples_per_prompt if game else 1)
    length = policy.max_prompt + policy.max_response
    forward = forward_flops(lab.student.config, total, length, policy.max_response)
    return Program(
        jit_on(mesh, lab.roll_out if game else lab.sample_student),
        (params, prompts, key),
        held.bytes - device_bytes(params),
        tokens=total * policy.max_response,
        model_flops=float(forward),
        turns=stage_ends(policy.max_response)[0],
    )


PROGRAMS: dict[str, Callable[..., Program]] = {
    "update": update_program,
    "teacher": teacher_program,
    "sampler": sampler_program,
}
"""By the name that ``--program`` has."""


def _state(inputs: Inputs, mesh: Mesh) -> TrainState:
    """The state's shapes, each with its place."""
    step, critic = inputs.step, inputs.critic
    begin = functools.partial(step.begin, dual=inputs.dual, mesh=None)
    abstract = jax.eval_shape(
        lambda student, critic, rng: begin(student, critic=critic, rng=rng),
        inputs.student,
        critic,
        jax.random.key(0),
    )
    homes = parameter_shardings(inputs.student, inputs.axes, mesh)
    student = placed(inputs.student, homes)
    return placed(abstract, step.shardings(student, critic, mesh))
