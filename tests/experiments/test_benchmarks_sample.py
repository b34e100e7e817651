"""The sampling benchmark: its costs by hand, and its line on a toy."""

import json

import jax
import numpy as np
import pytest

from experiments.benchmarks.sample import (
    SampleBenchmark,
    decoder_config,
    run,
    step_costs,
)

TOY = SampleBenchmark(
    model="h16-l2-i24-q4-kv2",
    vocab=40,
    batch=(3,),
    prompt=4,
    new=5,
    square=16,
    turns=1,
    json=True,
)


@pytest.mark.parametrize("tied", [True, False])
def test_costs_by_hand(tied):
    config = SampleBenchmark(
        **{**TOY.__dict__, "tie_embeddings": tied, "dtype": "bfloat16"}
    )
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16
    weights = 40 * 16 + 2 * (attention + 3 * 16 * 24 + 2 * 16) + 16
    columns = 4 + 5 // 2
    costs = step_costs(config, 3)
    assert costs["weights"] == weights
    assert costs["bytes"] == 2 * (weights + 3 * columns * 2 * 2 * 8)
    # Scores and weighted values: a product and a sum each, per head, column and layer.
    assert costs["flops"] == 3 * (2 * weights + columns * 2 * 2 * 2 * 16)


def test_a_json_line_per_batch_size(capsys):
    run(TOY)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["batch"] for line in lines] == [3]
    for line in lines:
        assert jax.devices()[0].device_kind in line["device"]
        ceiling = max(
            line["step_bytes"] / line["bandwidth_gb_s"] / 1e9,
            line["step_flops"] / line["peak_gflop_s"] / 1e9,
        )
        np.testing.assert_allclose(line["roofline_step_seconds"], ceiling)
        np.testing.assert_allclose(
            line["share_of_roofline"] * line["step_seconds"], ceiling
        )
        np.testing.assert_allclose(
            line["tokens_per_second"] * line["step_seconds"], line["batch"]
        )


def test_bad_sizes_are_named():
    for name in ("h384", "h384-l6-i1024-q6-kv3-x", ""):
        with pytest.raises(ValueError, match="not of the form"):
            decoder_config(SampleBenchmark(model=name))
    with pytest.raises(ValueError, match="q5 does not divide h16"):
        decoder_config(SampleBenchmark(model="h16-l2-i24-q5-kv5"))
    with pytest.raises(ValueError, match="new is 1"):
        run(SampleBenchmark(new=1))
