"""Slices by name, with and without the compiler."""

import importlib.util

import pytest

from rkd_jax import cli
from rkd_jax.aot.topology import TopologyError, chip_of, slice_devices

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
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")  # put back afterwards
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
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    with pytest.raises(SystemExit) as stop:
        cli.main(["compile", *options])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
