"""Damaged JSON and text files: read as what they say, or refused in a line naming them.

Formats that are parsed outside of Python are in `test_fuzz_native`.
"""

import collections
import json
import os
import tracemalloc

import jax
import numpy as np
import pytest

from rkd_jax.data.jsonl import write_jsonl
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord, RecordError
from rkd_jax.data.sources import read_jsonl
from rkd_jax.data.tokenizer import byte_tokenizer, from_file
from rkd_jax.interop import (
    UnsupportedConfigError,
    WeightsError,
    load_model,
    safetensors,
)
from rkd_jax.models.config import DecoderConfig
from rkd_jax.signals.cache import CachedRecord, CacheError, CacheSettings, Manifest
from rkd_jax.signals.cache_codec import LOG_PROB_DTYPES, Topk
from rkd_jax.signals.cache_format import (
    CachedResponse,
    Skipped,
    pack_record,
    pack_skipped,
    unpack_record,
)
from rkd_jax.training import RunFolder, RunMismatch
from rkd_jax.training.metrics import read_metrics
from tests.faults import whole_files
from tests.faults.mutations import (
    check_message,
    damaged_bytes,
    damaged_json,
    deadline,
    verdict,
)
from tests.signals import tiny_cache

MODEL_ERRORS = (FileNotFoundError, UnsupportedConfigError, WeightsError)
RUN = {"method": {"beta": 0.1, "layers": [1, 2], "name": "tvkd"}, "seed": 0}


def count_verdicts(cases, *, loaded, refused):
    """Fail at the first bad verdict, with its seed, or where one kind is too rare.

    Damage that is always noticed, or never, tries little.
    """
    found = collections.Counter()
    for seed, case in cases:
        try:
            found[case()] += 1
        except Exception as error:
            raise AssertionError(f"damage {seed}: {error!r}") from error
    assert found["loaded"] >= loaded, found
    assert found["refused"] >= refused, found


def file_cases(path, damage, seeds, read, errors):
    """One case per seed: ``path`` damaged, then read."""
    whole = path.read_bytes()

    def case(seed):
        path.write_bytes(damage(whole, seed))
        return verdict(read, errors, path.parent)

    try:
        yield from ((seed, lambda seed=seed: case(seed)) for seed in range(seeds))
    finally:
        path.write_bytes(whole)


def as_json(whole, seed):
    return damaged_json(json.loads(whole), seed)


# Model folders


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with everything a model folder may have."""
    return whole_files.model_folder(tmp_path_factory.mktemp("model") / "m")


def test_config_of_a_model(model):
    baseline = {leaf.shape for leaf in jax.tree.leaves(safetensors.load(model)[1])}

    def read():
        config, params = safetensors.load(model)
        assert {leaf.shape for leaf in jax.tree.leaves(params)} == baseline
        assert config == DecoderConfig(**vars(config))
        for name in ("vocab_size", "hidden_size", "num_layers", "max_length"):
            assert type(getattr(config, name)) is int
        assert np.isfinite([config.rope_theta, config.norm_eps]).all()
        assert isinstance(config.tie_embeddings, bool)

    path = model / "config.json"
    cases = file_cases(path, as_json, 1500, read, MODEL_ERRORS)
    count_verdicts(cases, loaded=100, refused=500)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 2**31 - 1},
        {"num_hidden_layers": 10**400},
        {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1},
        {"num_hidden_layers": 1e400},
        {"rms_norm_eps": 1e400},
        {"rope_theta": float("nan")},
    ],
    ids=["layers", "digits", "matrix", "infinity", "epsilon", "nan"],
)
def test_a_configuration_allocates_nothing_by_itself(model, change):
    path = model / "config.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(whole) | change))
        tracemalloc.start()
        with deadline(), pytest.raises(MODEL_ERRORS, match="m/(config|model)"):
            load_model(model)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
        path.write_text(whole)


@pytest.mark.parametrize(
    ("name", "damage"),
    [("tokenizer_config.json", as_json), ("chat_template.jinja", damaged_bytes)],
)
def test_tokenizer_config_and_template(tmp_path, name, damage):
    model = whole_files.model_folder(tmp_path / "m")
    if name != "chat_template.jinja":  # which has precedence
        (model / "chat_template.jinja").unlink()
    messages = [{"role": "user", "content": "a<|im_end|>b"}]

    def read():
        tokenizer = from_file(model)
        names = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert all(name is None or 0 <= name < 258 for name in names)
        try:
            ids = tokenizer.encode_chat(messages)
        except ValueError as error:
            check_message(error, "template", "encode")
        else:
            assert all(0 <= i < 258 for i in ids)

    cases = file_cases(model / name, damage, 250, read, ValueError)
    count_verdicts(cases, loaded=20, refused=20)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9**9**9 }}",
        "{% set x = 'a' * 10000000000 %}",
        "{% set x = [0] * 10000000000 %}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%-*d' % (9999999999, 1) }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ 'x'.ljust(10000000000) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{% for i in range(10000000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x.y }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ lipsum.__globals__['os'].getcwd() }}",
        "{{ raise_exception('two\nlines') }}",
        "{{" + "(" * 5000 + ")" * 5000 + "}}",
        "{% if a %}" * 300 + "{% endif %}" * 300,
    ],
)
def test_a_template_reaches_nothing_and_fills_no_memory(template):
    tokenizer = byte_tokenizer().with_chat_template(template)
    tracemalloc.start()
    try:
        with deadline(), pytest.raises(ValueError, match="template") as error:
            tokenizer.encode_chat([{"role": "user", "content": "x"}])
        assert tracemalloc.get_traced_memory()[1] < 5e7
    finally:
        tracemalloc.stop()
    assert str(error.value).isprintable()


def test_what_pads_within_reason_is_left_alone():
    source = "{{ messages[0].content | indent(2, true) }}{{ '%03d' | format(7) }}"
    tokenizer = byte_tokenizer().with_chat_template(source + "{{ 'x' | center(3) }}")
    ids = tokenizer.encode_chat([{"role": "user", "content": "50% 12345678"}])
    assert tokenizer.decode(ids) == "  50% 12345678007 x "


# Links


def test_names_in_an_index_may_not_lead_away_but_files_may_be_links(tmp_path):
    folder = whole_files.model_folder(tmp_path / "m", sharded=True)
    shard = min(folder.glob("model-*"))
    for seed, bad in enumerate(("/dev/zero", str(folder), "nowhere", str(shard))):
        content = shard.read_bytes()
        shard.unlink()
        os.symlink(bad, shard)
        case = verdict(lambda: load_model(folder), MODEL_ERRORS, folder)
        assert case == "refused", (seed, bad)
        shard.unlink()
        os.mkfifo(shard)
        assert verdict(lambda: load_model(folder), MODEL_ERRORS, folder) == "refused"
        shard.unlink()
        shard.write_bytes(content)
    shard.rename(tmp_path / "blob")  # as in the cache of the hub
    os.symlink(tmp_path / "blob", shard)
    load_model(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for outside in ("../blob", str(tmp_path / "blob")):
        content["weight_map"]["model.norm.weight"] = outside
        index.write_text(json.dumps(content))
        with pytest.raises(WeightsError, match="not a file name in this folder"):
            load_model(folder)


# Caches


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A finished cache of lists, its batch, and a file beside its folder."""
    folder = tmp_path_factory.mktemp("cache") / "c"
    whole_files.cache_folder(folder)
    whole = (folder / "shard-00000.array_record").read_bytes()
    (folder.parent / "x").write_bytes(whole)
    return folder


def test_manifest_of_a_cache(cache):
    batch = tiny_cache.batch_of(tiny_cache.demonstrations())
    expected = tiny_cache.open_cache(cache).topk(batch)

    def read():
        found = tiny_cache.open_cache(cache)
        assert len(found) == found.manifest.records == 7
        assert {shard.file for shard in found.manifest.shards} <= set(os.listdir(cache))
        signal = found.topk(batch)
        np.testing.assert_array_equal(signal.ids, expected.ids)
        np.testing.assert_array_equal(signal.log_probs, expected.log_probs)

    path = cache / "manifest.json"
    cases = file_cases(path, as_json, 1500, read, (CacheError, FileNotFoundError))
    count_verdicts(cases, loaded=10, refused=500)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "x\n", "", "..", 5, None])
def test_a_manifest_cannot_name_files_elsewhere(cache, name):
    path = cache / "manifest.json"
    whole = path.read_text()
    content = json.loads(whole)
    content["shards"][0]["file"] = name
    try:
        path.write_text(json.dumps(content))
        with pytest.raises(CacheError, match="not a file name in this folder"):
            Manifest.load(cache)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize("dtype", LOG_PROB_DTYPES)
def test_records_of_a_cache(dtype):
    settings = CacheSettings(top_k=4, log_prob_dtype=dtype, oracle="length")
    record = CachedRecord(tuple(map(_response, (3, 5))))
    payloads = [pack_record(record, settings), pack_skipped("no text, é")]

    def read(data):
        found = unpack_record(data, settings)
        if isinstance(found, Skipped):
            return
        for response in found.responses:
            topk = response.topk
            assert topk.ids.shape == topk.log_probs.shape == (response.length, 4)
            assert topk.ids.dtype == np.int32
            assert (topk.ids >= 0).all()
            assert (np.diff(np.sort(topk.ids), axis=-1) > 0).all()
            assert (topk.log_probs <= 1e-3).all()
            assert topk.log_tail.shape == response.checks.shape == (response.length,)

    def case(seed):
        data = damaged_bytes(payloads[seed % 5 == 0], seed, spots=(0, 13, 30, 46))
        return verdict(lambda: read(data), CacheError, "a record that cannot be read")

    cases = ((seed, lambda seed=seed: case(seed)) for seed in range(3000))
    count_verdicts(cases, loaded=50, refused=200)


def _response(length):
    rng = np.random.default_rng(length)
    ids = np.argsort(rng.random((length, 300)))[:, :4]
    log_probs = np.log(rng.dirichlet(np.ones(5), size=length))
    checks = rng.integers(0, 256, length).astype(np.uint8)
    topk = Topk(ids, log_probs[:, :4], log_probs[:, 4])
    return CachedResponse(b"12345678", length, {"reward": 0.5}, checks, topk)


# Runs


def test_record_of_a_run(tmp_path):
    RunFolder.open(tmp_path / "run", RUN, name="tvkd")
    path = tmp_path / "run" / "run.json"

    def read():
        found = RunFolder.open(path.parent, RUN, name="tvkd")
        stored = json.loads(path.read_text())
        assert (stored["name"], stored["config"]) == ("tvkd", RUN)
        assert found.config == RUN

    cases = file_cases(path, as_json, 1000, read, RunMismatch)
    count_verdicts(cases, loaded=50, refused=200)
    path.unlink()
    os.mkfifo(path)
    assert verdict(read, RunMismatch, path) == "refused"


def test_result_of_a_stage(tmp_path):
    stage = RunFolder.open(tmp_path / "run", RUN).stage("sft")
    stage.finish({"loss": 0.5, "steps": [1, 2], "deep": {"a": None}})
    path = stage.path / "done.json"

    def read():
        assert isinstance(stage.result, dict)

    cases = file_cases(path, as_json, 300, read, RunMismatch)
    count_verdicts(cases, loaded=50, refused=40)


def test_metrics_of_a_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": i, "metrics": {"loss": 1.5 * i}} for i in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def damage(whole, seed):
        parts = whole.splitlines()
        parts[seed % 3] = damaged_json(lines[seed % 3], seed)
        return b"\n".join(parts) + b"\n"

    def read():
        assert all(isinstance(entry, dict) for entry in read_metrics(tmp_path))

    cases = file_cases(path, damage, 200, read, ValueError)
    count_verdicts(cases, loaded=20, refused=20)


# Records


def test_lines_of_records_are_kept_or_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "é?"}]
    records = [
        PreferenceRecord("p", "a", "b", label=0.25),
        PreferenceRecord(chat, "a\nb", "\x00", "hint", 0.5, -1.0),
        PreferenceRecord("🙂", "<|im_end|>", "\u2028a"),
    ]
    write_jsonl(path, records)
    assert read_jsonl(path, PreferenceRecord)[0] == records

    def damage(whole, seed):
        if seed % 3 == 0:
            return damaged_bytes(whole, seed)
        line = damaged_json(records[seed % 2].to_json(), seed)
        return whole + line + b"\n" * (seed % 2)

    def read():
        lines = path.read_bytes().split(b"\n")
        found, report = read_jsonl(path, PreferenceRecord, on_error="skip")
        assert report.read == len(found)
        assert report.read + report.total_skipped == len(lines) - (lines[-1] == b"")
        assert str(report).isprintable(), ascii(str(report))
        for record in found:
            data = json.loads(json.dumps(record.to_json()))
            assert PreferenceRecord.from_json(data) == record
        if report.skipped.keys() - {"empty line"}:
            read_jsonl(path, PreferenceRecord)  # must refuse
            raise AssertionError("a bad line was read")

    cases = file_cases(path, damage, 450, read, RecordError)
    count_verdicts(cases, loaded=10, refused=200)


@pytest.mark.parametrize("depth", [10, 400, 480, 500, 900, 980, 995, 1005, 10**5])
def test_nesting_is_refused_at_every_depth(tmp_path, depth):
    path = tmp_path / "deep.jsonl"
    for opening, closing in (("[", "]"), ('{"role":', "}"), ('[{"content":', "}]")):
        value = opening * depth + '""' + closing * depth
        path.write_text('{"prompt": ' + value + ', "response": "r"}\n')
        with pytest.raises(RecordError, match="deep.jsonl:1: ") as error:
            read_jsonl(path, DemonstrationRecord)
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500
