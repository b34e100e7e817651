"""Where compiled programs are kept, and that only a command line keeps them."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.command import run_command
from rkd_jax.training.compiled_programs import MOST_BYTES, keep_compiled_programs

pytestmark = pytest.mark.usefixtures("users_cache")
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Options:
    """Nothing to choose."""


def command(monkeypatch, *arguments):
    """The folder that JAX is told while a command of these arguments runs."""
    seen = []

    def run(options):
        seen.append(jax.config.jax_compilation_cache_dir)
        return Path("report")

    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    run_command(run, Options, Options)
    return seen


def test_a_command_keeps_programs_in_the_users_cache_folder(monkeypatch, users_cache):
    folder = users_cache / "rkd_jax" / "compiled"
    assert command(monkeypatch) == [str(folder)]
    assert folder.is_dir()
    assert jax.config.jax_compilation_cache_max_size == MOST_BYTES


def test_another_bound_may_be_named(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")  # JAX has read its own
    before = jax.config.jax_compilation_cache_max_size
    command(monkeypatch)
    assert jax.config.jax_compilation_cache_max_size == before


def test_a_program_that_a_killed_command_left_half_written_is_dropped(
    monkeypatch, users_cache
):
    folder = users_cache / "rkd_jax" / "compiled"
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_bytes(b"x")
    command(monkeypatch)
    assert sorted(path.name for path in folder.iterdir()) == [
        "whole-atime",
        "whole-cache",
    ]


def test_the_option_turns_it_off(monkeypatch, users_cache):
    assert command(monkeypatch, "--no-compilation-cache", "--tiny") == [None]
    assert not any(users_cache.iterdir())


def test_the_variables_of_jax_win(users_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert keep_compiled_programs() == tmp_path / "mine"
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert keep_compiled_programs() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not any(users_cache.iterdir())


def test_without_a_variable_it_is_below_home_and_relative_paths_do_not_count(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / ".cache" / "rkd_jax" / "compiled"
    for variable in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
        jax.config.update("jax_compilation_cache_dir", None)
        assert keep_compiled_programs() == folder


def test_a_folder_that_cannot_be_written_is_one_warning_line(
    monkeypatch, tmp_path, capsys
):
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert keep_compiled_programs() is None
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: compiled programs are not kept")
    assert str(file) in line


PROGRAM = """
import jax, jax.numpy as jnp
from rkd_jax.training.compiled_programs import keep_compiled_programs
import experiments.quickstart, rkd_jax.cli
assert jax.config.jax_compilation_cache_dir is None
keep_compiled_programs()
print(jax.jit(lambda x: jnp.sin(x) * 2)(jnp.ones(3)).tolist())
"""


def test_a_second_process_reads_what_the_first_one_compiled(tmp_path):
    environment = os.environ | {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_LOG_COMPILES": "1",
    }
    outs, counts = [], []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        outs.append(done.stdout)
        counts.append(done.stderr.count("Persistent compilation cache hit"))
    assert outs[0] == outs[1]
    assert counts[0] == 0
    assert counts[1] > 0
