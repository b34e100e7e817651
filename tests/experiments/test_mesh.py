"""An experiment on eight devices: the same command, folder and numbers as on one."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import pbkd, tvkd
from experiments.lab import open_lab
from experiments.settings import SettingsError
from rkd_jax.data.collate import collate
from rkd_jax.data.records import PromptRecord
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.evaluation.generation import with_prompts
from rkd_jax.evaluation.likelihood import sequence_divergences
from rkd_jax.interop import load_model
from rkd_jax.sharding import MeshConfig, ShardingError
from rkd_jax.training.metrics import read_metrics

MESH = MeshConfig(data=2, fsdp=2, tensor=2)

pytestmark = pytest.mark.usefixtures("compiled_programs")


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


@pytest.fixture(scope="module")
def lab(compiled_programs):
    return open_lab(dataclasses.replace(tvkd.tiny(), mesh=MESH))


@pytest.fixture(scope="module")
def finished(compiled_programs, tmp_path_factory):
    """The folder of a run on the mesh, and its options."""
    folder = tmp_path_factory.mktemp("mesh") / "run"
    config = dataclasses.replace(tvkd.tiny(), out=str(folder), mesh=MESH)
    assert tvkd.run(config) == folder / "report" / "report.html"
    return folder, config


def test_a_run_goes_on_with_other_devices_and_trains_the_same(finished, tmp_path):
    folder, config = finished
    report = json.loads((folder / "report" / "report.json").read_text("utf-8"))
    names = ["teacher (steered)", "warm start", "DPO", "TVKD"]
    assert [row["name"] for row in report["policies"]] == names
    assert report["settings"]["mesh"] == dataclasses.asdict(MESH)

    alone = tmp_path / "run"
    shutil.copytree(folder, alone)
    for name in ("4-tvkd", "report", "student"):
        shutil.rmtree(alone / name)
    (alone / "6-evaluation" / "TVKD.json").unlink()
    before = (alone / "2-warm-start" / "metrics.jsonl").read_bytes()
    tvkd.run(dataclasses.replace(config, out=str(alone), mesh=MeshConfig()))
    # The warm start was restored, what came after it made anew.
    assert (alone / "2-warm-start" / "metrics.jsonl").read_bytes() == before
    logs = [read_metrics(run / "4-tvkd") for run in (folder, alone)]
    assert len(logs[0]) == config.updates
    close(*([entry["metrics"] for entry in log] for log in logs))
    close(*(load_model(run / "student")[1] for run in (folder, alone)))


def test_everything_large_is_cut(lab):
    assert dict(lab.mesh.shape) == dataclasses.asdict(MESH)
    for params in (lab.teacher_params, lab.student_params, lab.trunk_params):
        for kernel in (params["embed"]["embedding"], params["layers"]["mlp"]["up"]):
            for leaf in jax.tree.leaves(kernel):
                assert leaf.addressable_shards[0].data.size == leaf.size // 4


def test_samples_and_scores_are_those_of_one_device(lab):
    alone = open_lab(tvkd.tiny())
    records = [PromptRecord(f"number {i}") for i in range(8)]
    rows = [tokenize_record(r, lab.tokenizer, lab.rows) for r in records]
    batch = collate(rows, lab.rows)
    key = jax.random.key(3)
    some = jax.tree.map(lambda x: x[:6], batch.prompts)  # filled up to eight again
    found = lab.sample_student(lab.student_params, some, key)
    whole = alone.sample_student(alone.student_params, batch.prompts, key)
    expected = jax.tree.map(lambda x: np.asarray(x)[:6], whole)
    np.testing.assert_array_equal(found.sequences.tokens, expected.sequences.tokens)
    close(found, expected)

    own = jax.tree.map(lambda x: np.asarray(x)[:, 0], whole.sequences)
    scores, expected = (
        jax.tree.map(np.asarray, one.reference_scores(one.student_params, own))
        for one in (lab, alone)
    )
    close(scores, expected)
    as_teacher = with_prompts(own, batch.teacher_prompts)
    divergences = [
        dataclasses.asdict(
            sequence_divergences(
                *(one.student, one.student_params, one.teacher, one.teacher_params),
                *(own, as_teacher),
            )
        )
        for one in (lab, alone)
    ]
    close(*divergences)


def test_rows_that_do_not_divide_are_refused_before_anything_is_made(lab):
    config = tvkd.tiny()
    fit = dataclasses.replace(config.tvkd.fit, batch_size=6)
    options = dataclasses.replace(config.tvkd, fit=fit)
    with pytest.raises(SettingsError, match="6 rows in 1 micro-batches do not divide"):
        tvkd.table(lab, dataclasses.replace(config, tvkd=options))
    with pytest.raises(SettingsError, match="--policy.rollout-prompts: 2 rows"):
        pbkd.table(lab, pbkd.tiny())


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=16), "does not fit 8 devices"),
        (MeshConfig(tensor=4), "axis 'vocab' of size 258 does not divide over 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(ShardingError, match=message):
        open_lab(dataclasses.replace(tvkd.tiny(), mesh=mesh))


def test_the_devices_are_no_part_of_what_makes_a_run():
    config = dataclasses.replace(tvkd.tiny(), mesh=MESH)
    assert config.identity() == tvkd.tiny().identity()
