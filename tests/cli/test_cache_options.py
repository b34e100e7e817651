"""What `rkd cache` can be told: of what, on which devices, for the next command."""

import dataclasses
import functools
import shutil
import typing

import jax
import numpy as np
import pytest

from rkd_jax.cli.cache import Shaping
from rkd_jax.data.collate import collate
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.interop import load_model
from rkd_jax.placement import describe_mesh
from rkd_jax.sharding import MeshConfig, make_mesh, mesh_of
from rkd_jax.signals.cache import ShapingSettings, TeacherCache, model_hash
from rkd_jax.signals.values import ValueSource, make_shaping
from tests.cli.small_command import MODEL, PAIRS, ROWS, cache_command

pytestmark = pytest.mark.usefixtures("users_cache")
TOKENIZER = byte_tokenizer()


def open_cache(folder):
    return TeacherCache(folder, tokenizer=TOKENIZER, rows=ROWS)


def batch_of_all():
    rows = [tokenize_record(r, TOKENIZER, ROWS, i) for i, r in enumerate(PAIRS)]
    return collate(rows, ROWS)


def test_every_setting_of_the_shaping_can_be_said():
    options = dataclasses.asdict(Shaping())
    assert options.pop("keep") is False
    assert options == dataclasses.asdict(ShapingSettings())
    choices = typing.get_type_hints(Shaping)["value_source"]
    assert typing.get_args(choices) == typing.get_args(ValueSource)


@pytest.mark.parametrize("settings", [{"value_source": "raw_logits"}, {"support": 5}])
def test_the_values_of_the_shaping_are_what_the_options_say(files, tmp_path, settings):
    settings = {"gamma": 0.5, "terminal": "after_eos"} | settings
    options = [x for k, v in settings.items() for x in (f"--shaping.{k}", v)]
    options += ["--shaping.keep", "--top-k", "None"]
    assert cache_command(files, tmp_path, *options) == 0
    cache, batch = open_cache(tmp_path), batch_of_all()
    kept = cache.manifest.settings["shaping"]
    assert kept == dataclasses.asdict(ShapingSettings(**settings))
    read = make_shaping(MODEL, **settings)
    expected = read(MODEL.init(jax.random.key(0)), batch.teacher_sequences)
    found = cache.shaping(batch).shaping
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_programs_are_kept_unless_it_is_told_not_to(
    files, users_cache, tmp_path
):

    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    options = ("--top-k", "3", "--batch-size", "1")
    try:
        assert (
            cache_command(files, tmp_path / "a", *options, "--no-compilation-cache")
            == 0
        )
        assert not any(users_cache.iterdir())
        assert cache_command(files, tmp_path / "b", *options) == 0
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    folder = users_cache / "rkd_jax" / "compiled"
    assert list(folder.glob("jit_teacher_scores-*-cache"))


def test_models_go_to_the_devices_of_the_mesh(files, tmp_path, capsys, monkeypatch):
    """Whatever was written on others stays, and what is written is the same."""
    loaded = []

    def load(path, *, mesh, **options):
        model, params, tokenizer = load_model(path, mesh=mesh, **options)
        loaded.append((path.name, mesh_of(params), model_hash(model, params)))
        return model, params, tokenizer

    monkeypatch.setattr("rkd_jax.interop.load_model", load)
    options = ["--top-k", 6, "--log-prob-dtype", "float32", "--shaping.keep"]
    options += ["--reference", files / "student", "--shard-records", 1]
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert cache_command(files, out, *options) == 0
    assert "mesh" not in capsys.readouterr().err
    names, meshes, hashes = zip(*loaded, strict=True)
    assert (names, set(meshes)) == (("teacher", "student", "teacher"), {None})
    shutil.copytree(out, kept)
    for number, sizes in ((2, (2, 2, 1)), (1, (-1, 1, 1))):  # four rows on 4, and on 8
        loaded.clear()
        (out / f"shard-0000{number}.array_record").unlink()
        assert cache_command(files, out, *options, "--mesh", *sizes) == 0
        told = capsys.readouterr().err
        mesh = make_mesh(MeshConfig(*sizes))
        assert f"mesh: {describe_mesh(mesh)}\n" in told
        assert loaded == [(n, mesh, h) for n, h in zip(names, hashes, strict=True)]
    found, expected = open_cache(out), open_cache(kept)
    assert found.manifest.identity() == expected.manifest.identity()
    batch = batch_of_all()
    np.testing.assert_array_equal(found.topk(batch).ids, expected.topk(batch).ids)
    for one, two in zip(
        (found.topk(batch).log_probs, found.shaping(batch)),
        (expected.topk(batch).log_probs, expected.shaping(batch)),
        strict=True,
    ):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), one, two)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 3, 1), "mesh data=3 fsdp=3 tensor=1 does not fit 8 devices"),
        ((2, 0, 1), "every axis needs a positive size"),
        ((1, 1, 4), "axis 'vocab' of size 258 does not divide over 4 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_clear_line(
    files, tmp_path, capsys, sizes, message
):
    assert cache_command(files, tmp_path / "out", "--mesh", *sizes) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_one_of_several_processes_reads_nothing(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert cache_command(files, tmp_path / "out", "--data", tmp_path / "none") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: a cache is written by one process, on all devices")
