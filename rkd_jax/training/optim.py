"""Optimisers from a small configuration: clip, Adam, weight decay, schedule."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import optax

from rkd_jax.types import Params


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with a schedule. Steps are this player's own: a critic that takes five
    per update has ``total_steps`` five times the updates.

    Example: ``OptimConfig(3e-5, "cosine", warmup_steps=50, total_steps=2000)``.
    """

    learning_rate: float = 1e-5  # the peak
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0  # linear; the first step already has 1/warmup_steps
    total_steps: int | None = None  # end of the decay, warm-up included
    end_factor: float = 0.0  # learning rate at total_steps, as a share of the peak
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # matrices only, see `decayed`
    clip_norm: float | None = 1.0  # on the global gradient norm; None does not clip

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(
                f"schedule {self.schedule!r}: choose constant, cosine or linear"
            )
        if self.schedule == "constant":
            return
        if self.total_steps is None or self.total_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule {self.schedule!r} needs total_steps greater than "
                f"warmup_steps={self.warmup_steps}, not {self.total_steps}"
            )


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """The optimiser ``config`` describes; give the same one to state and update."""
    adamw = optax.adamw(
        make_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def make_schedule(config: OptimConfig) -> optax.Schedule:
    """Learning rate as a function of the number of steps already taken."""
    peak, warmup = config.learning_rate, config.warmup_steps
    span = (config.total_steps or 0) - warmup
    decay = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, span, config.end_factor),
        "linear": lambda: optax.linear_schedule(peak, peak * config.end_factor, span),
    }[config.schedule]()
    if not warmup:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup])


def decayed(params: Params) -> Any:
    """True for the arrays that weight decay applies to.

    Not to vectors, biases or norms. Names decide as well as ranks, because scanned
    layers stack a norm's ``[D]`` to ``[layers, D]``.
    """

    def decays(path, array):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        spared = names and (
            names[-1] in ("bias", "scale") or any("norm" in name for name in names)
        )
        return array.ndim > 1 and not spared

    return jax.tree_util.tree_map_with_path(decays, params)
