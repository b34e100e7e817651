"""The page of all benchmarks, from numbers given, and the step of other libraries."""

import functools
import importlib.util
import re

import jax
import numpy as np
import pytest

from experiments.benchmarks import peers, report
from experiments.benchmarks.step import StepBenchmark, setting_of
from rkd_jax.losses import forward_kl, generalized_jsd

ASKED = []
STEP = {
    "sequences": 4,
    "s_per_step": 2.0,
    "s_prepare": 0.5,
    "tokens_per_s": 512.0,
    "model_flops_per_step": 3 * 10**9,
    "utilization": 0.25,
    "peak_temp_bytes": 3 * 2**29,
    "compile_s": 4.0,
    "compilations": 0,
    "matmul_size": 2048,
    "matmul_peak_flops": 6e9,
    "student": "h32",
    "teacher": "h48",
    "vocab": 64,
    "batch": 4,
    "length": 12,
    "prompt": 4,
    "dtype": "float32",
}

SAMPLE = {
    "device": "cpu, h32",
    "batch": 32,
    "step_bytes": 3 * 2**20,
    "step_seconds": 0.25,
    "share_of_roofline": 0.5,
    "tokens_per_second": 128.0,
    "tokens_per_second_with_prefill": 100.0,
    "bandwidth_gb_s": 24.5,
    "peak_gflop_s": 188.0,
}


def given(module, *arguments):
    """Rows as the benchmarks print them, times that grow with every question."""
    ASKED.append((module, *arguments))
    options = dict(zip(arguments, arguments[1:], strict=False))
    if module == "fused":
        versions = {"dense": 1.0, "default": 0.5}
        row = {"loss": "jsd", "rows": 16, "device": "cpu, D 8"}
        row |= {f"{name}_temp_gib": size for name, size in versions.items()}
        row |= {f"{name}_seconds": size for name, size in versions.items()}
        return [row | {"default_time_ratio": 0.5}]
    if module == "sample":
        return [SAMPLE]
    if module == "peers":
        seconds = {"rkd_jax": 2.0, "torch": 3.0}
        ratios = {"rkd_jax": 1.0, "torch": 1.5}
        absent = {"trl": ["trl", "datasets"]}
        found = {"s_per_step": seconds, "ratio_to_rkd_jax": ratios}
        failed = {"tunix": "ImportError: no Llama"}
        return [STEP | found | {"to_install": absent, "failed": failed}]
    remat = options.get("--remat", "none")
    deep = "l24" in options.get("--student", "")
    factor = {"none": 1, "attention": 2, "dots": 4, "full": 8}[remat]
    return [
        STEP
        | {
            "objective": options.get("--objective", "kd"),
            "tokens_per_s": 1024.0 if "topk_kd" in arguments else 512.0,
            "remat": remat,
            "peak_temp_bytes": 2**33 // factor,
            "compile_s": 5.0 if deep else 4.0,
        }
    ]


def test_the_page_says_what_was_measured_and_by_which_command():
    ASKED.clear()
    text = report.page(report.ReportConfig(), given)
    assert "| drdo | 4 | 2.00 | 0.50 | 512 | 3 | 25% | 8.00 GiB | 4.0 | 0 |" in text
    assert "| full | 1.00 GiB | 0.12 | 2.00 | 1.00 |" in text
    assert "5.0 s against\n4.0 s, ratio 1.25" in text
    assert "| jsd | 16 | 1.00 GiB | 0.50 GiB | 1 | 0.5 | 0.5 |" in text
    assert "| gkd | torch | 3.00 | 1.50 |" in text
    assert "| kd | torch | 3.00 | 1.50 |" in text
    assert text.count("Not measured: trl (`pip install trl datasets`)") == 1
    assert text.count("Not measured: tunix, which failed: `ImportError: no Llama`") == 1
    assert re.search(r"Load average \d+\.\d before", text)
    named = [line[2] for line in ASKED if line[:2] == ("step", "--objective")]
    assert named == [*report.CASES, "dpo", "dpo", "dpo", "dpo"]
    assert "| 32 | 3 | 250.0 | 50% | 128 | 100 | 24.5 GB/s | 188 GFLOP/s |" in text
    assert "topk_kd: tokens / s 2.00 times those of kd, 2.00 times those of gkd" in text
    sizes = ("--sizes.batch", "8", "--sizes.steps", "3", "--json")
    assert ("peers", "--sizes.objective", "kd", *sizes) in ASKED


def test_remarks_are_kept_and_the_command_is_named(tmp_path, monkeypatch):
    out = tmp_path / "page.md"
    config = report.ReportConfig(str(out), steps=2, objectives=("kd",), peers=False)
    made = functools.partial(report.page, run=given)
    monkeypatch.setattr(report, "page", made)
    report.run(config)
    first = out.read_text()
    command = "python -m experiments.benchmarks.report --steps 2 --objectives kd"
    assert f"Written by `{command} --no-peers` on\n" in first
    assert report.command_of(report.ReportConfig()) == "make bench"
    by_hand = "\n## Remarks\n\nIt was late.\n\n## More of them\n\nAnd cold.\n"
    out.write_text(f"older\n{by_hand}")
    report.run(config)
    assert out.read_text() == first + by_hand


def test_a_benchmark_that_fails_is_loud():
    with pytest.raises(RuntimeError, match="prompt=9 must be positive and below"):
        report.measured("step", "--length", "9", "--prompt", "9", "--json")


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trl" else object()
    )
    assert peers.missing("trl") == ["trl"]
    assert peers.missing("torch") == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert peers.missing("tunix") == ["google-tunix"]
    with pytest.raises(ValueError, match="peer 'megatron' is not one of"):
        peers.measure(peers.PeersBenchmark(peers=("megatron",)))
    with pytest.raises(ValueError, match="has the objective dpo"):
        peers.measure(peers.PeersBenchmark(sizes=StepBenchmark(objective="dpo")))


def test_another_library_that_fails_leaves_the_others_measured(monkeypatch, capsys):
    def moved(setting, objective):
        raise ImportError("cannot import name 'GKDConfig' from 'trl'\nsecond line")

    def stumbling(setting, objective):
        def step():
            raise RuntimeError("shapes")

        return step

    def fine(setting, objective):
        return lambda: 3.0

    steps = {"rkd_jax": lambda *_: lambda: 2.0, "torch": fine, "trl": moved}
    monkeypatch.setattr(peers, "STEPS", steps)
    monkeypatch.setattr(peers, "missing", lambda name: [])
    monkeypatch.setattr(peers, "versions", lambda names: dict.fromkeys(names, "1"))
    toy = StepBenchmark(
        objective="gkd",
        vocab=64,
        batch=2,
        length=12,
        prompt=4,
        student="h32-l2-i48-q4-kv2",
        teacher="h32-l2-i48-q4-kv2",
    )
    config = peers.PeersBenchmark(peers=("trl", "torch"), sizes=toy)
    found = peers.measure(config)
    assert found["s_per_step"] == {"rkd_jax": 2.0, "torch": 3.0}
    assert found["ratio_to_rkd_jax"] == {"rkd_jax": 1.0, "torch": 1.5}
    assert found["versions"] == {"rkd_jax": "1", "torch": "1"}
    error = "ImportError: cannot import name 'GKDConfig' from 'trl'"
    assert found["failed"] == {"trl": error}
    steps["trl"] = stumbling
    peers.run(config)
    said = capsys.readouterr().out
    assert "     trl is not measured, it failed: RuntimeError: shapes\n" in said
    steps["rkd_jax"] = stumbling
    with pytest.raises(RuntimeError, match="shapes"):
        peers.measure(config)


@pytest.mark.parity
def test_the_step_in_torch_has_our_divergence_and_our_shapes():
    torch = pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("transformers", reason="needs transformers")
    student, teacher = np.random.default_rng(0).normal(size=(2, 3, 7)).astype("f4")
    theirs = [torch.log_softmax(torch.from_numpy(x), -1) for x in (student, teacher)]
    jsd = functools.partial(generalized_jsd, beta=0.5)
    for got, expected in ((peers.torch_jsd, jsd), (peers.torch_kl, forward_kl)):
        np.testing.assert_allclose(
            got(*theirs), expected(student, teacher), rtol=1e-5, atol=1e-6
        )
    setting = setting_of(
        StepBenchmark(
            vocab=64,
            batch=2,
            length=12,
            prompt=4,
            student="h32-l2-i48-q4-kv2",
            teacher="h48-l2-i64-q4-kv2",
        )
    )
    params = jax.eval_shape(setting.student.init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(params))
    assert peers.torch_llama(setting.student).num_parameters() == count
    assert peers.plain_torch(setting, "gkd")() > 0
