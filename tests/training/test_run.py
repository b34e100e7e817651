"""A folder belongs to one run; finished stages are remembered."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from rkd_jax.training import RunFolder, RunMismatch
from rkd_jax.training.provenance import differences, digest, summary, versions
from rkd_jax.training.run import write_json

CONFIG = {"method": {"beta": 0.1, "layers": [1, 2]}, "seed": 0}


@dataclasses.dataclass(frozen=True)
class Method:
    beta: float = 0.1
    layers: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Config:
    method: Method = Method()
    seed: int = 0


def test_a_new_folder_records_what_it_is(tmp_path):
    run = RunFolder.open(tmp_path / "a" / "b", CONFIG, name="tvkd")
    record = json.loads((run.path / "run.json").read_text())
    assert (record["name"], record["config"]) == ("tvkd", CONFIG)
    assert record["config_hash"] == digest(CONFIG)
    assert record["versions"] == versions()
    assert record["created"].endswith("+00:00")
    assert [path.name for path in run.path.iterdir()] == ["run.json"]


def test_the_same_run_comes_back_also_as_a_dataclass(tmp_path):
    first = RunFolder.open(tmp_path, CONFIG, name="tvkd")
    text = (tmp_path / "run.json").read_text()
    assert RunFolder.open(tmp_path, Config(), name="tvkd") == first
    assert (tmp_path / "run.json").read_text() == text


def test_another_run_is_refused_by_field(tmp_path):
    RunFolder.open(tmp_path, CONFIG, name="tvkd")
    with pytest.raises(RunMismatch) as error:
        RunFolder.open(tmp_path, Config(Method(beta=0.5)), name="dpo")
    assert str(error.value) == (
        f"{tmp_path} holds another run: config.method.beta is 0.1 there, 0.5 here; "
        'name is "tvkd" there, "dpo" here; choose another --out, or --fresh to discard '
        "what is there"
    )


def test_resume_can_be_refused(tmp_path):
    RunFolder.open(tmp_path, CONFIG)
    with pytest.raises(RunMismatch, match="already holds this run; .* --fresh"):
        RunFolder.open(tmp_path, CONFIG, resume=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunMismatch, match=r"holds no run \(thesis.tex\); .* --out"):
        RunFolder.open(tmp_path, CONFIG, overwrite=overwrite)
    (tmp_path / "run.json").write_text('{"theirs": 1}')
    with pytest.raises(RunMismatch, match="run.json is not the record of a run"):
        RunFolder.open(tmp_path, CONFIG, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_start_that_was_killed_while_it_wrote_the_record_is_begun_again(
    tmp_path, monkeypatch
):
    def killed(*paths, **kwargs):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", killed)  # nobody tidies up after a kill
        with pytest.raises(SystemExit):
            RunFolder.open(tmp_path / "run", CONFIG)
    assert [path.name[:10] for path in (tmp_path / "run").iterdir()] == [".run.json."]
    RunFolder.open(tmp_path / "run", CONFIG)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(RunMismatch, match="out is a file"):
        RunFolder.open(tmp_path / "out", CONFIG)


def test_overwrite_discards_the_run_that_is_there(tmp_path):
    old = RunFolder.open(tmp_path / "out", CONFIG)
    old.stage("sft").finish()
    outside = tmp_path / "kept"
    outside.mkdir()
    (outside / "file").write_text("x")
    os.symlink(outside, old.path / "link")
    new = RunFolder.open(tmp_path / "out", {"seed": 1}, overwrite=True)
    assert not new.stage("sft").done
    assert not (new.path / "link").exists()
    assert (outside / "file").read_text() == "x"
    assert RunFolder.open(tmp_path / "out", {"seed": 1}).config == {"seed": 1}


def test_stages_remember_their_result(tmp_path):
    run = RunFolder.open(tmp_path, CONFIG)
    stage = run.stage("sft")
    assert not stage.done
    with pytest.raises(FileNotFoundError):
        _ = stage.result
    assert stage.finish({"loss": 0.1 + 0.2, "steps": (1, 2)}) == stage.result
    again = RunFolder.open(tmp_path, CONFIG).stage("sft")
    assert again.done
    assert again.result == {"loss": 0.1 + 0.2, "steps": [1, 2]}


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "/abs"])
def test_stage_names_are_plain(tmp_path, name):
    with pytest.raises(ValueError, match="plain folder name"):
        RunFolder.open(tmp_path, CONFIG).stage(name)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "done.json"
    write_json(path, {"old": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_configurations_must_be_plain(tmp_path):
    with pytest.raises(ValueError, match="plain JSON: .*function"):
        RunFolder.open(tmp_path / "a", {"f": test_stage_names_are_plain})


def test_differences_keep_types_apart_and_are_cut_short():
    assert differences({"a": 1}, {"a": 1.0}) == ["a is 1 there, 1.0 here"]
    assert differences({"a": {}}, {"a": {"b": None}}) == [
        "a is {} there, absent here",
        "a.b is absent there, null here",
    ]
    assert summary(list("abcdef")) == "a; b; c; d; and 2 more"
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
