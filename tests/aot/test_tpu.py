"""What runs on a TPU, compiled by the TPU's own compiler.

Without a TPU: `make test` installs libtpu in a folder beside the environment, so that
JAX finds it here and nowhere else. Each program takes seconds; `python -m
tests.aot.tpu_programs "splash v5p" "splash v6e"` compiles for other chips by hand.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import tvkd
from experiments.abstract_lab import abstract_lab
from tests.aot import test_fsdp, tpu_programs

ROOT = Path(__file__).parents[2]
COMPILER = Path(sys.prefix) / "tpu-compiler"  # see the Makefile
COMPILED = ("splash v5e", *(f"fused {name}" for name in tpu_programs.LOSSES))
COMPILED += ("dense", "fsdp", "part")
FUSED = "experiments.benchmarks.fused"
THERE_IS_ONE = sys.platform == "linux" and platform.machine() == "x86_64"
pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(
        not THERE_IS_ONE, reason="libtpu, the TPU compiler, is for Linux on x86-64"
    ),
]


def lines_of(*command):
    """What a module prints, in a process with the TPU compiler's settings."""
    dropped = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    paths = [str(ROOT), str(COMPILER), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment
        | {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(paths),
            "TPU_SKIP_MDS_QUERY": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled():
    """What was found of a program of `tests.aot.tpu_programs`."""
    every = {}
    for line in lines_of("tests.aot.tpu_programs", *COMPILED):
        every |= line

    def found(name):
        assert "error" not in every[name], every[name]["error"]
        return every[name]

    return found


def test_splash_attention_in_a_step(compiled):
    """Once forward and twice backward in every layer; scores are nowhere."""
    found = compiled("splash v5e")
    layers = tpu_programs.LAYERS
    assert found["kernels"] == {"fwd": layers, "dq": layers, "dkv": layers}
    assert not found["scores"]


@pytest.mark.parametrize("name", tpu_programs.LOSSES)
def test_fused_losses_hold_no_logits(compiled, name):
    logits = 4 * tpu_programs.ROWS * tpu_programs.COLUMNS
    assert compiled("dense")["temporaries"] > logits
    assert 0 < compiled(f"fused {name}")["temporaries"] < logits / 2


def test_a_fused_loss_of_a_large_head_takes_little_memory():
    """At D 4096, V 128256 in halves on one chip; the gradient in the head is exact.

    That is 1.05 GB, and would be 2.1 GB in float32: the bound leaves no room for it.
    """
    sizes = ("--hidden", "4096", "--vocab", "128256", "--dtype", "bfloat16")
    options = ("--topology", "v5e:2x2", "--losses", "jsd", "--json")
    (found,) = lines_of(FUSED, *sizes, *options, "--rows", "8192")
    assert found["default_temp_gib"] * 2**30 <= 0.6e9
    assert found["dense_temp_gib"] * 2**30 > 6e9


def test_no_fused_loss_of_few_rows_takes_more_than_the_dense_one():
    sizes = ("--hidden", "4096", "--vocab", "128256", "--dtype", "bfloat16")
    losses = ("forward_kl", "reverse_kl", "jsd")
    options = ("--topology", "v5p:2x2x1", "--rows", "256", "--json")
    every = lines_of(FUSED, *sizes, *options, "--losses", *losses)
    assert [found["loss"] for found in every] == list(losses)
    for found in every:
        assert found["default_temp_gib"] <= found["dense_temp_gib"], found


def test_a_float32_head_under_bfloat16_states_takes_little_memory():
    """The gradient, 2.1 GB, is made where it is returned; a cast head is 1.05 GB."""
    sizes = ("--hidden", "4096", "--vocab", "128256", "--dtype", "bfloat16")
    options = ("--head-dtype", "float32", "--topology", "v5e:2x2", "--json")
    losses = ("--losses", "forward_kl", "jsd", "--rows", "1024")
    for found in lines_of(FUSED, *sizes, *options, *losses):
        assert found["default_temp_gib"] * 2**30 <= 0.4e9
        assert found["default_temp_gib"] <= found["dense_temp_gib"] / 2
    losses = ("--losses", "log_probs", "--rows", "256", "8192")
    few, many = lines_of(FUSED, *sizes, *options, *losses)
    assert few["default_temp_gib"] <= few["dense_temp_gib"]
    assert many["default_temp_gib"] * 2**30 <= 1.6e9
    assert many["dense_temp_gib"] * 2**30 > 8e9


def test_a_step_sends_what_it_has_to(compiled):
    """Parameters twice and gradients once, as whole matrices at the most."""
    found = dict(compiled("fsdp"))
    assert found.pop("largest") <= test_fsdp.LARGEST
    assert sum(found.values()) < 1.15 * 3 * 7 / 8 * 4 * test_fsdp.PARAMETERS


def test_a_part_of_a_slice_that_is_no_block(compiled):
    """As where a teacher has half of the chips of every host."""
    found = compiled("part")
    assert found["hosts"] == 8
    assert found["mesh"] == found["given"]
    assert found["reduces"]


@pytest.mark.parametrize(
    ("topology", "chip"), [("v5e:2x4", "TPU v5e"), ("tpu7x:2x2x1", "TPU7x, half")]
)
def test_an_update_of_an_experiment(topology, chip):
    """TVKD's tiny update on eight devices: donated, small, and it communicates."""
    options = ("--tiny", "--topology", topology, "--batch", "8", "--json")
    found = lines_of("rkd_jax.cli", "compile", "tvkd", *options)[-1]
    assert found["devices"] == 8
    assert found["chip"] == chip
    assert found["fits"]
    memory = found["memory"]
    # Everything that comes out, but for the metrics, is written over what went in.
    assert 0 < memory["outputs"] - memory["aliased"] < 2**17
    assert memory["aliased"] > 0.5 * memory["arguments"]
    assert sum(kind["bytes"] for kind in found["collectives"].values()) > 0
    # Of rows of two blocks a quarter of the scores, which by custom are all counted, is
    # left out: products with keys and values, three times with the backward pass.
    student, length = abstract_lab(tvkd.tiny(), accelerator="tpu").student.config, 108
    heads = student.num_layers * student.num_heads * student.head_dim
    left_out = 12 * length * heads * found["tokens"] / 4
    assert 8 * found["flops"] >= found["model_flops"] - left_out
    assert 0 < found["at_most"]["mfu"] < 1
