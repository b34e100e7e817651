"""``config.json`` of Llama, Mistral, Qwen2, Qwen3 and Gemma <-> `DecoderConfig`.

Nothing is ignored silently: an attribute is either translated, or required to have the
value under which it does nothing, or listed in `IRRELEVANT` with the reason. Anything
else raises `UnsupportedConfigError`. Both spellings of transformers are read: 4
(``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``,
``dtype``). The former is written; both versions read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rkd_jax.models.decoder import DecoderConfig
from rkd_jax.models.rope import RopeScaling
from rkd_jax.untrusted import one_line, shown


class UnsupportedConfigError(ValueError):
    """A configuration that `Decoder` would compute differently from its authors."""


@dataclass(frozen=True)
class Family:
    """What a family fixes in its code rather than in its ``config.json``."""

    architecture: str
    tie_embeddings: bool = False  # where the file says nothing
    head_dim: int | None = None  # where the file says nothing; None: D / H
    qkv_bias: bool = False
    qk_norm: bool = False
    unit_offset_norm: bool = False  # norms multiply by 1 + scale
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(D)
    has_window: bool = False  # ``sliding_window`` counts, for every layer


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", has_window=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "gemma": Family(
        "GemmaForCausalLM",
        tie_embeddings=True,
        head_dim=256,
        unit_offset_norm=True,
        scaled_embedding=True,
    ),
}

# ours -> theirs, translated unchanged
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

_ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_length": "original_max_position_embeddings",
}

# Attributes that must be absent or have one of these values, because `Decoder` has no
# such mechanism. None stands for null.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),  # their flag also puts a bias on the output
    "attention_dropout": (0,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False, None),
    "use_sliding_window": (False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}

IRRELEVANT = {
    "_attn_implementation": "which kernel computes the same attention",
    "_name_or_path": "where the file came from",
    "bos_token_id": "a fact about the tokenizer",
    "chunk_size_feed_forward": "how, not what, is computed",
    "dtype": "the stored tensors say their own type",
    "eos_token_id": "a fact about the tokenizer",
    "id2label": "labels of a classifier",
    "initializer_range": "random initialisation only",
    "is_decoder": "all five families are decoders",
    "is_llama_config": "a marker without function (SmolLM2)",
    "label2id": "labels of a classifier",
    "max_window_layers": "read only with use_sliding_window, which must be off",
    "output_attentions": "what else is returned",
    "output_hidden_states": "what else is returned",
    "pad_token_id": "a fact about the tokenizer",
    "problem_type": "labels of a classifier",
    "return_dict": "form of the result",
    "tokenizer_class": "a fact about the tokenizer",
    "torch_dtype": "the stored tensors say their own type",
    "torchscript": "an export option of torch",
    "transformers.js_config": "an export option of another runtime",
    "transformers_version": "who wrote the file",
    "unsloth_fixed": "who wrote the file",
    "unsloth_version": "who wrote the file",
    "use_cache": "how, not what, is computed",
}
"""Attributes without influence on logits, each with the reason."""

_REQUIRED = object()
# Sizes become axes of arrays, other numbers float32; JSON of Python spells Infinity.
_LARGEST_SIZE = 2**31 - 1
_LARGEST = 3e38


class _Attributes:
    """The attributes of one JSON object that are not accounted for yet."""

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        if not isinstance(values, Mapping):
            name = prefix.removesuffix(".") or "config.json"
            raise _unsupported(name, values, "expected an object")
        self._left = dict(values)
        self._prefix = prefix

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            raise UnsupportedConfigError(f"{self._prefix}{name} is missing")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _unsupported(self._prefix + name, value, "expected a number")
        if not abs(value) <= _LARGEST:
            raise _unsupported(self._prefix + name, value, "expected a finite number")
        return value

    def real(self, name: str, default: Any = _REQUIRED) -> float:
        return float(self.number(name, default))

    def size(self, name: str, default: Any = _REQUIRED) -> int:
        value = self.number(name, default)
        if not isinstance(value, int) or not 0 < value <= _LARGEST_SIZE:
            reason = "expected a positive whole number"
            raise _unsupported(self._prefix + name, value, reason)
        return value

    def size_or_none(self, name: str, default: Any = _REQUIRED) -> int | None:
        value = self.take(name, default)
        return None if value is None else self.size(name, value)

    def has(self, name: str) -> bool:
        return name in self._left

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise _unsupported(self._prefix + name, value, "expected true or false")
        return value

    def drop_neutral(self) -> None:
        for name, neutral in _NEUTRAL.items():
            value = self.take(name, neutral[0])
            if value not in neutral:
                raise _unsupported(name, value, f"only {neutral[0]!r} is supported")

    def finish(self, ignore: Collection[str] = ()) -> None:
        for name, value in self._left.items():
            if name not in ignore:
                reason = "this attribute is not known here"
                raise _unsupported(self._prefix + name, value, reason)


def from_hf(
    config: Mapping[str, Any], *, dtype: str = "float32", param_dtype: str = "float32"
) -> DecoderConfig:
    """The `DecoderConfig` that computes the same logits.

    Args:
        config: content of a ``config.json``.
        dtype: compute type of the result; the file has no say in it.
        param_dtype: parameter type of the result.

    Raises:
        UnsupportedConfigError: names the attribute and its value, in one line.
    """
    try:
        fields = _translated(_Attributes(config))
        return DecoderConfig(**fields, dtype=dtype, param_dtype=param_dtype)
    except UnsupportedConfigError:
        raise
    except ValueError as error:  # numbers that contradict each other
        raise UnsupportedConfigError(one_line(error)) from error


def _translated(left: _Attributes) -> dict[str, Any]:
    """Fields of `DecoderConfig`; nothing of ``left`` remains."""
    model_type = left.take("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise _unsupported("model_type", model_type, f"known are {', '.join(FAMILIES)}")
    architectures = left.take("architectures", None) or [family.architecture]
    if architectures != [family.architecture]:
        reason = f"only {family.architecture} is supported"
        raise _unsupported("architectures", architectures, reason)
    has_flag = left.has("use_sliding_window")
    left.drop_neutral()
    fields = {
        ours: (left.real if ours == "norm_eps" else left.size)(theirs)
        for ours, theirs in _SAME.items()
    }
    layer_types = left.take("layer_types", None)
    if layer_types and not _all_full(layer_types):
        raise _unsupported("layer_types", layer_types, "only full_attention everywhere")
    window = None
    if family.has_window:
        window = left.size_or_none("sliding_window")
    elif has_flag:  # it is False, so the window is not applied
        left.take("sliding_window", None)
    rope_theta, rope_scaling = _rope(left)
    width, heads = fields["hidden_size"], fields["num_heads"]
    fields |= {
        "num_kv_heads": _kv_heads(left, model_type, heads),
        "head_dim": _head_dim(left, family, width, heads),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "norm_offset": float(family.unit_offset_norm),
        "tie_embeddings": left.flag("tie_word_embeddings", family.tie_embeddings),
        "attention_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "activation": _activation(left),
        "embed_scale": width**0.5 if family.scaled_embedding else 1.0,
        "sliding_window": window,
    }
    left.finish(ignore=IRRELEVANT)
    return fields


def to_hf(
    config: DecoderConfig,
    *,
    family: str,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of ``family`` that computes the same logits.

    Args:
        config: ``param_dtype`` becomes ``torch_dtype``; ``dtype``, ``remat`` and
            ``attention`` have no counterpart.
        family: a key of `FAMILIES`.
        bos_token_id, eos_token_id, pad_token_id: written as they are.

    Raises:
        UnsupportedConfigError: the family cannot express a field; names it.
    """
    if family not in FAMILIES:
        raise _unsupported("family", family, f"known are {', '.join(FAMILIES)}")
    activation = {ours: hf for hf, ours in reversed(_ACTIVATIONS.items())}
    rope_scaling = config.rope_scaling
    result = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        **{theirs: getattr(config, ours) for ours, theirs in _SAME.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation[config.activation],
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling
        and {"rope_type": "llama3"}
        | {hf: getattr(rope_scaling, ours) for ours, hf in _ROPE_SCALING.items()},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "torch_dtype": config.param_dtype,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if FAMILIES[family].has_window:
        result["sliding_window"] = config.sliding_window
    read_back = dataclasses.replace(
        from_hf(result, dtype=config.dtype, param_dtype=config.param_dtype),
        remat=config.remat,
        attention=config.attention,
    )
    for field in dataclasses.fields(config):
        wanted, got = getattr(config, field.name), getattr(read_back, field.name)
        if wanted != got:
            reason = f"{family} models have {got!r}"
            raise _unsupported(field.name, wanted, reason)
    return result


def family_of(config: DecoderConfig) -> str:
    """The first of `FAMILIES` that can express ``config``.

    Raises:
        UnsupportedConfigError: none can.
    """
    reasons = []
    for family in FAMILIES:
        try:
            to_hf(config, family=family)
        except UnsupportedConfigError as error:
            reasons.append(str(error))
        else:
            return family
    raise UnsupportedConfigError("no family fits: " + "; ".join(reasons))


def _unsupported(name: str, value: Any, reason: str) -> UnsupportedConfigError:
    return UnsupportedConfigError(f"{one_line(name)}={shown(value)}: {reason}")


def _all_full(layer_types: Any) -> bool:
    kinds = layer_types if isinstance(layer_types, list | tuple) else [None]
    return all(kind == "full_attention" for kind in kinds)


def _kv_heads(left: _Attributes, model_type: str, num_heads: int) -> int:
    # Llama files older than grouped attention lack the attribute; the other families'
    # defaults differ between versions of transformers, so there it is required.
    default = None if model_type == "llama" else _REQUIRED
    value = left.size_or_none("num_key_value_heads", default)
    return num_heads if value is None else value


def _head_dim(left: _Attributes, family: Family, width: int, heads: int) -> int:
    value = left.size_or_none("head_dim", family.head_dim)
    if value is not None:
        return value
    if width % heads:
        raise UnsupportedConfigError(
            f"head_dim is missing and hidden_size={width} is no multiple of"
            f" num_attention_heads={heads}"
        )
    return width // heads


def _activation(left: _Attributes) -> str:
    name, value = "hidden_act", left.take("hidden_act")
    override = left.take("hidden_activation", None)  # Gemma: wins where it is given
    if override is not None:
        name, value = "hidden_activation", override
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        raise _unsupported(name, value, f"known are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _rope(left: _Attributes) -> tuple[float, RopeScaling | None]:
    """Base and scaling from ``rope_parameters`` or ``rope_theta``, ``rope_scaling``."""
    outer = left.take("rope_theta", None)
    if outer is not None:
        left.number("rope_theta", outer)
    given = {
        name: left.take(name, None) for name in ("rope_parameters", "rope_scaling")
    }
    given = {name: value for name, value in given.items() if value}
    if len(given) > 1:
        raise _unsupported(*given.popitem(), "rope_parameters is given as well")
    name, value = given.popitem() if given else ("rope_scaling", {})
    rope = _Attributes(value, prefix=f"{name}.")
    theta = rope.real("rope_theta", 1e4 if outer is None else outer)
    if outer not in (None, theta):
        raise _unsupported("rope_theta", outer, f"{name} has {theta}")
    kind = rope.take("rope_type", rope.take("type", "default"))
    scaling = None
    if kind == "llama3":
        fields = {
            ours: (rope.size if ours == "original_max_length" else rope.real)(hf)
            for ours, hf in _ROPE_SCALING.items()
        }
        scaling = RopeScaling(**fields)
    elif kind != "default":
        raise _unsupported(f"{name}.rope_type", kind, "known are default, llama3")
    if (part := rope.take("partial_rotary_factor", 1.0)) != 1.0:
        raise _unsupported(f"{name}.partial_rotary_factor", part, "only 1.0")
    rope.finish()
    return theta, scaling
