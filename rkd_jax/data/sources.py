"""Records from files and data sets, with every refused row accounted for.

All readers return ``(records, ReadReport)``. With ``on_error="raise"`` the first bad
row ends the reading with one line that names place, field and remedy; with ``"skip"``
bad rows are left out and counted by reason.

Foreign data is renamed by ``columns``: field -> column name, or field -> function of
the row. `write_jsonl` and `append_jsonl` write records back.

>>> from rkd_jax.data.records import DemonstrationRecord
>>> rows = [{"question": b"2 + 2?", "answer": b"4"}, {"question": b"3 + 3?"}]
>>> columns = {"prompt": "question", "response": "answer"}
>>> records, report = from_rows(rows, DemonstrationRecord, columns, on_error="skip")
>>> records
[DemonstrationRecord(prompt='2 + 2?', response='4', teacher_prompt=None)]
>>> print(report)
rows: 1 record read, 1 skipped. missing column 'answer': 1 (at 1: the row has \
'question').
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from rkd_jax.data.jsonl import EMPTY_LINE, append_jsonl, json_lines, write_jsonl
from rkd_jax.data.records import Record, RecordError, quoted
from rkd_jax.untrusted import one_line, refused

__all__ = [
    "Columns",
    "ReadReport",
    "Skipped",
    "append_jsonl",
    "from_parquet",
    "from_rows",
    "from_tfds",
    "read_jsonl",
    "write_jsonl",
]

R = TypeVar("R", bound=Record)
Columns = Mapping[str, str | Callable[[Mapping[str, Any]], Any]]
OnError = Literal["raise", "skip"]
OTHER_REASONS = "other reasons"


@dataclasses.dataclass
class Skipped:
    """Rows left out for one reason: how many, the first places, the first remedy."""

    count: int = 0
    places: list[int] = dataclasses.field(default_factory=list)
    remedy: str = ""


@dataclasses.dataclass
class ReadReport:
    """What a reader took and left. ``print`` it, or `to_json` it into a results file.

    Example: ``ReadReport("pairs.jsonl", read=2, skipped={"malformed JSON": Skipped(1,
    [3], "column 9: ...")})``. Places are line numbers from 1 in files of lines, row
    numbers from 0 elsewhere. A reason may quote the row, so there may be as many as
    rows: those that come first have an entry each, the later ones `OTHER_REASONS`.
    """

    source: str
    read: int = 0
    skipped: dict[str, Skipped] = dataclasses.field(default_factory=dict)

    PLACES_KEPT = 3
    REASONS_KEPT = 20

    @property
    def total_skipped(self) -> int:
        """Number of rows left out, empty lines included."""
        return sum(entry.count for entry in self.skipped.values())

    def skip(self, place: int, error: RecordError) -> None:
        """Count one row that was left out."""
        if error.reason in self.skipped or len(self.skipped) < self.REASONS_KEPT:
            reason, remedy = error.reason, error.remedy
        else:
            reason, remedy = OTHER_REASONS, f"the first is {error}"
        entry = self.skipped.setdefault(reason, Skipped(remedy=remedy))
        entry.count += 1
        if len(entry.places) < self.PLACES_KEPT:
            entry.places.append(place)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-able dict."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        records = "record" if self.read == 1 else "records"
        parts = [
            f"{self.source}: {self.read} {records} read, {self.total_skipped} skipped."
        ]
        for reason, entry in sorted(
            self.skipped.items(), key=lambda item: -item[1].count
        ):
            places = ", ".join(map(str, entry.places))
            more = ", ..." if entry.count > len(entry.places) else ""
            parts.append(
                f"{reason}: {entry.count} (at {places}{more}: {entry.remedy})."
            )
        return " ".join(parts)


def read_jsonl(
    path: str | Path,
    record_type: type[R],
    columns: Columns | None = None,
    *,
    on_error: OnError = "raise",
    max_chars: int = 1_000_000,
    allow_extra: bool = False,
) -> tuple[list[R], ReadReport]:
    """Read JSON Lines: UTF-8, one object per line, a byte order mark is tolerated.

    Args:
        path: the file. Lines end in a line feed; the last one may lack it.
        record_type: the record to make of each line.
        columns: renaming for foreign files; None means the keys are the field names.
        on_error: ``"raise"`` or ``"skip"``. Empty lines are counted, never an error.
        max_chars: longest line taken; a longer one is never held as a whole.
        allow_extra: ignore unknown keys. With ``columns`` they are ignored anyway.

    Returns:
        Records in file order, and the report. A function of ``columns`` that fails on a
        row makes that row a bad one.

    Raises:
        FileNotFoundError: no such file. RecordError: with ``"raise"``, the first bad
        line, or a file without any record. A last line that was cut off while it was
        written is named as torn.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    build = _builder(record_type, columns, allow_extra)
    with path.open("rb") as file:
        return _collect(json_lines(file, max_chars), build, str(path), on_error)


def from_rows(
    rows: Iterable[Mapping[str, Any]],
    record_type: type[R],
    columns: Columns | None = None,
    *,
    on_error: OnError = "raise",
    allow_extra: bool = False,
    source: str = "rows",
) -> tuple[list[R], ReadReport]:
    """Records from any iterable of mappings: a list, a HF ``datasets.Dataset``, TFDS.

    Bytes are decoded as UTF-8 (TFDS text arrives as bytes), numpy values become Python
    values, and messages stored as ``{"role": [...], "content": [...]}`` become a list
    of messages. Other arguments and errors as `read_jsonl`; ``source`` names the rows
    in messages.
    """
    build = _builder(record_type, columns, allow_extra)
    return _collect(enumerate(rows), build, source, on_error)


def from_parquet(
    path: str | Path,
    record_type: type[R],
    columns: Columns | None = None,
    *,
    on_error: OnError = "raise",
    allow_extra: bool = False,
) -> tuple[list[R], ReadReport]:
    """Records from a parquet file, row group by row group; needs pyarrow.

    Arguments and errors as `from_rows`.
    """
    parquet = _import("pyarrow.parquet", "pyarrow")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    with refused(f"{path}: not a parquet file"):
        file = parquet.ParquetFile(path)
    with file:
        return from_rows(
            _parquet_rows(file, path),
            record_type,
            columns,
            on_error=on_error,
            allow_extra=allow_extra,
            source=str(path),
        )


def _parquet_rows(file: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    batches = file.iter_batches()
    while True:
        with refused(f"{path}: damaged"):
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        if batch is None:
            return
        yield from rows


def from_tfds(
    name_or_dir: str | Path,
    split: str,
    record_type: type[R],
    columns: Columns | None = None,
    *,
    on_error: OnError = "raise",
) -> tuple[list[R], ReadReport]:
    """Records from a TensorFlow data set, without TensorFlow.

    Args:
        name_or_dir: a catalogue name, or the directory of a prepared data set (the one
            that holds ``dataset_info.json``), stored as array_record or parquet.
        split: TFDS split expression, e.g. ``"train[:50%]"``.
        record_type, columns, on_error: as `from_rows`; columns that are not named are
            ignored.

    Raises:
        ImportError: tensorflow-datasets is missing. ValueError: the data set is stored
        as tfrecord, which only TensorFlow reads, or TFDS does not honour the slice.
        RecordError: as `from_rows`.
    """
    tfds = _import("tensorflow_datasets", "tensorflow-datasets importlib_resources")
    source = f"{name_or_dir}[{split}]"
    if (Path(name_or_dir) / "dataset_info.json").is_file():
        builder = tfds.builder_from_directory(name_or_dir)
        file_format = builder.info.file_format.value
        if file_format == "tfrecord":
            raise ValueError(
                f"{name_or_dir}: stored as tfrecord, which needs TensorFlow; prepare "
                "it again with file_format='array_record'"
            )
        rows = builder.as_data_source(split=split)
        expected = builder.info.splits[split].num_examples
        if len(rows) != expected:
            # TFDS 4.9.10 ignores slices of parquet data: train and test would overlap.
            raise ValueError(
                f"{source}: TFDS gives {len(rows)} rows, the split has {expected}; it "
                f"cannot slice {file_format}, prepare the data as array_record"
            )
    else:
        rows = tfds.data_source(str(name_or_dir), split=split)
    numbered = (rows[i] for i in range(len(rows)))
    return from_rows(
        numbered,
        record_type,
        columns,
        on_error=on_error,
        allow_extra=True,
        source=source,
    )


def _collect(
    rows: Iterable[tuple[int, Any]],
    build: Callable[[Any], R],
    source: str,
    on_error: OnError,
) -> tuple[list[R], ReadReport]:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is 'raise' or 'skip', not {on_error!r}")
    records: list[R] = []
    report = ReadReport(source)
    for place, row in rows:
        try:
            if isinstance(row, RecordError):
                raise row
            records.append(build(row))
        except (RecordError, RecursionError) as error:
            if isinstance(error, RecursionError):
                remedy = "a prompt is text, or a list of messages with text"
                error = RecordError("nested too deeply", remedy)
            if on_error == "raise" and error is not EMPTY_LINE:
                raise RecordError(
                    f"{source}:{place}: {error.reason}", error.remedy
                ) from None
            report.skip(place, error)
    report.read = len(records)
    if on_error == "raise" and not records:
        raise RecordError(f"{source}: holds no record", "check path and split")
    return records, report


def _builder(
    record_type: type[R], columns: Columns | None, allow_extra: bool
) -> Callable[[Any], R]:
    if columns is None:
        return lambda row: record_type.from_json(_plain(row), allow_extra=allow_extra)
    known = {field.name for field in dataclasses.fields(record_type)}
    if unknown := [name for name in columns if name not in known]:
        raise ValueError(
            f"columns: {record_type.__name__} has no field {quoted(unknown)}; "
            f"its fields are {quoted(sorted(known))}"
        )

    def build(row: Any) -> R:
        if not isinstance(row, Mapping):
            raise RecordError(f"a {type(row).__name__} instead of an object")
        data = {}
        for field, column in columns.items():
            if callable(column):
                data[field] = _plain(_computed(field, column, row))
            elif column in row:
                data[field] = _plain(row[column])
            else:
                raise RecordError(
                    f"missing column {column!r}", f"the row has {quoted(row)}"
                )
        return record_type.from_json(data)

    return build


def _computed(field: str, function: Callable[[Any], Any], row: Any) -> Any:
    try:
        return function(row)
    except Exception as error:  # of any kind: the function is the user's
        reason = f"{field}: its function failed"
        raise RecordError(reason, one_line(repr(error))) from error


def _plain(value: Any) -> Any:
    """Bytes, numpy values and transposed messages as plain Python values."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RecordError(
                "bytes that are not UTF-8", f"see byte {error.start} of the value"
            ) from None
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        plain = {key: _plain(item) for key, item in value.items()}
        if set(plain) == {"role", "content"}:
            # A TFDS Sequence of messages arrives as a message of sequences.
            roles, contents = plain["role"], plain["content"]
            both = isinstance(roles, list) and isinstance(contents, list)
            if both and len(roles) == len(contents):
                turns = zip(roles, contents, strict=True)
                return [{"role": role, "content": text} for role, text in turns]
        return plain
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _import(module: str, packages: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} is missing ({error}); run: pip install {packages}"
        ) from error
