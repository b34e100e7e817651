"""The configuration of the library's own decoder."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from rkd_jax.models.rope import RopeScaling

_ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
_POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"),
    *("num_kv_heads", "head_dim", "max_length", "rope_theta", "norm_eps"),
    "embed_scale",
)
CUDNN_DTYPES = ("bfloat16", "float16")
DTYPES = ("bfloat16", "float16", "float32", "float64")
_REMAT = ("none", "attention", "dots", "full")
_ATTENTION = ("auto", "xla", "dot_product", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and arithmetic of a `Decoder`; hashable, so it may be a static argument.

    ``remat`` says what a block keeps for its backward pass and what is computed again;
    loss and gradient are the same. From most memory to least:

    ===========  =======================================================================
    none         everything is kept, scores and probabilities [H, L, L] included
    attention    those are computed again: memory grows with L, not with its square
    dots         projections are kept, and what a kernel of attention leaves; norms,
                 rotation, activation and XLA's attention are not. No slower than the
                 two above wherever it was timed, nor by any compiler's count: cheap
                 terms cost more to write and read than to compute again
    full         the input of every block alone: one more forward pass, a third more
                 arithmetic in a step
    ===========  =======================================================================

    ``attention`` names who computes it; see `rkd_jax.models.attention_kernels`.

    Example: ``DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=128,
    num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_length=128)``.
    """

    vocab_size: int  # V, rows of the embedding
    hidden_size: int  # D
    intermediate_size: int  # F, width of the MLP
    num_layers: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # Hkv, key and value heads; divides H
    head_dim: int  # Dh, even
    max_length: int  # context: most columns a row may have
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to stored norm scales; 1 for Gemma
    tie_embeddings: bool = True
    attention_bias: bool = False  # on query, key and value (Qwen2)
    qk_norm: bool = False  # RMS norm of each query and key head (Qwen3)
    activation: str = "silu"  # silu, gelu_tanh or gelu (exact)
    embed_scale: float = 1.0  # sqrt(D) for Gemma
    sliding_window: int | None = None  # keys a query sees, itself included
    logit_softcap: float | None = None  # c: logits become c * tanh(logits / c)
    dtype: str = "float32"  # compute
    param_dtype: str = "float32"
    remat: str = "dots"  # none, attention, dots or full: see above
    attention: str = "auto"  # auto, xla, dot_product, cudnn or splash

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("sliding_window", "logit_softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive, or None for none")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary pairs)")
        for name, choices in (
            ("activation", _ACTIVATIONS),
            ("dtype", DTYPES),
            ("param_dtype", DTYPES),
            ("remat", _REMAT),
            ("attention", _ATTENTION),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of {list(choices)}"
                )
        if self.attention == "cudnn" and self.dtype not in CUDNN_DTYPES:
            raise ValueError(
                f"attention='cudnn' computes in bfloat16 or float16, not in "
                f"dtype={self.dtype!r}"
            )

    @property
    def accumulator(self) -> jnp.dtype:
        """The dtype of norms, rotary angles and softmax: float32, or wider compute."""
        return jnp.dtype("float64" if self.dtype == "float64" else "float32")
