"""Damaged files of formats that are parsed outside of Python, a process for each.

A crash, a hang or an allocation beyond the limit ends that process; the report names
the case that did it, and `native_readers` says how to see it again.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rkd_jax.interop import WeightsError, load_model
from tests.faults import whole_files
from tests.faults.mutations import deadline
from tests.faults.native_readers import FORMATS

ROOT = Path(__file__).parents[2]


def run(name, folder, cases):
    """What a process says of so many damaged files."""
    command = [sys.executable, "-m", "tests.faults.native_readers", name, str(folder)]
    done = subprocess.run(
        [*command, str(cases)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    case = folder / "case"
    number = case.read_text().split()[0] if case.exists() else "none"
    tail = done.stderr[-2000:]
    assert done.returncode == 0, f"{name}: ended in case {number}\n{tail}"
    return json.loads(done.stdout.splitlines()[-1])


# How many files of each format, and how many of them at least are loaded and refused:
# damage that is always noticed, or never, tries little.
CASES = {
    "safetensors": (500, 50, 150),
    "sharded": (400, 50, 100),
    "gguf": (600, 50, 150),
    "tokenizer": (400, 20, 150),
    "shards": (300, 10, 100),
}


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(tmp_path, name):
    cases, loaded, refused = CASES[name]
    if name == "gguf":
        pytest.importorskip("gguf", reason="needs: pip install gguf")
    found = run(name, tmp_path, cases)
    assert found["faults"] == []
    assert found["loaded"] + found["refused"] == cases
    assert found["loaded"] >= loaded, found
    assert found["refused"] >= refused, found


def test_lengths_in_a_gguf_file_are_not_believed(tmp_path):
    """The reader behind would count to 2**40, a value at a time."""
    pytest.importorskip("gguf", reason="needs: pip install gguf")
    path = whole_files.gguf_file(tmp_path / "x.gguf")
    whole, key = path.read_bytes(), b"tokenizer.ggml.token_type"
    at = whole.index(key) + len(key) + 8  # behind the types of array and items
    path.write_bytes(whole[:at] + (2**40).to_bytes(8, "little") + whole[at + 8 :])
    with deadline(), pytest.raises(WeightsError, match="an array of 1099511627776"):
        load_model(path)
    path.write_bytes(whole[:4] + whole[7:3:-1] + whole[8:])
    with pytest.raises(WeightsError, match="big-endian"):
        load_model(path)
