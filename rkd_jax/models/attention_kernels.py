"""Attention over segments by somebody else's kernel, and which one to take.

===========  ===========================================================================
xla          `rkd_jax.models.attention`: everywhere, with a cache too; scores are in
             memory, of a long row 5 / 8 of ``[B, H, L, L]``
dot_product  `jax.nn.dot_product_attention` as XLA compiles it: everywhere
cudnn        the same by cuDNN's flash attention: NVIDIA GPUs, bfloat16 and float16
splash       `jax.experimental.pallas.ops.tpu.splash_attention`: TPUs; no ``[L, L]``
             array, blocks above the diagonal or outside the window are left out
auto         splash on TPUs where it is legal and the row is not short, cudnn on NVIDIA
             GPUs that can where dtype and head_dim allow, else xla
===========  ===========================================================================

All of them say the same within rounding: a query sees the keys of its own segment at or
before its column, itself included. Padding is a segment of its own, so its rows are
finite. A step of decoding reads a cache and is always ``xla``, whatever is named.

``auto`` asks for the default backend when it is traced: name ``splash`` to compile for
a TPU on a host without one. On several devices a kernel has to know who holds what: the
update tells it, and so does ``jax.set_mesh(mesh)`` around anything else; without either
``auto`` is xla, and ``splash`` is refused by JAX. ``cudnn`` is JAX's own function with
the arguments of ``dot_product``; its mask is an array ``[B, 1, L, L]`` in the dtype of
the queries, one for all heads. It has been lowered for GPUs, and not run on one yet:
name ``xla`` where it does not do what it should.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from rkd_jax.models.config import CUDNN_DTYPES, DecoderConfig
from rkd_jax.sharding import ambient_axes

_RESIDUALS = "attention"  # of splash, as it is told
_CUDNN_FORWARD = "dot_product_attention_fwd"  # start of the names of its primitives
_LANES = 128  # of a TPU: rows of keys and queries come in multiples
_BLOCKS = (512, 384, 256, 128)


def choose(config: DecoderConfig, length: int, *, has_cache: bool) -> str:
    """The implementation of one pass; "auto" is decided here.

    Args:
        config: names it, or what it depends on.
        length: L, columns of the pass.
        has_cache: keys of earlier passes are attended to.
    """
    if has_cache:
        return "xla"
    if config.attention != "auto":
        return config.attention
    mesh, backend = jax.sharding.get_abstract_mesh(), jax.default_backend()
    if mesh.empty and jax.device_count() > 1:
        return "xla"
    if backend == "tpu" and long_enough_for_splash(length):
        return "splash"
    here = backend == "gpu" and _is_ampere_or_later(jax.devices()[0])
    return "cudnn" if here and cudnn_has_kernels(config) else "xla"


def cudnn_has_kernels(config: DecoderConfig) -> bool:
    """Whether "auto" takes cuDNN's flash attention for it on GPUs that have it."""
    wide = config.head_dim % 8 or config.head_dim > 128
    return config.dtype in CUDNN_DTYPES and not wide


def _is_ampere_or_later(device: jax.Device) -> bool:
    # Of NVIDIA "8.0", "9.0"; AMD has names there.
    found = getattr(device, "compute_capability", "")
    numbers = re.fullmatch(r"(\d+)\.(\d+)", str(found))
    return bool(numbers) and int(numbers[1]) >= 8


def long_enough_for_splash(length: int) -> bool:
    """Whether "auto" takes splash attention for rows of so many columns on a TPU."""
    return length >= _LANES


def kept_of_kernels(primitive, *arguments, **parameters) -> bool:
    """A checkpoint policy: what a kernel's forward pass leaves for its backward one."""
    if primitive.name.startswith(_CUDNN_FORWARD):
        return True
    named = jax.checkpoint_policies.save_only_these_names(_RESIDUALS)
    return named(primitive, *arguments, **parameters)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    window: int | None,
    implementation: str = "xla",
) -> jax.Array:
    """`jax.nn.dot_product_attention` over segments; its softmax is float32 at most.

    Args:
        query: [B, L, H, head_dim].
        key: [B, L, H_kv, head_dim]; H_kv divides H.
        value: as ``key``.
        segment_ids: int32[B, L], 0 on padding.
        window: keys visible to a query, itself included; None for all.
        implementation: "xla" or "cudnn", of that function.

    Returns:
        [B, L, H, head_dim] in the dtype of ``query``.

    Raises:
        NotImplementedError: by cuDNN, for a dtype, head_dim or length it lacks.
    """
    seen = segment_ids[:, :, None] == segment_ids[:, None, :]
    if window is not None:
        columns = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
        seen &= (columns[:, None] - columns[None, :] < window)[None]
    # Its own arithmetic relies on promotion, which users may have made strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=seen[:, None],
            is_causal=True,
            implementation=implementation,
        )


def cudnn_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    window: int | None,
    implementation: str = "cudnn",
) -> jax.Array:
    """`dot_product_attention` by cuDNN, which differentiates rows of even length only.

    Arguments and result as there; on a mesh as in `splash_attention`.
    """

    def attend(query, key, value, segment_ids):
        length = query.shape[1]
        odd = ((0, 0), (0, length % 2))
        rows = (jnp.pad(x, (*odd, (0, 0), (0, 0))) for x in (query, key, value))
        mixed = dot_product_attention(
            *rows,
            jnp.pad(segment_ids, odd),
            window=window,
            implementation=implementation,
        )
        return mixed[:, :length]

    return _by_device(attend, query, key, value, segment_ids)


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention over segments; rows are padded to the kernel's blocks.

    Arguments and result as `dot_product_attention`, and ``interpret``: run the kernel
    step by step on any platform, to test it. On a mesh the batch is cut as the rule
    "batch" says and the heads as the rule "heads"; key heads that do not divide over
    the devices are repeated until they do.
    """
    attend = functools.partial(_splash, window=window, interpret=interpret)
    return _by_device(attend, query, key, value, segment_ids)


def _by_device(
    attend: Callable,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
) -> jax.Array:
    """``attend`` on the rows and heads that each device has; see `splash_attention`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    here = {name for name, kind in kinds if kind != AxisType.Manual}
    if not here:
        return attend(query, key, value, segment_ids)
    rows = ambient_axes("batch", query.shape[0])
    columns = ambient_axes("heads", query.shape[2])
    parts = math.prod(mesh.shape[name] for name in columns)
    repeats = parts // math.gcd(parts, key.shape[2])
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    heads = PartitionSpec(rows or None, None, columns or None)
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, PartitionSpec(rows or None)),
        out_specs=heads,
        axis_names=here,
        check_vma=False,
    )(query, key, value, segment_ids)


KERNELS = {
    "dot_product": dot_product_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
"""By name: ``(query, key, value, segment_ids, *, window)``."""
HOLD_SCORES = ("xla", "dot_product")
"""Those that keep the scores for the backward pass."""


def _splash(query, key, value, segment_ids, *, window, interpret) -> jax.Array:
    """On the rows and heads of one device."""
    # Pallas takes a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, head_dim = query.shape[1:]
    unit = _LANES if length <= 2 * _BLOCKS[0] else _BLOCKS[0]
    padded = -(-length // unit) * unit

    def rows(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
        return jnp.moveaxis(x, 2, 1)

    mask = splash.CausalMask((padded, padded))
    if window is not None:
        mask = splash.LocalMask((padded, padded), (window - 1, 0), 0)
    segments = jnp.pad(segment_ids, ((0, 0), (0, padded - length)))
    # Its own arithmetic relies on promotion, which users may have made strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=_blocks(splash, padded),
            residual_checkpoint_name=_RESIDUALS,
            interpret=interpret,
        )
        mixed = jax.vmap(kernel)(
            rows(query * head_dim**-0.5),
            rows(key),
            rows(value),
            splash.SegmentIds(segments, segments),
        )
    return jnp.moveaxis(mixed, 1, 2)[:, :length]


def _blocks(splash, length: int):
    """The largest blocks that divide the padded length."""
    block = next(size for size in _BLOCKS if length % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    names += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    return splash.BlockSizes(**dict.fromkeys(names, block))
