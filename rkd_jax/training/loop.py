"""The host loop: batches in, steps out, and nothing lost when it stops."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax

from rkd_jax.training.interrupt import Interrupted, StopRequest, blaming_peers
from rkd_jax.training.memory import memory_report
from rkd_jax.training.metrics import MetricsWriter
from rkd_jax.training.progress import Progress, Silent
from rkd_jax.training.refused import Drawn, RefusedBatches, drawn
from rkd_jax.training.spikes import WINDOW, SpikeWatch
from rkd_jax.training.state import TrainState, abstract

if TYPE_CHECKING:  # needs orbax, which training without checkpoints does not
    from rkd_jax.training.checkpoint import Checkpoints
    from rkd_jax.training.saving import Saves

Update = Callable[[TrainState, Any, Any, Any], tuple[TrainState, dict[str, jax.Array]]]
_LOSS = "student/loss"


class Diverged(RuntimeError):
    """Too many updates in a row were refused; the message says where to look."""


class Batches(Protocol):
    """An iterator of batches whose position can be saved; grain's iterators are."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any:
        """The position, as plain JSON."""

    def set_state(self, state: Any) -> None:
        """Go to a position."""


def fit(
    state: TrainState,
    update: Update,
    batches: Batches,
    *,
    steps: int,
    frozen: Any = None,
    prepare: Callable[[TrainState, Any], tuple[Any, Any]] | None = None,
    checkpoints: Checkpoints | None = None,
    metrics: MetricsWriter | None = None,
    progress: Progress | None = None,
    checkpoint_every: int = 500,
    in_flight: int = 2,
    max_skipped: int = 100,
    probe: Callable[[TrainState], Mapping[str, jax.Array]] | None = None,
    name: str = "train",
) -> TrainState:
    """Update until ``steps`` in total, starting from the newest checkpoint.

    Args:
        state: where to start; consumed (donated, or freed for a newer checkpoint).
        update: from `make_update`.
        batches: iterator of batches; its position is part of every checkpoint.
        steps: updates in total, those before a resume included.
        frozen: parameters that are never trained; handed to the update, kept intact.
        prepare: ``(state, batch) -> (batch, signal)``: samples and signals that depend
            on the current parameters. Draw randomness from
            ``step_keys(state).prepare``. None: ``(batch, ())``.
        checkpoints: a `Checkpoints`, or None to save nothing.
        metrics: a `MetricsWriter`, or None.
        progress: a `Progress`, or None.
        checkpoint_every: updates between checkpoints; the last one is always saved.
        in_flight: updates dispatched ahead of the oldest one whose metrics are not in.
        max_skipped: updates in a row that may be refused before the run gives up. What
            it was fed then is described in ``refused_batches.json``, beside the
            metrics.
        probe: ``state -> metrics``, logged with each step's own: what a held-out set
            says about the state after the update. Its keys must not be the update's.
        name: of the stage, for ``progress``.

    Returns:
        The state after ``steps`` updates, on disk if there are ``checkpoints``.

    A resumed run repeats an uninterrupted one bit for bit: parameters, optimiser
    states, keys, batches and the log. Where the newest checkpoint is damaged it resumes
    from the newest whole one, and says so. Spikes of the loss (`SpikeWatch`) are noted
    and logged as ``student/loss_spike``; nothing else is done about them.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the step was finished and saved.
        CheckpointError: the last checkpoint could not be written, or four in a row (in
            several processes any); or one does not fit, or there are some and none is
            whole.
        Diverged: more than ``max_skipped`` updates in a row were refused.
        ValueError: the batches ended early.
        TypeError: the position of ``batches`` cannot be saved, but should be.
        PeerLost: in one of several processes, a step failed.
    """
    state = _resume(state, batches, checkpoints, progress or Silent())
    start = step = int(state.step)
    log = _Log(metrics, progress or Silent(), in_flight, max_skipped)
    log.start(name, step, steps)
    save = _saves(checkpoints, progress or Silent())
    with StopRequest() as stop, blaming_peers():
        while step < steps:
            batch = _next(batches, step, steps)
            source = drawn(batch, batches)
            batch, signal = prepare(state, batch) if prepare else (batch, ())
            if progress and step == start and hasattr(update, "lower"):
                progress.memory(memory_report(update, state, frozen, batch, signal))
            state, values = update(state, frozen, batch, signal)
            step += 1
            if probe is not None:
                values = values | probe(state)
            log.put(step, values, source)
            due = stop.due(step)
            if due or step == steps or step % checkpoint_every == 0:
                log.drain()
                if save is not None:
                    save(state, batches.get_state(), last=due or step == steps)
            if due:
                break
        if checkpoints is not None:
            checkpoints.wait()
    if stop.signum is not None:
        raise Interrupted(_farewell(step, steps, checkpoints), stop.signum)
    return state


class _Log:
    """Metrics on their way to the host, at most ``in_flight`` steps behind."""

    def __init__(
        self,
        metrics: MetricsWriter | None,
        progress: Progress | Silent,
        in_flight: int,
        max_skipped: int,
    ):
        self._metrics, self._progress = metrics, progress
        self._in_flight, self._max_skipped = in_flight, max_skipped
        self._pending: deque[tuple[int, Mapping[str, jax.Array], Drawn]] = deque()
        self._refused = RefusedBatches()
        self._spikes = SpikeWatch()

    def start(self, name: str, step: int, steps: int) -> None:
        """Forget what was logged after ``step``."""
        if self._metrics is not None:
            self._metrics.truncate(step)
            self._spikes = SpikeWatch(self._metrics.recent(_LOSS, WINDOW))
        self._progress.stage(name, steps, done=step)

    def put(self, step: int, values: Mapping[str, jax.Array], batch: Drawn) -> None:
        """Queue one step. Waiting for old ones bounds what the device has queued."""
        self._pending.append((step, values, batch))
        while len(self._pending) > self._in_flight:
            self._write(*self._pending.popleft())

    def drain(self) -> None:
        """Everything is in and written."""
        while self._pending:
            self._write(*self._pending.popleft())
        if self._metrics is not None:
            self._metrics.flush()

    def _write(self, step: int, values: Mapping[str, jax.Array], batch: Drawn) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        if _LOSS in numbers:
            spike = self._spikes.see(numbers[_LOSS])
            numbers[f"{_LOSS}_spike"] = float(spike is not None)
            if spike is not None:
                self._progress.note(f"step {step}: {spike}")
        if self._metrics is not None:
            self._metrics.write(step, numbers)
        tokens = int(numbers.get("tokens", 0))
        self._progress.advance(loss=numbers.get(_LOSS), tokens=tokens)
        if count := int(numbers.get("skipped", 0)):
            self._refused.add(step, numbers, batch)
            self._report_skipped(step, count)
        else:
            self._refused.clear()

    def _report_skipped(self, step: int, count: int) -> None:
        cause = "loss or gradient not finite, or nothing unmasked in the batch"
        self._progress.note(f"step {step}: {count} optimiser steps skipped ({cause})")
        if self._refused.count > self._max_skipped:
            raise Diverged(
                f"{self._refused.count} updates up to step {step} were refused in a "
                f"row ({cause}); {self._dump()}look at the data and the learning rate"
            )

    def _dump(self) -> str:
        """Describe the refused batches in a file, and say where."""
        if self._metrics is None:
            return ""
        folder = self._metrics.path.parent
        try:
            return f"the last batches are described in {self._refused.write(folder)}; "
        except OSError as error:  # must not hide why the run gave up
            return f"the last batches could not be described in {folder} ({error}); "


def _resume(
    state: TrainState,
    batches: Batches,
    checkpoints: Checkpoints | None,
    progress: Progress | Silent,
) -> TrainState:
    """The newest checkpoint if it is ahead of ``state``, else ``state``."""
    if checkpoints is None:
        return state
    if not hasattr(batches, "get_state") or not hasattr(batches, "set_state"):
        raise TypeError(
            f"{type(batches).__name__} has no get_state and set_state: its position "
            "cannot be part of a checkpoint"
        )
    latest = checkpoints.latest()
    if latest is None or latest <= int(state.step):
        return state
    target = abstract(state)
    for leaf in jax.tree.leaves(state):  # never two states in memory at once
        leaf.delete()
    restored, position = checkpoints.restore(target)
    for line in checkpoints.damage:
        progress.note(line)
    batches.set_state(position)
    return restored


def _saves(
    checkpoints: Checkpoints | None, progress: Progress | Silent
) -> Saves | None:
    if checkpoints is None:
        return None
    from rkd_jax.training.saving import Saves  # needs orbax, as they do

    return Saves(checkpoints, progress.note)


def _next(batches: Batches, step: int, steps: int) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"the batches ended after {step} of {steps} steps: repeat the data or "
            "ask for fewer steps"
        ) from None


def _farewell(step: int, steps: int, checkpoints: Checkpoints | None) -> str:
    if checkpoints is None:
        return f"stopped after step {step} of {steps}; nothing was saved"
    return (
        f"stopped after step {step} of {steps}, saved in {checkpoints.folder}; "
        "the same command goes on from there"
    )
