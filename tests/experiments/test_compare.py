"""The comparison: all methods by name, and several seeds in one report."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import compare_seed_systems
from experiments.lab import open_lab
from experiments.settings import SettingsError

ROOT = Path(__file__).parents[2]
METHODS = ("SFT", "SeqKD", "DPO", "PbKD online")

pytestmark = pytest.mark.usefixtures("compiled_programs")


def report_in(folder: Path) -> dict:
    return json.loads((folder / "report" / "report.json").read_text("utf-8"))


def test_the_command_trains_the_named_methods_on_all_seeds(tmp_path):
    out = tmp_path / "run"
    chosen = ["--methods", *METHODS, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.compare_seed_systems", "--tiny", *chosen],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    page = out / "report" / "report.html"
    assert done.stdout.strip().endswith(str(page))
    config = dataclasses.replace(
        compare_seed_systems.tiny(), methods=METHODS, out=str(out)
    )
    assert len(config.seeds) == 2
    report = report_in(tmp_path / "run")
    names = [row["name"] for row in report["policies"]]
    assert names == ["teacher (steered)", "warm start", *METHODS]
    assert {row["reward"]["n"] for row in report["policies"]} == {2}
    of_seeds = [
        json.loads((tmp_path / f"run/seed-{seed}/6-evaluation/DPO.json").read_text())
        for seed in config.seeds
    ]
    rewards = [sum(one["rewards"]) / len(one["rewards"]) for one in of_seeds]
    (row,) = (row for row in report["policies"] if row["name"] == "DPO")
    assert row["reward"]["mean"] == pytest.approx(sum(rewards) / 2)
    compared = {(row["first"], row["second"]) for row in report["differences"]}
    assert {("SeqKD", "SFT"), ("PbKD online", "DPO")} <= compared
    assert ("PbKD online", "PbKD offline") not in compared  # not trained
    assert list(report["games"]) == ["PbKD online"]
    assert page.read_text("utf-8").count("over seeds") == 1

    written = page.stat().st_mtime_ns
    assert compare_seed_systems.run(config) == page  # a finished run is only named
    assert page.stat().st_mtime_ns == written


@pytest.fixture(scope="module")
def table():
    config = compare_seed_systems.tiny()
    return compare_seed_systems.table(open_lab(config), config)


def test_every_seed_system_and_baseline_is_in_the_table(table):
    assert list(table) == [
        "SFT",
        "SeqKD",
        "KD",
        "GKD",
        "MiniLLM",
        "DPO",
        "PbKD offline",
        "PbKD online",
        "MMKD",
        "MM-PbKD",
        "TVKD",
        "AVA-p reward, DPO",
        "AVA-d",
        "AVA-p",
        "X-KD sequence",
        "X-KD GKD",
        "X-KD MiniLLM",
        "d-DPO",
        "p-DPO",
        "dp-DPO",
        "e-DPO",
        "d-DPO, same oracle",
        "DRDO",
    ]
    for method, parents in compare_seed_systems.PARENTS.items():
        assert {method, *parents} <= set(table)


def test_an_unknown_method_is_refused_by_name(table):
    with pytest.raises(SettingsError, match="'DPOO'.*SeqKD"):
        compare_seed_systems.chosen(table, ("DPO", "DPOO"))
    assert list(compare_seed_systems.chosen(table, ("TVKD", "DPO"))) == [
        "DPO",
        "TVKD",
    ]
