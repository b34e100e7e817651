"""Batches of records of like length in an experiment: the same losses, narrower."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from experiments.baselines import Dpo, DpoConfig, Gkd, GkdConfig, Kd, Sft
from experiments.pupil import count_shapes
from experiments.settings import FitConfig, SettingsError
from experiments.trainer import narrower
from rkd_jax.data.collate import collate
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.tokenize import TokenizeConfig, tokenize_record
from rkd_jax.training.metrics import read_metrics
from rkd_jax.types import ReferenceSignal

pytestmark = pytest.mark.usefixtures("compiled_programs")
PAIRS = [
    PreferenceRecord(
        f"{i} " + "more " * (i % 4) * 3,
        "yes " * (1 + i % 3),
        "no" * (1 + i % 2),
        teacher_prompt=f"Be kind. {i} " + "more " * (i % 4) * 9,
    )
    for i in range(16)
]
TEXTS = [
    DemonstrationRecord(pair.prompt, pair.chosen, pair.teacher_prompt) for pair in PAIRS
]
FIT = FitConfig(1e-3, 4, accumulation=2, bucket=40)


def test_widths_are_multiples_up_to_the_limits(lab):
    rows = narrower(lab.rows, 40)
    assert rows.prompt_widths == (40, 80, 96)
    assert rows.response_widths == (12,)
    assert rows.teacher_prompt_widths == (40, 80, 120, 160, 200, 240, 280, 320)
    assert count_shapes(rows) == 24
    assert narrower(TokenizeConfig(80, 9, max_teacher_prompt=80), 40).prompt_widths == (
        40,
        80,
    )


def signal_of(kind, lab, batch):
    if kind == "kd":
        return lab.teach(batch.teacher_sequences)
    if kind == "dpo":
        return ReferenceSignal(-0.3 * np.ones((len(batch.index), 2), np.float32))
    return ()


@pytest.mark.parametrize("kind", ["sft", "kd", "dpo"])
def test_a_batch_has_the_loss_of_its_records_at_full_width(lab, kind):
    """And the gradient; batches of an epoch have every record once."""
    records = PAIRS if kind == "dpo" else TEXTS
    makers = {"sft": Sft, "kd": Kd, "dpo": lambda lab, fit: Dpo(lab, DpoConfig(fit))}
    trainer = makers[kind](lab, FIT).trainer
    batches, seen, widths = trainer.batches(records, seed=3), [], set()

    @jax.jit
    def loss(params, batch, signal):
        def total(params):
            given = (params, None, lab.frozen, batch, signal, None)
            return trainer.objective.student_loss(*given).total

        return jax.value_and_grad(total)(params)

    for _ in range(4):
        batch = next(batches)
        index = batch.index.tolist()
        rows = [tokenize_record(records[i], lab.tokenizer, lab.rows, i) for i in index]
        wide = dataclasses.replace(
            lab.rows, teacher_prompt_buckets=(lab.rows.max_teacher_prompt,)
        )
        found, expected = (
            loss(lab.student_params, x, signal_of(kind, lab, x))
            for x in (batch, collate(rows, wide))
        )
        assert float(found[0]) > 0.1
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
            found,
            expected,
        )
        widths.add((batch.sequences.tokens.shape, batch.teacher_sequences.tokens.shape))
        seen += index
    assert sorted(seen) == list(range(16))
    assert len(widths) > 1


def test_a_training_compiles_the_widths_that_occur(lab, desk):
    course = types.SimpleNamespace(start=lab.student_params, demonstrations=TEXTS)
    Kd(lab, FIT).train(desk, "kd", course, steps=6, seed=0)
    logs = read_metrics(desk.run.path / "kd")
    assert [entry["step"] for entry in logs] == list(range(1, 7))
    assert all(entry["metrics"]["student/loss"] > 0 for entry in logs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_length": 900}, "sft: bucket 40 and row_length 900: records lie in ro"),
        ({"bucket": -1}, "sft: bucket -1 has to be positive and below .*, 96"),
        ({"bucket": 96}, "sft: bucket 96 has to be positive and below .*, 96"),
    ],
)
def test_what_does_not_go_together_is_said(lab, options, message):
    with pytest.raises(SettingsError, match=message):
        Sft(lab, dataclasses.replace(FIT, **options))


def test_samples_are_of_one_width(lab):
    with pytest.raises(SettingsError, match="gkd: bucket 40, but it reads batches of"):
        Gkd(lab, GkdConfig(FIT))
