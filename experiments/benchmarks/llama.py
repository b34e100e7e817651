"""Llama shapes by name, and the arithmetic of a pass over them."""

from __future__ import annotations

import re

from rkd_jax.models.decoder import DecoderConfig

_SHAPE = re.compile(
    r"h(?P<hidden>\d+)-l(?P<layers>\d+)-i(?P<inner>\d+)-q(?P<heads>\d+)-kv(?P<kv>\d+)"
    r"(-d(?P<head_dim>\d+))?"
)


def llama(shape: str, *, vocab_size: int, max_length: int, **options) -> DecoderConfig:
    """The configuration that a name says, with tied embeddings.

    Args:
        shape: e.g. ``h384-l6-i1024-q6-kv3``: width, layers, width of the MLP, query
            heads, key heads; ``-d64`` at the end for heads that are not width / heads.
        vocab_size: V.
        max_length: context.
        options: other fields of `DecoderConfig`.

    Raises:
        ValueError: it is no such name, or the sizes do not go together.
    """
    found = _SHAPE.fullmatch(shape)
    if found is None:
        raise ValueError(
            f"shape {shape!r} is not of the form h384-l6-i1024-q6-kv3 (width, layers, "
            "MLP width, query heads, key heads), with -d64 at the end for wider heads"
        )
    size = {name: int(value) for name, value in found.groupdict().items() if value}
    if "head_dim" not in size and size["hidden"] % size["heads"]:
        raise ValueError(
            f"shape {shape!r}: width {size['hidden']} does not divide over "
            f"{size['heads']} heads; name their width, as in -d64"
        )
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=size["hidden"],
        intermediate_size=size["inner"],
        num_layers=size["layers"],
        num_heads=size["heads"],
        num_kv_heads=size["kv"],
        head_dim=size.get("head_dim", size["hidden"] // size["heads"]),
        max_length=max_length,
        **options,
    )


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
