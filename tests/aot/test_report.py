"""The arithmetic of a roofline, and what is said about it."""

import dataclasses
import json

import pytest

from rkd_jax.aot.chips import CHIPS, GIB
from rkd_jax.aot.collectives import Traffic
from rkd_jax.aot.report import Memory, Plan, Work, roofline

CHIP = CHIPS["v5e"]
WORK = Work(
    flops=197e12 / 2,
    hbm_bytes=819e9 / 4,
    collectives={"all-gather": Traffic(32, 150e9), "all-reduce": Traffic(2, 10e9)},
)
FITS = Memory(
    arguments=4 * GIB,
    temporaries=6 * GIB,
    outputs=4 * GIB,
    aliased=3 * GIB,
    beside=2 * GIB,
)
PLAN = Plan(
    setting={"experiment": "tvkd", "topology": "v5e:2x4"},
    chip=CHIP,
    devices=8,
    memory=FITS,
    work=WORK,
    tokens=64_000,
    model_flops=0.2 * 8 * 197e12,
)


def test_the_slowest_unit_binds():
    times = roofline(WORK, CHIP)
    assert times.compute == 0.5
    assert times.hbm == 0.25
    assert times.interconnect == 160 / 200
    assert (times.seconds, times.binds) == (0.8, "interconnect")
    alone = roofline(dataclasses.replace(WORK, collectives={}), CHIP)
    assert (alone.seconds, alone.binds) == (0.5, "compute")


def test_speeds_are_upper_bounds_per_device():
    assert PLAN.speed["tokens_per_s_per_device"] == pytest.approx(64_000 / 0.8 / 8)
    assert PLAN.speed["mfu"] == pytest.approx(0.2 / 0.8)


def test_what_is_donated_counts_once():
    assert FITS.peak == 13 * GIB
    assert PLAN.fits
    tight = dataclasses.replace(FITS, beside=4.8 * GIB)
    assert not dataclasses.replace(PLAN, memory=tight).fits
    refused = dataclasses.replace(FITS, compiled=False)
    assert not dataclasses.replace(PLAN, memory=refused).fits


def test_it_is_said_in_words_and_in_json():
    text = str(dataclasses.replace(PLAN, guessed_loops=2, notes=("buy more",)))
    for words in (
        "tvkd",
        "fits: 13.00 GiB of 15.75 GiB per device",
        "arguments 4.00 GiB, temporaries 6.00 GiB, results 1.00 GiB, kept beside",
        "98.5 TFLOP, 0.5 s",
        "160 GB sent, 0.8 s",
        "all-gather 150 GB in 32",
        "interconnect: a step takes at least 0.8 s",
        "10,000 tokens/s per device, model FLOPs utilisation 25 %",
        "buy more",
        "2 loops turn as often",
    ):
        assert words in text
    assert "1 loop turns as often" in str(dataclasses.replace(PLAN, guessed_loops=1))
    assert "as often" not in str(PLAN)
    found = json.loads(json.dumps(PLAN.as_dict()))
    assert found["fits"] is True
    assert found["memory"]["peak"] == 13 * GIB
    assert found["collectives"]["all-reduce"] == {"count": 2, "bytes": 10e9}
    assert found["binds"] == "interconnect"
    assert found["roofline_s"]["step"] == 0.8


def test_a_step_that_was_refused_says_no_speed():
    refused = dataclasses.replace(
        PLAN, memory=dataclasses.replace(FITS, compiled=False), work=None
    )
    assert "DOES NOT FIT" in str(refused)
    assert "tokens/s" not in str(refused)
    assert "at_most" not in refused.as_dict()


def test_half_a_chip_has_half_of_everything():
    """TPU7x: 2307 TFLOP/s, 7380 GB/s, 1200 GB/s both ways, two devices."""
    half = CHIPS["tpu7x"]
    assert 2 * half.peak == 2307e12
    assert 2 * half.hbm_bandwidth == 7380e9
    assert 4 * half.ici_bandwidth == 1200e9
