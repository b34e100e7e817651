"""Weight files of a Hugging Face model as Flax parameters, without torch."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import serialization, traverse_util

from rkd_jax.untrusted import is_plain_name, read_object, refused, shown

# Constants that torch checkpoints carry and that no Flax class keeps as a parameter.
_BUFFERS = ("/attn/bias", "/attention/bias", "/masked_bias", "/rotary_emb/inv_freq")


def read_weights(
    name: str, prefix: str, expected: Mapping[str, Any], *, ignore: tuple[str, ...] = ()
) -> dict[str, Any]:
    """All tensors of a checkpoint, by their slash-separated Flax names.

    Weights come from the first of ``flax_model.msgpack`` and ``model.safetensors``
    (each possibly sharded) that exists; PyTorch's names and layouts in safetensors are
    converted.

    Args:
        name: a folder, or a Hub name.
        prefix: where the causal LM keeps its base model; a checkpoint of the bare base
            model is put there.
        expected: name -> anything with a ``shape``; exactly these must be found.
        ignore: names that may be there and are dropped.

    Raises:
        FileNotFoundError: no weights that can be read without torch.
        ValueError: a missing, surplus or misshapen tensor, by name; an index that is
            none, or that lists files elsewhere.
    """
    found: dict[str, Any] = {}
    for file in _weight_files(name):
        found |= _read(file, prefix, expected)
    found = {
        key: value
        for key, value in found.items()
        if key not in ignore and not key.endswith(_BUFFERS)
    }
    _check_tensors(name, found, expected)
    return found


def _weight_files(name: str) -> list[str]:
    """The files that hold the weights, all of the first kind that is found."""
    from transformers.utils import cached_file

    def locate(filename, required=False):
        return cached_file(
            name,
            filename,
            _raise_exceptions_for_gated_repo=required,
            _raise_exceptions_for_missing_entries=required,
        )

    for filename in ("flax_model.msgpack", "model.safetensors"):
        if (single := locate(filename)) is not None:
            return [single]
        if (index := locate(f"{filename}.index.json")) is not None:
            return [locate(shard, required=True) for shard in _shards(Path(index))]
    raise FileNotFoundError(
        f"{name} holds neither flax_model.msgpack nor model.safetensors (whole or "
        "sharded). A pytorch_model.bin cannot be read without torch: save the model "
        "again with save_pretrained(..., safe_serialization=True)"
    )


def _shards(index: Path) -> list[str]:
    """The files that an index lists, which are beside it."""
    with refused(f"{index}: not an index of weights"):
        names = set(read_object(index)["weight_map"].values())
    for name in names:
        if not is_plain_name(name):
            raise ValueError(f"{index}: {shown(name)} is not a file name in its folder")
    return sorted(names)


def _read(file: str, prefix: str, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors of one file under the names and layouts of the Flax causal LM."""
    if file.endswith(".msgpack"):
        tree = serialization.msgpack_restore(Path(file).read_bytes())
    else:
        from transformers.modeling_flax_pytorch_utils import (
            load_pytorch_checkpoint_in_flax_state_dict as convert,
        )

        # All that the conversion wants of a model is its prefix and shapes.
        target = types.SimpleNamespace(
            base_model_prefix=prefix,
            params=traverse_util.unflatten_dict(dict(expected), sep="/"),
        )
        try:
            tree = convert(target, file, is_sharded=False)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    flat = _flatten(tree)
    if any(key.startswith(f"{prefix}/") for key in flat):
        return flat
    # A checkpoint of the bare base model, or a shard that holds the head alone.
    return {
        key if key.startswith("lm_head/") else f"{prefix}/{key}": value
        for key, value in flat.items()
    }


def _check_tensors(name: str, found: Mapping, expected: Mapping) -> None:
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    if missing:
        raise ValueError(
            f"{name}: tensor {missing[0]} is missing ({len(missing)} in all)"
        )
    if surplus:
        raise ValueError(
            f"{name}: tensor {surplus[0]} has no place in the model "
            f"({len(surplus)} in all); does config.json belong to these weights?"
        )
    for key, leaf in expected.items():
        if tuple(found[key].shape) != leaf.shape:
            raise ValueError(
                f"{name}: tensor {key} has shape {tuple(found[key].shape)}, "
                f"config.json says {leaf.shape}"
            )


def _flatten(tree) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")
