r"""Operations of a pass over a `Decoder`, by hand: 2 m n k for a product of matrices.

>>> shape = DecoderConfig(10, 4, 6, 1, 2, 1, 2, 3)
>>> forward_flops(shape, 1, 3, 2)  # 2 x 3 x (16 + 8 + 8 + 16 + 72 + 24) + 2 x 2 x 40
1024
"""

from __future__ import annotations

from rkd_jax.models.config import DecoderConfig


def trunk_flops(config: DecoderConfig, sequences: int, length: int) -> int:
    r"""Of a forward pass over the blocks, 2 m n k for a product of matrices.

    .. math:: 2 B L\,\big[D H d + 2 D H_{kv} d + H d D + 3 D F
        + 2 L H d\big] \cdot \text{layers}

    The last term is scores and their product with the values, counted in full, as is
    the custom for utilisation, though half of it is masked. Norms, rotation,
    activations, softmax and the rows of the embedding are left out.
    """
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    projections = 2 * width * heads + 2 * width * kv_heads + 3 * width * inner
    attention = 2 * length * heads
    return 2 * sequences * length * (projections + attention) * config.num_layers


def head_flops(config: DecoderConfig, positions: int) -> int:
    """Of the vocabulary head on so many states: ``2 positions D V``."""
    return 2 * positions * config.hidden_size * config.vocab_size


def forward_flops(
    config: DecoderConfig, sequences: int, length: int, targets: int
) -> int:
    """Of a forward pass: the blocks on every column, the head on response positions."""
    blocks = trunk_flops(config, sequences, length)
    return blocks + head_flops(config, sequences * targets)
