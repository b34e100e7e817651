"""Rotary position embedding in the half-split layout, with Llama-3 scaling."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3 context extension: slow rotations are slowed further, fast ones kept.

    Example, Llama 3.1: ``RopeScaling(8.0, 1.0, 4.0, 8192)``.
    """

    factor: float  # how much the slow rotations are slowed
    low_freq_factor: float  # fewer turns than this in the original context: slowed
    high_freq_factor: float  # more turns than this: kept; between the two, blended
    original_max_length: int  # context the model was pre-trained with, tokens

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_max_length <= 0:
            raise ValueError(
                f"rope_scaling: factor={self.factor} and original_max_length="
                f"{self.original_max_length} must be positive"
            )
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Angle per position of each rotated pair, in radians.

    Args:
        head_dim: width of a head, even.
        theta: base; pair i turns by ``theta ** (-2 i / head_dim)`` per position.
        scaling: Llama-3 scaling, None for none.

    Returns:
        float64[head_dim // 2], host array.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_length * frequencies / (2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def rope_table(
    positions: jax.Array, frequencies: np.ndarray, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine ``[B, L, 1, head_dim // 2]`` at int32[B, L] ``positions``."""
    angles = positions[..., None].astype(dtype) * jnp.asarray(
        frequencies[None, None], dtype
    )
    angles = jnp.expand_dims(angles, 2)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs ``(x[i], x[i + head_dim // 2])`` of ``[B, L, heads, head_dim]``.

    Computed in the dtype of the table, returned in the dtype of ``x``. The product of a
    rotated query and a rotated key depends on their positions' difference only.
    """
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
