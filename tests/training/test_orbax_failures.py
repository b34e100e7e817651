import asyncio
import sys
import types

import pytest

from rkd_jax.training.orbax_failures import hide_late_answers


def failure(call):
    """What the interpreter tells its hook if ``call`` raises where nobody can know."""
    with pytest.raises(RuntimeError) as raised:
        call()
    error, here = raised.value, raised.value.__traceback__
    return types.SimpleNamespace(exc_value=error, exc_traceback=here.tb_next.tb_next)


def to_a_closed_loop():
    loop = asyncio.new_event_loop()
    loop.close()
    loop.call_soon_threadsafe(print)


def of_another_kind():
    loop = asyncio.new_event_loop()
    loop.close()
    loop.run_forever()


def test_answers_to_a_closed_loop_are_hidden_and_nothing_else(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    for _ in range(2):
        hide_late_answers()
    other = failure(of_another_kind)
    without = types.SimpleNamespace(exc_value=RuntimeError(), exc_traceback=None)
    for each in (failure(to_a_closed_loop), other, without):
        sys.unraisablehook(each)
    assert told == [other, without]
