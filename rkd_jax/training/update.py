"""One round of the game: k critic steps, a dual step, a student step.

Beside the algorithm of PbKD (and, without a critic, plain minimisation)::

    N_in times: phi <- step(L_RM)          `_descend` on `critic_loss`, theta fixed
    lam   <- dual step on the slack        `Objective.dual_step`
    theta <- step(L_pi)                    `_descend` on `student_loss`, phi fixed

Both players minimise. Losses arrive as sums and weights (`LossOutput`) and are divided
once, after all micro-batches are in, so a batch may be cut anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from rkd_jax.masking import accumulator
from rkd_jax.packed import refuse_packed
from rkd_jax.placement import on_mesh
from rkd_jax.training.state import Player, TrainState, step_keys
from rkd_jax.types import LossOutput, Mean, Objective, Sequences

Metrics = dict[str, jax.Array]


def make_update(
    objective: Objective,
    *,
    student_optimizer: optax.GradientTransformation,
    critic_optimizer: optax.GradientTransformation | None = None,
    critic_steps: int = 1,
    accumulation: int = 1,
    state_shardings: TrainState | None = None,
    batch_sharding: NamedSharding | None = None,
    max_traces: int = 1,
) -> Callable[[TrainState, Any, Any, Any], tuple[TrainState, Metrics]]:
    """The jitted ``update(state, frozen, batch, signal) -> (state, metrics)``.

    Args:
        objective: what each player minimises.
        student_optimizer: as given to `init_state`.
        critic_optimizer: needed exactly when the objective has a critic.
        critic_steps: steps of the critic before each step of the student, all on the
            same batch.
        accumulation: micro-batches per step. Every array ``[B, ...]`` of batch and
            signal is cut to ``[accumulation, B / accumulation, ...]``; sums, weights,
            metrics and float32 gradients are added and divided once.
        state_shardings: keeps the state in place from step to step.
        batch_sharding: constrains the leading axis of batch and signal.
        max_traces: shapes a run may compile, one per length bucket.

    Returns:
        A jitted function. It donates ``state`` and nothing else: ``frozen`` may share
        no buffer with it (`init_state` copies). ``metrics`` holds float32 scalars: the
        objective's means, ``student/loss``, ``student/grad_norm`` (before clipping),
        the same for the critic, as of its last step, and then ``critic/param_norm``,
        the norm of its parameters after it, and ``dual`` (``dual/0``, ``dual/1``, ...
        of several multipliers); ``tokens``, the real tokens of the
        student's sequences; ``skipped``, steps not taken.

    A step with a non-finite loss or gradient, or with nothing unmasked (weight 0), is
    not taken: that player's parameters and optimiser state stay, and it is counted, in
    ``skipped`` and over the run in `TrainState.skipped`. Where it was the critic's last
    step, the dual stays too.

    What keeps a game from running away lies with those who know its scale. A critic is
    bounded by its head (``ScalarHead(bound=R)``, ``q_bound``) and, where there are
    preferences, by the confidence set, whose ``critic/slack`` the objective logs;
    gradients by ``OptimConfig.clip_norm``. A multiplier moves by at most ``step_size *
    clip`` in one step and never below 0 (`rkd_jax.losses.minmax.dual_update`); it has
    no ceiling, so watch ``dual``.

    Raises:
        ValueError: here, for a critic without optimiser or the reverse; when traced,
            for a missing signal, packed rows that the objective cannot read, or a batch
            that cannot be cut.
        RuntimeError: when traced for more than ``max_traces`` shapes.
    """
    game = _Game(
        objective, student_optimizer, critic_optimizer, critic_steps, accumulation
    )
    traces = 0
    mesh = None if batch_sharding is None else batch_sharding.mesh

    def update(state, frozen, batch, signal):
        with on_mesh(mesh):
            return play(state, frozen, batch, signal)

    def play(state, frozen, batch, signal):
        nonlocal traces
        _check_inputs(objective, state, batch, signal)
        if objective.whole_signal is not None and accumulation > 1:
            signal = objective.whole_signal(batch, signal)
        parts = _cut((batch, signal), accumulation, batch_sharding)
        traces += 1
        _check_traces(traces, max_traces)
        keys = step_keys(state)
        critic, dual, critic_metrics, refused = _critic_phase(
            game, state, frozen, parts, keys.critic
        )
        student, student_metrics, taken = _student_phase(
            game, state.student, critic, frozen, parts, keys.student
        )
        skipped = refused + (~taken).astype(jnp.int32)
        counts = {"tokens": _tokens(batch), "skipped": skipped.astype(jnp.float32)}
        state = TrainState(
            step=state.step + 1,
            student=student,
            critic=critic,
            dual=dual,
            rng=state.rng,
            skipped=state.skipped + skipped,
        )
        return state, critic_metrics | student_metrics | counts

    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(state_shardings, None, None, None),
        out_shardings=(state_shardings, None),
    )


@dataclasses.dataclass(frozen=True)
class _Game:
    """Who plays, by which rules; the arguments of `make_update`."""

    objective: Objective
    student_optimizer: optax.GradientTransformation
    critic_optimizer: optax.GradientTransformation | None
    critic_steps: int
    accumulation: int

    def __post_init__(self):
        if (self.objective.critic_loss is None) != (self.critic_optimizer is None):
            raise ValueError(
                f"objective {self.objective.name!r} has "
                + ("no critic: drop" if self.critic_optimizer else "a critic: give")
                + " critic_optimizer"
            )
        if self.critic_steps < 1 or self.accumulation < 1:
            raise ValueError(
                f"critic_steps={self.critic_steps} and accumulation="
                f"{self.accumulation} must be at least 1"
            )


def _critic_phase(game: _Game, state: TrainState, frozen, parts, rng):
    """``critic_steps`` steps of phi at fixed theta, then one step of the dual.

    Returns the critic, the dual, the metrics of the last step, and how many steps
    were refused.
    """
    if game.objective.critic_loss is None:
        return state.critic, state.dual, {}, jnp.int32(0)
    theta = jax.lax.stop_gradient(state.student.params)
    parts = _critic_parts(game, theta, frozen, parts)

    def loss(phi, batch, signal, rng):
        return game.objective.critic_loss(
            phi, theta, state.dual, frozen, batch, signal, rng
        )

    def step(critic, rngs):
        critic, *seen = _descend(
            "critic", loss, critic, game.critic_optimizer, parts, rngs
        )
        return critic, seen

    rngs = jax.random.split(rng, (game.critic_steps, game.accumulation))
    critic, (metrics, taken) = jax.lax.scan(step, state.critic, rngs)
    metrics = {name: values[-1] for name, values in metrics.items()}
    dual = _dual_step(game.objective, state.dual, metrics, taken[-1])
    refused = jnp.sum(~taken, dtype=jnp.int32)
    metrics |= {"critic/param_norm": _norm(critic.params)} | _dual_metrics(dual)
    return critic, dual, metrics, refused


def _critic_parts(game: _Game, theta, frozen, parts):
    """The micro-batches, with what every step of the critic would compute again."""
    read = game.objective.critic_signal
    if read is None or game.critic_steps == 1:
        return parts

    def part(inputs):
        batch, signal = inputs
        return batch, read(theta, frozen, batch, signal)

    return jax.lax.map(part, parts)


def _student_phase(game: _Game, student: Player, critic, frozen, parts, rng):
    """One step of theta at fixed phi; returns as `_descend`."""
    phi = None if critic is None else jax.lax.stop_gradient(critic.params)

    def loss(theta, batch, signal, rng):
        return game.objective.student_loss(theta, phi, frozen, batch, signal, rng)

    rngs = jax.random.split(rng, game.accumulation)
    return _descend("student", loss, student, game.student_optimizer, parts, rngs)


def _descend(role: str, loss, player: Player, optimizer, parts, rngs):
    """One step on total / weight: the player after it, metrics, was it taken."""
    out, grads = _sums(loss, player.params, parts, rngs)
    some = out.weight > 0
    weight = jnp.where(some, out.weight, 1.0)
    grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
    norm = jnp.where(some, optax.tree.norm(grads), 0.0).astype(jnp.float32)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, player.params)
    taken = some & jnp.isfinite(out.total) & jnp.isfinite(norm)
    # optax's own arithmetic relies on promotion, which users may have made strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt_state = optimizer.update(grads, player.opt_state, player.params)
        stepped = Player(optax.apply_updates(player.params, updates), opt_state)
    player = jax.tree.map(lambda new, old: jnp.where(taken, new, old), stepped, player)
    means = out.metrics | {f"{role}/loss": Mean(out.total, out.weight)}
    metrics = {name: _reduce(mean) for name, mean in means.items()}
    return player, metrics | {f"{role}/grad_norm": norm}, taken


def _sums(loss, params, parts, rngs) -> tuple[LossOutput, Any]:
    """Loss and gradient added over the micro-batches."""

    def part(inputs):
        (batch, signal), rng = inputs

        def total(params):
            out = loss(params, batch, signal, rng)
            return out.total, out

        (_, out), grads = jax.value_and_grad(total, has_aux=True)(params)
        return out, jax.tree.map(lambda g: g.astype(accumulator(g)), grads)

    def add(sums, inputs):
        return jax.tree.map(jnp.add, sums, part(inputs)), None

    inputs = (parts, rngs)
    first = jax.tree.map(lambda x: x[0], inputs)
    if len(rngs) == 1:
        return part(first)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, first))
    return jax.lax.scan(add, zeros, inputs)[0]


def _dual_step(objective: Objective, dual, metrics: Metrics, taken):
    """The next multiplier; the old one where the critic's step was refused."""
    if objective.dual_step is None:
        return dual
    moved = jnp.asarray(objective.dual_step(dual, metrics), dual.dtype)
    return jnp.where(taken & jnp.isfinite(moved), moved, dual)


def _norm(params: Any) -> jax.Array:
    """Of all parameters together, float32."""
    wide = jax.tree.map(lambda p: p.astype(accumulator(p)), params)
    return optax.tree.norm(wide).astype(jnp.float32)


def _dual_metrics(dual: jax.Array) -> Metrics:
    """``dual``; of several multipliers ``dual/0``, ``dual/1``, ..."""
    if not dual.ndim:
        return {"dual": dual}
    return {f"dual/{i}": value for i, value in enumerate(dual)}


def _reduce(mean: Mean) -> jax.Array:
    """Total / weight, 0 where nothing was counted."""
    some = mean.weight > 0
    value = jnp.where(some, mean.total, 0.0) / jnp.where(some, mean.weight, 1.0)
    return value.astype(jnp.float32)


def _cut(tree: Any, count: int, sharding: NamedSharding | None) -> Any:
    """``[B, ...] -> [count, B / count, ...]`` for every array.

    Micro-batch i takes rows i, i + count, ...: a batch cut over devices then stays
    where it is, while consecutive rows would gather on few of them.
    """

    def cut(path, array):
        if not array.ndim or array.shape[0] % count:
            raise ValueError(
                f"{_name(path)} of shape {array.shape} cannot be cut into accumulation="
                f"{count} micro-batches: its leading axis must be a multiple of it"
            )
        rows = (array.shape[0] // count, count)
        array = array.reshape(*rows, *array.shape[1:]).swapaxes(0, 1)
        if sharding is None:
            return array
        spec = PartitionSpec(None, *sharding.spec)
        return jax.lax.with_sharding_constraint(
            array, NamedSharding(sharding.mesh, spec)
        )

    return jax.tree_util.tree_map_with_path(cut, tree)


def _name(path) -> str:
    """``batch.tokens`` for an entry of ``(batch, signal)``."""
    return ("batch", "signal")[path[0].idx] + jax.tree_util.keystr(path[1:])


def _sequences(batch: Any) -> list[tuple[str, Sequences]]:
    """Every `Sequences` of a batch, with the name of its field."""
    found = jax.tree_util.tree_leaves_with_path(
        batch, is_leaf=lambda node: isinstance(node, Sequences)
    )
    return [
        (jax.tree_util.keystr(path[-1:]), leaf)
        for path, leaf in found
        if isinstance(leaf, Sequences)
    ]


def _tokens(batch: Any) -> jax.Array:
    """Real tokens in the student's `Sequences`; the teacher's copies do not count."""
    masks = [s.token_mask for name, s in _sequences(batch) if "teacher" not in name]
    return sum((jnp.sum(m, dtype=jnp.float32) for m in masks), jnp.float32(0))


def _check_traces(traces: int, allowed: int) -> None:
    if traces > allowed:
        raise RuntimeError(
            f"update was traced for {traces} different inputs, max_traces={allowed}: "
            "pad batches to fixed shapes, or allow one trace per length bucket"
        )


def _check_inputs(
    objective: Objective, state: TrainState, batch: Any, signal: Any
) -> None:
    if not objective.packed:
        for _, sequences in _sequences(batch):
            refuse_packed(sequences, f"objective {objective.name!r}")
    if objective.critic_loss is not None and state.critic is None:
        raise ValueError(
            f"objective {objective.name!r} has a critic, the state has none: "
            "give critic_params to init_state"
        )
    present = _fields(signal)
    missing = [name for name in objective.requires if name not in present]
    if missing:
        raise ValueError(
            f"objective {objective.name!r} requires the signal {', '.join(missing)}; "
            f"got {', '.join(sorted(present)) or 'none'}"
        )


def _fields(signal: Any) -> set[str]:
    """Names of the entries that are there: of a mapping, dataclass or NamedTuple."""
    if isinstance(signal, Mapping):
        items = signal.items()
    elif dataclasses.is_dataclass(signal):
        names = [field.name for field in dataclasses.fields(signal)]
        items = [(name, getattr(signal, name)) for name in names]
    else:
        items = signal._asdict().items() if hasattr(signal, "_asdict") else ()
    return {name for name, value in items if value is not None}
