"""A student, and how records become batches for it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import Mesh

from experiments.settings import SettingsError
from experiments.several_processes import widest
from rkd_jax.data.collate import Batch, collate
from rkd_jax.data.pipeline import BatchIterator, make_batches
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord, Record
from rkd_jax.data.tokenize import TokenizeConfig, tokenize_record
from rkd_jax.data.tokenizer import Tokenizer
from rkd_jax.models.api import CausalLM
from rkd_jax.sharding import mesh_of, mesh_shard, row_shards
from rkd_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Pupil:
    """What any training needs; its parameters say on which devices it is."""

    tokenizer: Tokenizer
    rows: TokenizeConfig
    student: CausalLM
    student_params: Params  # before any training

    @property
    def widths(self) -> int:
        """How many shapes a batch may have: one per width of the teacher's prompts."""
        return count_shapes(self.rows)

    @property
    def mesh(self) -> Mesh | None:
        """Where the student is; None for one device."""
        return mesh_of(self.student_params)

    @property
    def context(self) -> int:
        """Columns of the longest row that every model here can read."""
        return self.student.config.max_length

    def batches(
        self,
        records: Sequence[DemonstrationRecord] | Sequence[PreferenceRecord],
        *,
        batch_size: int,
        seed: int,
    ) -> BatchIterator:
        """Shuffled batches, for ever; each process reads the rows its devices hold."""
        return make_batches(
            records,
            self.tokenizer,
            self.rows,
            batch_size=batch_size,
            seed=seed,
            shard=mesh_shard(self.mesh),
            agree=widest,
        )

    def collated(self, records: Sequence[Record]) -> Batch:
        """All records as one batch on the host, numbered in their order."""
        rows = [
            tokenize_record(record, self.tokenizer, self.rows, number)
            for number, record in enumerate(records)
        ]
        return collate(rows, self.rows)

    def check_rows(self, what: str, rows: int, accumulation: int = 1) -> None:
        """Raise SettingsError unless an update's rows divide, over the mesh too."""
        shards = row_shards(self.mesh)
        if accumulation >= 1 and rows % (accumulation * shards) == 0:
            return
        where, way = "", " or"
        if shards > 1:
            where, way = f" over data x fsdp = {shards} devices", ","
        tensor = ", or more of --mesh on tensor" if shards > 1 else ""
        raise SettingsError(
            f"{what}: {rows} rows in {accumulation} micro-batches do not divide"
            f"{where}; take a multiple of {max(accumulation, 1) * shards}{way} fewer "
            f"micro-batches{tensor}"
        )


def count_shapes(rows: TokenizeConfig) -> int:
    """How many shapes batches of these rows may have."""
    choices = rows.prompt_widths, rows.teacher_prompt_widths, rows.response_widths
    return math.prod(map(len, choices))
