"""Readers account for every row, writers never leave half a line."""

import json
from pathlib import Path

import numpy as np
import pytest

from rkd_jax.data import jsonl
from rkd_jax.data.jsonl import append_jsonl, write_jsonl
from rkd_jax.data.records import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    RecordError,
)
from rkd_jax.data.sources import from_parquet, from_rows, from_tfds, read_jsonl

SHARED = Path(__file__).parents[2].parent / "shared" / "data"

GOOD = b'{"prompt": "p", "response": "r"}\n'
ROWS = [{"q": "2 + 2?", "a": "4"}, {"q": "häß 日本 🙂", "a": "ok"}]
COLUMNS = {"prompt": "q", "response": "a"}
RECORDS = [DemonstrationRecord(row["q"], row["a"]) for row in ROWS]


@pytest.fixture
def file(tmp_path):
    """Writes bytes to a file and gives its path."""

    def write(data: bytes) -> Path:
        path = tmp_path / "data.jsonl"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "p" "response": "r"}\n', "malformed JSON; column 16"),
        (b"[1, 2]\n", "a list instead of an object"),
        (b'{"prompt": "p"}\n', "missing 'response'"),
        (b'{"prompt": "p", "response": "r", "x": 1}\n', "unknown 'x'"),
        (b'{"prompt": "p", "response": ""}\n', "response: empty"),
        (b'{"prompt": "p", "response": "\\ud800"}\n', "response: invalid Unicode"),
        (b'{"prompt": "p", "response": "\xff"}\n', "not UTF-8; byte 29"),
        (b'{"prompt": "' + b"x" * 300 + b'"}\n', "line longer than 99 characters"),
        (b'{"prompt": "' + b"x" * 9999 + b'"}\n', "line longer than 99 characters"),
        (b"[" * 90 + b"\n", "malformed JSON"),
        (b'{"prompt": "p", "respo', "torn last line"),
        (b'{"prompt": "p", "response": "\xc3', "torn last line"),
    ],
)
def test_bad_line_is_named_or_counted(file, line, message):
    path = file(GOOD * 2 + line)
    with pytest.raises(RecordError) as caught:
        read_jsonl(path, DemonstrationRecord, max_chars=99)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

    records, report = read_jsonl(
        path, DemonstrationRecord, on_error="skip", max_chars=99
    )
    assert records == [DemonstrationRecord("p", "r")] * 2
    ((reason, skipped),) = report.skipped.items()
    assert message.startswith(reason)
    assert (skipped.count, skipped.places) == (1, [3])


def test_reasons_that_quote_their_line_do_not_pile_up(file):
    line = '{"prompt": "p", "response": "r", "extra %d": 1}\n'
    lines = [line % number for number in range(50)] + [line % 3] * 2
    path = file("".join(lines).encode())
    _, report = read_jsonl(path, DemonstrationRecord, on_error="skip")
    other = report.skipped.pop("other reasons")
    assert list(report.skipped) == [f"unknown 'extra {n}'" for n in range(20)]
    counts = [entry.count for entry in report.skipped.values()]
    assert counts == [1, 1, 1, 3, *[1] * 16]
    assert (other.count, other.places) == (30, [21, 22, 23])
    assert other.remedy.startswith("the first is unknown 'extra 20'; ")


def test_reading_goes_on_behind_an_over_long_line(file):
    for length in (395, 396, 397, 398, 399, 400, 5000):
        path = file(b"x" * length + b"\n" + GOOD)
        records, report = read_jsonl(
            path, DemonstrationRecord, on_error="skip", max_chars=99
        )
        assert records == [DemonstrationRecord("p", "r")]
        assert list(report.skipped) == ["line longer than 99 characters"]


def test_line_of_exactly_max_chars_is_read(file):
    text = '{"prompt": "%s"}' % ("日" * 50)
    path = file(text.encode() + b"\r\n")
    records, _ = read_jsonl(path, PromptRecord, max_chars=len(text))
    assert records == [PromptRecord("日" * 50)]
    with pytest.raises(RecordError, match=f"longer than {len(text) - 1} char"):
        read_jsonl(path, PromptRecord, max_chars=len(text) - 1)


def test_empty_lines_mark_and_missing_final_feed_are_harmless(file):
    path = file(b"\xef\xbb\xbf" + GOOD + b"\n  \n" + GOOD.rstrip())
    records, report = read_jsonl(path, DemonstrationRecord)
    assert records == [DemonstrationRecord("p", "r")] * 2
    assert report.to_json() == {
        "source": str(path),
        "read": 2,
        "skipped": {"empty line": {"count": 2, "places": [2, 3], "remedy": "harmless"}},
    }


def test_report_is_one_line_and_json(file):
    bad = b'{"prompt": "p"}\n'
    _, report = read_jsonl(
        file(GOOD + bad * 5 + b"{\n"), DemonstrationRecord, on_error="skip"
    )
    text = str(report)
    assert "1 record read, 6 skipped." in text
    assert "missing 'response': 5 (at 2, 3, 4, ...:" in text
    assert "malformed JSON: 1 (at 7:" in text
    assert "\n" not in text
    assert json.loads(json.dumps(report.to_json()))["read"] == 1
    assert report.total_skipped == 6


def test_nothing_to_read_is_an_error(file, tmp_path):
    with pytest.raises(RecordError, match="holds no record"):
        read_jsonl(file(b""), PromptRecord)
    with pytest.raises(RecordError, match="holds no record"):
        read_jsonl(file(b"\n\n"), PromptRecord)
    records, report = read_jsonl(file(b"{\n"), PromptRecord, on_error="skip")
    assert (records, report.read, report.total_skipped) == ([], 0, 1)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_jsonl(tmp_path / "absent.jsonl", PromptRecord)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_jsonl(tmp_path, PromptRecord)


def test_unknown_policy_and_unknown_column_field_are_refused(file):
    with pytest.raises(ValueError, match="on_error is 'raise' or 'skip'"):
        read_jsonl(file(GOOD), DemonstrationRecord, on_error="ignore")
    with pytest.raises(ValueError, match="no field 'answer'.*'response'"):
        from_rows([], DemonstrationRecord, {"answer": "a"})


def test_columns_rename_and_compute(file):
    path = file(json.dumps({"q": "2 + 2?", "a": {"text": "4"}}).encode())
    columns = {"prompt": "q", "response": lambda row: row["a"]["text"]}
    records, _ = read_jsonl(path, DemonstrationRecord, columns)
    assert records == RECORDS[:1]
    with pytest.raises(RecordError, match=":1: response: its function failed; KeyErr"):
        read_jsonl(path, DemonstrationRecord, columns | {"response": lambda r: r["b"]})
    with pytest.raises(RecordError, match="missing column 'b'; the row has 'q', 'a'"):
        read_jsonl(path, DemonstrationRecord, {"prompt": "q", "response": "b"})


def test_rows_of_bytes_equal_rows_of_text():
    as_bytes = [{k: v.encode() for k, v in row.items()} for row in ROWS]
    as_numpy = [{k: np.bytes_(v.encode()) for k, v in row.items()} for row in ROWS]
    for rows in (ROWS, as_bytes, as_numpy, iter(as_bytes)):
        assert from_rows(rows, DemonstrationRecord, COLUMNS)[0] == RECORDS
    with pytest.raises(RecordError, match="rows:1: bytes that are not UTF-8"):
        from_rows(
            [*as_bytes[:1], {"q": b"\xff", "a": b"x"}], PromptRecord, {"prompt": "q"}
        )


def test_rows_with_numpy_rewards_and_transposed_messages():
    row = {
        "prompt": {
            "role": np.array([b"system", b"user"], object),
            "content": np.array([b"Be brief.", b"Hi"], object),
        },
        "chosen": np.str_("a"),
        "rejected": "b",
        "chosen_reward": np.float32(0.5),
        "rejected_reward": np.int64(-1),
    }
    ((record,), _) = from_rows([row], PreferenceRecord)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    assert record == PreferenceRecord(
        chat, "a", "b", chosen_reward=0.5, rejected_reward=-1.0
    )
    with pytest.raises(RecordError, match="rows:0: a int instead of an object"):
        from_rows([3], PromptRecord, {"prompt": "q"})


@pytest.mark.parametrize("binary", [False, True])
def test_parquet(tmp_path, binary):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    kind = pyarrow.binary() if binary else pyarrow.string()
    table = pyarrow.table(
        {key: pyarrow.array([row[key] for row in ROWS], kind) for key in "qa"}
    )
    path = tmp_path / "rows.parquet"
    parquet.write_table(table, path)
    records, report = from_parquet(path, DemonstrationRecord, COLUMNS)
    assert records == RECORDS
    assert report.source == str(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        from_parquet(tmp_path / "absent", DemonstrationRecord)
    path.write_bytes(GOOD)
    with pytest.raises(ValueError, match=r"rows\.parquet: not a parquet file"):
        from_parquet(path, DemonstrationRecord)


@pytest.fixture(scope="module")
def tfds():
    return pytest.importorskip("tensorflow_datasets")


def prepared(tfds, folder, file_format):
    """A genuine TFDS data set of ROWS and of chats, built without TensorFlow."""
    text = tfds.features.Text()

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None  # no package with checksums stands behind it

        def _info(self):
            chat = tfds.features.Sequence({"role": text, "content": text})
            features = tfds.features.FeaturesDict({"q": text, "a": text, "chat": chat})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, row in enumerate(ROWS):
                yield i, row | {"chat": [{"role": "user", "content": row["q"]}]}

    builder = Tiny(data_dir=folder, file_format=file_format)
    builder.download_and_prepare()
    return builder.data_dir


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_tfds_without_tensorflow(tfds, tmp_path, file_format):
    folder = prepared(tfds, tmp_path, file_format)
    records, _ = from_tfds(folder, "train", DemonstrationRecord, COLUMNS)
    # TFDS shuffles on preparation; the set of records is what must survive.
    assert set(map(str, records)) == set(map(str, RECORDS))
    chats, _ = from_tfds(folder, "train", PromptRecord, {"prompt": "chat"})
    assert [record.prompt for record in chats] == [
        [{"role": "user", "content": record.prompt}] for record in records
    ]


def test_tfds_slice_is_honoured_or_refused(tfds, tmp_path):
    folder = prepared(tfds, tmp_path / "array_record", "array_record")
    whole, _ = from_tfds(folder, "train", DemonstrationRecord, COLUMNS)
    half, _ = from_tfds(folder, "train[:50%]", DemonstrationRecord, COLUMNS)
    assert half == whole[:1]
    # TFDS 4.9.10 hands out all rows of parquet data for any slice.
    folder = prepared(tfds, tmp_path / "parquet", "parquet")
    try:
        half, _ = from_tfds(folder, "train[:50%]", DemonstrationRecord, COLUMNS)
        fault = None
    except ValueError as error:
        half, fault = None, str(error)
    if fault is None:
        assert half == from_tfds(folder, "train", DemonstrationRecord, COLUMNS)[0][:1]
    else:
        assert "gives 2 rows, the split has 1" in fault


def test_tfds_catalogue_name_and_text_that_is_no_bytes(tfds):
    # TFDS mocks hand out str where real data sets hand out bytes.
    with tfds.testing.mock_data(num_examples=3):
        records, report = from_tfds(
            "imdb_reviews", "train", PromptRecord, {"prompt": "text"}
        )
    assert (len(records), report.source) == (3, "imdb_reviews[train]")


def test_tfds_in_tfrecord_format_is_refused(tfds, tmp_path):
    folder = Path(prepared(tfds, tmp_path, "array_record"))
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="tfrecord, which needs TensorFlow"):
        from_tfds(folder, "train", DemonstrationRecord, COLUMNS)


@pytest.mark.parametrize(
    ("read", "package"),
    [
        (lambda: from_parquet("x", PromptRecord), "pyarrow"),
        (lambda: from_tfds("x", "train", PromptRecord), "tensorflow-datasets"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, read, package):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("rkd_jax.data.sources.importlib.import_module", missing)
    with pytest.raises(ImportError, match=f"pip install .*{package}"):
        read()


def test_write_then_read(tmp_path):
    path = tmp_path / "out.jsonl"
    records = [*RECORDS, DemonstrationRecord("line\u2028sep\nfeed", "r\x00\x85")]
    write_jsonl(path, records)
    assert read_jsonl(path, DemonstrationRecord)[0] == records
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    write_jsonl(path, RECORDS)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jsonl.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_jsonl(path, RECORDS[:1])
    assert read_jsonl(path, DemonstrationRecord)[0] == RECORDS
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_append_adds_whole_lines(tmp_path, file):
    path = tmp_path / "new.jsonl"
    append_jsonl(path, RECORDS[:1])
    append_jsonl(path, RECORDS[1:])
    assert read_jsonl(path, DemonstrationRecord)[0] == RECORDS
    whole_without_feed = file(GOOD.rstrip())
    append_jsonl(whole_without_feed, RECORDS)
    assert read_jsonl(whole_without_feed, DemonstrationRecord)[0] == [
        DemonstrationRecord("p", "r"),
        *RECORDS,
    ]


def test_append_refuses_or_repairs_a_torn_line(file):
    for tail in (b'{"prompt": "', b'{"prompt": "' + b"x" * 200_000):
        path = file(GOOD + tail)
        with pytest.raises(RecordError, match="torn last line"):
            append_jsonl(path, RECORDS)
        assert path.read_bytes() == GOOD + tail
        append_jsonl(path, RECORDS, repair=True)
        assert read_jsonl(path, DemonstrationRecord)[0] == [
            DemonstrationRecord("p", "r"),
            *RECORDS,
        ]


def test_append_that_runs_out_of_space_leaves_the_old_file(file):
    resource = pytest.importorskip("resource")
    path = file(GOOD)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for a part of the new line only: the write really stops in the middle.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(GOOD) + 10, old[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_jsonl(path, RECORDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == GOOD


MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def solution_pairs(path):
    """GSM8K model solutions, every right one against every wrong one."""
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            solutions = [row[model] for model in MODELS]
            for right in solutions:
                for wrong in solutions:
                    if right["is_correct"] and not wrong["is_correct"]:
                        yield {
                            "prompt": row["question"],
                            "chosen": right["solution"],
                            "rejected": wrong["solution"],
                        }


@pytest.mark.assets
def test_gsm8k_solutions_give_1168_pairs():
    path = SHARED / "gsm8k" / "model_solutions.jsonl"
    if not path.is_file():
        pytest.skip("shared GSM8K data are absent")
    records, report = from_rows(solution_pairs(path), PreferenceRecord)
    assert len(records) == 1168
    assert report.total_skipped == 0
    assert len({record.prompt for record in records}) == 354


@pytest.mark.assets
def test_foreign_jsonl_files_are_read_by_columns():
    path = SHARED / "gsm8k" / "train.jsonl"
    if not path.is_file():
        pytest.skip("shared GSM8K data are absent")
    columns = {"prompt": "question", "response": "answer"}
    records, report = read_jsonl(path, DemonstrationRecord, columns)
    assert (len(records), report.total_skipped) == (7473, 0)
    assert all("####" in record.response for record in records)
    with pytest.raises(RecordError, match=r"train\.jsonl:1: missing 'prompt'"):
        read_jsonl(path, DemonstrationRecord)
