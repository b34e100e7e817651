"""Every system's ``tiny()``: the real wiring, on a toy teacher."""

import dataclasses
import hashlib
import importlib
import io
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import pbkd, system, tvkd
from experiments.course import Course, load_prompts, take_course
from experiments.game import Game
from experiments.lab import open_lab
from experiments.reward_models import RewardModels
from experiments.settings import SettingsError, WarmStartConfig
from experiments.stages import Desk, as_key
from experiments.warm_start import warm_start
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.training.metrics import read_metrics
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder

LAB = ("models", "oracle", "policy", "reward")  # what `open_lab` reads
COURSE = ("task", "pairs", "warm_start", "seed")  # and `take_course`, beside them
STAGES = (
    "1-teacher",
    "1-teacher-plain",
    "2-warm-start",
    "3-pairs",
    "3-pairs-held-out",
)
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
    "drdo": ["d-DPO, same oracle", "DRDO"],
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


pytestmark = pytest.mark.usefixtures("compiled_programs")


def fingerprints(tree) -> list[str]:
    """A hash of every array, and its type."""
    return [
        f"{leaf.dtype} {hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()}"
        for leaf in jax.tree.leaves(tree)
    ]


@pytest.fixture
def courses(lab, monkeypatch):
    """Every course that a run takes and its start's hash; it finds the lab open."""
    taken = []

    def take(*arguments, **keywords):
        course = take_course(*arguments, **keywords)
        taken.append((course, fingerprints(course.start)))
        return course

    monkeypatch.setattr(system, "open_lab", lambda config: lab)
    monkeypatch.setattr(system, "take_course", take)
    return taken


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Stages 1 to 3 of the first run, which others that begin alike go on from."""
    return tmp_path_factory.mktemp("begun")


def begin(config, name: str, begun: Path) -> Path:
    """The folder of a run, with the stages that an earlier one has made."""
    folder = RunFolder.open(config.out, config.identity(), name=name).path
    alike = all(getattr(config, part) == getattr(tvkd.tiny(), part) for part in COURSE)
    for stage in begun.iterdir() if alike else ():
        shutil.copytree(stage, folder / stage.name)
    return folder


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
def test_tiny_trains_and_judges_every_method(name, lab, courses, begun, tmp_path):
    experiment = importlib.import_module(f"experiments.{name}")
    config = dataclasses.replace(experiment.tiny(), out=str(tmp_path / "run"))
    assert all(getattr(config, part) == getattr(tvkd.tiny(), part) for part in LAB)
    frozen = [lab.teacher_params, lab.trunk_params, lab.student_params]
    before = fingerprints(frozen)
    folder = begin(config, name, begun)
    page = experiment.run(config)
    if not any(begun.iterdir()):
        for stage in STAGES:
            shutil.copytree(folder / stage, begun / stage)
    assert page == tmp_path / "run" / "report" / "report.html"
    report = report_in(tmp_path / "run")
    check_students(report, SYSTEMS[name])
    assert sorted(report["games"]) == sorted(GAMES.get(name, []))
    rivals = [row["second"] for row in report["differences"]]
    assert rivals == ["warm start", *SYSTEMS[name][:-1]]
    assert {row["first"] for row in report["differences"]} == {SYSTEMS[name][-1]}
    assert (tmp_path / "run/student/config.json").exists()

    # Nobody moved the teacher, the reward's trunk or the start, DPO's reference.
    assert fingerprints(frozen) == before
    ((course, start),) = courses
    assert fingerprints(course.start) == start

    # Nobody has read a prompt on whose pairs the students are ranked.
    read = (course.demonstrations, course.lesson, course.pairs, *course.fresh)
    assert all(read)
    prompts = {as_key(record) for records in read for record in records}
    assert prompts.isdisjoint(as_key(pair) for pair in course.held_out_pairs)
    if name == "drdo":  # one oracle for both, trained once
        entries = read_metrics(tmp_path / "run/3-oracle")
        assert len(list(entries)) == config.drdo.oracle_steps


def test_reward_players_may_train_their_trunk(tmp_path):
    config = pbkd.tiny()
    reward = dataclasses.replace(
        config.reward, trunk="trained", l2=0.0, steps=10, learning_rate=1e-2
    )
    config = dataclasses.replace(config, reward=reward)
    lab = open_lab(config)
    given = fingerprints(lab.trunk_params)
    run = RunFolder.open(tmp_path / "run", config.identity())
    with Progress(io.StringIO()) as progress:
        desk = Desk(run, progress, checkpoint_every=100)
        prompts, _, _ = load_prompts(config.task, lab)
        course = Course(
            config,
            jax.random.key(0),
            start=lab.student_params,
            demonstrations=[DemonstrationRecord(p.prompt, "aa") for p in prompts],
            lesson=(),
            pairs=[PreferenceRecord(p.prompt, "aa", "zz") for p in prompts],
            held_out_pairs=[PreferenceRecord(prompts[0].prompt, "aa", "zz")],
            fresh=(),
        )
        match = Game(lab, config.game, reward).open(desk, course, seed=0)
        state = match.play("4-game", match.begin(), course.pairs, steps=2)
        models = RewardModels(lab, reward, members=2)
        params = models.train(desk, "4-models", course, seed=0)
    nll = [
        entry["metrics"]["reward_model/nll"]
        for entry in read_metrics(run.stage("4-game-anchor").path)
    ]
    assert nll[0] == pytest.approx(math.log(2), abs=1e-6)  # the head starts at 0
    assert nll[-1] < 0.9 * nll[0]
    assert fingerprints(lab.trunk_params) == given
    for trained in (state.critic.params["trunk"], params["trunk"]):
        moved = [
            float(np.abs(np.asarray(now) - np.asarray(then)).max())
            for now, then in zip(
                jax.tree.leaves(trained), jax.tree.leaves(lab.trunk_params), strict=True
            )
        ]
        assert max(moved) > 1e-3

    # The ensemble on text says what it says on the pairs' rows.
    pairs = course.pairs[:3]
    on_rows = models.rewards(params, pairs)[:, 0]
    oracle = models.oracle(params)
    on_text = oracle.rewards([p.prompt for p in pairs], [p.chosen for p in pairs])
    np.testing.assert_allclose(on_text, on_rows, rtol=2e-5, atol=1e-6)


def test_a_warm_start_without_steps_is_the_student_as_given(lab):
    config = WarmStartConfig(steps=0)
    assert warm_start(lab, None, config, (), seed=0) is lab.student_params


def test_rounds_that_leave_no_offline_step_are_refused(lab):
    config = pbkd.tiny()
    online = pbkd.family(lab, config.game, config.reward, rounds=2)["PbKD online"]
    with pytest.raises(SettingsError, match="--updates"):
        online.train(None, "4-x", None, steps=2, seed=0)
