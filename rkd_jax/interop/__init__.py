"""Weights in and out, never through torch.

`load_model` opens whatever it is given: a model folder of Hugging Face (safetensors) or
a GGUF file; `load_tokenizer` reads the tokenizer alone. `save_model` writes a folder
that `transformers` reads. The formats are in `rkd_jax.interop.safetensors` and
`rkd_jax.interop.gguf`, the translation of ``config.json`` in
`rkd_jax.interop.hf_config`, the table of tensor names in `rkd_jax.interop.names`.
"""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

from rkd_jax.data.tokenizer import Tokenizer, from_file
from rkd_jax.interop import gguf, safetensors
from rkd_jax.interop.gguf import find_packaged_gguf
from rkd_jax.interop.hf_config import UnsupportedConfigError
from rkd_jax.interop.names import WeightsError
from rkd_jax.interop.safetensors import save as save_model
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.sharding import DEFAULT_RULES, Rules, tree_shardings
from rkd_jax.types import Params


def load_model(
    path: str | Path,
    *,
    param_dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> tuple[Decoder, Params, Tokenizer | None]:
    """Model, parameters and tokenizer of a model folder or a GGUF file.

    Args:
        path: a folder with ``config.json`` and safetensors, or a ``.gguf`` file.
        param_dtype: type of the parameters; None keeps the stored one (float32 for
            GGUF).
        mesh: where every parameter goes straight to its devices, cut as its logical
            axes say; None puts everything on the default device.
        rules: where these axes live, see `rkd_jax.sharding`; a teacher's may be others
            than its student's.

    Returns:
        ``(decoder, params, tokenizer)``; the tokenizer is None when the folder has no
        ``tokenizer.json``.

    Raises:
        FileNotFoundError: nothing there, or not a model.
        UnsupportedConfigError, WeightsError: see the two formats; the latter also for
            a tokenizer that cannot be read.
        ShardingError: an axis of a parameter does not divide over the mesh.
    """

    def homes(config: DecoderConfig):
        model = Decoder(config)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        return tree_shardings(model.logical_axes(), mesh, rules, shapes=shapes)

    shardings = None if mesh is None else homes
    path = _there(path)
    if path.is_file():
        file = gguf.GGUFFile(path)
        config, params = gguf.load(
            file, param_dtype=param_dtype or "float32", shardings=shardings
        )
        return Decoder(config), params, gguf.tokenizer(file)
    config, params = safetensors.load(
        path, param_dtype=param_dtype, shardings=shardings
    )
    return Decoder(config), params, load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer that `load_model` returns, without the model.

    Args:
        path: a model folder or a ``.gguf`` file.

    Raises:
        FileNotFoundError: nothing there, or not a model.
        UnsupportedConfigError, WeightsError: a tokenizer that cannot be read.
    """
    path = _there(path)
    if path.is_file():
        return gguf.tokenizer(path)
    if not (path / "tokenizer.json").is_file():
        return None
    try:
        return from_file(path)
    except ValueError as error:  # which names the file
        raise WeightsError(str(error)) from error


def _there(path: str | Path) -> Path:
    """The path, if a model may be there."""
    path = Path(path)
    if path.is_file() and path.suffix != ".gguf":
        raise FileNotFoundError(f"{path}: give the model's folder, or a .gguf file")
    if not path.is_file() and not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder or file")
    return path
