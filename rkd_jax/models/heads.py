"""Small heads on hidden states: scalar reward, Gaussian reward, action values.

Every head starts at exactly 0 (its last layer is zero), so a bounded head begins in the
middle of its range, where the bound has slope one; its first update moves that layer.
Heads compute in float32 whatever the dtype of the states.

>>> import jax, jax.numpy as jnp
>>> head = ScalarHead(bound=1.0)
>>> params = head.init(jax.random.key(0), 4)
>>> head.apply(params, jnp.ones((2, 3, 4), jnp.bfloat16)).tolist()
[[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rkd_jax.masking import accumulator, fill_masked
from rkd_jax.models.api import CausalLM, action_hidden
from rkd_jax.types import Params, Sequences


@dataclasses.dataclass(frozen=True)
class ScalarHead:
    """One number per state.

    Example: ``ScalarHead(bound=1.0)`` is linear, in (-1, 1); ``ScalarHead(width=256)``
    has one hidden layer of 256 units and no bound.

    Raises:
        ValueError: ``width`` or ``bound`` is not positive.
    """

    width: int | None = None  # units of the hidden layer; None is linear
    bound: float | None = None  # R: the value becomes R * tanh(value / R)

    def __post_init__(self) -> None:
        _check_positive(width=self.width, bound=self.bound)

    def init(self, rng: jax.Array, dim: int) -> Params:
        """Float32 parameters for states of width ``dim``; the value is exactly 0."""
        return _init_readout(rng, dim, self.width, 1)

    def apply(self, params: Params, hidden: jax.Array) -> jax.Array:
        """``[..., D] -> float32[...]``; gradient flows to both arguments."""
        return _bounded(_readout(params, hidden), self.bound)[..., 0]


@dataclasses.dataclass(frozen=True)
class QHead:
    """One number per state and action: ``[..., D] -> [..., actions]``.

    Example: ``QHead(actions=49152)`` is linear; ``width`` and ``bound`` as in
    `ScalarHead`, and the same errors.
    """

    actions: int  # V
    width: int | None = None
    bound: float | None = None

    def __post_init__(self) -> None:
        _check_positive(actions=self.actions, width=self.width, bound=self.bound)

    def init(self, rng: jax.Array, dim: int) -> Params:
        """Float32 parameters for states of width ``dim``; every value is exactly 0."""
        return _init_readout(rng, dim, self.width, self.actions)

    def apply(self, params: Params, hidden: jax.Array) -> jax.Array:
        """``[..., D] -> float32[..., actions]``; gradient flows to both arguments."""
        return _bounded(_readout(params, hidden), self.bound)


class Gaussian(NamedTuple):
    """Mean and natural logarithm of the standard deviation, equal shapes."""

    mean: jax.Array
    log_std: jax.Array


@dataclasses.dataclass(frozen=True)
class GaussianHead:
    """A normal distribution per state.

    A hard clip has no gradient outside its range, so a unit that drifts out never comes
    back; "smooth" is the default for that reason.

    Example: ``GaussianHead(log_std_range=(-3.0, 2.0))`` starts at mean 0, log_std -0.5.

    Raises:
        ValueError: ``width`` not positive, an empty range, or an unknown ``limit``.
    """

    width: int | None = None  # units of the hidden layer; None is linear
    log_std_range: tuple[float, float] = (-3.0, 2.0)
    limit: Literal["smooth", "clip", "none"] = "smooth"  # lo + (hi - lo) * sigmoid(raw)

    def __post_init__(self) -> None:
        _check_positive(width=self.width)
        if not self.log_std_range[0] < self.log_std_range[1]:
            raise ValueError(f"log_std_range={self.log_std_range} must be (low, high)")
        if self.limit not in ("smooth", "clip", "none"):
            raise ValueError(f"limit={self.limit!r} is not smooth, clip or none")

    def init(self, rng: jax.Array, dim: int) -> Params:
        """Float32 parameters for states of width ``dim``; mean and raw output are 0."""
        return _init_readout(rng, dim, self.width, 2)

    def apply(self, params: Params, hidden: jax.Array) -> Gaussian:
        """``[..., D] -> float32[...]`` each; gradient flows to both arguments."""
        out = _readout(params, hidden)
        raw, (low, high) = out[..., 1], self.log_std_range
        if self.limit == "smooth":
            raw = low + (high - low) * jax.nn.sigmoid(raw)
        elif self.limit == "clip":
            raw = jnp.clip(raw, low, high)
        return Gaussian(out[..., 0], raw)


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A language model's trunk with a `ScalarHead`: text to reward.

    Parameters are ``{"trunk": ..., "head": ...}``. To start from a fine-tuned model,
    replace "trunk" by a copy of its parameters. Both readings return one number per
    target, so that a return is the same masked sum for either.

    Example: ``RewardModel(Decoder(config), ScalarHead(bound=1.0))``.
    """

    trunk: CausalLM
    head: ScalarHead

    def init(self, rng: jax.Array) -> Params:
        """Random trunk, and a head that gives 0 everywhere."""
        trunk_rng, head_rng = jax.random.split(rng)
        return {
            "trunk": self.trunk.init(trunk_rng),
            "head": self.head.init(head_rng, self.trunk.config.hidden_size),
        }

    def token_rewards(self, params: Params, sequences: Sequences) -> jax.Array:
        """The reward of every target token, read after consuming it.

        Args:
            params: of this reward model; gradient flows to trunk and head.
            sequences: [*batch]; the end-of-text token is a target like any other and
                has a reward of its own.

        Returns:
            float32[*batch, T], exactly 0 where the response mask is not set.
        """
        rewards = self._rewards(params, sequences)
        return fill_masked(rewards, sequences.response_mask)

    def sequence_rewards(self, params: Params, sequences: Sequences) -> jax.Array:
        """One reward per response, credited to its last target; 0 at every other.

        The last target is found by the mask, never by comparing ids. Arguments and
        gradient as `token_rewards`.

        Returns:
            float32[*batch, T]; an empty response has no last target and gives zeros.
        """
        mask = sequences.response_mask.astype(jnp.int32)
        remaining = jnp.flip(jnp.cumsum(jnp.flip(mask, -1), axis=-1), -1)
        last = (mask == 1) & (remaining == 1)
        return fill_masked(self._rewards(params, sequences), last)

    def _rewards(self, params: Params, sequences: Sequences) -> jax.Array:
        hidden = action_hidden(self.trunk, params["trunk"], sequences)
        return self.head.apply(params["head"], hidden)


def _init_readout(rng: jax.Array, dim: int, width: int | None, outputs: int) -> Params:
    params, inner = {}, dim
    if width is not None:
        inner = width
        kernel = jax.random.normal(rng, (dim, width), jnp.float32) * dim**-0.5
        params["hidden"] = {"kernel": kernel, "bias": jnp.zeros(width, jnp.float32)}
    params["output"] = {
        "kernel": jnp.zeros((inner, outputs), jnp.float32),
        "bias": jnp.zeros(outputs, jnp.float32),
    }
    return params


def _readout(params: Params, hidden: jax.Array) -> jax.Array:
    hidden = hidden.astype(accumulator(hidden))
    if "hidden" in params:
        hidden = jax.nn.gelu(_affine(params["hidden"], hidden))
    return _affine(params["output"], hidden)


def _affine(layer: Params, x: jax.Array) -> jax.Array:
    out = x @ layer["kernel"].astype(x.dtype)
    bias = layer["bias"].astype(x.dtype)
    return out + jnp.expand_dims(bias, range(x.ndim - 1))


def _bounded(value: jax.Array, bound: float | None) -> jax.Array:
    return value if bound is None else bound * jnp.tanh(value / bound)


def _check_positive(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be positive")
