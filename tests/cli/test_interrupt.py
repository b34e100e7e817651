"""Ctrl-C at moments at which Python or an extension loses it."""

import signal
import time

import pytest

from rkd_jax.cli import main
from rkd_jax.cli.cache import CacheCommand
from rkd_jax.cli.interrupt import hearing_ctrl_c

pytestmark = pytest.mark.usefixtures("ctrl_c_is_heard")


def test_ctrl_c_that_python_drops_is_heard():
    """Python prints what a destructor raises and goes on, as with JAX's collections."""

    class Deaf:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def wait():
        Deaf()
        time.sleep(10)

    with hearing_ctrl_c() as interrupted:
        assert not interrupted()
        pytest.raises(KeyboardInterrupt, wait)
        assert interrupted()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_fails_because_of_ctrl_c_is_an_interruption(capsys, monkeypatch):
    """A C extension that is being imported makes an ImportError of it."""

    def run(command):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half of a module") from None

    monkeypatch.setattr(CacheCommand, "run", run)
    with pytest.raises(SystemExit) as left:
        main(["cache", "--data", "any.jsonl", "--out", "any"])
    assert left.value.code == 130
    assert "half of" not in capsys.readouterr().err
