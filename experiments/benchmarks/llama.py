"""Llama shapes by name."""

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
