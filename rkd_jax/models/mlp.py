"""Small networks for control: action values, and a Gaussian over rewards.

Plain pytrees of arrays, no framework: a network is a frozen configuration, ``init`` and
a pure ``apply``. They compute in float32 (float64 states stay float64).

>>> import jax, jax.numpy as jnp
>>> networks = avril_networks(state_size=4, actions=2)
>>> params = networks.init(jax.random.key(0))
>>> networks.q_values(params["policy"], jnp.ones((3, 5, 4))).shape
(3, 5, 2)
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rkd_jax.masking import accumulator
from rkd_jax.models.heads import (
    Gaussian,
    LogStdLimit,
    check_log_std_limit,
    limit_log_std,
)
from rkd_jax.types import Params


@dataclasses.dataclass(frozen=True)
class MLP:
    """Fully connected layers with ELU between them.

    Example: ``MLP(inputs=4, outputs=2)`` has two hidden layers of 64 units.

    Raises:
        ValueError: a size is not positive.
    """

    inputs: int
    outputs: int
    width: int = 64  # units of a hidden layer
    layers: int = 2  # hidden ones; 0 is linear

    def __post_init__(self) -> None:
        if min(self.inputs, self.outputs, self.width, self.layers + 1) < 1:
            raise ValueError(f"{self} has a size that is not positive")

    def init(self, rng: jax.Array) -> Params:
        """Float32 ``{"layers": [{"kernel": [in, out], "bias": [out]}, ...]}``.

        Kernels are normal with standard deviation ``in ** -0.5``, cut at two of them;
        biases are 0.
        """
        sizes = [self.inputs, *[self.width] * self.layers, self.outputs]
        keys = jax.random.split(rng, len(sizes) - 1)
        made = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return {"layers": [_init_layer(*layer) for layer in made]}

    def apply(self, params: Params, x: jax.Array) -> jax.Array:
        """``[..., inputs] -> float32[..., outputs]``; gradient flows to both."""
        x = x.astype(accumulator(x))
        *hidden, last = params["layers"]
        for layer in hidden:
            x = jax.nn.elu(_affine(layer, x))
        return _affine(last, x)


@dataclasses.dataclass(frozen=True)
class AvrilNetworks:
    """The two networks of AVRIL: action values, and the posterior of the reward.

    They share nothing. `q_values` and `reward` are what
    `rkd_jax.objectives.avril.make_avril` asks for; see `avril_networks`.

    Raises:
        ValueError: an empty range or an unknown ``limit``.
    """

    q_network: MLP
    encoder: MLP
    state_action: bool  # the reward is one of state and action
    log_std_range: tuple[float, float] = (-3.0, 2.0)
    limit: LogStdLimit = "none"  # "none" ignores the range

    def __post_init__(self) -> None:
        check_log_std_limit(self.log_std_range, self.limit)

    def init(self, rng: jax.Array) -> Params:
        """``{"policy": ..., "encoder": ...}``."""
        policy_rng, encoder_rng = jax.random.split(rng)
        return {
            "policy": self.q_network.init(policy_rng),
            "encoder": self.encoder.init(encoder_rng),
        }

    def q_values(self, params: Params, states: jax.Array) -> jax.Array:
        """``params["policy"]``, ``[..., S] -> float32[..., actions]``."""
        return self.q_network.apply(params, states)

    def reward(
        self, params: Params, states: jax.Array, actions: jax.Array | None
    ) -> Gaussian:
        """``params["encoder"]``, the posterior of the reward, ``float32[...]`` each.

        Args:
            params: of the encoder; gradient flows to them and to ``states``.
            states: float[..., S].
            actions: int[...], for an encoder of state and action; else None.

        Raises:
            ValueError: the encoder reads actions and got none, or the reverse.
        """
        if self.state_action != (actions is not None):
            raise ValueError(
                f"the encoder was built with state_action={self.state_action}, and got "
                f"{'no' if actions is None else 'an'} action: match reward_input of "
                "the objective"
            )
        out = self.encoder.apply(params, states)
        if actions is None:
            mean, raw = out[..., 0], out[..., 1]
        else:
            mean, raw = (_entry(x, actions) for x in jnp.split(out, 2, axis=-1))
        return Gaussian(mean, limit_log_std(raw, self.log_std_range, self.limit))


def avril_networks(
    state_size: int,
    actions: int,
    *,
    state_action: bool = False,
    log_std_range: tuple[float, float] = (-3.0, 2.0),
    limit: LogStdLimit = "none",
) -> AvrilNetworks:
    """The configuration of AVRIL's released code: two separate 2 x 64 ELU networks.

    Train it with Adam at 1e-4 on batches of 64 transitions to follow that code.

    Args:
        state_size: S.
        actions: A.
        state_action: the reward depends on the action too: the encoder has 2 A outputs,
            the means first, of which those of the action are taken.
        log_std_range: where ``limit`` keeps the posterior's log_std.
        limit: ``"none"``, as released: at lambda = 1 the posterior can then collapse;
            ``"smooth"`` or ``"clip"`` as in `rkd_jax.models.heads.GaussianHead`.

    Returns:
        `AvrilNetworks`.

    Raises:
        ValueError: a size is not positive, an empty range or an unknown ``limit``.

    References:
        Chan and van der Schaar, AVRIL, 2102.06483, code XanderJC/scalable-birl.
        Deviation: none but the random numbers.
    """
    outputs = 2 * actions if state_action else 2
    q_network, encoder = MLP(state_size, actions), MLP(state_size, outputs)
    return AvrilNetworks(q_network, encoder, state_action, log_std_range, limit)


def _init_layer(rng: jax.Array, inputs: int, outputs: int) -> Params:
    kernel = jax.random.truncated_normal(rng, -2.0, 2.0, (inputs, outputs), jnp.float32)
    return {"kernel": kernel * inputs**-0.5, "bias": jnp.zeros(outputs, jnp.float32)}


def _affine(layer: Params, x: jax.Array) -> jax.Array:
    bias = jnp.expand_dims(layer["bias"].astype(x.dtype), range(x.ndim - 1))
    return x @ layer["kernel"].astype(x.dtype) + bias


def _entry(values: jax.Array, ids: jax.Array) -> jax.Array:
    """``[..., A]`` at ids ``[...]``."""
    return jnp.take_along_axis(values, jnp.expand_dims(ids, -1), axis=-1).squeeze(-1)
