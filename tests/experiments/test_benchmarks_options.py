"""Options of the benchmarks that nothing can be measured with: one line, exit 2."""

import importlib
import re
import sys

import pytest

REFUSED = {
    "step --steps 0": "steps=0 has to be at least 1",
    "step --batch -1": "batch=-1 has to be at least 1",
    "step --matmul-size 0": "matmul_size=0 has to be at least 1",
    "step --prompt 256": "prompt=256 must be positive and below length=256",
    "peers --sizes.steps 0": "sizes.steps=0 has to be at least 1",
    "fused --turns 0": "turns=0 has to be at least 1",
    "fused --rows 256 0": r"rows=\(256, 0\) has to be at least 1",
    "fused --rows": "rows is empty",
    "fused --topology v9:1": "topology 'v9:1': write a chip and its grid",
    "sample --batch 0": r"batch=\(0,\) has to be at least 1",
    "sample --new 1": "a step takes at least 2 columns",
    "sample --model toy": "model 'toy' is not of the form",
    "report --objectives kd none": "there is no objective 'none'; there are kd, gkd",
    "report --objectives": "objectives is empty",
    "packing --data nowhere": "nowhere: no such file",
    "packing --data setup.py --bucket 0": "bucket=0 has to be at least 1",
    "packed_pairs --data setup.py": r"setup.py:1: JSONDecodeError.*lines have question",
    "teacher_cache --prompts 0": "prompts=0 has to be at least 1",
    "teacher_cache --models.teacher nowhere": "nowhere: no such folder or file",
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_be_measured_is_refused(command, monkeypatch, capsys):
    name, *options = command.split()
    benchmark = importlib.import_module(f"experiments.benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, *options])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{REFUSED[command]}", line), line
