r"""Weights of preference pairs that make the members of an ensemble differ.

A resample of the data is a weight for every pair: how often it was drawn. Weights here
are functions of the record, never of the batch it happens to be in, so they may be
computed batch by batch, in any order and on any number of hosts. They go into
`PreferenceSignal.weights`; products of weights combine two kinds of resampling.

>>> import jax.numpy as jnp
>>> print(bootstrap_weights(jnp.array([0, 1, 2]), members=4, seed=0).shape)
(3, 4)
>>> pair = [[True, True, True], [True, False, False]]  # the chosen one is longer
>>> print(length_bias_weights(jnp.array([pair]), jnp.ones(1), jnp.array([1.0, 0.25])))
[[2.  0.5]]
"""

from __future__ import annotations

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

# P(count <= j) for j = 0 .. 9; beyond is less than a float32 in [0, 1) can tell.
_POISSON = np.cumsum([math.exp(-1.0) / math.factorial(j) for j in range(10)])


@functools.partial(jax.jit, static_argnames="members")
def bootstrap_weights(index: jax.Array, *, members: int, seed: int) -> jax.Array:
    r"""How often each member's bootstrap resample contains each record.

    .. math:: w_{ik} \sim \mathrm{Poisson}(1)

    independently: the limit, for many records, of drawing as many as there are with
    replacement.

    Args:
        index: int32[B], position of each record in its source.
        members: K. More members leave the weights of the first ones as they are.
        seed: of the whole resample.

    Returns:
        float32[B, K]: whole numbers of mean 1.

    Gradient:
        None: data.

    References:
        Oza and Russell, Online Bagging and Boosting, 2001. Deviation: none.
    """
    chex.assert_rank(index, 1)
    root = jax.random.key(seed)

    def draw(record, member):
        key = jax.random.fold_in(jax.random.fold_in(root, record), member)
        at_most = jnp.asarray(_POISSON, jnp.float32)
        return jnp.sum(jax.random.uniform(key, (), jnp.float32) >= at_most)

    over_members = jax.vmap(draw, in_axes=(None, 0))
    counts = jax.vmap(over_members, in_axes=(0, None))(index, jnp.arange(members))
    return counts.astype(jnp.float32)


def length_bias_weights(
    response_mask: jax.Array, label: jax.Array, share: jax.Array
) -> jax.Array:
    r"""Weights as if each member's data preferred the longer response that often.

    .. math:: w_{bk} = \begin{cases} 2\rho_k & \text{the longer one was preferred}\\
        2(1 - \rho_k) & \text{the shorter one was} \\ 1 & \text{neither} \end{cases}

    where the longer one is preferred in half of the pairs, the weights have mean 1 and
    a share :math:`\rho_k` of the weight says "longer".

    Args:
        response_mask: bool[B, 2, T], of the chosen and of the rejected response.
        label: float[B], probability that the chosen one was preferred; 0.5 is neither.
        share: float[K], each member's share in [0, 1]; 0.5 changes nothing, 1 keeps
            only pairs whose longer response was preferred.

    Returns:
        float32[B, K], in [0, 2].

    Gradient:
        None: data.

    References:
        e-DPO, 2405.19316, on ensembles under length bias. Reconstruction: how its
        members' data were resampled is not published in what we have.
    """
    chex.assert_rank([response_mask, label, share], [3, 1, 1])
    lengths = response_mask.sum(axis=-1)
    longer = jnp.sign(lengths[:, 0] - lengths[:, 1]).astype(jnp.float32)
    says_longer = longer * jnp.sign(label.astype(jnp.float32) - 0.5)
    bias = 2.0 * share.astype(jnp.float32) - 1.0
    return 1.0 + jnp.outer(says_longer, bias)
