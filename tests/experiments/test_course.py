"""What is set aside stays aside, and rankings count prompts."""

import dataclasses
import io
import types

import numpy as np
import pytest

from experiments import judging, tvkd
from experiments.course import hold_out, load_prompts, take_course, without
from experiments.judging import Judge
from experiments.lab import open_lab
from experiments.stages import Desk
from rkd_jax.data.records import PreferenceRecord
from rkd_jax.data.sources import write_jsonl
from rkd_jax.signals.retrying_oracle import RetryConfig
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder

pytestmark = pytest.mark.usefixtures("compiled_programs")


def pair(prompt, number=0, label=1.0):
    return PreferenceRecord(prompt, f"good {number}", f"bad {number}", label=label)


def test_all_pairs_of_a_held_out_prompt_are_held_out():
    pairs = [pair(f"p{i % 10}", i) for i in range(40)]
    kept, aside = hold_out(pairs)  # the last four are of p6 to p9
    assert {one.prompt for one in aside} == {"p6", "p7", "p8", "p9"}
    assert len(aside) == 16
    assert [one for one in pairs if one in kept or one in aside] == pairs
    assert not {one.prompt for one in kept} & {one.prompt for one in aside}


def test_without_knows_chats_and_text():
    chat = [{"role": "user", "content": "hi"}]
    pairs = [pair("hi"), pair(chat)]
    _, aside = hold_out(pairs)
    assert aside == [pairs[1]]
    assert without(pairs, {'"hi"'}) == [pairs[1]]


def test_prompts_of_held_out_pairs_in_a_file_teach_nobody(tmp_path):
    calls = RetryConfig(retries=7, on_failure="drop")
    config = dataclasses.replace(tvkd.tiny(), oracle_calls=calls, checkpoint_every=3)
    assert config.identity() == tvkd.tiny().identity()  # patience makes no other run
    lab = open_lab(config)
    assert lab.oracle.config == calls
    prompts, _, _ = load_prompts(config.task, lab)
    file = tmp_path / "pairs.jsonl"
    write_jsonl(file, [pair(record.prompt, i) for i, record in enumerate(prompts)])
    task = dataclasses.replace(config.task, pairs_file=str(file))
    config = dataclasses.replace(config, task=task)
    run = RunFolder.open(tmp_path / "run", config.identity())
    with Progress(io.StringIO()) as progress:
        desk = Desk(run, progress, checkpoint_every=100)
        course = take_course(lab, desk, config, prompts, seed=0)
    aside = [one.prompt for one in course.held_out_pairs]
    assert aside == [record.prompt for record in prompts[-2:]]  # a tenth of 24
    for records in (course.pairs, course.demonstrations, course.lesson):
        assert records
        assert not [one for one in records if one.prompt in aside]


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        # Prompt a: right, wrong; prompt b: right, right, equal; the tie is left out.
        ((1.0, -2.0, 3.0, 0.5, 0.0, -9.0), (0.5 + 2.5 / 3) / 2),
        ((-1.0, -1.0, -1.0, -1.0, -1.0, 9.0), 0.0),
    ],
)
def test_the_prompt_is_the_unit_of_a_ranking(margins, expected, monkeypatch):
    pairs = [*(pair("a", i) for i in range(2)), *(pair("b", i) for i in range(3))]
    pairs.append(pair("c", label=0.5))
    scores = {"start": np.zeros((6, 2)), "now": np.array([[m, 0.0] for m in margins])}
    monkeypatch.setattr(judging, "pair_log_probs", lambda lab, who, pairs: scores[who])
    monkeypatch.setattr(
        judging, "reference_log_probs", lambda lab, desk, who, pairs: scores[who]
    )
    judge = types.SimpleNamespace(lab=None, desk=None, _pairs=pairs, _start="start")
    found = Judge._ranking(judge, "now")
    assert found.mean == pytest.approx(expected)
    assert found.n == 2


def test_a_ranking_is_right_about_the_preferred_response(monkeypatch):
    """Which may be the second one."""
    pairs = [pair("a", label=0.2), pair("b", label=0.8), pair("c", label=0.1)]
    gains = {"now": np.array([[-1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])}
    for name in ("pair_log_probs", "reference_log_probs"):
        monkeypatch.setattr(
            judging, name, lambda *given: gains.get(given[-2], np.zeros((3, 2)))
        )
    judge = types.SimpleNamespace(lab=None, desk=None, _pairs=pairs, _start="start")
    found = Judge._ranking(judge, "now")
    assert found.mean == pytest.approx(2 / 3)
