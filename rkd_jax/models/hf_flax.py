"""Hugging Face's Flax classes (transformers < 5) behind `CausalLM`.

For GPT-2, Llama, Mistral, Gemma, OPT, GPT-Neo, GPT-J and BLOOM. Teacher, reference
and student are served alike: the object is static, the parameters are an argument.

Those classes differ from their torch originals without saying so. Repaired here:

- a tied head that FlaxLlama and FlaxMistral would leave random (the head is ours);
- Mistral without a window, which would see only itself, and a window of W, which would
  see W + 1 keys;
- contexts below twice the head width, where the rotary table is cut short;
- positions under left padding: always counted from the mask;
- strict dtype and rank promotion: calls run under the standard settings.

Refused, with the remedy in the message: a RoPE base other than 10,000 or any RoPE
scaling (ignored by the classes) and the other options that they ignore, listed in
`rkd_jax.models.hf_flax_config.unsupported`. Llama, Mistral and Gemma then go to the
native decoder, through `rkd_jax.interop`.

These classes know a padding mask, no segments: packed `Sequences` are refused by all
that reads states (`HFFlaxLM.single_segment`), and a row of several segment ids given to
`HFFlaxLM.hidden` itself is refused when the ids are concrete, i.e. outside `jax.jit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax import lax

from rkd_jax.models.api import positions_from_mask
from rkd_jax.models.hf_flax_config import FAMILIES, context_of, repaired, unsupported
from rkd_jax.models.hf_flax_files import read_weights
from rkd_jax.types import Params, struct


@dataclasses.dataclass(frozen=True)
class HFFlaxConfig:
    """What the rest of the library may ask of an HF Flax model.

    Example: ``HFFlaxConfig("gpt2", 50257, 768, 1024, 12, True, "float32")``.
    """

    model_type: str  # key of the family, as in config.json
    vocab_size: int  # width of the head
    hidden_size: int  # width of what `hidden` returns
    max_length: int  # context, in columns
    num_layers: int
    tie_embeddings: bool
    dtype: str  # compute dtype
    logit_softcap: None = None  # no family with Flax classes has one


@struct
class HFFlaxCache:
    """Keys and values as the Flax module keeps them, and which slots hold tokens."""

    variables: Any  # the module's "cache" collection, batch first
    segment_ids: jax.Array  # int32[B, S], 0 = empty or padding
    index: jax.Array  # int32[], next free slot


class HFFlaxLM:
    """A Hugging Face Flax causal LM as a `CausalLM`.

    ``hidden`` is the state after the final norm, so ``hidden @ head + head_bias`` are
    the logits of the Flax class. The parameter tree is that of
    ``Flax...ForCausalLM`` without ``lm_head/kernel`` where the embedding is tied.
    """

    single_segment = True  # see the module docstring

    def __init__(
        self, config: Any, *, dtype: str = "float32", max_length: int | None = None
    ) -> None:
        """Wrap the architecture that ``config`` describes; no weights yet.

        Args:
            config: a transformers config of one of the eight families.
            dtype: compute dtype of the module.
            max_length: context to prepare for, at most the model's own (the default).
                Smaller values shrink the tables of rotary models. BLOOM has no limit
                of its own and defaults to 2048.

        Raises:
            ImportError: transformers has no Flax classes.
            ValueError: unknown family, an option the Flax class ignores, or a
                ``max_length`` beyond the model's.
        """
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise ValueError(
                f"model_type {config.model_type!r} is none of {sorted(FAMILIES)}"
            )
        base_class = _flax_class(family.base_class)
        if problem := unsupported(config):
            raise ValueError(
                f"{family.base_class} would compute something else than the torch "
                f"class: {problem}"
            )
        context = context_of(config, max_length)
        self._family = family
        self._initializer_range = getattr(
            config, "init_std" if config.model_type == "opt" else "initializer_range"
        )
        self._module = base_class.module_class(
            config=repaired(config, context),
            # A jnp scalar type: some classes test `dtype is not jnp.float32`.
            dtype=getattr(jnp, jnp.dtype(dtype).name),
        )
        self.config = HFFlaxConfig(
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            hidden_size=getattr(config, "word_embed_proj_dim", config.hidden_size),
            max_length=context,
            num_layers=config.num_hidden_layers,
            tie_embeddings=bool(config.tie_word_embeddings),
            dtype=jnp.dtype(dtype).name,
        )

    def init(self, rng: jax.Array) -> Params:
        """Random float32 parameters, drawn as the Flax classes do."""
        body, head = jax.random.split(rng)
        with _standard_promotion():
            variables = self._module.init(body, **self._inputs(_dummy(1, 1)))
        params = {self._family.prefix: variables["params"]}
        shape = (self.config.hidden_size, self.config.vocab_size)
        if not self.config.tie_embeddings:
            kernel = self._initializer_range * jax.random.normal(head, shape)
            params["lm_head"] = {"kernel": kernel}
        if self.config.model_type == "gptj":
            params.setdefault("lm_head", {})["bias"] = jnp.zeros(shape[1])
        return params

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: HFFlaxCache | None = None,
    ) -> Any:
        """Final-normed hidden states.

        Args:
            params: as returned by `init` or `load_hf_flax`.
            tokens: int32[B, L].
            positions: int32[B, L]; counted from the mask when omitted. BLOOM always
                counts.
            segment_ids: int32[B, L], 0 = padding, anything else a token; None means no
                padding. At most one non-zero id per row.
            cache: appends the L tokens to it and attends to all it holds.

        Returns:
            [B, L, D] in the compute dtype; with ``cache``, (hidden, cache). Finite
            everywhere, meaningless on padding.

        Raises:
            ValueError: more columns than the context; several segments in a row.
        """
        self._check_length(tokens.shape[1])
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        _refuse_packing(segment_ids)
        tokens = jnp.where(segment_ids == 0, 0, tokens)
        variables, start = {"params": params[self._family.prefix]}, jnp.int32(0)
        if cache is not None:
            start = cache.index
            variables["cache"] = cache.variables
            segment_ids = lax.dynamic_update_slice(
                cache.segment_ids, segment_ids, (jnp.int32(0), start)
            )
        mask = segment_ids != 0
        if positions is None:
            positions = lax.dynamic_slice_in_dim(
                positions_from_mask(mask), start, tokens.shape[1], axis=1
            )
        hidden, updated = self._apply(variables, tokens, mask, positions)
        if cache is None:
            return hidden
        return hidden, HFFlaxCache(
            variables=updated["cache"],
            segment_ids=segment_ids,
            index=start + tokens.shape[1],
        )

    def head(self, params: Params) -> jax.Array:
        """[D, V]: the head, or the transposed embedding where it is tied."""
        if not self.config.tie_embeddings:
            return params["lm_head"]["kernel"]
        leaf = params[self._family.prefix]
        for name in self._family.embedding.split("/"):
            leaf = leaf[name]
        return leaf.T

    def head_bias(self, params: Params) -> jax.Array | None:
        """[V] for GPT-J, None for the others."""
        return params["lm_head"]["bias"] if self.config.model_type == "gptj" else None

    def unembed(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Logits float32[..., V] of hidden states [..., D], accumulated in float32."""
        logits = jnp.matmul(
            hidden,
            self.head(params).astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        bias = self.head_bias(params)
        if bias is None:
            return logits
        return logits + lax.expand_dims(
            bias.astype(jnp.float32), range(logits.ndim - 1)
        )

    def logits(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Logits float32[B, L, V]; arguments and errors as `hidden`."""
        hidden = self.hidden(
            params, tokens, positions=positions, segment_ids=segment_ids
        )
        return self.unembed(params, hidden)

    def init_cache(
        self, params: Params | None, batch_size: int, length: int
    ) -> HFFlaxCache:
        """An empty cache of ``length`` slots; ``params`` is not looked at."""
        del params
        self._check_length(length)
        with _standard_promotion():
            shapes = jax.eval_shape(
                lambda key: self._module.init(
                    key, **self._inputs(_dummy(batch_size, length)), init_cache=True
                ),
                jax.random.key(0),
            )
        return HFFlaxCache(
            variables=jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["cache"]
            ),
            segment_ids=jnp.zeros((batch_size, length), jnp.int32),
            index=jnp.int32(0),
        )

    def grow_cache(self, cache: HFFlaxCache, length: int) -> HFFlaxCache:
        """``cache`` with empty slots behind its own, ``length`` in all."""
        rows = cache.segment_ids.shape[0]
        longer = jax.eval_shape(lambda: self.init_cache(None, rows, length))

        def grown(leaf, shape):
            if leaf.shape == shape.shape:  # such as the index of the next slot
                return leaf
            ends = [(0, b - a) for a, b in zip(leaf.shape, shape.shape, strict=True)]
            return jnp.pad(leaf, ends)

        return jax.tree.map(grown, cache, longer)

    @functools.partial(jax.jit, static_argnums=0)
    def _apply(self, variables, tokens, mask, positions):
        """The module on arrays; compiled, for its tables are as long as the context."""
        with _standard_promotion():
            outputs, updated = self._module.apply(
                variables,
                **self._inputs((tokens, mask.astype(jnp.int32), positions)),
                mutable=["cache"] if "cache" in variables else [],
            )
        return outputs[0].astype(self.config.dtype), updated

    def _inputs(self, arrays) -> dict[str, Any]:
        tokens, mask, positions = arrays
        inputs = {"input_ids": tokens, "attention_mask": mask, "return_dict": False}
        if self._family.takes_positions:
            inputs["position_ids"] = positions
        return inputs

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise ValueError(
                f"{length} columns exceed the context of {self.config.max_length}"
            )


def load_hf_flax(
    name_or_folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    max_length: int | None = None,
) -> tuple[HFFlaxLM, Params]:
    """Load a model and its weights, without torch.

    Weights come from the first of ``flax_model.msgpack`` and ``model.safetensors``
    (each possibly sharded) that exists; PyTorch's names and layouts in safetensors are
    converted. Every tensor must be there, have the right shape, and be used.

    Args:
        name_or_folder: a folder with ``config.json``, or a Hub name.
        dtype: compute dtype.
        param_dtype: dtype the parameters are stored in.
        max_length: see `HFFlaxLM`.

    Returns:
        The model and its parameters, a plain nested dict.

    Raises:
        ImportError: transformers is missing or has no Flax classes (version 5).
        FileNotFoundError: no ``config.json``, or no weights readable without torch.
        OSError: a Hub name that transformers cannot resolve.
        ValueError: a missing, surplus or misshapen tensor, by name; and as `HFFlaxLM`.
    """
    transformers = _transformers()
    name = os.fspath(name_or_folder)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json")
    model = HFFlaxLM(
        transformers.AutoConfig.from_pretrained(name),
        dtype=dtype,
        max_length=max_length,
    )
    expected = jax.eval_shape(model.init, jax.random.key(0))
    weights = read_weights(
        name,
        model._family.prefix,
        traverse_util.flatten_dict(expected, sep="/"),
        # A checkpoint may repeat a tied embedding as its head.
        ignore=("lm_head/kernel",) if model.config.tie_embeddings else (),
    )
    cast = {key: jnp.asarray(value, param_dtype) for key, value in weights.items()}
    return model, traverse_util.unflatten_dict(cast, sep="/")


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError(_install("transformers is not installed")) from error
    return transformers


def _flax_class(name: str):
    transformers = _transformers()
    found = getattr(transformers, name, None)
    # Without flax, transformers 4 puts a dummy object in the place of the class.
    if not hasattr(found, "module_class"):
        raise ImportError(
            _install(f"transformers {transformers.__version__} has no {name}")
        )
    return found


def _install(problem: str) -> str:
    return (
        f"{problem}. HF Flax models need the last line that has them: pip install "
        "'transformers>=4.57,<5' flax. Llama, Mistral and Gemma folders also load into "
        "the native decoder, through rkd_jax.interop, with any version"
    )


def _refuse_packing(segment_ids) -> None:
    if isinstance(segment_ids, jax.core.Tracer):
        return
    largest = jnp.max(segment_ids, axis=1, keepdims=True)
    mixed = jnp.any((segment_ids != 0) & (segment_ids != largest), axis=1)
    if bool(jnp.any(mixed)):
        raise ValueError(
            f"row {int(jnp.argmax(mixed))} packs several segments, but HF Flax classes "
            "know only a padding mask: unpack it, or use the native decoder"
        )


def _dummy(batch_size: int, length: int):
    shape = (batch_size, length)
    positions = jnp.broadcast_to(jnp.expand_dims(jnp.arange(length), 0), shape)
    return jnp.zeros(shape, jnp.int32), jnp.ones(shape, jnp.int32), positions


@contextlib.contextmanager
def _standard_promotion():
    """The implicit promotions that the HF classes rely on."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
