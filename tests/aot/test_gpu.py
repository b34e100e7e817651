"""What runs on a GPU, compiled by the GPU's own compiler, without a GPU.

It is JAX's plugin, gigabytes that `make test` does not install: ``pip install
'jax[cuda12]'`` beside the tests, and they are run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from rkd_jax.aot.flops import matmul_flops
from rkd_jax.models.attention_kernels import cudnn_attention, kept_of_kernels

ROOT = Path(__file__).parents[2]
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
pytestmark = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)),
    reason="the GPU compiler is not installed: pip install 'jax[cuda12]'",
)


def run(*command: str) -> list[dict]:
    """The JSON lines that a module prints."""
    dropped = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    done = subprocess.run(
        [sys.executable, "-m", *command, "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_fused_losses_hold_no_logits_at_the_published_shape():
    """H100, D 4096, V 128256, 8192 rows in bfloat16: 8.7 GB are published."""
    sizes = ("--hidden", "4096", "--vocab", "128256", "--rows", "8192")
    command = ("experiments.benchmarks.fused", "--topology", "h100:1", *sizes)
    for row in run(*command, "--dtype", "bfloat16"):
        assert row["default_temp_gib"] < 0.6, row
        assert row["dense_temp_gib"] > 7, row


@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
def test_no_fused_loss_of_few_rows_takes_more_than_the_dense_one(head_dtype):
    sizes = ("--hidden", "4096", "--vocab", "128256", "--rows", "256")
    command = ("experiments.benchmarks.fused", "--topology", "h100:1", *sizes)
    losses = ("log_probs", "forward_kl", "reverse_kl", "jsd", "total_variation")
    dtypes = ("--dtype", "bfloat16", "--head-dtype", head_dtype)
    every = run(*command, *dtypes, "--losses", *losses)
    assert [row["loss"] for row in every] == list(losses)
    for row in every:
        assert row["default_temp_gib"] <= row["dense_temp_gib"], row


def test_products_of_its_attention_are_counted():
    """Two forward; backward the scores again, and two for each of them: by halves."""
    query = jax.ShapeDtypeStruct((2, 64, 8, 32), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def loss(query, key, value, segments):
        mixed = cudnn_attention(query, key, value, segments, window=None)
        return mixed.astype(jnp.float32).sum()

    def products(function):
        jaxpr = jax.make_jaxpr(function)(query, key, key, segments).jaxpr
        return matmul_flops(jaxpr, devices=1) / (2 * 2 * 8 * 64 * 64 * 32)

    assert products(loss) == 1
    assert products(jax.grad(loss, (0, 1, 2))) == 3.5
    kept = jax.checkpoint(loss, policy=kept_of_kernels)
    assert products(jax.grad(kept, (0, 1, 2))) == 3.5
    assert products(jax.grad(jax.checkpoint(loss), (0, 1, 2))) == 4.5


def test_a_whole_update_on_eight_gpus():
    """Attention by cuDNN, parameters gathered and gradients scattered over fsdp."""
    (found,) = run(
        *("rkd_jax.cli", "compile", "tvkd", "--topology", "h100:8"),
        *("--remat", "full"),
    )
    assert found["compute"] == "bfloat16, attention cudnn, remat full"
    assert found["fits"]
    kinds = found["collectives"]
    assert kinds["all-gather"]["bytes"] > 1e9 < kinds["reduce-scatter"]["bytes"]
    assert found["at_most"]["mfu"] < 1.0
