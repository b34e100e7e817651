"""Slices by name, with and without the compiler."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rkd_jax import cli
from rkd_jax.aot.topology import TopologyError, chip_of, slice_devices

ROOT = Path(__file__).parents[2]
HAS_COMPILER = importlib.util.find_spec("libtpu") is not None
SLICE = ("--topology", "v5e:2x4")


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2", "v5e:2x4x", "16x16", ""])
def test_a_name_that_is_no_slice(name):
    with pytest.raises(TopologyError, match="write a chip and its grid"):
        chip_of(name)


def test_without_the_compiler_it_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "libtpu" else find(name, *rest),
    )
    with pytest.raises(ImportError, match=r"pip install 'rkd_jax\[aot\]'"):
        slice_devices("v5e:2x4")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # put back afterwards
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", "tvkd", "--tiny", *SLICE])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: the TPU compiler is not installed: pip install 'rkd_jax[aot]'\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing", *SLICE], "there is no experiment 'nothing' to compile"),
        (["tvkd", "--topology", "v5e"], "write a chip and its grid"),
    ],
)
def test_bad_input_is_one_line(options, message, monkeypatch, capsys):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # put back afterwards
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", *options])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def rkd_compile(*options):
    """The command in a process of its own: libtpu wants its own settings."""
    dropped = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-m", "rkd_jax.cli", "compile", *options],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.tpu_compile
@pytest.mark.skipif(not HAS_COMPILER, reason="needs libtpu, the TPU compiler")
def test_a_step_compiles_for_a_slice():
    """TVKD's tiny update on eight chips: donated, small, and it communicates."""
    options = ("tvkd", "--tiny", *SLICE, "--batch", "8", "--json")
    found = json.loads(rkd_compile(*options).splitlines()[-1])
    assert found["devices"] == 8
    assert found["chip"] == "TPU v5e"
    assert found["fits"]
    memory = found["memory"]
    # Everything that comes out, but for the metrics, is written over what went in.
    assert 0 < memory["outputs"] - memory["aliased"] < 2**17
    assert memory["aliased"] > 0.5 * memory["arguments"]
    assert sum(kind["bytes"] for kind in found["collectives"].values()) > 0
    assert found["flops"] >= found["model_flops"] / 8
    assert 0 < found["at_most"]["mfu"] < 1
