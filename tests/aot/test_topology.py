"""Slices by name, with and without the compiler."""

import importlib.util
import os

import pytest

from rkd_jax import cli
from rkd_jax.aot.topology import (
    TopologyError,
    chip_of,
    prefer_the_compiler,
    slice_devices,
)

SLICE = ("--topology", "v5e:2x4")
SETTINGS = (
    "TPU_SKIP_MDS_QUERY",
    "ALLOW_MULTIPLE_LIBTPU_LOAD",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK",
)


@pytest.mark.parametrize(
    "name",
    [
        *("v5e", "v9:2x2", "v5e:2", "v5e:2x4x", "v5e:2x2x2x2", "16x16", ""),
        *("v5e:0x4", "v5e:2x0"),
        *("h100", "h100:2x4", "h100:", "h9:8"),
    ],
)
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
    for name in SETTINGS:
        monkeypatch.setenv(name, "1")  # put back afterwards
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", "tvkd", "--tiny", *SLICE])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: the TPU compiler is not installed: pip install 'rkd_jax[aot]'\n"
    )


def test_gpus_are_those_of_one_host_and_need_their_compiler(monkeypatch):
    assert chip_of("h100:8").kind == chip_of("h200:1").kind == "gpu"
    for name in ("h100:0", "h100:9", "h200:16"):
        with pytest.raises(TopologyError, match="a host has 1 to 8 GPUs"):
            slice_devices(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jax\[cuda12\]'"):
        slice_devices("h100:8")


def test_the_compiler_is_asked_for_alone_and_beside_others(monkeypatch):
    """No metadata server is asked, and two commands may compile at once."""
    for name in ("JAX_PLATFORMS", *SETTINGS):
        monkeypatch.setenv(name, "")  # put back afterwards
        monkeypatch.delenv(name)
    prefer_the_compiler()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert [os.environ[name] for name in SETTINGS] == ["1", "true", "1"]
    monkeypatch.setenv(SETTINGS[1], "false")
    prefer_the_compiler()
    assert os.environ[SETTINGS[1]] == "false"  # the user knows better


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing", *SLICE], "there is no experiment 'nothing' to compile"),
        (["tvkd", "--topology", "v5e"], "write a chip and its grid"),
    ],
)
def test_bad_input_is_one_line(options, message, monkeypatch, capsys):
    for name in SETTINGS:
        monkeypatch.setenv(name, "1")  # put back afterwards
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", *options])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
