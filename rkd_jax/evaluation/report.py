"""A run's results: one HTML page for people, ``report.json`` for programs.

``write_report(folder, report)`` leaves behind

- ``report.html``: self-contained, readable in light and dark;
- ``report.json``: the same content, see `report_json`;
- the figures as PNG files, in their light version.

The records that make up a report live in `rkd_jax.evaluation.content`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkd_jax.evaluation import plots
from rkd_jax.evaluation.content import COLUMNS, Report, cell, quality_flags
from rkd_jax.evaluation.formatting import as_text, decimals, signed
from rkd_jax.evaluation.page import render_page

FORMAT = 1  # of report.json; rises when a key changes its meaning
_TERMINAL = {
    "reward": "reward",
    "gap_closed": "gap closed",
    "win_rate": "win rate",
    "forward_kl": "fwd KL",
    "reverse_kl": "rev KL",
    "teacher_nll": "NLL",
    "distinct_2": "dist-2",
    "length": "length",
    "ended_share": "ended",
    "preference_accuracy": "pairs",
    "seconds_per_step": "s/step",
    "peak_gib": "GiB",
}


def write_report(folder: str | os.PathLike[str], report: Report) -> Path:
    """Write the page, the JSON and the figures into ``folder``, each file atomically.

    Args:
        folder: created if missing; older files of the same names are replaced.
        report: the content.

    Returns:
        The path of ``report.html``.

    Raises:
        ImportError: there is something to plot and matplotlib is missing.
        OSError: ``folder`` cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flags = _flags(report)
    figures = plots.render(report, flags)
    text = json.dumps(
        report_json(report), indent=1, allow_nan=False, ensure_ascii=False
    )
    for figure in figures:
        _write(folder / f"{figure.name}.png", figure.light)
    _write(folder / "report.json", text.encode())
    page = folder / "report.html"
    _write(page, render_page(report, figures, flags).encode())
    return page


def report_json(report: Report) -> dict[str, Any]:
    """The report as JSON values, without NaN: an undefined number is null.

    Keys: ``format`` (1); then the fields of `Report` under their own names, records as
    objects of their fields (an `Interval` is ``{"mean", "low", "high", "n"}``); then
    ``flags``, reasons by policy from `quality_flags`. A `Difference` also carries its
    ``finding``.
    """
    values = {"format": FORMAT, **_plain(report), "flags": _plain(_flags(report))}
    for entry, difference in zip(
        values["differences"], report.differences, strict=True
    ):
        entry["finding"] = difference.finding
    return values


def summary_table(report: Report) -> str:
    """The main table, the flags, the differences and the verdicts as plain text."""
    flags = _flags(report)
    columns = [c for c in COLUMNS if c.key in _TERMINAL]
    table = [["policy"], *([p.name] for p in report.policies)]
    for column in columns:
        cells = [cell(policy, column) for policy in report.policies]
        shown = [c for c in cells if c is not None]
        if shown:
            places = decimals(shown, percent=column.percent)
            table[0].append(_TERMINAL[column.key])
            for row, value in zip(table[1:], cells, strict=True):
                row.append(as_text(value, places, percent=column.percent))
    lines = [report.title, ""]
    if report.policies:
        lines += [*_aligned(table), ""]
    lines += [f"! {name}: {reason}" for name, why in flags.items() for reason in why]
    places = decimals([d.difference for d in report.differences])
    lines += [
        f"{d.first} - {d.second}: {d.quantity} {signed(d.difference, places)}, "
        f"{d.finding}"
        for d in report.differences
    ]
    lines += [f"[{verdict.status}] {verdict.text}" for verdict in report.summary]
    return "\n".join(lines).rstrip() + "\n"


def _flags(report: Report) -> dict[str, tuple[str, ...]]:
    return quality_flags(
        report.policies,
        nll_shift=report.nll_shift,
        distinct_drop=report.distinct_drop,
    )


def _aligned(table: list[list[str]]) -> list[str]:
    """First column left, the others right, a rule under the head."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        first, *others = [
            text.rjust(width) for text, width in zip(row, widths, strict=True)
        ]
        lines.append("  ".join([row[0].ljust(len(first)), *others]))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def _plain(value: Any) -> Any:
    """JSON values of records, arrays and paths; NaN and infinities become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):  # numpy and jax
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def _write(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
