"""Sampling a policy on a set of prompts, and what the texts look like.

Works in batches of one fixed size, so the sampler is compiled once. The diversity
measures count words (maximal runs of non-space characters, compared as they are).

>>> distinct_n(["to be or not to be"], 2), repetition(["la la la la la", "one two"])
(0.8, 0.5)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rkd_jax.evaluation.intervals import Interval, mean_interval
from rkd_jax.models.sampling import Samples
from rkd_jax.placement import fetch, fill_rows
from rkd_jax.types import Params, Prompts, Sequences

Decode = Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """The responses of one policy to N prompts, G each, in the prompts' order.

    Example: ``GenerationResult(texts=(("Sure.",), ("No.",)), samples=Samples(...))``.
    """

    texts: tuple[tuple[str, ...], ...]  # [N][G], without the EOS
    samples: Samples  # numpy arrays, [N, G, ...]

    @property
    def flat_texts(self) -> list[str]:
        """All N * G responses, samples of a prompt side by side."""
        return [text for group in self.texts for text in group]

    @property
    def mean_length(self) -> Interval:
        """Targets per response, EOS included, over prompts."""
        mask = self.samples.sequences.response_mask
        return mean_interval(mask.sum(axis=-1).mean(axis=-1))

    @property
    def ended_share(self) -> float:
        """Share of responses that ended by themselves; NaN if there is none."""
        ended = self.samples.ended
        return float(ended.mean()) if ended.size else math.nan


def generate(
    sample: Callable[[Params, Prompts, jax.Array], Samples],
    params: Params,
    prompt_batches: Iterable[Prompts],
    decode: Decode,
    rng: jax.Array,
) -> GenerationResult:
    """Sample responses for every prompt, batch after batch.

    A later batch may hold fewer rows than the first: it is filled up with copies of
    its last prompt, whose responses are dropped, so nothing is compiled again. Batch i
    uses ``rng`` folded with i. The same key for every policy gives them common random
    numbers, which narrows paired differences.

    Args:
        sample: from `rkd_jax.models.sampling.make_sampler`.
        params: of the policy.
        prompt_batches: `Prompts` [B, P]. P may vary; each width is compiled once.
        decode: token ids of one response, its EOS removed, to text.
        rng: key.

    Returns:
        `GenerationResult`, on the host.

    Raises:
        ValueError: no batch, an empty one, or one with more rows than the first.
    """
    parts: list[Samples] = []
    size = 0
    for number, prompts in enumerate(prompt_batches):
        rows = prompts.tokens.shape[0]
        size = size or rows
        if not 0 < rows <= size:
            raise ValueError(
                f"prompt batch {number} has {rows} rows, the first has {size}: only "
                "a smaller, non-empty batch can follow"
            )
        key = jax.random.fold_in(rng, number)
        samples = sample(params, fill_rows(prompts, size), key)
        parts.append(jax.tree.map(lambda x, n=rows: x[:n], fetch(samples)))
    if not parts:
        raise ValueError("there is no prompt batch to generate from")
    samples = _concatenate(parts)
    return GenerationResult(_texts(samples, decode), samples)


def with_prompts(sequences: Sequences, prompts: Prompts) -> Sequences:
    """The same responses behind other prompts, such as the teacher's.

    Args:
        sequences: [N, G, P + T] or [N, P + T].
        prompts: [N, P'], one for each leading row of ``sequences``.

    Returns:
        `Sequences` of P' + T columns: numpy where all was numpy, else where the arrays
        were; ``response_mask`` is the one given.

    Raises:
        ValueError: the number of rows differs.
    """
    lead = sequences.tokens.shape[:-1]
    rows, width = prompts.tokens.shape
    if rows != lead[0]:
        raise ValueError(f"{rows} prompts for {lead[0]} rows of responses")

    # A process cannot fetch rows that are on the devices of others.
    placed = any(
        isinstance(x, jax.Array) for x in jax.tree.leaves((sequences, prompts))
    )
    xp = jnp if placed else np

    def join(prompt, response):
        prompt = xp.reshape(prompt, (rows, *(1,) * (len(lead) - 1), width))
        prompt = xp.broadcast_to(prompt, (*lead, width))
        return xp.concatenate([prompt, response], axis=-1)

    return Sequences(
        tokens=join(prompts.tokens, sequences.targets),
        token_mask=join(prompts.mask, sequences.response_mask),
        response_mask=sequences.response_mask,
    )


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Different word n-grams divided by all word n-grams, over all texts together.

    Falls as more text is counted: compare policies on equally many responses. NaN
    where no text has n words.

    References:
        Li et al., A diversity-promoting objective function, 2016, section 5.
    """
    found = [gram for text in texts for gram in _grams(text, n)]
    return len(set(found)) / len(found) if found else math.nan


def repetition(texts: Iterable[str], n: int = 4) -> float:
    """Share of a response's word n-grams that repeat an earlier one in it.

    The mean over the responses that have at least n words: 0 is no repetition, near 1
    is a loop. NaN where no text has n words.
    """
    shares = [1 - len(set(g)) / len(g) for text in texts if (g := _grams(text, n))]
    return sum(shares) / len(shares) if shares else math.nan


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _texts(samples: Samples, decode: Decode) -> tuple[tuple[str, ...], ...]:
    """Decode each response up to, and without, the EOS that ended it."""
    targets = samples.sequences.targets
    lengths = samples.sequences.response_mask.sum(axis=-1) - samples.ended
    return tuple(
        tuple(
            decode(row[:length].tolist())
            for row, length in zip(rows, row_lengths, strict=True)
        )
        for rows, row_lengths in zip(targets, lengths, strict=True)
    )


def _concatenate(parts: Sequence[Samples]) -> Samples:
    """One `Samples` of all rows, narrower prompts padded further on the left."""
    columns = max(part.sequences.tokens.shape[-1] for part in parts)

    def widen(leaf):
        missing = columns - leaf.shape[-1]
        return np.pad(leaf, ((0, 0), (0, 0), (missing, 0)))

    widened = [
        dataclasses.replace(
            part,
            sequences=dataclasses.replace(
                part.sequences,
                tokens=widen(part.sequences.tokens),
                token_mask=widen(part.sequences.token_mask),
            ),
        )
        for part in parts
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *widened)
