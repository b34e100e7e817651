"""Sums and differences with a verifier, and the characters they are written in.

A prompt is an item of `reasoning-gym`'s ``chain_sum`` data set without its sentence
around it, ``37+48=``; the response is the result in plain digits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rkd_jax.data.records import Prompt
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.data.tokenizer import Tokenizer, from_bpe
from rkd_jax.signals.oracles import OracleError

CHARACTERS = "0123456789+-="
END = "<|end|>"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

_PROMPT = re.compile(r"\d+([+-]\d+)+=")
# reasoning-gym makes item i of seed s from the random stream s + i, so the items of
# neighbouring seeds are the same but one; ours lie this far apart.
_SEED_STRIDE = 1 << 24
_DRAWS_PER_PROBLEM = 20


@dataclasses.dataclass(frozen=True)
class ProblemsConfig:
    """Which sums, and how many of them for what."""

    seed: int = 0
    digits: int = 2
    """Of every operand. With one digit 0 is an operand too."""
    terms: int = 2
    """How many numbers are added or subtracted."""
    lessons: int = 8192
    """Problems whose right answers the teacher learns."""
    train: int = 2048
    """Prompts of distillation."""
    held_out: int = 512
    """Prompts of the evaluation."""


class Problem(NamedTuple):
    """Example: ``Problem("37+48=", "85")``."""

    prompt: str
    answer: str


class Problems(NamedTuple):
    """Three parts that share no problem, not even with the terms in another order."""

    lessons: tuple[Problem, ...]
    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]


def make_problems(config: ProblemsConfig) -> Problems:
    """Draw different problems for each part, deterministic in the seed.

    The held-out ones are drawn first, then train, then lessons: more lessons leave the
    other parts as they are.

    Raises:
        ValueError: the data set has not that many different problems.
        OracleError: `reasoning-gym` is not installed.
    """
    cut = config.held_out + config.train
    count = cut + config.lessons
    dataset = _chain_sum(
        min_terms=config.terms,
        max_terms=config.terms,
        min_digits=config.digits,
        max_digits=config.digits,
        seed=config.seed * _SEED_STRIDE,
        size=_SEED_STRIDE,
    )
    found: dict[tuple[int, ...], Problem] = {}
    for index in range(_DRAWS_PER_PROBLEM * count):
        item = dataset[index]
        prompt = item["metadata"]["expression"].replace(" ", "") + "="
        found.setdefault(signed_terms(prompt), Problem(prompt, item["answer"]))
        if len(found) == count:
            break
    else:
        raise ValueError(
            f"{count} different problems asked for, {_DRAWS_PER_PROBLEM * count} draws "
            f"gave {len(found)}: ask for fewer, or for more digits or terms"
        )
    drawn = tuple(found.values())
    return Problems(
        lessons=drawn[cut:],
        train=drawn[config.held_out : cut],
        held_out=drawn[: config.held_out],
    )


class Verifier:
    """The oracle: 1.0 where `reasoning-gym` gives the response full marks, else 0.0.

    The marks are ``chain_sum``'s own: numerically equal, so ``085`` and ``+85`` are
    right as well. Part marks, which that scorer gives to any longer text that contains
    the right digits (``185`` for ``85``: 2/3), count as wrong here: half the marks for
    guessing longer numbers would be a reward to exploit, not to verify.

    Raises:
        OracleError: `reasoning-gym` is not installed; when called, a prompt that is no
            sum.
    """

    def __init__(self):
        self._dataset = _chain_sum(size=1)

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> list[float]:
        marks = (
            self._dataset.score_answer(response, {"answer": result(prompt)})
            for prompt, response in zip(prompts, responses, strict=True)
        )
        return [float(mark == 1.0) for mark in marks]


def result(prompt: Prompt) -> str:
    """The right answer.

    >>> result("37-48=")
    '-11'
    """
    if not isinstance(prompt, str) or not _PROMPT.fullmatch(prompt):
        raise OracleError(f"{prompt!r} is no prompt of the arithmetic task")
    return str(sum(signed_terms(prompt)))


def signed_terms(prompt: str) -> tuple[int, ...]:
    """What is added up, ascending: equal for problems that differ in order only.

    >>> signed_terms("37+48=") == signed_terms("48+37="), signed_terms("37-48=")
    (True, (-48, 37))
    """
    return tuple(sorted(map(int, re.findall(r"[+-]?\d+", prompt))))


def make_tokenizer() -> Tokenizer:
    """One token per character of `CHARACTERS`, and the end token.

    Its chat template is the prompt itself, without any turn around it.
    """
    end = len(CHARACTERS)
    return from_bpe(
        [*CHARACTERS, END],
        merges=[],
        special=(end,),
        eos_id=end,
        chat_template=TEMPLATE,
    )


def row_layout(config: ProblemsConfig) -> TokenizeConfig:
    """Columns for the longest prompt, and for the longest answer, the end and one more.

    The one to spare is for answers that go on too long.
    """
    largest = 10**config.digits - 1
    extremes = (config.terms * largest, (1 - config.terms) * largest)
    longest = max(len(str(value)) for value in extremes)
    return TokenizeConfig(
        max_prompt=config.terms * (config.digits + 1), max_response=longest + 2
    )


def _chain_sum(**options) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise OracleError(
            "the arithmetic task needs reasoning-gym: pip install reasoning-gym==0.1.25"
        ) from error
    return reasoning_gym.create_dataset("chain_sum", **options)
