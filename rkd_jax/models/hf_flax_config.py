"""Where Hugging Face's Flax classes depart from their torch originals, per config."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple


class Family(NamedTuple):
    base_class: str  # transformers attribute; its module ends with the final norm
    prefix: str  # where a causal-LM checkpoint keeps the base model
    embedding: str  # token embedding below the prefix
    rotary: bool = False  # no learned positions: the context is only a table size
    takes_positions: bool = True


FAMILIES = {
    "gpt2": Family("FlaxGPT2Model", "transformer", "wte/embedding"),
    "gpt_neo": Family("FlaxGPTNeoModel", "transformer", "wte/embedding"),
    "gptj": Family("FlaxGPTJModel", "transformer", "wte/embedding", rotary=True),
    "bloom": Family(
        "FlaxBloomModel",
        "transformer",
        "word_embeddings/embedding",
        takes_positions=False,
    ),
    "opt": Family("FlaxOPTModel", "model", "decoder/embed_tokens/embedding"),
    "llama": Family("FlaxLlamaModel", "model", "embed_tokens/embedding", rotary=True),
    "mistral": Family(
        "FlaxMistralModel", "model", "embed_tokens/embedding", rotary=True
    ),
    "gemma": Family("FlaxGemmaModel", "model", "embed_tokens/embedding", rotary=True),
}
_BLOOM_CONTEXT = 2048  # ALiBi sets no limit; this is what BLOOM was trained with
_ROPE_BASE = 10_000.0  # fixed inside the Flax classes


def unsupported(config: Any) -> str | None:
    """Which option makes the Flax class differ from torch beyond repair, or None."""
    kind, native = config.model_type, "load the folder with rkd_jax.interop instead"
    if kind in ("llama", "mistral", "gemma"):
        if getattr(config, "rope_theta", _ROPE_BASE) != _ROPE_BASE:
            return f"it ignores rope_theta={config.rope_theta}; {native}"
        if getattr(config, "rope_scaling", None) is not None:
            return f"it ignores rope_scaling={config.rope_scaling}; {native}"
    if kind in ("llama", "mistral"):
        width = config.hidden_size // config.num_attention_heads
        if (getattr(config, "head_dim", None) or width) != width:
            return f"it ignores head_dim={config.head_dim}; {native}"
    if getattr(config, "mlp_bias", False):
        return f"it ignores mlp_bias=True; {native}"
    if kind == "gemma" and (config.hidden_activation or "gelu_pytorch_tanh") != (
        config.hidden_act
    ):
        return (
            f"hidden_act={config.hidden_act!r} and hidden_activation="
            f"{config.hidden_activation!r} (None is 'gelu_pytorch_tanh') disagree; "
            "write the right one into both fields of config.json"
        )
    if kind == "gpt2":
        if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
            return "it always scales attention by the root of the head width alone"
        if config.add_cross_attention:
            return "add_cross_attention is not a causal language model"
    if kind == "opt" and not (
        config.enable_bias and config.layer_norm_elementwise_affine
    ):
        return "it ignores enable_bias and layer_norm_elementwise_affine"
    if kind == "gptj" and config.rotary_dim is None:
        return "rotary_dim=None does not run in either class"
    if kind == "bloom" and config.n_head & (config.n_head - 1):
        return f"it fails for a number of heads ({config.n_head}) not a power of two"
    return None


def context_of(config: Any, max_length: int | None) -> int:
    """The context to prepare for: ``max_length``, or all the model has."""
    if config.model_type == "bloom":
        return max_length or _BLOOM_CONTEXT
    limit = config.max_position_embeddings
    if max_length is not None and max_length > limit:
        raise ValueError(f"max_length {max_length} exceeds the model's context {limit}")
    return max_length or limit


def repaired(config: Any, context: int) -> Any:
    """A copy of ``config`` under which the Flax class equals the torch class."""
    config = copy.deepcopy(config)
    if FAMILIES[config.model_type].rotary:
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        # The class cuts the *width* of its rotary table at max_position_embeddings.
        config.max_position_embeddings = max(context, 2 * width)
    if config.model_type == "mistral":
        # The class keeps keys with i - j <= window; torch keeps i - j < window.
        window = config.sliding_window or context + 1
        config.sliding_window = window - 1
    if config.model_type == "gemma":
        # Equal already, see `unsupported`; but None makes the class log a warning.
        config.hidden_activation = config.hidden_act
    return config
