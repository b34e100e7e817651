"""What one update of each game reads, as shapes; see `experiments.abstract_inputs`."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from experiments.abstract_inputs import (
    Inputs,
    demonstrations,
    full,
    head_params,
    inputs_of,
    pairs,
    refuse_packed_shapes,
    rows,
)
from experiments.lab import Lab
from experiments.moment_games import Mmkd, MmPbkd
from experiments.pbkd import Pbkd
from experiments.trainer import Step
from rkd_jax.types import GameBatch, GameSignal, Sequences, WhiteBoxSignal


@inputs_of.register(Pbkd)
def _pbkd(method, batch: int | None) -> Inputs:
    lab, options = method.lab, method.game.config
    refuse_packed_shapes("pbkd", options.row_length)
    data = _game_batch(lab, batch, pairs_per_step=options.pairs_per_step)
    signal = GameSignal(
        full(np.float32, _pairs(data)),
        _features(lab, data.demonstrations.sequences),
        _features(lab, data.rollouts),
        _features(lab, data.preferences.sequences),
    )
    critic = head_params(lab.reward_head, lab.trunk)
    if lab.trains_trunk:
        critic = {"trunk": lab.trunk_params, "head": critic}
    return _game(lab, method.game.step, data, signal, critic, options.dual)


@inputs_of.register(Mmkd)
def _mmkd(method, batch: int | None) -> Inputs:
    lab, options = method.lab, method.options
    data = _game_batch(lab, batch, sampled=method.sampled)
    critic = {side: head_params(method.head, lab.trunk) for side in ("off", "on")}
    signal = WhiteBoxSignal(**_seen(method, data, options.on_weight < 1))
    return _game(lab, method.step, data, signal, critic, 1.0, lab.frozen)


@inputs_of.register(MmPbkd)
def _mm_pbkd(method, batch: int | None) -> Inputs:
    lab, options, sides = method.lab, method.options, method.sides
    data = _game_batch(
        lab, batch, pairs_per_step=options.pairs_per_step, sampled=method.sampled
    )
    found = _seen(method, data, "off" in sides)
    found["preference_features"] = _states(lab, data.preferences.sequences)
    if "on" in sides:
        found["preferences"] = _heard(method, data.preferences.teacher_sequences)
    mixed = len(sides) > 1
    each = (len(sides),) if mixed else ()
    signal = WhiteBoxSignal(full(np.float32, _pairs(data), *each), **found)
    critics = {side: head_params(method.head, lab.trunk) for side in sides}
    critic = critics if mixed else critics[options.gap]
    dual = (options.dual,) * 2 if mixed else options.dual
    return _game(lab, method.step, data, signal, critic, dual, lab.frozen)


def _game_batch(
    lab: Lab, batch: int | None, *, pairs_per_step: int = 0, sampled: bool = True
) -> GameBatch:
    """B prompts with their rollouts, and pairs in the same proportion as ever."""
    usual, group = lab.policy.rollout_prompts, lab.policy.samples_per_prompt
    size = batch or usual
    return GameBatch(
        demonstrations(lab, size),
        rows(lab, size, group) if sampled else None,
        pairs(lab, pairs_per_step * size // usual) if pairs_per_step else None,
    )


def _pairs(data: GameBatch) -> int:
    return data.preferences.label.shape[0]


def _game(
    lab: Lab, step: Step, data: GameBatch, signal, critic, dual, frozen=None
) -> Inputs:
    trained = data.demonstrations.sequences if data.rollouts is None else data.rollouts
    return Inputs(
        step,
        records=data.demonstrations.index.shape[0],
        sequences=int(np.prod(trained.tokens.shape[:-1])),
        batch=data,
        signal=signal,
        student=lab.student_params,
        axes=lab.student.logical_axes(),
        critic=critic,
        dual=dual,
        frozen=frozen,
    )


def _seen(method, data: GameBatch, taught: bool) -> dict[str, Any]:
    """What is asked of the teacher and the trunk at every step."""
    lab, found = method.lab, {}
    if taught:
        seen = data.demonstrations
        found["demonstrations"] = _heard(method, seen.teacher_sequences)
        found["demonstration_features"] = _states(lab, seen.sequences)
    if data.rollouts is not None:
        heard = rows(lab, *data.rollouts.tokens.shape[:-1], teacher=True)
        found["rollouts"] = _heard(method, heard)
        found["rollout_features"] = _states(lab, data.rollouts)
    return found


def _heard(method, sequences: Sequences) -> Any:
    """The teacher's word, in the form that the method reads."""
    return jax.eval_shape(method.ask, method.lab.teacher_params, sequences)


def _states(lab: Lab, sequences: Sequences) -> Any:
    return jax.eval_shape(lab.trunk_states, lab.trunk_params, sequences)


def _features(lab: Lab, sequences: Sequences) -> Any:
    if lab.trains_trunk:
        return None
    return jax.eval_shape(lab.trunk_features, lab.trunk_params, sequences)
