"""What one update of each method reads, as shapes.

Rows are as wide as the experiment pads them and full. What the experiment computes
before the step is asked of its own scorers, so that types and widths are theirs; what
it looks up in a table is said here.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import ava, baselines, drdo, edpo, tvkd, xkd
from experiments.lab import Lab
from experiments.settings import SettingsError
from experiments.trainer import Step
from rkd_jax.models.decoder import Decoder
from rkd_jax.types import (
    AnchoredPairs,
    DemonstrationBatch,
    EnsembleSignal,
    ImitationBatch,
    ImitationSignal,
    Params,
    PreferenceBatch,
    ReferenceSignal,
    Sequences,
    ShapingSignal,
    TeacherStates,
)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One update and its arguments, all of them abstract.

    ``axes`` are the logical axes of ``student``, see `rkd_jax.sharding`.
    """

    step: Step
    records: int  # B: demonstrations, pairs, or prompts of a game
    sequences: int  # that the student is trained on
    batch: Any
    signal: Any
    student: Params
    axes: Any
    frozen: Any = None
    critic: Params | None = None
    dual: float | tuple[float, ...] = 1.0


@functools.singledispatch
def inputs_of(method: Any, batch: int | None) -> Inputs:
    """The update of a method.

    Args:
        method: of an experiment's table, made for an abstract lab.
        batch: B, as many records as the options say if None. A game keeps its number of
            pairs for every prompt.

    Raises:
        SettingsError: a method that is not known here.
    """
    raise SettingsError(
        f"{type(method).__name__} has no shapes in experiments/abstract_inputs.py"
    )


def full(dtype, *shape: int) -> jax.ShapeDtypeStruct:
    """An abstract array."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def rows(lab: Lab, *batch: int, teacher: bool = False) -> Sequences:
    """`Sequences` under the student's prompt or the teacher's."""
    policy = lab.policy
    prompt = policy.max_teacher_prompt if teacher else policy.max_prompt
    return Sequences(
        full(np.int32, *batch, prompt + policy.max_response),
        full(bool, *batch, prompt + policy.max_response),
        full(bool, *batch, policy.max_response),
    )


def demonstrations(lab: Lab, batch: int) -> DemonstrationBatch:
    """One response for every prompt."""
    index = full(np.int32, batch)
    return DemonstrationBatch(rows(lab, batch), rows(lab, batch, teacher=True), index)


def pairs(lab: Lab, batch: int) -> PreferenceBatch:
    """Two."""
    return PreferenceBatch(
        rows(lab, batch, 2),
        rows(lab, batch, 2, teacher=True),
        full(np.float32, batch),
        full(np.float32, batch, 2),
        full(np.int32, batch),
    )


def refuse_packed_shapes(what: str, row_length: int) -> None:
    """Raise SettingsError for packed rows, which have no shapes here."""
    if row_length:
        raise SettingsError(
            f"{what}: row_length {row_length}, but shapes are those of a row for each "
            "record; set it to 0"
        )


def states(lab: Lab, sequences: Sequences) -> TeacherStates:
    """The teacher's."""
    return TeacherStates(
        jax.eval_shape(lab.teacher_states, lab.teacher_params, sequences)
    )


def with_head(lab: Lab, head: Any) -> dict[str, Params]:
    """The student and a head on its states."""
    return {
        "policy": lab.student_params,
        "reward_head": head_params(head, lab.student),
    }


def head_params(head: Any, trunk: Decoder) -> Params:
    """Of a head on a trunk's states."""
    width = trunk.config.hidden_size
    return jax.eval_shape(lambda key: head.init(key, width), jax.random.key(0))


def axes_of(model: Decoder, params: Params) -> Any:
    """Logical axes of a student; a head beside it is replicated."""
    if "policy" not in params:
        return model.logical_axes()
    head = jax.tree.map(lambda x: (None,) * x.ndim, params["reward_head"])
    return {"policy": model.logical_axes(), "reward_head": head}


def _trained(
    method,
    batch: int | None,
    data,
    signal,
    params: Params | None = None,
    *,
    sequences: int = 1,
    frozen: Any = None,
) -> Inputs:
    """Of a method that a `Trainer` trains; ``data`` and ``signal`` are of B."""
    trainer = method.trainer
    lab = trainer.lab
    refuse_packed_shapes(trainer.objective.name, trainer.options.row_length)
    size = batch or trainer.options.batch_size
    params = lab.student_params if params is None else params
    found = data(size)
    return Inputs(
        trainer.step,
        records=size,
        sequences=sequences * size,
        batch=found,
        signal=signal(found),
        student=params,
        axes=axes_of(lab.student, params),
        frozen=frozen,
    )


def _nothing(batch) -> tuple[()]:
    del batch
    return ()


def _reference(batch) -> ReferenceSignal:
    return ReferenceSignal(full(np.float32, *_pair_shape(batch)))


def _pair_shape(batch) -> tuple[int, int]:
    found = batch.pairs if isinstance(batch, AnchoredPairs) else batch
    return found.rewards.shape


@inputs_of.register(baselines.Sft)
@inputs_of.register(baselines.SeqKd)
def _likelihood(method, batch: int | None) -> Inputs:
    data = functools.partial(demonstrations, method.trainer.lab)
    return _trained(method, batch, data, _nothing)


@inputs_of.register(baselines.Kd)
def _kd(method, batch: int | None) -> Inputs:
    lab = method.lab
    return _trained(
        method,
        batch,
        functools.partial(demonstrations, lab),
        lambda data: states(lab, data.teacher_sequences),
        frozen=lab.frozen,
    )


@inputs_of.register(baselines.Gkd)
def _gkd(method, batch: int | None) -> Inputs:
    rho = method.options.rho
    return _imitating(method, batch, lambda size: _imitation(method.lab, size, rho))


@inputs_of.register(baselines.MiniLlm)
def _minillm(method, batch: int | None) -> Inputs:
    lab, mixed = method.lab, method.options.alpha > 0.0

    def data(size: int) -> ImitationBatch:
        width = lab.policy.max_response
        weights = full(np.float32, size, width) if mixed else None
        found = _imitation(lab, size, 1.0)
        return dataclasses.replace(found, importance_weights=weights)

    return _imitating(method, batch, data)


def _imitating(method, batch: int | None, data) -> Inputs:
    lab = method.lab
    return _trained(
        method,
        batch,
        data,
        lambda data: states(lab, _imitated(data).teacher_sequences),
        frozen=lab.frozen,
    )


def _imitation(lab: Lab, size: int, rho: float) -> ImitationBatch:
    imitated = demonstrations(lab, size) if rho else None
    return ImitationBatch(demonstrations(lab, size), imitated)


def _imitated(batch: ImitationBatch) -> DemonstrationBatch:
    return batch.demonstrations if batch.imitated is None else batch.imitated


@inputs_of.register(baselines.Dpo)
def _dpo(method, batch: int | None) -> Inputs:
    data = functools.partial(pairs, method.lab)
    return _trained(method, batch, data, _reference, sequences=2)


@inputs_of.register(tvkd.Tvkd)
def _tvkd(method, batch: int | None) -> Inputs:
    def signal(data) -> ShapingSignal:
        each = full(np.float32, *_pair_shape(data))
        return ShapingSignal(each, each)

    data = functools.partial(pairs, method.lab)
    return _trained(method, batch, data, signal, sequences=2)


@inputs_of.register(xkd.Xkd)
def _xkd(method, batch: int | None) -> Inputs:
    lab, requires = method.lab, method.trainer.objective.requires
    params = with_head(lab, method.head)
    trained = functools.partial(_trained, method, batch, params=params)
    if not requires:  # as `Xkd.train`: batches go to the update as they are
        data = functools.partial(demonstrations, lab)
        return trained(data, _nothing, frozen=lab.frozen)

    def signal(data: ImitationBatch):
        if method.options.next_value == "sampled":
            return states(lab, _imitated(data).teacher_sequences)
        asked = functools.partial(
            jax.eval_shape, lab.teacher_policy, lab.teacher_params
        )
        found = asked(_imitated(data).teacher_sequences)
        fixed = asked(data.demonstrations.teacher_sequences) if method.rho else None
        return ImitationSignal(found, fixed)

    return trained(
        lambda size: _imitation(lab, size, method.rho),
        signal,
        frozen=lab.frozen,
        sequences=2 if method.rho else 1,
    )


@inputs_of.register(ava.AvaD)
@inputs_of.register(ava.AvaP)
def _ava(method, batch: int | None) -> Inputs:
    lab, params = method.lab, with_head(method.lab, method.head)
    if isinstance(method, ava.AvaD):
        data = functools.partial(demonstrations, lab)
        return _trained(method, batch, data, _nothing, params)
    data = functools.partial(pairs, lab)
    return _trained(method, batch, data, _nothing, params, sequences=2)


@inputs_of.register(ava.AvaReward)
def _ava_reward(method, batch: int | None) -> Inputs:
    return inputs_of(method.dpo, batch)


@inputs_of.register(drdo.Drdo)
def _drdo(method, batch: int | None) -> Inputs:
    params = with_head(method.lab, method.head)
    data = functools.partial(pairs, method.lab)
    return _trained(method, batch, data, _nothing, params, sequences=2)


@inputs_of.register(edpo.RewardDistillation)
@inputs_of.register(edpo.Pdpo)
def _edpo(method, batch: int | None) -> Inputs:
    lab, penalised = method.lab, method.options.kappa > 0

    def data(size: int) -> AnchoredPairs:
        samples = demonstrations(lab, size) if penalised else None
        return AnchoredPairs(pairs(lab, size), samples)

    def signal(data) -> ReferenceSignal | EnsembleSignal:
        if isinstance(method, edpo.Pdpo):
            return _reference(data)
        each = _pair_shape(data)
        rewards = full(np.float32, *each, method.source.members)
        return EnsembleSignal(full(np.float32, *each), rewards)

    return _trained(method, batch, data, signal, sequences=3 if penalised else 2)
