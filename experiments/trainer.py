"""One objective trained on one data set: what all methods without a game share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from experiments.pupil import Pupil, count_shapes
from experiments.settings import FitConfig, SettingsError
from experiments.stages import Desk, train, training_key
from rkd_jax.data.pipeline import BatchIterator
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.data.windows import make_bucketed_batches, make_packed_batches
from rkd_jax.sharding import (
    batch_sharding,
    mesh_of,
    mesh_shard,
    parameter_shardings,
)
from rkd_jax.training.loop import Update
from rkd_jax.training.optim import OptimConfig, make_optimizer
from rkd_jax.training.state import TrainState, init_state, state_shardings
from rkd_jax.training.update import make_update
from rkd_jax.types import Objective, Params

Record = DemonstrationRecord | PreferenceRecord


def constant_rate(learning_rate: float) -> optax.GradientTransformation:
    """Adam without decay and without a schedule, the same for every method."""
    return make_optimizer(OptimConfig(learning_rate=learning_rate, weight_decay=0.0))


@dataclasses.dataclass(frozen=True)
class Step:
    """What one update is made of, so that the same one can be placed anywhere.

    Example::

        step = Step(make_sft(model), constant_rate(1e-5))
        state = step.begin(params, rng=key, mesh=mesh)
        state, metrics = step.update_on(mesh)(state, frozen, batch, signal)
    """

    objective: Objective
    student_optimizer: optax.GradientTransformation
    critic_optimizer: optax.GradientTransformation | None = None
    critic_steps: int = 1
    accumulation: int = 1

    def update(self, **placement: Any) -> Update:
        """`make_update`; ``placement`` are the arguments that are not above."""
        return make_update(
            self.objective,
            student_optimizer=self.student_optimizer,
            critic_optimizer=self.critic_optimizer,
            critic_steps=self.critic_steps,
            accumulation=self.accumulation,
            **placement,
        )

    def begin(
        self,
        student: Params,
        *,
        rng: jax.Array,
        mesh: Mesh | None,
        critic: Params | None = None,
        dual: float | Sequence[float] = 1.0,
    ) -> TrainState:
        """`init_state`, on the mesh if there is one."""
        return init_state(
            student,
            student_optimizer=self.student_optimizer,
            critic_params=critic,
            critic_optimizer=self.critic_optimizer,
            dual=dual,
            rng=rng,
            shardings=None if mesh is None else self.shardings(student, critic, mesh),
        )

    def shardings(
        self, student: Params, critic: Params | None, mesh: Mesh
    ) -> TrainState:
        """Where a state is that begins with these, abstract or not.

        Parameters that are on the mesh stay where they are; see `parameter_shardings`.
        """
        return state_shardings(
            student,
            parameter_shardings(student, None, mesh),
            student_optimizer=self.student_optimizer,
            critic_params=critic,
            critic_shardings=critic and parameter_shardings(critic, None, mesh),
            critic_optimizer=self.critic_optimizer,
        )

    def update_for(self, state: TrainState, **placement: Any) -> Update:
        """The update of states that are on a mesh, where this one is."""
        return self.update(
            state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
            batch_sharding=batch_sharding(mesh_of(state)),
            **placement,
        )

    def update_on(self, mesh: Mesh | None, *, max_traces: int = 1) -> Update:
        """The update of states that `begin` there."""
        if mesh is None:
            return self.update(max_traces=max_traces)
        return _UpdateOnMesh(self, max_traces)


class _UpdateOnMesh:
    """An update that is made when the first state shows where its arrays are."""

    def __init__(self, step: Step, max_traces: int):
        self._make = functools.partial(step.update_for, max_traces=max_traces)
        self._update: Any = None

    def __call__(self, state: TrainState, *inputs: Any):
        """As `make_update`."""
        return self._made(state)(state, *inputs)

    def lower(self, state: TrainState, *inputs: Any):
        """As that of a jitted function."""
        return self._made(state).lower(state, *inputs)

    def _made(self, state: TrainState) -> Any:
        if self._update is None:
            self._update = self._make(state)
        return self._update


def record_batches(
    what: str,
    lab: Pupil,
    records: Sequence[Record],
    *,
    batch_size: int,
    row_length: int = 0,
    bucket: int = 0,
    seed: int,
) -> BatchIterator:
    """Shuffled batches of records, for ever: a row for each, or packed rows.

    Args:
        what: needs them, for messages.
        lab: its tokenizer, limits and mesh.
        records: demonstrations or pairs, one kind.
        batch_size: rows. Packed ones may be fewer in an epoch; then a batch holds rows
            of several.
        row_length: columns of a packed row; 0 for a row to each record.
        bucket: of the widths of batches whose records are of like length; 0 for the
            lab's widths.
        seed: of their order.

    Raises:
        SettingsError: fewer records than rows of a batch, or a packed row that is
            longer than the models' context or need not hold a record.
    """
    if len(records) < batch_size:
        raise SettingsError(
            f"{what}: {len(records)} records for batches of {batch_size}; lower the "
            "batch size or give more data"
        )
    if bucket:
        return make_bucketed_batches(
            records,
            lab.tokenizer,
            narrower(lab.rows, bucket),
            batch_size=batch_size,
            # A record that a window of several epochs has again and again would be its
            # own neighbour.
            window_batches=min(32, len(records) // batch_size),
            seed=seed,
            shard=mesh_shard(lab.mesh),
        )
    if not row_length:
        return lab.batches(records, batch_size=batch_size, seed=seed)
    members = 2 if isinstance(records[0], PreferenceRecord) else 1
    limits = lab.rows
    prompt = max(limits.max_prompt, limits.max_teacher_prompt or 0)
    least = members * (prompt + limits.max_response)
    if not least <= row_length <= lab.context:
        raise SettingsError(
            f"{what}: row_length {row_length}; the longest record allowed takes "
            f"{least} columns, the models' context has {lab.context}"
        )
    return make_packed_batches(
        records,
        lab.tokenizer,
        limits,
        row_length=row_length,
        batch_size=batch_size,
        seed=seed,
        shard=mesh_shard(lab.mesh),
    )


def narrower(rows: TokenizeConfig, bucket: int) -> TokenizeConfig:
    """The same limits; batches as wide as a multiple of ``bucket``, or as a limit."""

    def widths(longest: int) -> tuple[int, ...]:
        return (*range(bucket, longest, bucket), longest)

    return dataclasses.replace(
        rows,
        prompt_buckets=widths(rows.max_prompt),
        response_buckets=widths(rows.max_response),
        teacher_prompt_buckets=widths(rows.max_teacher_prompt),
    )


class Trainer:
    """An objective with its optimiser, compiled once for any number of runs.

    Example::

        trainer = Trainer(lab, make_sft(lab.student), options)
        params = trainer.train(desk, "4-sft", start, records, steps=20, seed=0)
    """

    def __init__(self, lab: Pupil, objective: Objective, options: FitConfig):
        self.lab, self.objective, self.options = lab, objective, options
        self.optimizer = constant_rate(options.learning_rate)
        self.step = Step(objective, self.optimizer, accumulation=options.accumulation)
        lab.check_rows(objective.name, options.batch_size, options.accumulation)
        if options.row_length and not objective.packed:
            raise SettingsError(
                f"{objective.name}: row_length {options.row_length}, but it reads a "
                "row for each record; set it to 0"
            )
        widths = lab.widths
        if options.bucket:
            self._check_bucket()
            widths = count_shapes(narrower(lab.rows, options.bucket))
        self.update = self.step.update_on(lab.mesh, max_traces=widths)

    def _check_bucket(self) -> None:
        """Raise SettingsError unless batches may be as narrow as their records."""
        bucket, rows = self.options.bucket, self.lab.rows
        name = f"{self.objective.name}: bucket {bucket}"
        if self.options.row_length:
            raise SettingsError(
                f"{name} and row_length {self.options.row_length}: records lie in rows "
                "of like length or share one; set either to 0"
            )
        if not self.objective.packed:  # what is beside the batch is of one width
            raise SettingsError(
                f"{name}, but it reads batches of one width; set it to 0"
            )
        widest = max(rows.max_prompt, rows.max_response)
        if not 0 < bucket < widest:
            raise SettingsError(
                f"{name} has to be positive and below the longest prompt or response "
                f"allowed, {widest}"
            )

    def batches(self, records: Sequence[Record], seed: int):
        """Shuffled batches of the records, for ever.

        Raises:
            SettingsError: as `record_batches`.
        """
        return record_batches(
            self.objective.name,
            self.lab,
            records,
            batch_size=self.options.batch_size,
            row_length=self.options.row_length,
            bucket=self.options.bucket,
            seed=seed,
        )

    def train(
        self,
        desk: Desk,
        stage: str,
        start: Params,
        records: Sequence[Record],
        *,
        steps: int,
        seed: int,
        prepare: Callable | None = None,
        look_up: Callable | None = None,
        batches=None,
        frozen=None,
    ) -> Params:
        """``steps`` updates from ``start``; the trained parameters.

        Args:
            desk: where to write and show.
            stage: folder of the checkpoints and the metrics.
            start: parameters, copied.
            records: the data.
            steps: updates.
            seed: of the order of the records and of everything drawn.
            prepare: ``(state, batch) -> (batch, signal)``.
            look_up: ``batch -> (batch, signal)`` in its place, see `stages.train`.
            batches: in place of those of ``records``.
            frozen: what the objective reads and does not train.
        """
        state = self.step.begin(start, rng=training_key(seed), mesh=self.lab.mesh)
        config = {
            "objective": self.objective.name,
            "fit": dataclasses.asdict(self.options),
            "steps": steps,
            "seed": seed,
        }
        state = train(
            desk,
            stage.replace("-", " "),
            desk.run.stage(stage).path,
            state,
            self.update,
            self.batches(records, seed) if batches is None else batches,
            steps=steps,
            config=config,
            prepare=prepare,
            look_up=look_up,
            frozen=frozen,
        )
        return state.student.params
