"""Oracles that hang, raise or return nonsense: bounded in time, named, and counted."""

import doctest
import io
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from experiments import judging, stages
from experiments.judging import Judge
from experiments.stages import Desk, collect_pairs
from rkd_jax.data.records import DemonstrationRecord, PromptRecord
from rkd_jax.signals import retrying_oracle
from rkd_jax.signals.oracles import LabelReport, OracleError, label_preferences, score
from rkd_jax.signals.retrying_oracle import RetryConfig, RetryingOracle, stopping
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder

ROOT = Path(__file__).parents[2]
PROMPTS, TEXTS = ["p", "q", "r"], ["a", "bb", "ccc"]
QUICK = RetryConfig(retries=1, backoff=0.0)
DROPPING = RetryConfig(retries=1, backoff=0.0, on_failure="drop")


def lengths(prompts, responses):
    return [float(len(text)) for text in responses]


def refuses(prompts, responses):
    raise ConnectionError("refused\nby the other side")


def too_few(prompts, responses):
    return [1.0] * (len(responses) + 1)


def words(prompts, responses):
    return ["good"] * len(responses)


def nan_for_b(prompts, responses):
    return [float("nan") if "b" in text else float(len(text)) for text in responses]


def infinite_for_b(prompts, responses):
    return [float("inf") if "b" in text else float(len(text)) for text in responses]


class Scripted:
    """The failures given, one per call, and then `lengths`."""

    def __init__(self, *failures):
        self.failures, self.asked = list(failures), []

    def __call__(self, prompts, responses):
        self.asked.append((list(prompts), list(responses)))
        reply = self.failures.pop(0) if self.failures else lengths
        return reply(prompts, responses)


@pytest.mark.parametrize("failure", [refuses, too_few, words, nan_for_b])
def test_a_failure_that_passes_costs_only_time(failure):
    pauses = []
    oracle = RetryingOracle(
        Scripted(failure, failure), RetryConfig(retries=2, backoff=0.5), pauses.append
    )
    assert score(oracle, PROMPTS, TEXTS).tolist() == [1.0, 2.0, 3.0]
    assert pauses == [0.5, 1.0]


def test_only_responses_without_a_reward_are_asked_about_again():
    scripted = Scripted(nan_for_b, infinite_for_b)
    oracle = RetryingOracle(scripted, RetryConfig(retries=2, backoff=0.0))
    assert oracle(PROMPTS, TEXTS).tolist() == [1.0, 2.0, 3.0]
    assert scripted.asked == [(PROMPTS, TEXTS), (["q"], ["bb"]), (["q"], ["bb"])]


def test_waits_double_up_to_a_bound():
    pauses = []
    config = RetryConfig(retries=5, backoff=1.0, max_backoff=3.0)
    scripted = Scripted(*[refuses] * 9)
    with pytest.raises(OracleError):
        RetryingOracle(scripted, config, pauses.append)(PROMPTS, TEXTS)
    assert pauses == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert len(scripted.asked) == 6


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (refuses, "3 of 3 .* ConnectionError: refused; the first is response 0: 'a'"),
        (too_few, r"3 of 3 .* shape \(4,\) for 3 responses; .* response 0: 'a'"),
        (words, "3 of 3 .* ValueError: could not convert .* response 0: 'a'"),
        (nan_for_b, "1 of 3 .* a reward of nan; the first is response 1: 'bb'"),
        (infinite_for_b, "1 of 3 .* a reward of inf; the first is response 1: 'bb'"),
    ],
)
def test_in_the_end_one_line_names_calls_cause_and_response(failure, message):
    with pytest.raises(OracleError, match=f"no reward for {message}") as error:
        RetryingOracle(failure, QUICK)(PROMPTS, TEXTS)
    assert "in 2 calls" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_of_the_oracles_own_is_passed_on_at_once():
    def knows(prompts, responses):
        raise OracleError("no prompt of this task")

    scripted = Scripted(knows)
    with pytest.raises(OracleError, match="^no prompt of this task$"):
        RetryingOracle(scripted)(PROMPTS, TEXTS)
    assert len(scripted.asked) == 1


def test_without_a_timeout_it_is_called_in_the_thread_that_asks():
    """As one has to be that sets signals."""
    threads = []

    def oracle(prompts, responses):
        threads.append(threading.current_thread())
        if len(threads) == 1:
            raise RuntimeError("busy")
        return [1.0] * len(responses)

    config = RetryConfig(timeout=float("inf"), retries=1, backoff=0.0)
    assert RetryingOracle(oracle, config)(["p"], ["a"]).tolist() == [1.0]
    assert threads == [threading.main_thread()] * 2


def test_a_hang_ends_after_the_timeout():
    release = threading.Event()

    def hangs(prompts, responses):
        release.wait(60.0)
        return lengths(prompts, responses)

    start = time.monotonic()
    config = RetryConfig(timeout=0.05, retries=1, backoff=0.0)
    with pytest.raises(
        OracleError, match=r"in 2 calls, .* TimeoutError: no answer within 0\.05 s"
    ):
        RetryingOracle(hangs, config)(PROMPTS, TEXTS)
    assert time.monotonic() - start < 30.0
    release.set()


def test_an_answer_that_comes_too_late_is_thrown_away():
    release, returned = threading.Event(), threading.Event()

    def late(prompts, responses):
        release.wait(60.0)
        returned.set()
        return [99.0] * len(responses)

    def sleep(seconds):
        release.set()
        assert returned.wait(60.0)

    config = RetryConfig(timeout=0.05, retries=1)
    oracle = RetryingOracle(Scripted(late), config, sleep)
    assert oracle(PROMPTS, TEXTS).tolist() == [1.0, 2.0, 3.0]


def test_a_hanging_oracle_does_not_keep_the_process():
    code = (
        "import time\n"
        "from rkd_jax.signals.retrying_oracle import RetryConfig, RetryingOracle\n"
        "hangs = lambda prompts, responses: time.sleep(600)\n"
        "RetryingOracle(hangs, RetryConfig(timeout=0.1, retries=0))(['p'], ['a'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120
    )
    assert done.returncode == 1
    assert b"OracleError: the oracle gave no reward for 1 of 1" in done.stderr


def test_dropped_pairs_are_counted_and_said(caplog):
    first, second = ["a", "bb", "bb", "a", "x"], ["ccc", "a", "bb", "bb", "yy"]
    records, report = label_preferences(
        RetryingOracle(nan_for_b, DROPPING), list("pqrst"), first, second
    )
    assert [(r.prompt, r.chosen) for r in records] == [("p", "ccc"), ("t", "yy")]
    assert report == LabelReport(
        kept=2, ties_dropped=0, ties_halved=0, identical=1, empty=0, unscored=2
    )
    assert "2 without a reward" in str(report)
    assert "no reward for 2 of 5 responses in 2 calls" in caplog.text


def test_only_an_oracle_that_may_abstain_is_allowed_a_nan():
    with pytest.raises(OracleError, match="returned nan for response 1: 'bb'"):
        label_preferences(nan_for_b, PROMPTS, TEXTS, TEXTS)
    with pytest.raises(OracleError, match="no reward for 1 of 3 responses"):
        label_preferences(RetryingOracle(nan_for_b, QUICK), PROMPTS, TEXTS, TEXTS)
    with pytest.raises(OracleError, match="returned nan for response 1: 'bb'"):
        score(RetryingOracle(nan_for_b, DROPPING), PROMPTS, TEXTS)


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"retries": -1},
        {"backoff": -1.0},
        {"on_failure": "zero"},
    ],
)
def test_bounds_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RetryConfig(**options)


def test_doctests():
    assert doctest.testmod(retrying_oracle) == (0, 3)


# The stages that ask.


@pytest.fixture
def desk(tmp_path):
    """A run folder, and progress into a string."""
    stream = io.StringIO()
    return Desk(RunFolder.open(tmp_path / "run", {}), Progress(stream), 100), stream


def pairs_of(desk, monkeypatch, oracle):
    """One prompt, the teacher's answer "ccc", samples "a" and "bb": three pairs."""
    sampled = types.SimpleNamespace(texts=[["a", "bb"]])
    monkeypatch.setattr(stages, "write_responses", lambda *args, **kwargs: sampled)
    return collect_pairs(
        types.SimpleNamespace(roll_out=None),
        desk,
        "3-pairs",
        None,
        [DemonstrationRecord("p", "ccc")],
        [],
        oracle=oracle,
        ties="drop",
        batch_size=1,
        rng=None,
    )


def test_a_stage_counts_the_pairs_it_dropped(desk, monkeypatch):
    desk, stream = desk
    records = pairs_of(desk, monkeypatch, RetryingOracle(nan_for_b, DROPPING))
    assert [(r.chosen, r.rejected) for r in records] == [("ccc", "a")]
    assert desk.run.stage("3-pairs").result["unscored"] == 2
    assert "3 pairs: 1 pairs kept" in stream.getvalue()
    assert "2 without a reward" in stream.getvalue()


def test_a_stage_without_any_reward_is_not_finished(desk, monkeypatch):
    desk, _ = desk
    with pytest.raises(OracleError, match="3 pairs: 0 pairs kept .* 3 without a rew"):
        pairs_of(desk, monkeypatch, RetryingOracle(refuses, DROPPING))
    assert not desk.run.stage("3-pairs").done
    assert len(pairs_of(desk, monkeypatch, RetryingOracle(lengths, DROPPING))) == 3


def test_evaluation_stops_rather_than_judge_what_is_left(monkeypatch):
    result = types.SimpleNamespace(flat_texts=TEXTS)
    monkeypatch.setattr(judging, "write_responses", lambda *args, **kwargs: result)
    lab = types.SimpleNamespace(
        oracle=RetryingOracle(nan_for_b, DROPPING),
        policy=types.SimpleNamespace(batch_size=1),
    )
    prompts = [PromptRecord(prompt) for prompt in PROMPTS]
    judge = types.SimpleNamespace(lab=lab, desk=None, prompts=prompts, rng=None)
    with pytest.raises(OracleError, match="no reward for 1 of 3 responses in 2 calls"):
        Judge._listen(judge, "student", None, None)


def test_stopping_leaves_other_oracles_alone():
    stops = RetryingOracle(lengths, QUICK)
    assert stopping(lengths) is lengths
    assert stopping(stops) == stops
    assert not stopping(RetryingOracle(lengths, DROPPING)).may_abstain
