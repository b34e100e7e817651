"""Students cut from teachers, and heads of different width brought to one vocabulary.

All functions return new buffers: the result may be donated while the original lives on.

The vocabulary rule. Two models with the *same* token map (compare the tokenizers first)
may have heads padded to different widths. Both are cut to the number of real tokens
before any softmax, so a padded id never receives probability:

>>> import numpy as np
>>> student, teacher = np.zeros((1, 12)), np.zeros((1, 16))
>>> [x.shape for x in align_vocab(student, teacher, token_count=11)]
[(1, 11), (1, 11)]
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.masking import masked_sum
from rkd_jax.models.api import response_logits
from rkd_jax.models.decoder import Decoder, DecoderConfig
from rkd_jax.types import Params, Sequences

_log = logging.getLogger(__name__)


class DepthPruning(NamedTuple):
    """A shallower model and the way there.

    Example, 4 layers to 2: ``kept=(0, 3), removed=(2, 1), losses=(3.1, 3.2, 3.6)``.
    """

    config: DecoderConfig
    params: Params
    kept: tuple[int, ...]  # layers of the original, ascending
    removed: tuple[int, ...]  # in the order of removal
    losses: tuple[float, ...]  # nats per response token, before and after each removal


def keep_layers(
    config: DecoderConfig, params: Params, layers: Sequence[int]
) -> tuple[DecoderConfig, Params]:
    """A model of the given layers; embedding, final norm and head stay.

    Args:
        config: of the original.
        params: of the original.
        layers: 0-based, in the new order; a layer may come twice.

    Returns:
        configuration and parameters, sharing no buffer with the original.

    Raises:
        ValueError: no layer, or a layer the original does not have.
    """
    layers = tuple(layers)
    if not layers:
        raise ValueError("layers is empty; keep at least one")
    wrong = [i for i in layers if not 0 <= i < config.num_layers]
    if wrong:
        raise ValueError(f"layers {wrong} are not in 0..{config.num_layers - 1}")
    index = np.array(layers, np.int32)
    kept = jax.tree.map(lambda x: jnp.asarray(x)[index], params["layers"])
    rest = _copied({name: x for name, x in params.items() if name != "layers"})
    config = dataclasses.replace(config, num_layers=len(layers))
    return config, {**rest, "layers": kept}


def greedy_depth_prune(
    model: Decoder, params: Params, batches: Sequence[Sequences], keep: int
) -> DepthPruning:
    """Remove one layer at a time, always the one whose loss is lowest without it.

    The loss is the mean negative log-probability of the response tokens of ``batches``.
    A removed layer is switched off by a traced factor, so everything runs on a single
    compilation; the work is about ``layers * removals`` forward passes per batch.

    Args:
        model: the original.
        params: its parameters.
        batches: held-in data, each [*batch]; equal shapes compile once.
        keep: number of layers to keep.

    Returns:
        `DepthPruning`; among equal losses the lowest layer goes first.

    Raises:
        ValueError: ``keep`` outside 1..layers, or no response token in ``batches``.
    """
    layers = model.config.num_layers
    if not 1 <= keep <= layers:
        raise ValueError(f"keep={keep} must be in 1..{layers}")
    loss = functools.partial(_gated_loss, model, params, batches)
    gates, removed, losses = np.ones(layers, np.float32), [], []
    losses.append(loss(gates))
    while len(removed) < layers - keep:
        candidates = np.flatnonzero(gates)
        trials = [loss(_without(gates, layer)) for layer in candidates]
        best = int(np.argmin(trials))
        removed.append(int(candidates[best]))
        losses.append(trials[best])
        gates = _without(gates, candidates[best])
    kept = tuple(int(i) for i in np.flatnonzero(gates))
    config, pruned = keep_layers(model.config, params, kept)
    return DepthPruning(config, pruned, kept, tuple(removed), tuple(losses))


def mlp_importance(
    model: Decoder, params: Params, batches: Sequence[Sequences]
) -> jax.Array:
    """How much the loss depends on each hidden unit of each MLP, to first order.

    .. math:: \\sum_{batches} \\Big(\\sum_d \\frac{\\partial\\, \\mathrm{NLL}}
        {\\partial W^{down}_{f d}} W^{down}_{f d}\\Big)^2

    That is the squared derivative of the summed loss with respect to a factor on the
    unit's output. Loss and errors as in `greedy_depth_prune`.

    Args:
        model: the original.
        params: its parameters.
        batches: held-in data, each [*batch].

    Returns:
        float32[layers, F], larger is more important; for `slice_width`.

    References:
        Molchanov et al., Importance Estimation for Neural Network Pruning, 2019, Eq. 8,
        with the batches as its samples.
    """

    @jax.jit
    def factor_gradient(params: Params, sequences: Sequences) -> jax.Array:
        down = params["layers"]["mlp"]["down"]["kernel"]

        def total(factors):
            scaled = down * factors[..., None].astype(down.dtype)
            return _response_nll(model, _with_down(params, scaled), sequences)[0]

        return jax.grad(total)(jnp.ones(down.shape[:2], jnp.float32))

    if not any(np.any(batch.response_mask) for batch in batches):
        raise ValueError("batches hold no response token; check their response_mask")
    return sum(jnp.square(factor_gradient(params, batch)) for batch in batches)


def slice_width(
    config: DecoderConfig,
    params: Params,
    intermediate_size: int,
    *,
    importance: jax.Array | None = None,
) -> tuple[DecoderConfig, Params]:
    """Keep the most important hidden units of every MLP, in their old order.

    Args:
        config: of the original.
        params: of the original.
        intermediate_size: units to keep in each layer.
        importance: float[layers, F], e.g. from `mlp_importance`. None takes the product
            of the norms of a unit's gate, up and down weights, which bounds what the
            unit can add to a state of unit norm.

    Returns:
        configuration and parameters, sharing no buffer with the original.

    Raises:
        ValueError: more units than there are, none, or ``importance`` of another shape.
    """
    mlp = params["layers"]["mlp"]
    gate, up, down = (jnp.asarray(mlp[k]["kernel"]) for k in ("gate", "up", "down"))
    old = config.intermediate_size
    if not 1 <= intermediate_size <= old:
        raise ValueError(f"intermediate_size={intermediate_size} must be in 1..{old}")
    if importance is None:
        norm = functools.partial(jnp.linalg.norm, axis=1)
        importance = norm(gate) * norm(up) * jnp.linalg.norm(down, axis=2)
    if importance.shape != (config.num_layers, old):
        raise ValueError(
            f"importance has shape {importance.shape}, not {(config.num_layers, old)}"
        )
    top = jnp.argsort(importance, axis=1, descending=True)[:, :intermediate_size]
    top = jnp.sort(top, axis=1)
    sliced = {
        "gate": {"kernel": jnp.take_along_axis(gate, top[:, None, :], axis=2)},
        "up": {"kernel": jnp.take_along_axis(up, top[:, None, :], axis=2)},
        "down": {"kernel": jnp.take_along_axis(down, top[:, :, None], axis=1)},
    }
    config = dataclasses.replace(config, intermediate_size=intermediate_size)
    layers = {**params["layers"], "mlp": sliced}
    return config, _copied({**params, "layers": layers})


def shared_vocab_size(
    student_size: int, teacher_size: int, *, token_count: int | None = None
) -> int:
    """Width at which two heads over one token map are compared.

    Args:
        student_size: width of the student's head.
        teacher_size: width of the teacher's head.
        token_count: real tokens, i.e. largest id + 1; may be None if the widths agree.

    Returns:
        ``token_count``, or the common width when it is None. Cutting a head is logged
        once per pair of widths.

    Raises:
        ValueError: the widths differ and ``token_count`` is None, or it exceeds one.
    """
    sizes = f"student head has {student_size} entries, teacher head {teacher_size}"
    if token_count is None:
        if student_size != teacher_size:
            raise ValueError(
                f"{sizes}: if both models have the same token map, pass token_count "
                "(largest id + 1); otherwise use a cross-tokenizer method"
            )
        return student_size
    if not 1 <= token_count <= min(student_size, teacher_size):
        raise ValueError(f"{sizes}: token_count={token_count} must fit in both")
    if token_count < max(student_size, teacher_size):
        _log_cut(sizes, token_count)
    return token_count


def align_vocab(
    student: jax.Array, teacher: jax.Array, *, token_count: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cut two arrays whose last axis is the vocabulary to the shared width.

    Args:
        student: [..., V_student]: logits, or a head [D, V]; before any softmax, since
            probabilities would no longer add up.
        teacher: [..., V_teacher]; leading axes need not match.
        token_count: see `shared_vocab_size`, which also raises.

    Returns:
        both, [..., shared]; gradient flows, and is 0 for what was cut.
    """
    size = shared_vocab_size(
        student.shape[-1], teacher.shape[-1], token_count=token_count
    )
    return student[..., :size], teacher[..., :size]


def pad_vocab(
    config: DecoderConfig, params: Params, vocab_size: int
) -> tuple[DecoderConfig, Params]:
    """Widen embedding and head with zeros, e.g. to a multiple of 128.

    The new ids get logit 0, not probability 0: cut them with `align_vocab` before a
    softmax, and with `crop_vocab` before the model is exported or sampled from.

    Raises:
        ValueError: ``vocab_size`` is smaller than the model's.
    """
    if vocab_size < config.vocab_size:
        raise ValueError(
            f"cannot pad a vocabulary of {config.vocab_size} to {vocab_size}; "
            "crop_vocab makes it smaller"
        )
    extra = vocab_size - config.vocab_size
    return _map_vocab(
        config,
        params,
        vocab_size,
        lambda x, axis: jnp.pad(x, [(0, extra if i == axis else 0) for i in (0, 1)]),
    )


def crop_vocab(
    config: DecoderConfig, params: Params, vocab_size: int
) -> tuple[DecoderConfig, Params]:
    """Drop the ids from ``vocab_size`` on; the logits of the others do not change.

    Raises:
        ValueError: ``vocab_size`` is larger than the model's, or not positive.
    """
    if not 1 <= vocab_size <= config.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} must be in 1..{config.vocab_size}; "
            "pad_vocab makes a vocabulary larger"
        )
    return _map_vocab(
        config,
        params,
        vocab_size,
        lambda x, axis: jax.lax.slice_in_dim(x, 0, vocab_size, axis=axis),
    )


def _map_vocab(config, params, vocab_size, change):
    params = _copied(params)
    table = change(params["embed"]["embedding"], 0)
    params = {**params, "embed": {"embedding": table}}
    if not config.tie_embeddings:
        params["head"] = {"kernel": change(params["head"]["kernel"], 1)}
    return dataclasses.replace(config, vocab_size=vocab_size), params


def _response_nll(model, params, sequences) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-prob of the response tokens, and their number."""
    logits = response_logits(model, params, sequences)
    chosen = jnp.take_along_axis(logits, sequences.targets[..., None], axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen[..., 0]
    mask = sequences.response_mask
    return masked_sum(nll, mask), masked_sum(jnp.ones_like(nll), mask)


@functools.partial(jax.jit, static_argnums=0)
def _gated_nll(model, params, gates, sequences):
    """`_response_nll` with every layer's two residual branches scaled by its gate."""
    layers = params["layers"]
    output = layers["attention"]["output"]["kernel"]
    scale = gates.astype(output.dtype)
    output = output * scale[:, None, None, None]
    down = layers["mlp"]["down"]["kernel"] * scale[:, None, None]
    attention = {**layers["attention"], "output": {"kernel": output}}
    gated = {**params, "layers": {**layers, "attention": attention}}
    return _response_nll(model, _with_down(gated, down), sequences)


def _gated_loss(model, params, batches, gates) -> float:
    parts = [_gated_nll(model, params, gates, batch) for batch in batches]
    count = sum(float(n) for _, n in parts)
    if count == 0:
        raise ValueError("batches hold no response token; check their response_mask")
    return sum(float(total) for total, _ in parts) / count


def _with_down(params: Params, kernel: jax.Array) -> Params:
    mlp = {**params["layers"]["mlp"], "down": {"kernel": kernel}}
    return {**params, "layers": {**params["layers"], "mlp": mlp}}


def _without(gates: np.ndarray, layer: int) -> np.ndarray:
    return np.where(np.arange(len(gates)) == layer, np.float32(0), gates)


def _copied(params: Params) -> Params:
    return jax.tree.map(jnp.copy, params)


@functools.cache
def _log_cut(sizes: str, token_count: int) -> None:
    _log.info("%s: both are cut to %d before the softmax", sizes, token_count)
