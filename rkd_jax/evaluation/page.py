"""The report as one HTML page that needs nothing beside it.

Styles are inline, figures are embedded as PNG in two versions (the browser picks the
one for a light or a dark page), there is no script. Every piece of text passes through
`html.escape`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from rkd_jax.evaluation.content import (
    COLUMNS,
    DataSource,
    Difference,
    Incident,
    Report,
    SamplePrompt,
    best_policies,
    cell,
)
from rkd_jax.evaluation.formatting import decimals, duration, number, signed, spread
from rkd_jax.evaluation.plots import Plot
from rkd_jax.evaluation.styles import STYLES

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$styles</style>
</head>
<body>
<header>
<h1>$title</h1>
$byline
</header>
<main>
$sections
</main>
</body>
</html>
""")
_MARKS = {"pass": "✓", "fail": "✗", "note": "•"}


def render_page(
    report: Report, plots: Sequence[Plot], flags: Mapping[str, Sequence[str]]
) -> str:
    """The whole page.

    Args:
        report: the content; empty parts leave no heading behind.
        plots: from `rkd_jax.evaluation.plots.render`.
        flags: from `quality_flags`.
    """
    sections = (
        ("", _verdicts(report)),
        ("Policies", _policies(report, flags)),
        ("Paired differences", _differences(report.differences, report.unit)),
        ("Figures", _figures(plots)),
        ("Samples", _samples(report.samples, flags)),
        ("Data", _data(report.data)),
        ("Timing", _timings(report.timings)),
        ("Provenance", _provenance(report)),
    )
    return _PAGE.substitute(
        title=escape(report.title),
        styles=STYLES,
        byline=_byline(report),
        sections="\n".join(
            f"<section>{f'<h2>{name}</h2>' if name else ''}{body}</section>"
            for name, body in sections
            if body
        ),
    )


def _byline(report: Report) -> str:
    parts = []
    if report.created:
        parts.append(f"<span>{escape(report.created)}</span>")
    if report.command:
        parts.append(f"<code>{escape(report.command)}</code>")
    return f'<p class="byline">{" ".join(parts)}</p>' if parts else ""


def _verdicts(report: Report) -> str:
    lines = (
        f'<li class="{v.status}"><span class="mark">{_MARKS[v.status]}</span>'
        f"<span>{escape(v.text)}</span></li>"
        for v in report.summary
    )
    return f'<ul class="verdicts">{"".join(lines)}</ul>' if report.summary else ""


def _policies(report: Report, flags: Mapping[str, Sequence[str]]) -> str:
    """The main table, without the columns that no policy fills."""
    if not report.policies:
        return ""
    best = best_policies(report.policies, flags)
    cells = {c.key: [cell(p, c) for p in report.policies] for c in COLUMNS}
    columns = [c for c in COLUMNS if any(x is not None for x in cells[c.key])]
    head = "".join(
        f"<th><span>{escape(c.label)}</span><small>{escape(c.hint)}</small></th>"
        for c in columns
    )
    rows = []
    for index, policy in enumerate(report.policies):
        reasons = flags.get(policy.name, ())
        values = "".join(
            _value(
                cells[c.key][index],
                decimals([x for x in cells[c.key] if x], percent=c.percent),
                c.percent,
                best.get(c.key) == policy.name,
            )
            for c in columns
        )
        rows.append(
            f'<tr class="{"flagged" if reasons else policy.role}">'
            f'<th scope="row">{escape(policy.name)}{_role(policy)}</th>{values}</tr>'
        )
        if reasons:
            marks = "".join(f"<span>⚠ {escape(reason)}</span>" for reason in reasons)
            rows.append(
                f'<tr class="flagged why"><td colspan="{len(columns) + 1}">'
                f'<div class="flags">{marks}</div></td></tr>'
            )
    without: dict[str, list[str]] = {}
    for policy in report.policies:
        if policy.gap_closed and policy.gap_closed.note:
            without.setdefault(policy.gap_closed.note, []).append(policy.name)
    notes = [
        f"{', '.join(names)}: gap closed is not reported, {note}."
        for note, names in without.items()
    ]
    legend = (
        f"Intervals: 95%, over {report.unit}. Bold green: the best student of the "
        "column; students flagged for collapsed text do not compete."
    )
    below = "".join(f'<p class="legend">{escape(t)}</p>' for t in (legend, *notes))
    return (
        f'<div class="scroll"><table class="policies"><thead><tr><th>policy</th>{head}'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>{below}"
    )


def _role(policy) -> str:
    """The role, unless the name already says it."""
    if policy.role == "student" or policy.role in policy.name.lower():
        return ""
    return f'<span class="role">{policy.role}</span>'


def _value(interval, places: int, percent: bool, best: bool) -> str:
    if interval is None:
        return '<td class="none">–</td>'
    shown = number(interval.mean, places, percent=percent)
    detail = spread(interval, places, percent=percent)
    small = f"<small>{_typographic(detail)}</small>" if detail else ""
    mark = ' class="best"' if best else ""
    return f"<td{mark}>{_typographic(shown)}{small}</td>"


def _differences(differences: Sequence[Difference], unit: str) -> str:
    if not differences:
        return ""
    places = decimals([d.difference for d in differences])
    rows = "".join(
        f'<tr><th scope="row">{escape(d.first)} <span class="minus">minus</span> '
        f"{escape(d.second)}</th><td>{escape(d.quantity)}</td>"
        f"<td>{_typographic(signed(d.difference, places))}</td>"
        f"<td>{d.difference.n}</td>"
        f'<td><span class="chip {d.finding.split()[0]}">{d.finding}</span></td></tr>'
        for d in differences
    )
    return (
        '<div class="scroll"><table class="differences"><thead><tr><th>comparison</th>'
        f"<th>of</th><th>difference [95%]</th><th>{unit}</th><th>finding</th></tr>"
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _figures(plots: Sequence[Plot]) -> str:
    def source(png: bytes) -> str:
        return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

    figures = (
        f'<figure class="{"wide" if p.wide else "half"}"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{source(p.dark)}">'
        f'<img alt="{escape(p.caption)}" src="{source(p.light)}"></picture>'
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in plots
    )
    return f'<div class="figures">{"".join(figures)}</div>' if plots else ""


def _samples(
    samples: Sequence[SamplePrompt], flags: Mapping[str, Sequence[str]]
) -> str:
    """A card per response; the best reward among policies without a flag is marked."""

    def card(response, best) -> str:
        flagged = response.policy in flags
        known = response.reward is not None
        reward = f"{response.reward:+.2f}" if known else "–"
        mark = " best" if known and not flagged and response.reward == best else ""
        text = escape(response.text) or '<span class="none">(empty)</span>'
        return (
            f'<div class="card{" flagged" if flagged else ""}"><div class="who">'
            f"<span>{escape(response.policy)}{' ⚠' if flagged else ''}</span>"
            f'<span class="score{mark}">{_typographic(reward)}</span></div>'
            f'<div class="text">{text}</div></div>'
        )

    def article(sample) -> str:
        rewards = [
            r.reward
            for r in sample.responses
            if r.reward is not None and r.policy not in flags
        ]
        best = max(rewards, default=None)
        cards = "".join(card(response, best) for response in sample.responses)
        return (
            f'<article><p class="prompt">{escape(sample.prompt)}</p>'
            f'<div class="cards">{cards}</div></article>'
        )

    return "".join(map(article, samples))


def _data(sources: Sequence[DataSource]) -> str:
    if not sources:
        return ""
    rows = []
    for source in sources:
        incidents = "".join(
            f"<li>{i.count:,} {word}: {escape(i.reason)}{_places(i)}</li>"
            for word, group in (("skipped", source.skipped), ("cut", source.changed))
            for i in group
        )
        skipped = sum(i.count for i in source.skipped)
        rows.append(
            f'<tr><th scope="row">{escape(source.name)}</th><td>{source.used:,}</td>'
            f"<td>{skipped:,}</td><td><ul>{incidents}</ul></td></tr>"
        )
    return (
        '<div class="scroll"><table class="data"><thead><tr><th>source</th>'
        "<th>used</th><th>skipped</th><th>why, and where first</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _places(incident: Incident) -> str:
    """Where it was seen first, and what to do about it."""
    places = ", ".join(map(str, incident.places))
    more = ", …" if incident.count > len(incident.places) else ""
    parts = [f"at {places}{more}" if places else "", incident.remedy]
    text = "; ".join(part for part in parts if part)
    return f' <span class="muted">{escape(text)}</span>' if text else ""


def _timings(timings: Mapping[str, float]) -> str:
    """A bar per stage, relative to the longest, and "total", or else their sum."""
    stages = {name: seconds for name, seconds in timings.items() if name != "total"}
    longest = max(stages.values(), default=0.0) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{escape(stage)}</th><td>{duration(seconds)}</td>'
        f'<td><span class="bar" style="width:{100 * seconds / longest:.1f}%"></span>'
        "</td></tr>"
        for stage, seconds in stages.items()
    )
    whole = timings.get("total", sum(stages.values()))
    total = (
        f'<tr class="total"><th scope="row">total</th>'
        f"<td>{duration(whole)}</td><td></td></tr>"
    )
    return (
        f'<table class="timings"><tbody>{rows}{total}</tbody></table>' if rows else ""
    )


def _provenance(report: Report) -> str:
    """Versions and asset hashes as lists, the resolved settings folded away."""
    parts = [
        _definitions("Versions", report.versions),
        _definitions("Assets, SHA-256", report.assets),
    ]
    if report.settings:
        parts.append(
            "<details><summary>Resolved settings</summary>"
            f"<pre>{escape(_pretty(report.settings))}</pre></details>"
        )
    return "".join(parts)


def _definitions(title: str, pairs: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(str(key))}</dt><dd><code>{escape(str(value))}</code></dd>"
        for key, value in pairs.items()
    )
    return f"<h3>{escape(title)}</h3><dl>{rows}</dl>" if rows else ""


def _pretty(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, default=str, ensure_ascii=False)


def _typographic(text: str) -> str:
    """A true minus sign for the hyphen of a number."""
    return escape(text).replace("-", "−")
