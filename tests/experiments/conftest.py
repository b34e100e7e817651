"""What tests of single stages and methods share."""

import io
import sys

import pytest

from experiments import from_cache, tvkd
from experiments.lab import open_lab
from experiments.stages import Desk
from rkd_jax.training.progress import Progress
from rkd_jax.training.run import RunFolder


@pytest.fixture(scope="module")
def lab(compiled_programs):
    """What the toys have in common."""
    return open_lab(tvkd.tiny())


@pytest.fixture
def desk(tmp_path):
    """Of an empty run."""
    with Progress(io.StringIO()) as progress:
        yield Desk(RunFolder.open(tmp_path / "run", {}), progress, checkpoint_every=100)


@pytest.fixture
def refused_line(monkeypatch, capsys):
    """The line that a command ends with, and nothing but that line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["from_cache", "--tiny", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            from_cache.main()
        assert end.value.code == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ")
        assert line.count("\n") == 1
        return line

    return run
