"""Packed rows in an experiment: the same updates as with a row for each record."""

import dataclasses
import io
import types

import numpy as np
import pytest

from experiments import tvkd
from experiments.abstract_inputs import inputs_of
from experiments.baselines import Dpo, DpoConfig, Gkd, GkdConfig, Kd, SeqKd, Sft
from experiments.lab import open_lab
from experiments.settings import FitConfig, SettingsError
from experiments.stages import Desk
from experiments.warm_start import warm_start
from rkd_jax.data.packing import pack
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.training.metrics import read_metrics
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder

pytestmark = pytest.mark.usefixtures("compiled_programs")
ROW = 900  # columns
PAIRS = [
    PreferenceRecord(
        f"Say {'more ' * (i % 3)}about {'it' * i}.",
        "yes " * (1 + i % 3),
        "no" * (1 + i % 4),
        teacher_prompt=f"Be kind. Say something about {'it' * (7 - i)}.",
    )
    for i in range(8)
]
TEXTS = [
    DemonstrationRecord(pair.prompt, pair.chosen, pair.teacher_prompt) for pair in PAIRS
]


@pytest.fixture(scope="module")
def lab(compiled_programs):
    return open_lab(tvkd.tiny())


@pytest.fixture(scope="module")
def course(lab):
    """What a `Trainer` reads of one."""
    return types.SimpleNamespace(
        start=lab.student_params, pairs=PAIRS, demonstrations=TEXTS
    )


@pytest.fixture
def desk(tmp_path):
    with Progress(io.StringIO()) as progress:
        yield Desk(RunFolder.open(tmp_path / "run", {}), progress, checkpoint_every=100)


def rows_of(lab, records) -> int:
    """How many packed rows all records take."""
    found = [tokenize_record(r, lab.tokenizer, lab.rows) for r in records]
    return len(pack(found, ROW))


def assert_same_updates(packed, plain):
    """Two of them, on all records: loss and gradient, and what the first one did."""
    assert [entry["step"] for entry in packed] == [1, 2]
    for found, expected in zip(packed, plain, strict=True):
        found, expected = found["metrics"], expected["metrics"]
        assert found["tokens"] == expected["tokens"] > 0
        for name in ("student/loss", "student/grad_norm"):
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-5)


@pytest.mark.parametrize(
    ("make", "records"),
    [(Sft, TEXTS), (SeqKd, TEXTS), (Kd, TEXTS), (Dpo, PAIRS)],
    ids=["sft", "seqkd", "kd", "dpo"],
)
def test_packed_rows_give_the_updates_of_single_ones(lab, course, desk, make, records):
    rows = rows_of(lab, records)
    assert rows < len(records)
    logs = {}
    for name, row_length, size in (("packed", ROW, rows), ("plain", 0, len(records))):
        # A micro-batch for every row, however many records it holds.
        fit = FitConfig(1e-3, size, accumulation=size, row_length=row_length)
        method = make(lab, DpoConfig(fit) if make is Dpo else fit)
        method.train(desk, name, course, steps=2, seed=0)
        logs[name] = read_metrics(desk.run.path / name)
    assert_same_updates(logs["packed"], logs["plain"])


def test_so_does_the_warm_start(lab, desk, tmp_path):
    logs = {}
    for name, row_length, size in (
        ("packed", ROW, rows_of(lab, TEXTS)),
        ("plain", 0, len(TEXTS)),
    ):
        config = dataclasses.replace(
            tvkd.tiny().warm_start, steps=2, batch_size=size, row_length=row_length
        )
        run = RunFolder.open(tmp_path / name, {})
        warm_start(lab, dataclasses.replace(desk, run=run), config, TEXTS, seed=0)
        logs[name] = read_metrics(run.path / "2-warm-start")
    assert_same_updates(logs["packed"], logs["plain"])


@pytest.mark.parametrize("row_length", [331, 1025])
def test_a_row_that_need_not_hold_a_record_or_exceeds_the_context(
    lab, course, desk, row_length
):
    method = Sft(lab, FitConfig(batch_size=2, row_length=row_length))
    message = f"row_length {row_length}.* takes 332 columns.* context has 1024"
    with pytest.raises(SettingsError, match=message):
        method.train(desk, "sft", course, steps=1, seed=0)


def test_fewer_records_than_rows_of_a_batch(lab, course, desk):
    for records, size in ((TEXTS, 9), ([], 1)):
        method = SeqKd(lab, FitConfig(batch_size=size, row_length=ROW, accumulation=1))
        few = types.SimpleNamespace(start=course.start, demonstrations=records)
        with pytest.raises(SettingsError, match=f"{len(records)} records for batches"):
            method.train(desk, "seqkd", few, steps=1, seed=0)


def test_two_responses_need_twice_the_room(lab, course, desk):
    method = Dpo(lab, DpoConfig(FitConfig(batch_size=2, row_length=663)))
    with pytest.raises(SettingsError, match="takes 664 columns"):
        method.train(desk, "dpo", course, steps=1, seed=0)


def test_who_reads_a_row_for_each_record_says_so(lab):
    with pytest.raises(SettingsError, match="gkd: row_length 900, but it reads a row"):
        Gkd(lab, GkdConfig(FitConfig(row_length=ROW)))


def test_ahead_of_time_there_are_no_packed_shapes(lab):
    with pytest.raises(SettingsError, match="sft: row_length 900, but shapes are"):
        inputs_of(Sft(lab, FitConfig(row_length=ROW)), None)
