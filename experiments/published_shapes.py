"""Architectures of the models that experiments name, as their authors published them.

A folder of weights is not needed to know what a step on them would cost. Shapes are
those of ``config.json`` at https://huggingface.co, in the repository named beside each;
fine-tuned models have the shape of what they were tuned from. Fused projections are
counted as the ones they fuse.
"""

from __future__ import annotations

from types import MappingProxyType

from experiments.settings import SettingsError
from rkd_jax.models.decoder import DecoderConfig, RopeScaling

# meta-llama/Llama-3.1-8B
LLAMA_3_1_8B = DecoderConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_length=131072,
    rope_theta=5e5,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    tie_embeddings=False,
)
# meta-llama/Llama-3.2-1B
LLAMA_3_2_1B = DecoderConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    max_length=131072,
    rope_theta=5e5,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
)
# meta-llama/Llama-2-7b-chat-hf
LLAMA_2_7B = DecoderConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_length=4096,
    tie_embeddings=False,
)
# microsoft/Phi-3-mini-4k-instruct
PHI_3_MINI = DecoderConfig(
    vocab_size=32064,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=96,
    max_length=4096,
    sliding_window=2047,
    tie_embeddings=False,
)
# HuggingFaceTB/SmolLM2-135M-Instruct
SMOLLM2_135M = DecoderConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_length=8192,
    rope_theta=1e5,
)

SHAPES = MappingProxyType(
    {
        "smollm2": SMOLLM2_135M,
        "Llama-2-7b-chat": LLAMA_2_7B,
        "Llama-3.1-8B-Instruct": LLAMA_3_1_8B,
        "Llama-3.1-8B-SFT-DPO": LLAMA_3_1_8B,
        "Llama-3.2-1B": LLAMA_3_2_1B,
        "Llama-3.2-1B-SFT": LLAMA_3_2_1B,
        "Llama-3.2-1B-SFT-tldr": LLAMA_3_2_1B,
        "Phi-3-mini-4k-instruct": PHI_3_MINI,
    }
)
"""By the name that an experiment's options give a model."""


def shape_of(name: str) -> DecoderConfig:
    """The architecture of a model that options name.

    Args:
        name: a key of `SHAPES`.

    Raises:
        SettingsError: no such model.
    """
    if name not in SHAPES:
        raise SettingsError(
            f"the shape of {name!r} is not known; known are {', '.join(SHAPES)}"
        )
    return SHAPES[name]
