"""The benchmark of a training step: its arithmetic by hand, and toy runs of it."""

import dataclasses
import json
import math
import sys

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from experiments.benchmarks import step
from experiments.benchmarks.llama import llama
from experiments.benchmarks.step import StepBenchmark, setting_of
from experiments.benchmarks.step_cases import CASES, demonstrations
from rkd_jax.models.api import response_logits
from rkd_jax.models.decoder import DecoderConfig
from rkd_jax.models.flops import forward_flops
from rkd_jax.training.optim import OptimConfig, make_optimizer
from rkd_jax.training.state import init_state
from rkd_jax.training.update import make_update

TOY = StepBenchmark(
    vocab=64,
    batch=2,
    length=12,
    prompt=4,
    student="h32-l2-i48-q4-kv2",
    teacher="h48-l5-i64-q4-kv2",
    steps=1,
    matmul_size=64,
)
OPTIONS = [
    *("--vocab", "64", "--batch", "2", "--length", "12", "--prompt", "4"),
    *("--student", TOY.student, "--teacher", TOY.teacher),
    *("--steps", "1", "--matmul-size", "64", "--json"),
]


def multiplications(jaxpr) -> int:
    """2 m n k of every product in a program, those of a loop as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner
        for inside in jaxprs_in_params(eqn.params):
            total += times * multiplications(inside)
    return total


def test_flops_of_a_pass_counted_by_hand():
    """D 4, F 6, two heads of 2, one of them for keys, V 10; one row, L 3, T 2.

    A column: q 16, k 8, v 8, o 16, MLP 3 x 24; scores and mixing 2 x 3 x 4. The head:
    two positions of 40.
    """
    config = llama("h4-l1-i6-q2-kv1", vocab_size=10, max_length=3)
    column = 16 + 8 + 8 + 16 + 72 + 24
    assert forward_flops(config, 1, 3, 2) == 2 * 3 * column + 2 * 2 * 40 == 1024
    deep = llama("h4-l5-i6-q2-kv1", vocab_size=10, max_length=3)
    assert forward_flops(deep, 7, 3, 2) == 7 * (5 * 2 * 3 * column + 2 * 2 * 40)


def test_flops_equal_those_of_the_traced_passes():
    setting = setting_of(dataclasses.replace(TOY, remat="none"))
    batch = demonstrations(setting).sequences

    def loss(params):
        return response_logits(setting.student, params, batch).sum()

    def ask(params):
        return response_logits(setting.teacher, params, batch)

    params = jax.eval_shape(setting.student.init, jax.random.key(0))
    trained = jax.make_jaxpr(jax.value_and_grad(loss))(params)
    assert multiplications(trained.jaxpr) == setting.trained_flops(2)
    params = jax.eval_shape(setting.teacher.init, jax.random.key(0))
    asked = jax.make_jaxpr(ask)(params)
    assert multiplications(asked.jaxpr) == setting.teacher_flops(2)


def test_a_name_is_the_shape_it_says():
    common = {"vocab_size": 32000, "max_length": 256}
    config = llama("h768-l12-i2048-q12-kv6", dtype="bfloat16", **common)
    assert config == DecoderConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=6,
        head_dim=64,
        dtype="bfloat16",
        **common,
    )
    assert llama("h64-l1-i8-q3-kv1-d32", **common).head_dim == 32
    with pytest.raises(ValueError, match="'h64-l2' is not of the form h384-l6"):
        llama("h64-l2", **common)
    with pytest.raises(ValueError, match="width 64 does not divide over 3 heads"):
        llama("h64-l1-i8-q3-kv1", **common)


TRAINED = {"kd": 2, "gkd": 2, "xkd": 4, "dpo": 4, "tvkd": 4, "drdo": 4}
TRAINED |= {"topk_kd": 2, "pbkd": 6, "mm_pbkd": 6}
ASKED = {"kd": 2, "gkd": 2, "xkd": 2, "mm_pbkd": 6}  # sequences, of the teacher


@pytest.mark.parametrize("name", CASES)
def test_every_objective_takes_a_step_on_its_data(name):
    """Traced, not run: shapes, the signals it requires, and what counts as work."""
    setting = setting_of(dataclasses.replace(TOY, samples=3))
    case = CASES[name](setting)
    optimizer = make_optimizer(OptimConfig())
    critic = None if case.critic is None else optimizer
    state = init_state(
        case.params,
        student_optimizer=optimizer,
        critic_params=case.critic,
        critic_optimizer=critic,
        rng=jax.random.key(0),
    )
    update = make_update(
        case.objective,
        student_optimizer=optimizer,
        critic_optimizer=critic,
        critic_steps=case.critic_steps,
    )
    signal = jax.eval_shape(case.prepare, case.batch)
    _, metrics = jax.eval_shape(update, state, case.frozen, case.batch, signal)
    assert "student/loss" in metrics
    assert case.sequences == TRAINED[name]
    work = setting.trained_flops(TRAINED[name]) + setting.teacher_flops(
        ASKED.get(name, 0)
    )
    if name.endswith("pbkd"):  # four layers of the teacher, width 48, on six rollouts
        column = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 64 + 2 * 12 * 48
        work += 2 * 6 * 12 * 4 * column
    if name == "mm_pbkd":  # D 48, 64 units, V 64; three steps on 6 + 4 responses of 8
        hidden, output = 2 * 48 * 64, 2 * 64 * 64
        work += 3 * 10 * 8 * (2 * hidden + 3 * output) + 6 * 8 * (hidden + output)
        work += 2 * 4 * 8 * 48 * 64  # the teacher's head on both responses of two pairs
    assert case.flops == work


@pytest.mark.parametrize("name", ["kd", "pbkd"])
def test_the_command_prints_one_json_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step", "--objective", name, *OPTIONS])
    step.main()
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["compilations"] == 0
    assert found["peak_temp_bytes"] > 0
    assert 0 < found["s_prepare"] < found["s_per_step"]
    rate = found["model_flops_per_step"] / found["s_per_step"]
    assert found["utilization"] == pytest.approx(rate / found["matmul_peak_flops"])
    columns = found["sequences"] * 12
    assert found["tokens_per_s"] == pytest.approx(columns / found["s_per_step"])
    assert found["student"] == TOY.student
    # Embedding, per layer q, k, v, o, the MLP and two norms, the last norm.
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    assert found["student_parameters"] == 64 * 32 + 2 * layer + 32


def test_bad_sizes_are_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["step", "--length", "64", "--prompt", "64"])
    with pytest.raises(SystemExit, match="2"):
        step.main()
    assert "prompt=64 must be positive and below length=64" in capsys.readouterr().err


def test_the_peak_is_that_of_the_fastest_product():
    peak = step.matmul_peak(64, np.dtype("float32"), turns=2)
    assert 1e6 < peak < 1e16
