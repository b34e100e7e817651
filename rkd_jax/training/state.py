"""What training carries from step to step, and where each part of it lives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from rkd_jax.sharding import replicated
from rkd_jax.types import Params, struct


@struct
class Player:
    """Parameters and the state of the optimiser that moves them.

    Example: ``Player(params={"w": ...}, opt_state=optimizer.init({"w": ...}))``.
    """

    params: Params
    opt_state: Any


@struct
class TrainState:
    """Everything one update reads and replaces; donated to it as a whole.

    Example: ``TrainState(step=0, student=Player(...), critic=None, dual=1.0,
    rng=key<fry>[], skipped=0)``.
    """

    step: jax.Array  # int32[], updates done so far
    student: Player
    critic: Player | None  # None where the objective has no second player
    dual: jax.Array  # float32[] or [constraints], the critic's multipliers
    rng: jax.Array  # typed key [], the root; never advanced, see `step_keys`
    skipped: jax.Array  # int32[], optimiser steps refused so far, of both players


class StepKeys(NamedTuple):
    """The independent keys of one step; equal after a resume by construction."""

    prepare: jax.Array  # for sampling before the update
    critic: jax.Array
    student: jax.Array


def step_keys(state: TrainState) -> StepKeys:
    """The keys of the step ``state.step``: ``split(fold_in(rng, step), 3)``."""
    return StepKeys(*jax.random.split(jax.random.fold_in(state.rng, state.step), 3))


def init_state(
    student_params: Params,
    *,
    student_optimizer: optax.GradientTransformation,
    critic_params: Params | None = None,
    critic_optimizer: optax.GradientTransformation | None = None,
    dual: float | Sequence[float] = 1.0,
    rng: jax.Array,
    shardings: TrainState | None = None,
) -> TrainState:
    """The state before the first update.

    Every buffer is a copy, so that a reference or a frozen critic started from the
    same parameters survives the donation of the state. Optimiser states are created
    under their final sharding, never whole first. Works under `jax.eval_shape`.

    Args:
        student_params: float arrays. Keep them float32: they are the master weights,
            and a model's compute dtype is its own business.
        student_optimizer: as given to `make_update`.
        critic_params: second player, or None.
        critic_optimizer: needed exactly when there are critic parameters.
        dual: initial multiplier, or one per constraint of the objective.
        rng: typed root key, ``jax.random.key(seed)``.
        shardings: what `state_shardings` returned; None leaves placement to JAX.

    Raises:
        ValueError: a critic without optimiser or the reverse; ``rng`` is no typed key.
    """
    if (critic_params is None) != (critic_optimizer is None):
        raise ValueError("give critic_params and critic_optimizer together, or neither")
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) or rng.shape:
        raise ValueError("rng must be one typed key: jax.random.key(seed)")
    players = (student_params, critic_params)
    if shardings is not None:
        # `device_put`, because the parameters may sit on other devices than the mesh.
        critic = None if shardings.critic is None else shardings.critic.params
        players = jax.device_put(players, (shardings.student.params, critic))

    def build(players, rng):
        student, critic = jax.tree.map(jnp.copy, players)
        return TrainState(
            step=jnp.int32(0),
            student=Player(student, student_optimizer.init(student)),
            critic=None
            if critic is None
            else Player(critic, critic_optimizer.init(critic)),
            dual=jnp.asarray(dual, jnp.float32),
            rng=jnp.copy(rng),
            skipped=jnp.int32(0),
        )

    return jax.jit(build, out_shardings=shardings)(players, rng)


def state_shardings(
    student_params: Params,
    student_shardings: Any,
    *,
    student_optimizer: optax.GradientTransformation,
    critic_params: Params | None = None,
    critic_shardings: Any = None,
    critic_optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
    """A `TrainState` of shardings: moments live where their parameters live.

    Args:
        student_params: arrays or their abstract values.
        student_shardings: a `NamedSharding` per array of ``student_params``.
        student_optimizer: as given to `init_state`.
        critic_params: second player, or None.
        critic_shardings: a `NamedSharding` per array of ``critic_params``.
        critic_optimizer: as given to `init_state`.

    Returns:
        The tree that `init_state` and `make_update` take. Whatever is no copy of a
        parameter (step counters, factored moments) is replicated.
    """
    everywhere = replicated(jax.tree.leaves(student_shardings)[0].mesh)

    def player(params, shardings, optimizer):
        abstract = jax.eval_shape(optimizer.init, params)
        return Player(shardings, _following(abstract, params, shardings, everywhere))

    return TrainState(
        step=everywhere,
        student=player(student_params, student_shardings, student_optimizer),
        critic=None
        if critic_params is None
        else player(critic_params, critic_shardings, critic_optimizer),
        dual=everywhere,
        rng=everywhere,
        skipped=everywhere,
    )


def _following(
    opt_state: Any, params: Params, shardings: Any, default: NamedSharding
) -> Any:
    """Of each entry: the sharding of the parameter whose path ends its own path."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    homes = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings), strict=True)
    }

    def place(path, leaf):
        for start in range(len(path) + 1):
            shape, sharding = homes.get(path[start:], (None, default))
            if shape == leaf.shape:
                return sharding
        return default

    return jax.tree_util.tree_map_with_path(place, opt_state)


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of ``state`` without its buffers."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
