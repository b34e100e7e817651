"""The whole of quickstart on the toy teacher: the real wiring, nothing replaced."""

import collections
import dataclasses
import html.parser
import json
import logging
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import quickstart
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.interop import load_model
from rkd_jax.training import read_metrics

ROOT = Path(__file__).parents[2]
FREE = ("created", "timings", "versions", "command")  # what may differ between two runs

pytestmark = pytest.mark.usefixtures("compiled_programs")


class CompileLog(logging.Handler):
    """Counts what XLA compiles, by function and types."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def emit(self, record):
        message = record.getMessage()
        if message.startswith("Compiling "):
            self.seen[message.split(". Argument mapping")[0]] += 1


@pytest.fixture(scope="module")
def tiny_run(compiled_programs, tmp_path_factory):
    """One uninterrupted run: its folder and what was compiled."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    log = CompileLog()
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(log)
    propagate, logger.propagate = logger.propagate, False
    try:
        with jax.log_compiles(True):
            quickstart.run(dataclasses.replace(quickstart.tiny(), out=str(folder)))
    finally:
        logger.removeHandler(log)
        logger.propagate = propagate
    return folder, log.seen


def report_of(folder: Path) -> dict:
    report = json.loads((folder / "report" / "report.json").read_text("utf-8"))
    del report["settings"]["out"]
    return {key: value for key, value in report.items() if key not in FREE}


@pytest.fixture
def refused(monkeypatch, capsys):
    """The line that a command ends with, and nothing but that line."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["quickstart", "--tiny", *arguments])
        with pytest.raises(SystemExit) as end:
            quickstart.main()
        assert end.value.code == 2
        return capsys.readouterr().err

    return run


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.quickstart", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_report_names_every_policy_and_shows_the_game(tiny_run):
    report = report_of(tiny_run[0])
    names = [policy["name"] for policy in report["policies"]]
    assert names == [
        "teacher (steered)",
        "warm start",
        "PbKD offline",
        "PbKD online",
        "DPO",
    ]
    config = quickstart.tiny()
    game = report["games"]["PbKD"]
    steps = config.game.offline_steps + config.pairs.rounds * config.game.round_steps
    assert game["steps"] == list(range(1, steps + 1))
    assert len(game["phases"]) == 1 + config.pairs.rounds
    assert all(isinstance(value, float) for value in game["gap"] + game["slack"])
    held_out = report["losses"]["reward player: held-out NLL, nats/pair"]
    assert held_out["steps"] == game["steps"]
    assert all(0 < value < math.inf for value in held_out["values"])
    assert len(report["samples"]) == min(12, config.task.held_out_prompts)
    assert {len(sample["responses"]) for sample in report["samples"]} == {5}
    assert len(report["summary"]) == 4
    for policy in report["policies"]:
        assert policy["reward"]["n"] == config.task.held_out_prompts


def test_the_game_logs_what_would_show_it_running_away(tiny_run):
    watched = {"critic/grad_norm", "critic/param_norm", "critic/slack", "dual"}
    entries = read_metrics(tiny_run[0] / "4-offline")
    assert len(entries) == quickstart.tiny().game.offline_steps
    for entry in entries:
        found = [entry["metrics"][name] for name in watched]
        assert all(math.isfinite(value) for value in found)


def test_the_page_is_one_file_that_needs_nothing_else(tiny_run):
    page = (tiny_run[0] / "report" / "report.html").read_text("utf-8")

    class Links(html.parser.HTMLParser):
        found = []

        def handle_starttag(self, tag, attrs):
            self.found += [v for k, v in attrs if k in ("src", "href") and v]

    Links().feed(page)
    assert Links.found
    assert all(link.startswith(("data:", "#")) for link in Links.found)


# Every jitted function of the run, and how many shapes it is compiled for: updates of
# warm start, anchor, game and DPO (offline and three rounds share the game's); samplers
# of the teacher for two prompt widths, of the student for evaluation and rollouts.
COMPILED = {
    "update": 4,
    "build": 4,
    "generate": 4,
    "sequence_scores": 1,
    "features": 3,
    "_pair_nll": 1,
    "_held_out": 1,
    "_divergence_totals": 1,
    "_nll_totals": 1,
}


@pytest.mark.parametrize(("function", "shapes"), COMPILED.items())
def test_each_function_is_compiled_once_per_shape(tiny_run, function, shapes):
    start = f"Compiling jit({function})"
    counts = [n for name, n in tiny_run[1].items() if name.startswith(start)]
    assert sum(counts) == shapes, counts


def test_the_student_is_exported_for_anyone_to_load(tiny_run):
    model, params, tokenizer = load_model(tiny_run[0] / "student")
    assert model.config.num_layers == 2  # three less the dropped one
    assert tokenizer.fingerprint() == byte_tokenizer().fingerprint()
    same_shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, same_shapes)
    logits = model.logits(params, jnp.asarray([[72, 105]], jnp.int32))
    assert bool(jnp.isfinite(logits).all())


def test_the_data_report_counts_what_was_dropped(tiny_run):
    sources = {source["name"]: source for source in report_of(tiny_run[0])["data"]}
    pairs = sources["3 pairs: pairs"]
    dropped = sum(incident["count"] for incident in pairs["skipped"])
    config = quickstart.tiny()
    # Two answers of the teacher and the student's samples: every two are a pair.
    candidates = 2 + config.policy.samples_per_prompt
    duels = config.pairs.offline_prompts * math.comb(candidates, 2)
    assert pairs["used"] + dropped == duels


def test_a_finished_run_only_names_its_report(tiny_run, capsys):
    folder, _ = tiny_run
    before = (folder / "report" / "report.json").stat().st_mtime_ns
    page = quickstart.run(dataclasses.replace(quickstart.tiny(), out=str(folder)))
    assert page == folder / "report" / "report.html"
    assert (folder / "report" / "report.json").stat().st_mtime_ns == before


def test_interrupted_and_resumed_equals_uninterrupted(tiny_run, tmp_path):
    folder = tmp_path / "run"
    process = start("--tiny", "--out", str(folder))
    deadline = time.monotonic() + 240
    game_log = folder / "4-offline" / "metrics.jsonl"
    while not (game_log.exists() and game_log.stat().st_size):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not (folder / "report" / "report.json").exists()

    process = start("--tiny", "--out", str(folder))
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert out.strip().endswith(str(folder / "report" / "report.html"))
    assert report_of(folder) == report_of(tiny_run[0])


def test_help_shows_every_option_with_its_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart", "--help"])
    with pytest.raises(SystemExit) as end:
        quickstart.main()
    assert end.value.code == 0
    out = capsys.readouterr().out
    for field in ("--out", "--oracle", "--game.epsilon", "--models.drop-layers"):
        assert field in out
    assert "0.05" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--game.epsilom", "0.1"), "epsilom"),
        (("--models.teacher", "no/such/folder"), "no/such/folder"),
        (("--oracle", "no_such_module_:x"), "no_such_module_"),
        (("--task.train-file", "x.jsonl"), "--task.held-out-file"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    arguments, message, tmp_path, refused
):
    assert message in refused("--out", str(tmp_path / "run"), *arguments)


def test_a_folder_of_another_run_is_refused_and_left_alone(tiny_run, refused):
    folder, _ = tiny_run
    assert "seed" in refused("--out", str(folder), "--seed", "7")
    assert (folder / "report" / "report.json").exists()
