"""Every system's ``tiny()``, and all of them in one comparison."""

import dataclasses
import hashlib
import importlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import compare_seed_systems, system, tvkd
from experiments.lab import open_lab
from experiments.settings import SettingsError
from experiments.system import train_and_judge
from rkd_jax.evaluation.report import write_report
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder

LAB = ("models", "oracle", "policy", "reward")  # what `open_lab` reads
ROOT = Path(__file__).parents[2]
COMMON = ["teacher (steered)", "warm start"]
MEASURED = (
    "reward",
    "gap_closed",
    "win_rate",
    "preference_accuracy",
    "forward_kl",
    "reverse_kl",
    "teacher_nll",
    "distinct_2",
    "seconds_per_step",
    "peak_gib",
)
# Beside parents, of which each experiment has at least one, the methods of the paper.
SYSTEMS = {
    "ava": ["SFT", "DPO", "AVA-p reward, DPO", "AVA-d", "AVA-p"],
    "drdo": ["d-DPO", "DRDO"],
    "edpo": ["DPO", "d-DPO", "p-DPO", "dp-DPO", "e-DPO"],
    "mm_pbkd": ["PbKD", "MMKD", "MM-PbKD"],
    "pbkd": ["DPO", "PbKD offline", "PbKD online"],
    "tvkd": ["DPO", "TVKD"],
    "xkd": [
        "SeqKD",
        "GKD",
        "MiniLLM",
        "X-KD sequence",
        "X-KD GKD",
        "X-KD MiniLLM",
    ],
}
GAMES = {"pbkd": ["PbKD offline", "PbKD online"], "mm_pbkd": ["PbKD"]}


@pytest.fixture(scope="module")
def lab(quick_compiler):
    """What the toys have in common, compiled once."""
    return open_lab(tvkd.tiny())


def report_in(folder: Path) -> dict:
    return json.loads((folder / "report" / "report.json").read_text("utf-8"))


def check_students(report: dict, names: list[str]) -> None:
    """All measured, all trained, in that order."""
    assert [row["name"] for row in report["policies"]] == COMMON + names
    for row in report["policies"][len(COMMON) :]:
        missing = [key for key in MEASURED if row[key] is None]
        assert not missing, row["name"]
    assert len(report["losses"]) == len(names)
    for title, curve in report["losses"].items():
        assert curve["values"], title
        assert all(map(math.isfinite, curve["values"])), title


@pytest.mark.parametrize("name", SYSTEMS)
def test_tiny_trains_and_judges_every_method(name, lab, tmp_path, monkeypatch):
    experiment = importlib.import_module(f"experiments.{name}")
    config = dataclasses.replace(experiment.tiny(), out=str(tmp_path / "run"))
    assert all(getattr(config, part) == getattr(tvkd.tiny(), part) for part in LAB)
    monkeypatch.setattr(system, "open_lab", lambda config: lab)
    page = experiment.run(config)
    assert page == tmp_path / "run" / "report" / "report.html"
    report = report_in(tmp_path / "run")
    check_students(report, SYSTEMS[name])
    assert sorted(report["games"]) == sorted(GAMES.get(name, []))
    rivals = [row["second"] for row in report["differences"]]
    assert rivals == ["warm start", *SYSTEMS[name][:-1]]
    assert {row["first"] for row in report["differences"]} == {SYSTEMS[name][-1]}
    assert (tmp_path / "run/student/config.json").exists()


def fingerprints(tree) -> list[str]:
    """A hash of every array, and its type."""
    return [
        f"{leaf.dtype} {hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()}"
        for leaf in jax.tree.leaves(tree)
    ]


@pytest.fixture(scope="module")
def comparison(lab, tmp_path_factory):
    """Every method trained and judged: the report, and the frozen before and after."""
    config = compare_seed_systems.tiny()
    assert all(getattr(config, part) == getattr(tvkd.tiny(), part) for part in LAB)
    folder = RunFolder.open(tmp_path_factory.mktemp("compare"), config.identity())
    methods = compare_seed_systems.table(lab, config)
    with Progress(io.StringIO()) as progress:
        classes, data = compare_seed_systems.enrol(config, lab, folder, progress)
        frozen = [lab.teacher_params, lab.trunk_params, lab.student_params]
        frozen += [one.course.start for one in classes]
        before = fingerprints(frozen)
        for label, method in methods.items():
            for seed, desk, course, judge in classes:
                train_and_judge(
                    desk, course, judge, label, method, config.updates, seed
                )
    report = compare_seed_systems.report_of(config, classes, methods, data)
    write_report(folder.path / "report", report)
    return report_in(folder.path), before, fingerprints(frozen)


def test_the_comparison_has_every_method_over_the_seeds(comparison):
    report, _, _ = comparison
    names = [row["name"] for row in report["policies"]][len(COMMON) :]
    check_students(report, names)
    of_papers = {method for methods in SYSTEMS.values() for method in methods}
    assert set(names) == (of_papers - {"PbKD"}) | {"KD"}
    seeds = len(compare_seed_systems.tiny().seeds)
    assert {row["reward"]["n"] for row in report["policies"]} == {seeds}
    compared = {(row["first"], row["second"]) for row in report["differences"]}
    for method, parents in compare_seed_systems.PARENTS.items():
        assert {(method, parent) for parent in parents} <= compared


def test_teacher_reference_and_reward_trunk_are_bit_identical_after_all(comparison):
    _, before, after = comparison
    assert before == after


def test_the_commands_end_by_naming_their_report(tmp_path):
    for arguments in (
        ("tvkd", "--tiny"),
        ("compare_seed_systems", "--tiny", "--methods", "SeqKD", "SFT", "--seeds", "0"),
    ):
        out = tmp_path / arguments[0]
        done = subprocess.run(
            [sys.executable, "-m", f"experiments.{arguments[0]}"]
            + [*arguments[1:], "--out", str(out)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith(str(out / "report" / "report.html"))
    report = report_in(out)
    check_students(report, ["SFT", "SeqKD"])
    prompts = compare_seed_systems.tiny().task.held_out_prompts
    assert {row["reward"]["n"] for row in report["policies"]} == {prompts}


def test_an_unknown_method_is_refused_by_name(lab):
    methods = compare_seed_systems.table(lab, compare_seed_systems.tiny())
    with pytest.raises(SettingsError, match="'DPOO'.*SeqKD"):
        compare_seed_systems.chosen(methods, ("DPO", "DPOO"))
    assert list(compare_seed_systems.chosen(methods, ("TVKD", "DPO"))) == [
        "DPO",
        "TVKD",
    ]
