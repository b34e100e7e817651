"""Oracles: the protocol is checked, ties and duplicates are counted, VADER is real."""

import subprocess
import sys

import numpy as np
import pytest

from rkd_jax.signals.oracles import (
    LabelReport,
    OracleError,
    VaderOracle,
    label_preferences,
    load_oracle,
    score,
)

PROMPTS = ["p", "q"]


def by_length(prompts, responses):
    return [float(len(text)) for text in responses]


@pytest.fixture(scope="module")
def vader():
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")
    return VaderOracle()


def test_vader_gives_the_published_scores(vader):
    # "good" has valence 1.9 and the compound is s / sqrt(s^2 + 15).
    texts = ["good", "table", "not good", " ".join(["good"] * 7)]
    rewards = score(vader, ["p"] * 4, texts)
    np.testing.assert_allclose(rewards[0], 1.9 / np.sqrt(1.9**2 + 15), atol=5e-5)
    assert rewards[1] == 0.0
    assert rewards[2] < 0.0
    np.testing.assert_allclose(
        rewards[3], 13.3 / np.sqrt(13.3**2 + 15), atol=5e-5
    )  # stacking praise drives it up


def test_vader_is_the_same_in_another_process(vader):
    texts = ["A lovely, quiet lake.", "The horrible noise never ends!"]
    code = (
        "from rkd_jax.signals.oracles import VaderOracle\n"
        f"print(VaderOracle()(['p'] * 2, {texts!r}))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == str(vader(["p"] * 2, texts))


def test_load_oracle_finds_a_function_a_class_and_an_instance():
    name = "rkd_jax.signals.oracles:VaderOracle"
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")
    assert isinstance(load_oracle(name), VaderOracle)
    assert load_oracle("builtins:len") is len


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nltk", "module:attribute"),
        ("no_such_module_:x", "no_such_module_"),
        ("math:no_such_name", "no_such_name"),
        ("math:pi", "not callable"),
    ],
)
def test_an_oracle_that_cannot_be_loaded_is_explained(name, message):
    with pytest.raises(OracleError, match=message):
        load_oracle(name)


@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        (lambda p, r: [1.0], "shape"),
        (lambda p, r: 0.0, "shape"),
        (lambda p, r: [0.0, float("nan")], "response 1: 'bb'"),
        (lambda p, r: [float("inf"), 0.0], "response 0: 'a'"),
        (lambda p, r: [0.0, -1e39], r"returned -1e\+39 for response 1: 'bb'"),
    ],
)
def test_a_broken_oracle_is_never_a_silent_zero(oracle, message):
    with pytest.raises(OracleError, match=message):
        score(oracle, PROMPTS, ["a", "bb"])


def test_prompts_and_responses_must_pair_up():
    with pytest.raises(OracleError, match="2 prompts for 1 responses"):
        score(by_length, PROMPTS, ["a"])


def test_pairs_are_ordered_by_reward_whichever_came_first():
    records, report = label_preferences(
        by_length, PROMPTS, ["long text", "s"], ["tiny", "longer"]
    )
    assert [(r.chosen, r.rejected) for r in records] == [
        ("long text", "tiny"),
        ("longer", "s"),
    ]
    assert [(r.chosen_reward, r.rejected_reward) for r in records] == [
        (9.0, 4.0),
        (6.0, 1.0),
    ]
    assert report == LabelReport(2, 0, 0, 0, 0)


def test_ties_identical_and_empty_texts_are_counted():
    prompts = ["a", "b", "c", "d"]
    first, second = ["xx", "same", "", "long"], ["yy", "same", "word", "s"]
    records, report = label_preferences(by_length, prompts, first, second)
    assert [r.prompt for r in records] == ["d"]
    assert report == LabelReport(
        kept=1, ties_dropped=1, ties_halved=0, identical=1, empty=1
    )
    records, report = label_preferences(by_length, prompts, first, second, ties="half")
    assert [(r.prompt, r.label) for r in records] == [("a", 0.5), ("d", 1.0)]
    assert report.ties_halved == 1


def test_a_tie_margin_is_in_the_oracles_units():
    records, report = label_preferences(
        by_length, ["a", "b"], ["xx", "x"], ["yyy", "yyy"], tie_margin=1.0
    )
    assert [r.prompt for r in records] == ["b"]
    assert report.ties_dropped == 1


def test_teacher_prompts_travel_with_the_pair():
    records, _ = label_preferences(
        by_length, ["a"], ["x"], ["yy"], teacher_prompts=["steered a"]
    )
    assert records[0].teacher_prompt == "steered a"


def test_unknown_tie_rule():
    with pytest.raises(ValueError, match="'drop' or 'half'"):
        label_preferences(by_length, ["a"], ["x"], ["y"], ties="keep")
