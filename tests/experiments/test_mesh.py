"""An experiment on eight devices: the same command, folder and numbers as on one."""

import dataclasses
import io
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import pbkd, tvkd
from experiments.baselines import Gkd, GkdConfig, MiniLlm, MiniLlmConfig
from experiments.course import load_prompts, take_course
from experiments.devices import open_meshes
from experiments.lab import open_lab
from experiments.references import pair_log_probs
from experiments.settings import SettingsError
from experiments.stages import Desk
from experiments.system import TOY_FIT
from rkd_jax.data.collate import collate
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord, PromptRecord
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.evaluation.generation import with_prompts
from rkd_jax.evaluation.likelihood import sequence_divergences
from rkd_jax.interop import load_model
from rkd_jax.objectives.policy import target_log_probs
from rkd_jax.sharding import MeshConfig, ShardingError
from rkd_jax.training.metrics import read_metrics
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
APART = {"mesh": MeshConfig(data=2, tensor=2), "teacher_mesh": (1, 2, 2)}

pytestmark = pytest.mark.usefixtures("compiled_programs")


def options(mesh=MESH, **changes):
    """The toy with one shape for each sampler, so that less is compiled."""
    config = tvkd.tiny()
    return dataclasses.replace(
        config,
        mesh=mesh,
        policy=dataclasses.replace(config.policy, batch_size=4, samples_per_prompt=1),
        warm_start=dataclasses.replace(config.warm_start, steered=True),
        evaluation=dataclasses.replace(config.evaluation, likelihood_prompts=4),
        **changes,
    )


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


@pytest.fixture(scope="module")
def lab(compiled_programs):
    return open_lab(options())


@pytest.fixture(scope="module")
def apart(compiled_programs):
    """The teacher has four devices of its own."""
    return open_lab(options(**APART))


@pytest.fixture(scope="module")
def finished(compiled_programs, tmp_path_factory):
    """The folder of a run on the mesh, and its options; of two methods the second."""
    folder = tmp_path_factory.mktemp("mesh") / "run"
    config = options(out=str(folder))
    table = tvkd.table
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tvkd, "table", lambda *args: {"TVKD": table(*args)["TVKD"]})
        assert tvkd.run(config) == folder / "report" / "report.html"
        yield folder, config


def test_a_run_goes_on_with_other_devices_and_trains_the_same(finished, tmp_path):
    folder, config = finished
    report = json.loads((folder / "report" / "report.json").read_text("utf-8"))
    names = ["teacher (steered)", "warm start", "TVKD"]
    assert [row["name"] for row in report["policies"]] == names
    assert report["settings"]["mesh"] == dataclasses.asdict(MESH)

    there = tmp_path / "run"
    shutil.copytree(folder, there)
    shutil.rmtree(there / "4-tvkd")
    before = (there / "2-warm-start" / "metrics.jsonl").read_bytes()
    config = dataclasses.replace(config, out=str(there), mesh=MeshConfig())
    run = RunFolder.open(there, config.identity(), name="tvkd")
    with Progress(io.StringIO()) as progress:
        desk = Desk(run, progress, checkpoint_every=100)
        alone = open_lab(config)
        prompts, _, _ = load_prompts(config.task, alone)
        course = take_course(alone, desk, config, prompts, seed=config.seed)
        params = tvkd.Tvkd(alone, config.tvkd).train(
            desk, "4-tvkd", course, steps=config.updates, seed=config.seed
        )
    # The warm start was restored, what came after it made anew.
    assert (there / "2-warm-start" / "metrics.jsonl").read_bytes() == before
    logs = [read_metrics(run / "4-tvkd") for run in (folder, there)]
    assert len(logs[0]) == config.updates
    for entry in logs[0] + logs[1]:
        # The sign of a margin that is 0 to rounding: the policy is still the reference.
        del entry["metrics"]["student/accuracy"]
    close(*logs)
    close(load_model(folder / "student")[1], params)


def test_everything_large_is_cut(lab):
    assert dict(lab.mesh.shape) == dataclasses.asdict(MESH)
    for params in (lab.teacher_params, lab.student_params, lab.trunk_params):
        for kernel in (params["embed"]["embedding"], params["layers"]["mlp"]["up"]):
            for leaf in jax.tree.leaves(kernel):
                assert leaf.addressable_shards[0].data.size == leaf.size // 4


def test_a_teacher_on_other_devices_is_there_alone(apart):
    devices = jax.devices()
    everywhere = {
        "teacher": (apart.teacher_params, devices[4:]),
        "its head": (apart.frozen, devices[:4]),
        "student": (apart.student_params, devices[:4]),
        "trunk of the rewards": (apart.trunk_params, devices[:4]),
    }
    for name, (params, home) in everywhere.items():
        for leaf in jax.tree.leaves(params):
            assert leaf.sharding.device_set == set(home), name
    assert apart.mesh.shape == {"data": 2, "fsdp": 1, "tensor": 2}
    (head,) = jax.tree.leaves(apart.frozen)
    assert head.shape == apart.teacher_params["embed"]["embedding"].shape


def learnt(lab, method, folder):
    """Metrics and parameters after two updates on what both say."""
    records = [DemonstrationRecord(f"number {i}", f"it is {i}") for i in range(8)]
    course = SimpleNamespace(start=lab.student_params, demonstrations=records)
    with Progress(io.StringIO()) as progress:
        run = RunFolder.open(folder, {})
        desk = Desk(run, progress, checkpoint_every=100)
        params = method.train(desk, "4-student", course, steps=2, seed=0)
    return read_metrics(run.path / "4-student"), jax.device_get(params)


def test_a_student_learns_from_it_as_on_one_device(apart, tmp_path):
    """From its states, on what the student says and on what there is."""
    alone = open_lab(options(MeshConfig()))
    close(
        *(
            learnt(lab, Gkd(lab, GkdConfig(fit=TOY_FIT)), tmp_path / name)
            for name, lab in (("apart", apart), ("alone", alone))
        )
    )


def test_the_weights_are_those_of_student_over_mixture():
    """Each under its own prompts, from the log-probs of fresh passes."""
    one = open_lab(options(MeshConfig()))
    records = [
        DemonstrationRecord(f"number {i}", "yes", f"Be kind. number {i}")
        for i in range(4)
    ]
    rows = [tokenize_record(r, one.tokenizer, one.rows) for r in records]
    method = MiniLlm(one, MiniLlmConfig(TOY_FIT, alpha=0.4))
    state = method.trainer.step.begin(
        one.student_params, rng=jax.random.key(0), mesh=None
    )
    batch, _ = method.prepare(state, collate(rows, one.rows))
    own = batch.imitated.sequences
    mask = np.asarray(own.response_mask)
    student, teacher = (
        np.exp(target_log_probs(model, params, sequences))
        for model, params, sequences in (
            (one.student, one.student_params, own),
            (one.teacher, one.teacher_params, batch.imitated.teacher_sequences),
        )
    )
    wanted = student / (0.4 * teacher + 0.6 * student)
    weights = np.asarray(batch.importance_weights)
    np.testing.assert_allclose(weights[mask], wanted[mask], rtol=2e-5)
    assert weights[mask].std() > 1e-3
    np.testing.assert_array_equal(weights[~mask], 1.0)


def test_a_student_learns_from_what_both_write_together(lab, apart, tmp_path):
    """Samples, their weights and what is learned from them, as on one device."""
    alone = open_lab(options(MeshConfig()))
    mixed = MiniLlmConfig(fit=TOY_FIT, alpha=0.4)
    found, expected = (
        learnt(one, MiniLlm(one, mixed), tmp_path / name)
        for name, one in (("mesh", lab), ("alone", alone))
    )
    close(found, expected)
    assert all("student/importance" in line["metrics"] for line in expected[0])
    own, _ = learnt(alone, MiniLlm(alone, MiniLlmConfig(TOY_FIT)), tmp_path / "own")
    assert "student/importance" not in own[0]["metrics"]
    token = dataclasses.replace(mixed, importance="token")
    _, others = learnt(alone, MiniLlm(alone, token), tmp_path / "token")
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), others, expected[1])
    assert max(jax.tree.leaves(differences)) > 1e-7
    with pytest.raises(SettingsError, match="leave --teacher-mesh out, or take an"):
        MiniLlm(apart, mixed)


@pytest.mark.parametrize("where", ["lab", "apart"])
def test_samples_and_scores_are_those_of_one_device(where, request):
    lab = request.getfixturevalue(where)
    alone = open_lab(options(MeshConfig()))
    records = [PromptRecord(f"number {i}") for i in range(4)]
    rows = [tokenize_record(r, lab.tokenizer, lab.rows) for r in records]
    batch = collate(rows, lab.rows)
    key = jax.random.key(3)
    some = jax.tree.map(lambda x: x[:3], batch.prompts)  # filled up to four again
    found = lab.sample_student(lab.student_params, some, key)
    whole = alone.sample_student(alone.student_params, batch.prompts, key)
    expected = jax.tree.map(lambda x: np.asarray(x)[:3], whole)
    np.testing.assert_array_equal(found.sequences.tokens, expected.sequences.tokens)
    close(found, expected)

    pairs = [PreferenceRecord(r.prompt, "some", "none at all") for r in records]
    close(*(pair_log_probs(one, one.student_params, pairs) for one in (lab, alone)))
    own = jax.tree.map(lambda x: np.asarray(x)[:, 0], whole.sequences)
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
        open_lab(options(mesh))


@pytest.mark.parametrize(
    ("mesh", "teacher_mesh", "message"),
    [
        (MESH, (1, 2, 1), "data=2 fsdp=2 tensor=2 does not fit 6 devices"),
        (MeshConfig(), (1, 8, 1), "leave some of the 8 devices for the student"),
        (MeshConfig(), (1, -1, 1), "--teacher-mesh 1 -1 1: give every axis a size"),
    ],
)
def test_a_teacher_that_takes_too_much_is_refused(mesh, teacher_mesh, message):
    with pytest.raises(ValueError, match=message):
        open_lab(options(mesh, teacher_mesh=teacher_mesh))


@pytest.mark.parametrize(
    ("kind", "processes", "message"),
    [
        ("cpu", 3, "4 devices do not divide among 3 processes; each has to have some"),
        ("TPU v5 lite", 2, "for TPU v5 lite there are programs for whole slices"),
        ("TPU v6 lite", 2, "for TPU v6 lite there are programs for whole slices"),
    ],
)
def test_a_teacher_that_processes_cannot_share_is_refused(
    kind, processes, message, monkeypatch
):
    device = SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device] * 12)
    monkeypatch.setattr(jax, "device_count", lambda: 12)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(SettingsError, match=f"--teacher-mesh 1 2 2: {message}"):
        open_meshes(MeshConfig(data=-1), (1, 2, 2))


def test_the_devices_are_no_part_of_what_makes_a_run():
    assert options().identity() == options(MeshConfig()).identity()
    assert options().identity() == options(**APART).identity()
