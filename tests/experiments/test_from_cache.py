"""Training on a teacher cache: the numbers of the models themselves."""

import dataclasses
import io
import shutil
import sys

import jax
import numpy as np
import pytest

from experiments import from_cache, toy_cache
from experiments.cached_methods import METHODS
from experiments.devices import open_meshes
from experiments.sentiment_task import letter_share
from experiments.settings import FitConfig
from experiments.stages import Desk
from experiments.trainer import Trainer
from rkd_jax.data.packing import pack
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.interop import load_model, save_model
from rkd_jax.objectives.drdo import make_drdo
from rkd_jax.sharding import MeshConfig
from rkd_jax.signals.cache_rows import Located, located
from rkd_jax.signals.teacher import make_sequence_scorer
from rkd_jax.signals.topk import make_topk
from rkd_jax.signals.values import make_shaping
from rkd_jax.training.metrics import read_metrics
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder
from rkd_jax.types import ReferenceSignal, ShapingSignal
from tests.experiments.toy_school import (
    SEED,
    losses,
    options,
    report_of,
    toy_models,
    toys_of,
)
from tests.experiments.two_processes import run_two

pytestmark = pytest.mark.usefixtures("compiled_programs")


@pytest.fixture(scope="module")
def runs(compiled_programs, tmp_path_factory):
    """A finished run of every method, by name."""
    root = tmp_path_factory.mktemp("from-cache")
    for method in METHODS:
        shown = 2 if method == "kd" else 0
        from_cache.run(options(root / method, method, samples_shown=shown))
    return {method: root / method for method in METHODS}


def live(method, temperature):
    """``batch -> (batch, signal)`` by the models themselves."""
    model, teacher, reference = toy_models()
    top = make_topk(model, top_k=toy_cache.EVERYTHING.top_k, temperature=temperature)
    scores = make_sequence_scorer(model, temperature=temperature)
    shaping = make_shaping(model, temperature=temperature)

    def rewards(batch):
        texts = [
            byte_tokenizer().decode(row[mask][:-1].tolist())
            for row, mask in zip(
                batch.sequences.targets.reshape(-1, 12),
                batch.sequences.response_mask.reshape(-1, 12),
                strict=True,
            )
        ]
        found = np.array(letter_share(None, texts), np.float32).reshape(-1, 2)
        return dataclasses.replace(batch, rewards=found)

    return {
        "kd": lambda batch: (batch, top(teacher, batch.teacher_sequences)),
        "dpo": lambda batch: (
            batch,
            ReferenceSignal(scores(reference, batch.sequences)),
        ),
        "tvkd": lambda batch: (
            batch,
            ShapingSignal(
                scores(reference, batch.sequences),
                shaping(teacher, batch.teacher_sequences),
            ),
        ),
        "drdo": lambda batch: (rewards(batch), ()),
    }[method]


def test_rewards_of_drdo_are_scaled_over_all_that_is_taught(runs):
    config = options(runs["drdo"], "drdo")
    pupil, lessons, method, trainer = from_cache.open_school(config)
    pairs = lessons.taught.records
    gaps = np.subtract(
        letter_share(None, [pair.chosen for pair in pairs]),
        letter_share(None, [pair.rejected for pair in pairs]),
    )
    batch = lessons.tabulate(lessons.taught, 4)
    batch, signal = method.signal(lessons.cache, batch)
    params = method.begin(pupil, jax.random.key(0))

    def loss(objective):
        given = (params, {}, (), batch, signal, jax.random.key(0))
        return objective.student_loss(*given).total

    by_hand = make_drdo(
        pupil.student, method.head, oracle_scale=np.sqrt(np.mean(gaps**2))
    )
    np.testing.assert_allclose(loss(trainer.objective), loss(by_hand), rtol=1e-5)
    unscaled = loss(make_drdo(pupil.student, method.head))
    assert abs(unscaled / loss(by_hand) - 1) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_updates_are_those_of_the_models_themselves(method, runs, tmp_path):
    config = options(tmp_path / "run", method)
    run = RunFolder.open(config.out, {})
    pupil, lessons, found, trainer = from_cache.open_school(config)
    with Progress(io.StringIO()) as progress:
        trainer.train(
            Desk(run, progress, 100),
            "live",
            found.begin(pupil, jax.random.key(config.seed)),
            lessons.taught.records,
            steps=config.updates,
            seed=config.seed,
            look_up=live(method, lessons.cache.settings.temperature),
        )
    cached = losses(runs[method] / "1-training")
    assert len(cached) == config.updates
    np.testing.assert_allclose(cached, losses(run.path / "live"), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_report_measures_what_nobody_trained_on(method, runs):
    report = report_of(runs[method])
    (difference,) = report["differences"]
    assert (difference["first"], difference["second"]) == ("student", "start")
    assert difference["quantity"] == METHODS[method].unit
    assert difference["difference"]["n"] == 2  # prompts
    better = "lower" if method == "kd" else "higher"
    assert np.sign(difference["difference"]["mean"]) == (-1 if better == "lower" else 1)
    trained, held_out = (source["used"] for source in report["data"])
    assert (trained, held_out) == (22, 2)
    shown = [len(sample["responses"]) for sample in report["samples"]]
    assert shown == ([2, 2] if method == "kd" else [])
    assert report["assets"]["data of the cache"]


def log_softmax(model, params, row: Located) -> np.ndarray:
    """Of the model at every target of a row by itself, without padding."""
    tokens = np.concatenate([row.prompt, row.targets])[None].astype(np.int32)
    logits = np.asarray(model.logits(params, tokens)[0], np.float64)
    logits = logits[len(row.prompt) - 1 : -1]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("method", ["kd", "dpo"])
def test_held_out_values_are_those_of_the_exported_student(method, runs):
    """KL of a list and its bucket, and margins, by hand and in float64."""
    model, params, tokenizer = load_model(runs[method] / "student")
    pupil, lessons, *_ = from_cache.open_school(options(runs[method], method))
    batch = lessons.tabulate(lessons.held_out)
    if method == "dpo":
        chosen, rejected = (
            [
                log_softmax(model, params, row)[
                    np.arange(len(row.targets)), row.targets
                ]
                for row in (responses[n] for _, responses in located(batch))
            ]
            for n in range(2)
        )
        expected = [a.sum() - b.sum() for a, b in zip(chosen, rejected, strict=True)]
    else:
        expected = []
        teacher = lessons.cache.topk(batch)
        for _, (row,) in located(batch):
            p = np.exp(teacher.log_probs[row.columns].astype(np.float64))
            q = log_softmax(model, params, row)
            q = np.exp(np.take_along_axis(q, teacher.ids[row.columns], -1))
            rest = [1 - x.sum(-1, keepdims=True) for x in (p, q)]
            p, q = (np.concatenate(x, -1) for x in zip((p, q), rest, strict=True))
            expected.append((p * np.log(p / q)).sum(-1).mean())
    expected = np.array(expected)
    found = METHODS[method].measure(pupil, lessons)(params)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    mean = report_of(runs[method])["differences"][0]["difference"]["mean"]
    start = METHODS[method].measure(pupil, lessons)(pupil.student_params)
    np.testing.assert_allclose(mean, (expected - start).mean(), rtol=1e-2, atol=1e-6)
    assert tokenizer.eos_id == pupil.tokenizer.eos_id


def test_the_same_command_again_is_the_same_run(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["kd"], folder)
    shutil.rmtree(folder / "report")
    from_cache.run(options(folder, "kd"))
    assert report_of(folder)["differences"] == report_of(runs["kd"])["differences"]


@pytest.mark.parametrize("method", ["kd", "drdo"])
def test_packed_rows_of_all_records_make_the_same_first_update(method, tmp_path):
    """Every one of the 22 records in one batch, of which the update is a mean."""
    config = options(tmp_path / "run", method, updates=1)
    run = RunFolder.open(config.out, {})
    pupil, lessons, found, _ = from_cache.open_school(config)
    objective = found.objective(pupil.student, config, lessons)
    length = 2 * (lessons.rows.max_prompt + lessons.rows.max_response)
    tokenized = [
        tokenize_record(record, pupil.tokenizer, lessons.rows)
        for record in lessons.taught.records
    ]
    first = {}
    for name, fit in (
        ("plain", FitConfig(batch_size=22, accumulation=1)),
        (
            "packed",
            FitConfig(
                batch_size=len(pack(tokenized, length)),
                accumulation=1,
                row_length=length,
            ),
        ),
    ):
        fit = dataclasses.replace(fit, learning_rate=1e-3)
        with Progress(io.StringIO()) as progress:
            Trainer(pupil, objective, fit).train(
                Desk(run, progress, 100),
                name,
                found.begin(pupil, jax.random.key(0)),
                lessons.taught.records,
                steps=1,
                seed=0,
                look_up=lessons.look_up(found.signal),
            )
        (entry,) = read_metrics(run.path / name)
        first[name] = entry["metrics"]
    for metric in ("student/loss", "student/grad_norm", "tokens"):
        packed, plain = (first[name][metric] for name in ("packed", "plain"))
        np.testing.assert_allclose(packed, plain, rtol=2e-5)


def test_on_a_mesh_it_is_the_same_run(runs, tmp_path):
    mesh = MeshConfig(data=2, fsdp=1, tensor=2)
    assert open_meshes(mesh, None)[0].size == 4
    folder = tmp_path / "drdo"
    from_cache.run(options(folder, "drdo", mesh=mesh, samples_shown=0))
    found, expected = (losses(x / "1-training") for x in (folder, runs["drdo"]))
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    one, many = (
        report_of(x)["differences"][0]["difference"]["mean"]
        for x in (runs["drdo"], folder)
    )
    np.testing.assert_allclose(many, one, rtol=1e-3, atol=1e-6)


def test_two_processes_read_their_own_rows_and_make_the_same_run(runs, tmp_path):
    folder = tmp_path / "run"
    toys = toys_of(runs["kd"])
    options = ("--data", toys / "data.jsonl", "--cache", toys / "cache")
    options += ("--student.seed", SEED, "--mesh.data", -1, "--out", folder)
    options += ("--samples-shown", 0)
    ends = run_two("experiments.from_cache", "--tiny", *map(str, options))
    assert [status for status, _, _ in ends] == [0, 0], ends
    found, expected = (losses(x / "1-training") for x in (folder, runs["kd"]))
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    one, many = (
        report_of(x)["differences"][0]["difference"] for x in (runs["kd"], folder)
    )
    np.testing.assert_allclose(many["mean"], one["mean"], rtol=1e-3, atol=1e-6)


def test_own_data_and_student_from_files(runs, tmp_path, monkeypatch, capsys):
    """As a user has them: nothing of the toy but what is on the disk."""
    toys = toys_of(runs["dpo"])
    model, _, params = toy_models()
    save_model(tmp_path / "student", model.config, params, tokenizer=byte_tokenizer())
    command = ["from_cache", "--data", toys / "data.jsonl", "--cache", toys / "cache"]
    command += ["--student.model", tmp_path / "student", "--method", "dpo"]
    command += ["--fit.batch-size", 4, "--fit.learning-rate", 1e-3, "--updates", 4]
    command += ["--samples-shown", 0, "--out", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    from_cache.main()
    assert "margin of the preferred response" in capsys.readouterr().out
    np.testing.assert_allclose(
        losses(tmp_path / "run" / "1-training"), losses(runs["dpo"] / "1-training")
    )


def test_a_start_that_is_refused_leaves_what_is_there(runs, tmp_path, refused_line):
    """Not even --fresh empties a folder for a command that cannot run."""
    folder = tmp_path / "run"
    shutil.copytree(runs["kd"], folder)
    toys = toys_of(runs["kd"])
    own = ("--data", toys / "data.jsonl", "--cache", toys / "cache", "--out", folder)
    refused_line(*own, "--fresh", "--method", "dpo")
    assert report_of(folder) == report_of(runs["kd"])


def test_another_reference_than_the_start_is_said(runs, tmp_path):
    def notes(folder):
        return [line["text"] for line in report_of(folder)["summary"][2:]]

    assert notes(runs["dpo"]) == notes(runs["tvkd"]) == notes(runs["drdo"]) == []
    toys = toys_of(runs["dpo"])
    other = dataclasses.replace(from_cache.tiny().student, seed=SEED + 7)
    config = dataclasses.replace(
        options(tmp_path / "run", "dpo", samples_shown=0, updates=1),
        data=str(toys / "data.jsonl"),
        cache=str(toys / "cache"),
        student=other,
    )
    from_cache.run(config)
    (note,) = notes(tmp_path / "run")
    assert "another model than the start" in note


def test_other_weights_under_the_same_name_are_another_run(
    runs, tmp_path, refused_line, capsys
):
    toys, student = toys_of(runs["dpo"]), tmp_path / "student"
    model, teacher, params = toy_models()
    command = ("--data", toys / "data.jsonl", "--cache", toys / "cache")
    command += ("--student.model", student, "--method", "dpo", "--samples-shown", 0)
    command += ("--out", tmp_path / "run")
    save_model(student, model.config, params, tokenizer=byte_tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["from_cache", "--tiny", *map(str, command)])
        from_cache.main()
    capsys.readouterr()
    save_model(
        student, model.config, teacher, tokenizer=byte_tokenizer(), overwrite=True
    )
    assert "holds another run" in refused_line(*command)
