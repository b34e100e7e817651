"""The code samples of README.md run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
SAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", SAMPLES, ids=range(len(SAMPLES)))
def test_sample_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_samples_and_their_files_exist():
    assert len(SAMPLES) == 4
    for name in re.findall(
        r"`((?:rkd_jax|experiments|docs|tests)/[\w/]+\.\w+)`", README
    ):
        assert (Path(__file__).parents[1] / name).exists(), name
