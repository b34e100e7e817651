"""How far a student is from its teacher, measured with the models' probabilities.

These are the true Kullback-Leibler divergences over the whole vocabulary at every
position, not differences of the sampled tokens' log-probs. Which sequences they are
averaged over decides what they estimate:

- reverse KL on the student's own samples: ``per_sequence`` is the KL(student||teacher)
  of whole responses (up to T tokens), each step's expectation taken exactly;
- forward KL on the teacher's samples: the KL(teacher||student), likewise;
- either on fixed data: distance along those texts only.

Everything is masked by ``response_mask``: prompt and padding never count.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
from jax.sharding import Mesh

from rkd_jax.evaluation.intervals import Interval, mean_interval, ratio_interval
from rkd_jax.losses import forward_kl, reverse_kl, token_log_probs
from rkd_jax.masking import sequence_sum
from rkd_jax.models.api import CausalLM, response_logits
from rkd_jax.packed import refuse_packed
from rkd_jax.placement import fetch, fill_rows, on_mesh, place_rows
from rkd_jax.sharding import mesh_of, row_shards
from rkd_jax.types import Params, Sequences


@dataclasses.dataclass(frozen=True)
class SequenceStatistic:
    """One quantity summed over each response's targets, in nats.

    Example: two responses of 3 and 5 tokens: ``SequenceStatistic(totals=[0.6, 1.2],
    tokens=[3, 5])`` has 1.8 / 8 = 0.225 nats per token and 0.9 per sequence.
    """

    totals: np.ndarray  # float64[N, ...], N prompts, any number of samples of each
    tokens: np.ndarray  # float64[N, ...], targets counted

    @property
    def per_token(self) -> Interval:
        """Token-weighted mean; the interval is over prompts (axis 0)."""
        return ratio_interval(_per_prompt(self.totals), _per_prompt(self.tokens))

    @property
    def per_sequence(self) -> Interval:
        """Mean over responses of the summed quantity; the interval is over prompts."""
        rows = self.totals.reshape(len(self.totals), -1)
        return mean_interval(rows.mean(axis=1))


@dataclasses.dataclass(frozen=True)
class Divergences:
    """Both divergences on the same sequences, and how probable the teacher finds them.

    Example: ``Divergences(forward_kl=..., reverse_kl=...).reverse_kl.per_token.mean``.
    """

    forward_kl: SequenceStatistic  # KL(teacher || student)
    reverse_kl: SequenceStatistic  # KL(student || teacher)
    teacher_nll: SequenceStatistic  # as `teacher_nll`, from the same forward pass


def sequence_divergences(
    student: CausalLM,
    student_params: Params,
    teacher: CausalLM,
    teacher_params: Params,
    sequences: Sequences,
    teacher_sequences: Sequences | None = None,
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
) -> Divergences:
    """Full-vocabulary forward and reverse KL along given responses.

    Args:
        student, teacher: models over the same vocabulary.
        student_params, teacher_params: their parameters.
        sequences: [N, ..., P + T], axis 0 counting prompts.
        teacher_sequences: [N, ..., P' + T], the same responses as the teacher sees
            them (`with_prompts`); None if its prompts are the student's.
        temperature: positive, divides both logits.
        batch_size: rows on a device at once. Memory: two float32 [batch_size, T, V]. Of
            parameters on a mesh the rows are cut over it, so many for every part.

    Returns:
        `Divergences`. A response without targets counts 0 nats and 0 tokens.

    Gradient:
        None: host code around a jitted function, compiled once per shape.

    Raises:
        ValueError: temperature or batch_size not positive, no sequence, vocabularies
            of different size, responses that differ between the two sequences.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive: {temperature}")
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"the student has {student.config.vocab_size} logits, the teacher "
            f"{teacher.config.vocab_size}: bring both to one vocabulary first "
            "(rkd_jax.models.surgery.align_vocab)"
        )
    if teacher_sequences is None:
        teacher_sequences = sequences
    _check_same_responses(sequences, teacher_sequences)
    mesh, there = mesh_of(student_params), mesh_of(teacher_params)
    models = (student, student_params, teacher, teacher_params)

    def totals(rows, teacher_rows):
        rows, teacher_rows = _placed(rows, mesh), _placed(teacher_rows, there)
        if mesh == there:
            return _divergence_totals(
                *models, rows, teacher_rows, temperature=temperature, mesh=mesh
            )
        logits = _teacher_logits(teacher, teacher_params, teacher_rows, mesh=there)
        logits = fetch(logits) if mesh is None else place_rows(logits, mesh)
        return _divergence_totals(
            *models[:2], None, logits, rows, None, temperature=temperature, mesh=mesh
        )

    shards = row_shards(mesh), row_shards(there)
    sums = _in_batches(totals, (sequences, teacher_sequences), batch_size, *shards)
    tokens = _tokens(sequences)
    return Divergences(*(SequenceStatistic(total, tokens) for total in sums))


def teacher_nll(
    teacher: CausalLM,
    teacher_params: Params,
    sequences: Sequences,
    *,
    batch_size: int = 8,
) -> SequenceStatistic:
    """Negative log-likelihood the teacher gives to responses, a measure of fluency.

    A student that exploits a reward drifts to text the teacher finds improbable, or to
    loops it finds all too probable: compare with the value of the start.

    Args:
        teacher: any `CausalLM`, with its parameters.
        sequences: [N, ..., P + T], axis 0 counting prompts, with the teacher's prompts.
        batch_size: rows on a device at once, as there.

    Returns:
        `SequenceStatistic`, nats. ``exp`` of ``per_token.mean`` is the perplexity.

    Gradient:
        None.

    Raises:
        ValueError: batch_size not positive, no sequence.
    """

    mesh = mesh_of(teacher_params)

    def totals(rows):
        rows = _placed(rows, mesh)
        return (_nll_totals(teacher, teacher_params, rows, mesh=mesh),)

    (nll,) = _in_batches(totals, (sequences,), batch_size, row_shards(mesh))
    return SequenceStatistic(nll, _tokens(sequences))


@functools.partial(jax.jit, static_argnames=("teacher", "mesh"))
def _teacher_logits(teacher, params, rows, *, mesh):
    """float32[R, T, V], where the teacher is."""
    refuse_packed(rows, "sequence_divergences")
    with on_mesh(mesh):
        return response_logits(teacher, params, rows)


@functools.partial(
    jax.jit, static_argnames=("student", "teacher", "temperature", "mesh")
)
def _divergence_totals(
    student,
    student_params,
    teacher,
    taught,
    rows,
    teacher_rows,
    *,
    temperature,
    mesh,
):
    """Summed forward KL, reverse KL and teacher NLL of each row, three float32[R].

    ``taught`` are the teacher's parameters, or without a ``teacher`` its logits.
    """
    refuse_packed(rows, "sequence_divergences")
    with on_mesh(mesh):
        student_logits = response_logits(student, student_params, rows)
        teacher_logits = taught
        if teacher is not None:
            teacher_logits = response_logits(teacher, taught, teacher_rows)
        logits = (student_logits, teacher_logits)
        values = (
            forward_kl(*logits, temperature=temperature),
            reverse_kl(*logits, temperature=temperature),
            -token_log_probs(teacher_logits, rows.targets),
        )
        return tuple(sequence_sum(value, rows.response_mask) for value in values)


@functools.partial(jax.jit, static_argnames=("teacher", "mesh"))
def _nll_totals(teacher, params, rows, *, mesh):
    """Summed negative log-prob of each row, float32[R]."""
    refuse_packed(rows, "teacher_nll")
    with on_mesh(mesh):
        logits = response_logits(teacher, params, rows)
        log_probs = token_log_probs(logits, rows.targets)
        return sequence_sum(-log_probs, rows.response_mask)


def _in_batches(totals, trees, batch_size: int, *shards: int) -> tuple[np.ndarray, ...]:
    """Apply ``totals`` to slices of ``batch_size`` rows; results float64[N, ...].

    On a mesh a slice has as many rows for every part of it. Where meshes cut rows into
    different numbers of ``shards``, no part of either has more, unless it must.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1: {batch_size}")
    lead = trees[0].response_mask.shape[:-1]
    trees = jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, np.shape(x)[-1]), tuple(trees)
    )
    count = len(trees[0].response_mask)
    if not count:
        raise ValueError("there is no sequence to evaluate")
    parts = math.lcm(*shards)
    most = max(1, batch_size * min(shards) // parts)
    size = parts * min(most, -(-count // parts))
    found = []
    for first in range(0, count, size):
        rows = jax.tree.map(lambda x, i=first: x[i : i + size], trees)
        kept = len(rows[0].response_mask)
        rows = fill_rows(rows, size)
        results = fetch(totals(*rows))
        found.append([np.asarray(x[:kept], np.float64) for x in results])
    return tuple(np.concatenate(x).reshape(lead) for x in zip(*found, strict=True))


def _placed(rows, mesh: Mesh | None):
    return rows if mesh is None else place_rows(rows, mesh)


def _tokens(sequences: Sequences) -> np.ndarray:
    return np.asarray(sequences.response_mask).sum(axis=-1).astype(np.float64)


def _per_prompt(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).sum(axis=1)


def _check_same_responses(sequences: Sequences, teacher_sequences: Sequences) -> None:
    """Both must hold the same targets under the same mask."""
    mask, other = (np.asarray(s.response_mask) for s in (sequences, teacher_sequences))
    if mask.shape != other.shape or (mask != other).any():
        raise ValueError(
            f"sequences and teacher_sequences mask different responses ({mask.shape}, "
            f"{other.shape}): build one from the other with with_prompts"
        )
    targets, others = (np.asarray(s.targets) for s in (sequences, teacher_sequences))
    if ((targets != others) & mask).any():
        raise ValueError("sequences and teacher_sequences hold different responses")
