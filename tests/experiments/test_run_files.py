"""What an experiment wrote and reads again: damage is one line that says what to do."""

import json

import numpy as np
import pytest

from experiments.costs import read_costs
from experiments.judging import Judged
from rkd_jax.evaluation.content import Policy
from rkd_jax.evaluation.intervals import Interval
from rkd_jax.training.run import RunMismatch, write_json


def damaged(text):
    """One text for every kind of damage."""
    fields = json.loads(text)
    yield text[: len(text) // 2]
    yield "[]"
    yield "\x00" * len(text)
    for name in fields:
        yield json.dumps({k: v for k, v in fields.items() if k != name})
        yield json.dumps(fields | {name: {"other": [None]}})


def assert_said(read, path):
    whole = path.read_text()
    for text in damaged(whole):
        path.write_text(text)
        with pytest.raises(RunMismatch) as said:
            read()
        (line,) = str(said.value).splitlines()
        assert line.startswith(f"{path}"), text
    path.write_bytes(b"\xff\xfe" + whole.encode())
    with pytest.raises(RunMismatch, match="not valid JSON"):
        read()


def test_a_judged_policy(tmp_path):
    path = tmp_path / "DPO.json"
    reward = Interval(0.5, 0.4, 0.6, 20)
    judged = Judged(Policy("DPO", reward=reward), ["a", "b"], np.array([0.25, 0.75]))
    judged.save(path)
    found = Judged.load(path)
    assert (found.policy, found.texts) == (judged.policy, judged.texts)
    np.testing.assert_array_equal(found.rewards, judged.rewards)
    assert_said(lambda: Judged.load(path), path)


def test_what_a_step_costs(tmp_path):
    assert read_costs(tmp_path) == {}
    path = tmp_path / "cost.json"
    write_json(path, {"seconds_per_step": 0.5, "peak_bytes": None})
    assert read_costs(tmp_path) == {"seconds_per_step": 0.5}
    write_json(path, {"seconds_per_step": None, "peak_bytes": 2**31})
    assert read_costs(tmp_path) == {"peak_gib": 2.0}
    write_json(path, {"seconds_per_step": 0.5, "peak_bytes": 2**31})
    assert read_costs(tmp_path) == {"seconds_per_step": 0.5, "peak_gib": 2.0}
    assert_said(lambda: read_costs(tmp_path), path)
