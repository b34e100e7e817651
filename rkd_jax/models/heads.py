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
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from rkd_jax.masking import accumulator, fill_masked
from rkd_jax.models.api import CausalLM, action_hidden
from rkd_jax.models.projection import project
from rkd_jax.packed import last_targets
from rkd_jax.types import Params, Sequences


def _check_positive(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be positive")


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


LogStdLimit = Literal["smooth", "clip", "none"]


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
    limit: LogStdLimit = "smooth"  # low + (high - low) * sigmoid(raw)

    def __post_init__(self) -> None:
        _check_positive(width=self.width)
        check_log_std_limit(self.log_std_range, self.limit)

    def init(self, rng: jax.Array, dim: int) -> Params:
        """Float32 parameters for states of width ``dim``; mean and raw output are 0."""
        return _init_readout(rng, dim, self.width, 2)

    def apply(self, params: Params, hidden: jax.Array) -> Gaussian:
        """``[..., D] -> float32[...]`` each; gradient flows to both arguments."""
        out = _readout(params, hidden)
        log_std = limit_log_std(out[..., 1], self.log_std_range, self.limit)
        return Gaussian(out[..., 0], log_std)


def check_log_std_limit(log_std_range: tuple[float, float], limit: LogStdLimit) -> None:
    """Raise ValueError for an empty range or an unknown limit."""
    if not log_std_range[0] < log_std_range[1]:
        raise ValueError(f"{log_std_range=} must be (low, high)")
    if limit not in get_args(LogStdLimit):
        raise ValueError(f"{limit=} is not smooth, clip or none")


def limit_log_std(
    raw: jax.Array, log_std_range: tuple[float, float], limit: LogStdLimit
) -> jax.Array:
    """``raw`` [...] within the range as `GaussianHead` says; gradient flows to it."""
    low, high = log_std_range
    if limit == "smooth":
        return low + (high - low) * jax.nn.sigmoid(raw)
    return jnp.clip(raw, low, high) if limit == "clip" else raw


TOKEN_HEAD = ScalarHead(bound=1.0)
"""The default of a reward for every target: linear, each in (-1, 1)."""
SEQUENCE_HEAD = ScalarHead(bound=5.0)
"""The default of one reward for the whole response: linear, in (-5, 5)."""

HeadRewards = Callable[[Params, Sequences, jax.Array | None], jax.Array]
"""``(head parameters, sequences [*batch], features [*batch, T, D]) -> [*batch, T]``."""
HeadQValues = Callable[[Params, Sequences, jax.Array | None], jax.Array]
"""As `HeadRewards`, of features before each target: ``-> [*batch, T, actions]``."""


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A language model's trunk with a `ScalarHead`: text to reward.

    Parameters are ``{"trunk": ..., "head": ...}``. To start from a fine-tuned model,
    replace "trunk" by a copy of its parameters. Both readings return one number per
    target, so that a return is the same masked sum for either. For a head on the states
    of a frozen trunk see `head_token_rewards` and `head_sequence_rewards`; all four
    have the signature that the objectives ask of a reward player.

    Example: ``RewardModel(Decoder(config), TOKEN_HEAD).token_rewards``, or
    ``RewardModel(Decoder(config), SEQUENCE_HEAD).sequence_rewards``.
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

    def token_rewards(
        self, params: Params, sequences: Sequences, features: None = None
    ) -> jax.Array:
        """The reward of every target token, read after consuming it.

        Args:
            params: of this reward model; gradient flows to trunk and head.
            sequences: [*batch]; the end-of-text token is a target like any other and
                has a reward of its own.
            features: None: the trunk computes its own.

        Returns:
            float32[*batch, T], exactly 0 where the response mask is not set.

        Raises:
            ValueError: features were given.
        """
        return self._rewards(params, sequences, features, sequences.response_mask)

    def sequence_rewards(
        self, params: Params, sequences: Sequences, features: None = None
    ) -> jax.Array:
        """One reward per response, credited to its last target; 0 at every other.

        The last target is found by the mask, never by comparing ids. Arguments,
        gradient and errors as `token_rewards`.

        Returns:
            float32[*batch, T]; an empty response has no last target and gives zeros.
        """
        return self._rewards(params, sequences, features, last_targets(sequences))

    def _rewards(self, params, sequences, features, credited) -> jax.Array:
        if features is not None:
            raise ValueError(
                "this reward model has a trunk of its own and reads no features; give "
                "None, or use head_token_rewards for a head on them"
            )
        hidden = action_hidden(self.trunk, params["trunk"], sequences)
        return fill_masked(self.head.apply(params["head"], hidden), credited)


def head_token_rewards(head: ScalarHead) -> HeadRewards:
    """A reward player that is only a head: one reward for every target.

    Args:
        head: read on a frozen trunk's states after each target
            (`rkd_jax.signals.teacher.make_features`); its parameters are all there is
            to train.

    Returns:
        `HeadRewards`: float32[*batch, T], exactly 0 where the response mask is not set.
        It raises ValueError without features, AssertionError for ones of other rows.

    Gradient:
        Flows to the head's parameters only; the features are data and may hold NaN in
        padding.
    """

    def token_rewards(params, sequences, features):
        return _read_features(head, params, features, sequences.response_mask)

    return token_rewards


def head_sequence_rewards(head: ScalarHead) -> HeadRewards:
    """A reward player that is only a head: one reward, credited to the last target.

    The head is read after the last target, which the mask tells. Arguments, gradient
    and errors as `head_token_rewards`.

    Returns:
        `HeadRewards`: float32[*batch, T], 0 but for the last target of each response.
    """

    def sequence_rewards(params, sequences, features):
        return _read_features(head, params, features, last_targets(sequences))

    return sequence_rewards


@dataclasses.dataclass(frozen=True)
class _QOnFeatures:
    """`head_q_values`."""

    head: QHead

    def __call__(
        self, params: Params, sequences: Sequences, features: jax.Array | None
    ) -> jax.Array:
        """See `head_q_values`."""
        mask = sequences.response_mask
        return fill_masked(self.on_states(params, _given_states(features, mask)), mask)

    def on_states(self, params: Params, states: jax.Array) -> jax.Array:
        """``[.., D] -> [.., actions]``, wherever the states stand."""
        return self.head.apply(params, states)


def head_q_values(head: QHead) -> HeadQValues:
    """A critic that is only a head: the value of every action before each target.

    Args:
        head: read on a frozen trunk's states before each target
            (`rkd_jax.signals.teacher.make_features` with ``states="before"``); its
            parameters are all there is to train. Leave it unbounded: the objectives
            that take it bound its values, if asked after centring them.

    Returns:
        `HeadQValues`: float32[*batch, T, actions], 0 where the response mask is not
        set. It raises ValueError without features, AssertionError for ones of other
        rows. Its ``on_states(params, [.., D])`` reads single states; the objectives ask
        that, a few positions at a time.

    Gradient:
        Flows to the head's parameters and, for penalties on a critic's slope, to the
        features, which may hold NaN in padding.
    """
    return _QOnFeatures(head)


def _read_features(head: ScalarHead, params, features, credited) -> jax.Array:
    """The head where ``credited`` [*batch, T] is set, 0 elsewhere."""
    states = jax.lax.stop_gradient(_given_states(features, credited))
    return fill_masked(head.apply(params, states), credited)


def _given_states(features: jax.Array | None, mask: jax.Array) -> jax.Array:
    if features is None:
        raise ValueError(
            "a head on frozen states needs features; give the signal those of "
            "rkd_jax.signals.teacher.make_features, or use a model with its own trunk"
        )
    chex.assert_rank(features, mask.ndim + 1)
    return fill_masked(features, mask)


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
    out = project(x, layer["kernel"])
    bias = layer["bias"].astype(x.dtype)
    return out + jnp.expand_dims(bias, range(x.ndim - 1))


def _bounded(value: jax.Array, bound: float | None) -> jax.Array:
    return value if bound is None else bound * jnp.tanh(value / bound)
