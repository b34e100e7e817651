"""Model folders of Hugging Face: ``config.json`` and safetensors, in and out.

No torch: tensors are read and written as numpy arrays, bfloat16 included. Every tensor
is accounted for in both directions, and a folder appears under its name only when it
is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from rkd_jax.data.tokenizer import Tokenizer
from rkd_jax.interop.hf_config import (
    UnsupportedConfigError,
    family_of,
    from_hf,
    to_hf,
)
from rkd_jax.interop.names import (
    Found,
    Stored,
    WeightsError,
    assemble,
    check_tensors,
    leaves,
    rearrange,
    sizes,
    stored_tensors,
)
from rkd_jax.models.decoder import DecoderConfig
from rkd_jax.types import Params
from rkd_jax.untrusted import is_plain_name, one_line, read_object, refused, shown

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
# Rotary frequencies, kept in old Llama files; they follow from rope_theta.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load(
    folder: str | Path, *, param_dtype: str | None = None, shardings: Any = None
) -> tuple[DecoderConfig, Params]:
    """Configuration and parameters of a model folder.

    Args:
        folder: holds ``config.json`` and ``model.safetensors``, or the index of its
            shards.
        param_dtype: type of the parameters; None keeps the stored one (float32 if
            the file mixes several).
        shardings: pytree of `jax.sharding.Sharding` like the parameters, or a function
            of the configuration that gives one; each leaf then goes straight to its
            devices. None: the default device.

    Returns:
        ``(config, params)`` for `rkd_jax.models.decoder.Decoder`. ``config.dtype``, the
        compute type, is float32: change it with `dataclasses.replace`.

    Raises:
        FileNotFoundError: no folder, no ``config.json``, no safetensors, no shard.
        UnsupportedConfigError: names the attribute that `Decoder` has no place for.
        WeightsError: a file that cannot be read; a missing, unexpected or misshapen
            tensor; an index that points outside the folder.
    """
    folder = Path(folder)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{config_path}: no such file; not a model folder")
    try:
        config = from_hf(read_object(config_path, WeightsError))
    except UnsupportedConfigError as error:
        raise UnsupportedConfigError(f"{config_path}: {error}") from error
    with _Tensors.open(folder) as tensors:
        tensors.drop_redundant(tied=config.tie_embeddings)
        check_tensors(config, "hf", tensors.found, tensors.source)
        stored = tensors.common_dtype()
        config = dataclasses.replace(config, param_dtype=param_dtype or stored)
        return config, assemble(config, "hf", tensors.read, shardings=shardings)


class _Tensors:
    """The tensors of one folder, whichever file each of them is in."""

    def __init__(self, source: Path, handles: Mapping[Path, Any]):
        self.source = source
        self._handles = handles
        self.found: dict[str, Found] = {}
        for file, handle in handles.items():
            names = handle.keys()
            if twice := sorted(self.found.keys() & set(names)):
                other = self.found[twice[0]].file.name
                raise WeightsError(
                    f"{file}: tensor {one_line(twice[0])} is in {other} as well"
                )
            for name in names:
                with refused(f"{file}: tensor {one_line(name)}", WeightsError):
                    shape = tuple(handle.get_slice(name).get_shape())
                self.found[name] = Found(file, shape)

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[_Tensors]:
        """All weight files of ``folder``, opened but not read."""
        source, files = _weight_files(folder)
        with ExitStack() as stack:
            handles = {}
            for file in files:
                with refused(f"{file}: not a complete safetensors file", WeightsError):
                    handles[file] = stack.enter_context(safe_open(file, "numpy"))
            yield cls(source, handles)

    def read(self, name: str) -> np.ndarray:
        """The array of a tensor, in its stored type."""
        file = self.found[name].file
        with refused(f"{file}: tensor {one_line(name)}", WeightsError):
            return self._handles[file].get_tensor(name)

    def drop_redundant(self, *, tied: bool) -> None:
        """Forget what other tensors already say."""
        for name in [name for name in self.found if _DERIVED.fullmatch(name)]:
            del self.found[name]
        if not tied or _HEAD not in self.found or _EMBEDDING not in self.found:
            return
        if not np.array_equal(self.read(_HEAD), self.read(_EMBEDDING)):
            raise WeightsError(
                f"{self.found[_HEAD].file}: {_HEAD} differs from {_EMBEDDING}, but"
                " config.json ties them (tie_word_embeddings)"
            )
        del self.found[_HEAD]

    def common_dtype(self) -> str:
        """The type all tensors share, or float32."""
        met = {self._dtype(name, found.file) for name, found in self.found.items()}
        return met.pop() if len(met) == 1 else "float32"

    def _dtype(self, name: str, file: Path) -> str:
        with refused(f"{file}: tensor {one_line(name)}", WeightsError):
            stored = self._handles[file].get_slice(name).get_dtype()
        if stored not in _DTYPES:
            raise WeightsError(
                f"{file}: tensor {one_line(name)} is stored as {stored}; known are"
                f" {', '.join(_DTYPES)} (quantised files: use GGUF)"
            )
        return _DTYPES[stored]


def _weight_files(folder: Path) -> tuple[Path, list[Path]]:
    """The file that lists the tensors, and the files that hold them."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return single, [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder}: neither {_SINGLE} nor {_INDEX}; other formats are converted by"
            " transformers' save_pretrained(folder, safe_serialization=True)"
        )
    weight_map = read_object(index, WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index}: no weight_map")
    # Only plain names: an index is data and must not reach outside its folder. (A file
    # of the folder may be a link: so the hub's cache keeps them.)
    for name in weight_map.values():
        if not is_plain_name(name):
            raise WeightsError(
                f"{index}: {shown(name)} is not a file name in this folder"
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file; {_INDEX} names it")
    return index, [folder / name for name in names]


def save(
    folder: str | Path,
    config: DecoderConfig,
    params: Params,
    *,
    family: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder that `transformers` and `load` read back.

    Everything goes to a temporary folder beside the target, which takes the target's
    name when it is complete; an interrupted save leaves no half-written model.

    Args:
        folder: the target; absent or empty, unless ``overwrite``.
        config: of ``params``.
        params: as `Decoder.init` returns them, adapters merged.
        family: a key of `rkd_jax.interop.hf_config.FAMILIES`; None takes the first
            that can express ``config``.
        dtype: stored type; None keeps the type of the parameters.
        max_shard_bytes: a new file starts before this size is exceeded; a single
            larger tensor gets a file of its own.
        tokenizer: saved too, and source of the ids in ``generation_config.json``.
        metadata: text pairs for the header of every safetensors file.
        overwrite: replace what is in ``folder``.

    Raises:
        FileExistsError: ``folder`` is not empty.
        UnsupportedConfigError: no family, or not this one, can express ``config``.
        WeightsError: ``params`` do not fit ``config``.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder}: not empty; pass overwrite=True to replace it")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: a file of that name exists")
    flat = leaves(config, params)
    dtype = dtype or str(flat["embed/embedding"].dtype)
    config = dataclasses.replace(config, param_dtype=dtype)
    token_ids = _token_ids(tokenizer)
    content = to_hf(config, family=family or family_of(config), **token_ids)
    with _replacing(folder) as partial:
        _write_json(partial / "config.json", content)
        _write_json(partial / "generation_config.json", token_ids)
        if tokenizer is not None:
            tokenizer.save(partial)
        _write_tensors(partial, config, flat, max_shard_bytes, metadata or {})


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    roles = ("bos", "eos", "pad")
    return {
        f"{role}_token_id": getattr(tokenizer, f"{role}_id", None) for role in roles
    }


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder that becomes ``folder`` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    previous = folder.parent / f".{folder.name}.previous-{os.getpid()}"
    # Of a killed save: in a container the next process often has the same number.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if not folder.exists():
            partial.rename(folder)
            return
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        try:
            partial.rename(folder)
        except OSError:
            previous.rename(folder)
            raise
        shutil.rmtree(previous)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tensors(
    folder: Path,
    config: DecoderConfig,
    flat: Mapping[str, Any],
    max_shard_bytes: int,
    metadata: Mapping[str, str],
) -> None:
    table = stored_tensors(config, "hf")
    itemsize = jnp.dtype(config.param_dtype).itemsize
    shards = _plan(table, itemsize, max_shard_bytes)
    header = {**metadata, "format": "pt"}  # transformers refuses a file without it
    weight_map, size = {}, sizes(config)
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else _SINGLE
        tensors = {
            name: _to_stored(table[name], flat, size, config.param_dtype)
            for name in names
        }
        save_file(tensors, folder / file, metadata=header)
        # safetensors makes its files readable by their owner alone.
        shutil.copymode(folder / "config.json", folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(itemsize * int(np.prod(t.shape)) for t in table.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / _INDEX, index)


def _plan(
    table: Mapping[str, Stored], itemsize: int, max_shard_bytes: int
) -> list[list[str]]:
    """Tensor names by shard, in order."""
    shards, used = [[]], 0
    for name, tensor in table.items():
        size = itemsize * int(np.prod(tensor.shape))
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _to_stored(
    tensor: Stored, flat: Mapping[str, Any], size: Mapping[str, int], dtype: str
) -> np.ndarray:
    leaf = flat[tensor.weight.path]
    part = leaf if tensor.layer is None else leaf[tensor.layer]
    array = rearrange(np.asarray(part), tensor.weight.axes, tensor.layout, size)
    # safetensors writes the buffer as it lies in memory: it must be contiguous.
    return np.ascontiguousarray(array, jnp.dtype(dtype))
