"""The log: exact numbers, truncation on resume, repair after a crash."""

import json
import math
import resource
import signal
import struct

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from rkd_jax.training import MetricsWriter, read_metrics


def values(step):
    return {"student/loss": float(np.float32(1) / np.float32(3 + step)), "dual": 0.1}


@pytest.fixture
def folder(tmp_path):
    with MetricsWriter(tmp_path / "run", tensorboard=False) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, values(step))
    return tmp_path / "run"


def test_numbers_read_back_exactly(folder):
    entries = read_metrics(folder)
    assert entries == [{"step": s, "metrics": values(s)} for s in (1, 2, 3, 4)]


def test_truncated_log_equals_an_uninterrupted_one(folder):
    whole = (folder / "metrics.jsonl").read_bytes()
    with MetricsWriter(folder, tensorboard=False) as writer:
        writer.truncate(2)
        assert [entry["step"] for entry in read_metrics(folder)] == [1, 2]
        for step in (3, 4):
            writer.write(step, values(step))
    assert (folder / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("torn", [b'{"step": 5, "metr', b'{"step": 5}', b"\x00\x00\n"])
def test_a_torn_last_line_is_repaired(folder, torn):
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(read_metrics(folder)) == 4
    MetricsWriter(folder, tensorboard=False).close()
    assert path.read_bytes() == whole


def test_a_broken_line_inside_is_named_not_dropped(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "oops", *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not a JSON object"):
        MetricsWriter(folder, tensorboard=False)


def test_every_line_is_strict_json(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"a": math.nan, "b": -math.inf, "c": 0.5})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    entry = json.loads(line, parse_constant=pytest.fail)
    assert entry["metrics"] == {"a": None, "b": None, "c": 0.5}


def test_a_full_disk_names_the_file_once(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = MetricsWriter(tmp_path, tensorboard=False)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        writer.write(1, {"a": 0.5})
        with pytest.raises(OSError, match=r"cannot log step 2, .*metrics.jsonl"):
            writer.write(2, {"a" * 100: 0.5})
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"student/loss": 0.625})
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, scalars = path.read_bytes(), []
    while data:  # TFRecord: length, its checksum, an Event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    assert scalars == [(3, "student/loss", 0.625)]
