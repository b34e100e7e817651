"""The notebook is well-formed, and its cells run from top to bottom."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads(
    (ROOT / "tpu_scripts" / "colab_quickstart.ipynb").read_text("utf-8")
)
CODE = {
    cell["id"]: "".join(cell["source"])
    for cell in NOTEBOOK["cells"]
    if cell["cell_type"] == "code"
}


def test_the_file_is_what_nbformat_asks_for():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert NOTEBOOK["metadata"]["kernelspec"] == kernel
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    common = {"cell_type", "id", "metadata", "source"}
    for cell in NOTEBOOK["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", cell["id"])
        more = {
            "markdown": set(),
            "code": {"execution_count", "outputs"},
        }[cell["cell_type"]]
        assert cell.keys() == common | more
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell["source"][-1].endswith("\n")


@pytest.mark.parametrize("cell", CODE)
def test_a_cell_is_plain_python_and_was_not_saved_with_output(cell):
    ast.parse(CODE[cell])
    (saved,) = (c for c in NOTEBOOK["cells"] if c["id"] == cell)
    assert saved["outputs"] == []
    assert saved["execution_count"] is None


def test_without_the_package_it_asks_where_to_install_from():
    bare = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CODE["install"]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert bare.returncode == 1
    assert "RuntimeError: set SOURCE to where pip finds rkd_jax" in bare.stderr


def test_its_cells_run_from_top_to_bottom(compiled_programs, tmp_path):
    """In one interpreter, compiled cheaply: a toy computes little."""
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(CODE.values())],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "MPLBACKEND": "agg",
            "PYTHONWARNINGS": "ignore:FigureCanvasAgg is non-interactive",
        },
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "runs" / "colab" / "report"
    lines = process.stdout.splitlines()
    assert lines[0].startswith("cpu ")
    start = lines.index(f"{'policy':<20}{'reward':>8}  95 % interval")
    policies = json.loads((folder / "report.json").read_text("utf-8"))["policies"]
    shown = lines[start + 1 : start + 1 + len(policies)]
    for line, policy in zip(shown, policies, strict=True):
        name, mean = line[:20].rstrip(), float(line[20:28])
        assert name == policy["name"]
        assert mean == pytest.approx(policy["reward"]["mean"], abs=6e-4)
    assert lines[-1] == str((folder / "report.html").resolve())
