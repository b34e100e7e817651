"""Oracles that are slow, fail or hang: asked again, within bounds.

>>> def picky(prompts, responses):
...     return [float("nan") if text == "?" else 1.0 for text in responses]
>>> config = RetryConfig(retries=1, backoff=0.0, on_failure="drop")
>>> RetryingOracle(picky, config)(["p", "p"], ["yes", "?"]).tolist()
[1.0, nan]
"""

from __future__ import annotations

import dataclasses
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from rkd_jax.data.records import Prompt
from rkd_jax.signals.oracles import Oracle, OracleError

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RetryConfig:
    """How long an oracle is waited for, how often it is asked, and what if in vain."""

    timeout: float = 600.0
    """Seconds one call may take; a call is about all responses of a stage. With inf it
    is waited for without end, and called in the main thread."""
    retries: int = 3
    """Calls after the first one, about those responses that have no reward yet."""
    backoff: float = 1.0
    """Seconds before the first of them; each further wait is twice as long."""
    max_backoff: float = 60.0
    """Seconds, the longest wait."""
    on_failure: Literal["stop", "drop"] = "stop"
    """In the end: stop the run, or drop the pairs of such a response and count them."""

    def __post_init__(self):
        if self.on_failure not in ("stop", "drop"):
            raise ValueError(f"on_failure is 'stop' or 'drop', not {self.on_failure!r}")
        if not self.timeout > 0:
            raise ValueError(f"timeout={self.timeout} must be positive")
        for name in ("retries", "backoff", "max_backoff"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclasses.dataclass(frozen=True)
class RetryingOracle:
    """``oracle``, asked until every response has a finite reward, or in vain.

    A failure is an exception, silence for ``timeout`` seconds, a wrong number of
    rewards, or a reward that is not finite. Where some rewards of a call are finite,
    these are kept and only the other responses are asked about again. An `OracleError`
    of the oracle's own is no failure: it says what is wrong, and is passed on at once.

    Each call runs in a daemon thread. Python cannot end a thread, so a call that took
    too long is abandoned: it goes on until it returns or the process exits, its answer
    is thrown away, and the next call may run beside it. An oracle that does not bear
    that needs ``retries=0``; one that sets signals of its own, or keeps something to
    the thread that made it, needs ``timeout=inf``: it is called where it is asked.

    Args:
        oracle: what is asked.
        config: the bounds.
        sleep: waits so many seconds between two calls.
    """

    oracle: Oracle
    config: RetryConfig = RetryConfig()
    sleep: Callable[[float], None] = time.sleep

    @property
    def may_abstain(self) -> bool:
        """Whether a reward may be NaN, for a response that got none."""
        return self.config.on_failure == "drop"

    def __call__(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> np.ndarray:
        """One reward per response, ``float64[n]``.

        Returns:
            Finite rewards; with ``on_failure="drop"`` NaN where there is none.

        Raises:
            OracleError: with ``"stop"``, a response without a reward after all calls.
        """
        rewards = np.full(len(responses), np.nan)
        missing, failure = np.arange(len(responses)), ""
        pause = self.config.backoff
        for call in range(self.config.retries + 1):
            if call and missing.size:
                pause = min(pause, self.config.max_backoff)
                _LOGGER.warning("oracle: %s; next call in %g s", failure, pause)
                self.sleep(pause)
                pause *= 2
            if missing.size:
                found, failure = self._ask(
                    [prompts[i] for i in missing], [responses[i] for i in missing]
                )
                finite = np.isfinite(found)
                rewards[missing[finite]] = found[finite]
                missing = missing[~finite]
        if missing.size:
            self._give_up(missing, responses, failure)
        return rewards

    def _ask(
        self, prompts: list[Prompt], responses: list[str]
    ) -> tuple[np.ndarray, str]:
        """Rewards, not finite where there is none, and what went wrong."""
        nothing = np.full(len(responses), np.nan)
        try:
            found = np.asarray(self._call(prompts, responses), np.float64)
        except OracleError:
            raise
        except Exception as error:
            words = (str(error).splitlines() or [""])[0][:200]
            return nothing, f"{type(error).__name__}: {words}"
        if found.shape != nothing.shape:
            return nothing, f"shape {found.shape} for {len(responses)} responses"
        bad = found[~np.isfinite(found)]
        return found, f"a reward of {bad[0]}" if bad.size else ""

    def _call(self, prompts: list[Prompt], responses: list[str]) -> Any:
        """What the oracle returns or raises, or TimeoutError."""
        if math.isinf(self.config.timeout):
            return self.oracle(prompts, responses)
        answers: queue.SimpleQueue[tuple[Any, BaseException | None]]
        answers = queue.SimpleQueue()

        def ask():
            try:
                answers.put((self.oracle(prompts, responses), None))
            except BaseException as error:  # raised again in the caller's thread
                answers.put((None, error))

        threading.Thread(target=ask, name="oracle", daemon=True).start()
        timeout = self.config.timeout
        try:
            found, error = answers.get(timeout=min(timeout, threading.TIMEOUT_MAX))
        except queue.Empty:
            raise TimeoutError(f"no answer within {timeout:g} s") from None
        if error is not None:
            raise error
        return found

    def _give_up(
        self, missing: np.ndarray, responses: Sequence[str], failure: str
    ) -> None:
        """Stop, or say what is dropped."""
        first = missing[0]
        text = (
            f"the oracle gave no reward for {missing.size} of {len(responses)} "
            f"responses in {self.config.retries + 1} calls, the last of which ended "
            f"with {failure}; the first is response {first}: {responses[first][:60]!r}"
        )
        if not self.may_abstain:
            raise OracleError(text)
        _LOGGER.warning("%s; dropped", text)


def stopping(oracle: Oracle) -> Oracle:
    """The same oracle, stopping where it would drop.

    For evaluation: a mean over those responses that the oracle likes to judge is not
    the mean.

    Args:
        oracle: any; only a `RetryingOracle` that drops is changed.

    Returns:
        An oracle that gives every response a reward or raises `OracleError`.
    """
    if not isinstance(oracle, RetryingOracle):
        return oracle
    config = dataclasses.replace(oracle.config, on_failure="stop")
    return dataclasses.replace(oracle, config=config)
