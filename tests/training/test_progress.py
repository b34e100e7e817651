"""What a user sees, on a terminal and off it."""

import io

from rkd_jax.training import Progress


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_come_at_the_interval_and_at_both_ends():
    clock, out = Clock(), io.StringIO()
    with Progress(out, interval=10.0, clock=clock) as progress:
        progress.stage("train", 8, done=2)
        for step in range(6):
            clock.now += 4.0
            progress.advance(loss=1.0 / (step + 1), tokens=1000)
        progress.note("saved")
        progress.stage("sample", 3)
        clock.now += 1.0
        progress.advance(3)
    assert out.getvalue().splitlines() == [
        "train: 2/8",
        "train: 5/8  loss 0.3333  250 tokens/s  left 0:00:12",
        "train: 8/8  loss 0.1667  250 tokens/s  left 0:00:00",
        "saved",
        "sample: 0/3",
        "sample: 3/3  left 0:00:00",
    ]


def test_a_finished_stage_says_nothing():
    out = io.StringIO()
    Progress(out).stage("train", 5, done=5)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    clock, out = Clock(), Terminal()
    with Progress(out, clock=clock) as progress:
        progress.stage("train", 4)
        clock.now = 2.0
        progress.advance(loss=0.25, tokens=1000)
        progress.note("[not markup]")
    text = out.getvalue()
    for part in ("train", "1/4", "loss 0.25", "500 tokens/s", "[not markup]"):
        assert part in text
