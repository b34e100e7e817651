"""Which stored tensor holds which of our parameters, and in which order of axes.

One table serves reading and writing, Hugging Face files and GGUF files. A layout is a
sequence of axes, each a word of letters; letters that share a word are merged into one
axis, the first letter slowest. So the query kernel, ours ``"D H RP"``, is the stored
matrix ``"HRP D"``: the same letters, permuted and merged. The two rotary halves of a
head are R = 2 by P = K / 2; GGUF keeps the members of a rotary pair side by side and
stores ``"HPR D"``.

========  ==================================================================
V         vocabulary
D, F      width of the hidden state, of the MLP
H, G      query heads, key and value heads
K         width of a head; split into R by P where the rotary layout matters
========  ==================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.models.decoder import DecoderConfig
from rkd_jax.types import Params
from rkd_jax.untrusted import one_line, shown

Format = Literal["hf", "gguf"]


class WeightsError(ValueError):
    """A weights file that cannot be read or does not hold what its config promises."""


@dataclass(frozen=True)
class Weight:
    """One of our parameters and its place in both file formats.

    A stacked parameter has a leading layer axis in our tree and one tensor per layer
    in a file; ``{}`` in its stored name is the layer.
    """

    path: str  # ours, "layers/attention/query/kernel"
    axes: str  # ours, without the layer axis
    hf: tuple[str, str]  # name and layout in a Hugging Face file
    gguf: tuple[str, str] | None = None  # the same in a llama GGUF file, if it has one

    @property
    def stacked(self) -> bool:
        """Whether our leaf has a layer axis."""
        return self.path.startswith("layers/")


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: part ``layer`` of ``weight``."""

    weight: Weight
    layout: str
    layer: int | None  # None: the weight is not stacked
    shape: tuple[int, ...]


def _block(path: str, axes: str, hf: tuple[str, str], gguf=None) -> Weight:
    hf = ("model.layers.{}." + hf[0], hf[1])
    gguf = None if gguf is None else ("blk.{}." + gguf[0], gguf[1])
    return Weight("layers/" + path, axes, hf, gguf)


_EMBED = Weight(
    "embed/embedding",
    "V D",
    ("model.embed_tokens.weight", "V D"),
    ("token_embd.weight", "V D"),
)
_FINAL_NORM = Weight(
    "final_norm/scale", "D", ("model.norm.weight", "D"), ("output_norm.weight", "D")
)
_HEAD = Weight(
    "head/kernel", "D V", ("lm_head.weight", "V D"), ("output.weight", "V D")
)
# fmt: off
_BLOCK = (
    _block("attention_norm/scale", "D",
           ("input_layernorm.weight", "D"), ("attn_norm.weight", "D")),
    _block("attention/query/kernel", "D H RP",
           ("self_attn.q_proj.weight", "HRP D"), ("attn_q.weight", "HPR D")),
    _block("attention/key/kernel", "D G RP",
           ("self_attn.k_proj.weight", "GRP D"), ("attn_k.weight", "GPR D")),
    _block("attention/value/kernel", "D G K",
           ("self_attn.v_proj.weight", "GK D"), ("attn_v.weight", "GK D")),
    _block("attention/output/kernel", "H K D",
           ("self_attn.o_proj.weight", "D HK"), ("attn_output.weight", "D HK")),
    _block("mlp_norm/scale", "D",
           ("post_attention_layernorm.weight", "D"), ("ffn_norm.weight", "D")),
    _block("mlp/gate/kernel", "D F",
           ("mlp.gate_proj.weight", "F D"), ("ffn_gate.weight", "F D")),
    _block("mlp/up/kernel", "D F",
           ("mlp.up_proj.weight", "F D"), ("ffn_up.weight", "F D")),
    _block("mlp/down/kernel", "F D",
           ("mlp.down_proj.weight", "D F"), ("ffn_down.weight", "D F")),
)
_BIASES = (
    _block("attention/query/bias", "H K", ("self_attn.q_proj.bias", "HK")),
    _block("attention/key/bias", "G K", ("self_attn.k_proj.bias", "GK")),
    _block("attention/value/bias", "G K", ("self_attn.v_proj.bias", "GK")),
)
_HEAD_NORMS = (
    _block("attention/query_norm/scale", "K", ("self_attn.q_norm.weight", "K")),
    _block("attention/key_norm/scale", "K", ("self_attn.k_norm.weight", "K")),
)
# fmt: on


def weights(config: DecoderConfig) -> tuple[Weight, ...]:
    """The parameters a `Decoder` of this configuration has."""
    return (
        _EMBED,
        *_BLOCK,
        *(_BIASES if config.attention_bias else ()),
        *(_HEAD_NORMS if config.qk_norm else ()),
        _FINAL_NORM,
        *(() if config.tie_embeddings else (_HEAD,)),
    )


def sizes(config: DecoderConfig) -> dict[str, int]:
    """The size of every axis letter."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "K": config.head_dim,
        "R": 2,
        "P": config.head_dim // 2,
    }


def shape_of(layout: str, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an array with this layout.

    >>> shape_of("HRP D", {"H": 3, "R": 2, "P": 4, "D": 5})
    (24, 5)
    """
    return tuple(math.prod(size[letter] for letter in word) for word in layout.split())


def rearrange(
    array: np.ndarray, source: str, target: str, size: Mapping[str, int]
) -> np.ndarray:
    """``array`` of layout ``source`` in layout ``target``; a view where possible.

    >>> rearrange(np.arange(6), "AB", "B A", {"A": 2, "B": 3})
    array([[0, 3],
           [1, 4],
           [2, 5]])
    """
    letters, wanted = source.replace(" ", ""), target.replace(" ", "")
    split = array.reshape([size[letter] for letter in letters])
    order = [letters.index(letter) for letter in wanted]
    return split.transpose(order).reshape(shape_of(target, size))


def stored_tensors(config: DecoderConfig, format: Format) -> dict[str, Stored]:
    """Every tensor a file of this format must hold, by name, one weight at a time."""
    return dict(_each_stored(config, format))


def _each_stored(config: DecoderConfig, format: Format) -> Iterator[tuple[str, Stored]]:
    size = sizes(config)
    for weight in weights(config):
        name, layout = getattr(weight, format)
        shape = shape_of(layout, size)
        for layer in range(config.num_layers) if weight.stacked else (None,):
            yield name.format(layer), Stored(weight, layout, layer, shape)


@dataclass(frozen=True)
class Found:
    """A tensor met in a file."""

    file: Path
    shape: tuple[int, ...]


def check_tensors(
    config: DecoderConfig, format: Format, found: Mapping[str, Found], source: Path
) -> None:
    """Account for every tensor on both sides.

    Args:
        config: what a file of this ``format`` has to hold the tensors of.
        format: of the names in ``found``.
        found: what the files hold.
        source: named when a tensor is in no file.

    Raises:
        WeightsError: the first missing, unexpected or misshapen tensor.
    """
    expected = set()
    # One at a time: a configuration of a billion layers ends at the first that is
    # missing, before anything is made for the others.
    for name, tensor in _each_stored(config, format):
        if name not in found:
            raise WeightsError(
                f"{source}: tensor {name} is missing; expected shape {tensor.shape}"
            )
        file, shape = found[name].file, found[name].shape
        if shape != tensor.shape:
            raise WeightsError(
                f"{file}: tensor {name} has shape {shown(shape)}; expected"
                f" {tensor.shape}"
            )
        expected.add(name)
    for name in sorted(found.keys() - expected):
        raise WeightsError(
            f"{found[name].file}: unexpected tensor {one_line(name)} of shape"
            f" {shown(found[name].shape)}; the configuration has no place for it"
        )


def assemble(
    config: DecoderConfig,
    format: Format,
    read: Callable[[str], np.ndarray],
    *,
    shardings: Any = None,
) -> Params:
    """Our parameter tree from stored tensors, one leaf at a time.

    Host memory holds one leaf beside what is on the devices already.

    Args:
        config: shapes, and ``param_dtype``, the type of every leaf.
        format: of the names given to ``read``.
        read: the tensor of that name in its stored layout, any floating type.
        shardings: pytree of `jax.sharding.Sharding` like the parameters, or a function
            of ``config`` that gives one; None puts everything on the default device.
    """
    size, params = sizes(config), {}
    shardings = shardings(config) if callable(shardings) else shardings
    for weight in weights(config):
        name, layout = getattr(weight, format)
        shape, dtype = shape_of(weight.axes, size), jnp.dtype(config.param_dtype)
        if weight.stacked:
            leaf = np.empty((config.num_layers, *shape), dtype)
            for layer in range(config.num_layers):
                stored = read(name.format(layer))
                leaf[layer] = rearrange(stored, layout, weight.axes, size)
        else:
            leaf = rearrange(read(name), layout, weight.axes, size)
            leaf = np.ascontiguousarray(leaf, dtype)
        *parents, last = weight.path.split("/")
        node, sharding = params, shardings
        for key in parents:
            node = node.setdefault(key, {})
            sharding = None if sharding is None else sharding[key]
        sharding = None if sharding is None else sharding[last]
        node[last] = _place(leaf, sharding)
    return params


def _place(leaf: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)


def leaves(config: DecoderConfig, params: Params) -> dict[str, jax.Array]:
    """The leaves of ``params`` by path, after checking that they fit ``config``.

    Raises:
        WeightsError: a missing, superfluous or misshapen leaf, or one that this
            process cannot see in full.
    """
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    size, expected = sizes(config), weights(config)
    for weight in expected:
        shape = shape_of(weight.axes, size)
        shape = (config.num_layers, *shape) if weight.stacked else shape
        if weight.path not in flat:
            raise WeightsError(f"params: no leaf {weight.path}; expected shape {shape}")
        leaf = flat[weight.path]
        if leaf.shape != shape:
            raise WeightsError(
                f"params: {weight.path} has shape {leaf.shape}; expected {shape}"
            )
        if not getattr(leaf, "is_fully_addressable", True):
            raise WeightsError(
                f"params: {weight.path} is spread over several processes; gather it"
                " first (jax.experimental.multihost_utils.process_allgather)"
            )
    for path in flat.keys() - {weight.path for weight in expected}:
        raise WeightsError(f"params: unexpected leaf {path}; merge adapters first")
    return flat
