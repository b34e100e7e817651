"""The report: judgements, numbers, a page that stands alone, JSON without NaN."""

import dataclasses
import html.parser
import io
import json
import math
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from rkd_jax.evaluation import formatting, plots
from rkd_jax.evaluation.content import (
    DataSource,
    Difference,
    GameCurves,
    Incident,
    Phase,
    Policy,
    Report,
    Response,
    SamplePrompt,
    Series,
    Verdict,
    best_policies,
    quality_flags,
)
from rkd_jax.evaluation.intervals import Interval
from rkd_jax.evaluation.report import report_json, summary_table, write_report
from rkd_jax.evaluation.rewards import GapClosed, WinRate

NAN = math.nan
VOID = {"meta", "img", "source"}


def around(mean, half, n=100):
    return Interval(mean, mean - half, mean + half, n)


def policies():
    nothing = Interval(NAN, NAN, NAN, 100)
    return (
        Policy("teacher", "teacher", reward=around(0.6, 0.04), distinct_2=0.8),
        Policy(
            "warm start",
            "start",
            reward=around(0.1, 0.05),
            reverse_kl=around(0.6, 0.03),
            teacher_nll=around(1.9, 0.05),
            distinct_2=0.8,
        ),
        Policy(
            "DPO <b>",
            reward=around(0.3, 0.05),
            gap_closed=GapClosed(0.4, Interval(0.4, 0.31, 0.52, 100)),
            win_rate=WinRate(0.7, 3, Interval(0.7, 0.6, 0.78, 100)),
            reverse_kl=around(0.5, 0.03),
            teacher_nll=around(1.8, 0.05),
            distinct_2=0.75,
        ),
        Policy(
            "PbKD",
            reward=around(0.4, 0.05),
            gap_closed=GapClosed(NAN, nothing, "the lead cannot be told from 0"),
            reverse_kl=around(0.7, 0.03),
            teacher_nll=around(2.1, 0.05),
            distinct_2=0.7,
        ),
        Policy(
            "hack",
            reward=around(0.9, 0.02),
            reverse_kl=around(3.0, 0.1),
            teacher_nll=around(4.4, 0.05),
            distinct_2=0.1,
        ),
    )


@pytest.fixture(scope="module")
def report():
    steps = np.arange(1, 61)
    return Report(
        title="A <script>alert('title')</script> & more",
        command="python -m experiments.quickstart",
        summary=(Verdict("PbKD improves: 5 < 6 & so on", "pass"), Verdict("note")),
        policies=policies(),
        differences=(
            Difference("PbKD", "DPO <b>", around(0.1, 0.04)),
            Difference("DPO <b>", "PbKD", around(-0.001, 0.04)),
        ),
        games={
            "PbKD": GameCurves(
                steps,
                np.exp(-steps / 20),
                np.where(steps == 3, np.nan, 0.01 - steps / 6000),
                1 + steps / 60,
                epsilon=0.02,
                phases=(Phase("offline", 1), Phase("round 1", 31)),
            )
        },
        losses={"DPO": Series([1, 2, 3], [0.69, np.float32(0.6), NAN])},
        samples=(
            SamplePrompt(
                "Say </pre><script>alert('prompt')</script>",
                (
                    Response("teacher", "<script>alert(1)</script>", 0.5),
                    Response("PbKD", "$title ${title} $$", 0.25),
                    Response("hack", "great " * 50, 1.0),
                    Response("warm start", "", None),
                ),
            ),
        ),
        data=(
            DataSource(
                "train.jsonl",
                997,
                skipped=(Incident("malformed JSON", 3, (17, 40), "fix the comma"),),
                changed=(Incident("response truncated", 2, (5, 9)),),
            ),
        ),
        settings={"seed": 0, "path": dataclasses, "rate": NAN, "widths": jnp.arange(2)},
        versions={"jax": "0.10.2"},
        assets={"teacher.gguf": "ab" * 32},
        timings={"train": 61.2, "evaluate": 3.04},
    )


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one" / "report"
    assert write_report(folder, report) == folder / "report.html"
    return folder


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(folder):
    reader = Reader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize(
    ("whole", "shown"), [({}, "1 min 04 s"), ({"total": 70.0}, "1 min 10 s")]
)
def test_the_total_of_a_run_is_one_row_however_it_is_known(whole, shown, tmp_path):
    timings = {"train": 61.2, "evaluate": 3.04} | whole
    path = write_report(tmp_path, Report("A run", timings=timings))
    rows = re.findall("<tr.*?</tr>", path.read_text(encoding="utf-8"))
    (total,) = [row for row in rows if ">total<" in row]
    assert shown in total
    bars = [row for row in rows if "bar" in row]
    assert ["width:100.0%" in row for row in bars] == [True, False]


def test_page_holds_every_part(page):
    text = " ".join(page.text)
    for expected in (
        "PbKD improves: 5 < 6 & so on",
        "python -m experiments.quickstart",
        "± 0.05",
        "[31, 52]",
        "40%",
        "+0.10 [+0.06, +0.14]",
        "not separated",
        "PbKD: gap closed is not reported, the lead cannot be told from 0.",
        "3 skipped: malformed JSON",
        "at 17, 40, …; fix the comma",
        "2 cut: response truncated",
        "1 min 01 s",
        "0.10.2",
        "ab" * 32,
        '"seed": 0',
        "diversity collapsed: distinct-2 0.10, start 0.80",
    ):
        assert expected in text


def test_page_stands_alone(page):
    linked = [v for k, v in page.attributes if k in ("src", "srcset", "href", "action")]
    assert len(linked) == 8  # four figures, each in light and dark
    assert all(value.startswith("data:image/png;base64,") for value in linked)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    styles = page.text[page.text.index(next(t for t in page.text if ":root" in t))]
    assert "url(" not in styles
    assert "@import" not in styles


def test_page_escapes_text_and_leaves_templates_alone(page, folder):
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in source
    assert "DPO <b>" not in source
    text = " ".join(page.text)
    assert "<script>alert(1)</script>" in text
    assert "Say </pre><script>alert('prompt')</script>" in text
    assert "$title ${title} $$" in text
    assert "A <script>alert('title')</script> & more" in text


def test_json_is_strict_and_complete(report, folder):
    def refuse(name):
        raise AssertionError(f"{name} in report.json")

    text = (folder / "report.json").read_text(encoding="utf-8")
    values = json.loads(text, parse_constant=refuse)
    assert values == report_json(report)
    fields = [field.name for field in dataclasses.fields(Report)]
    assert list(values) == ["format", *fields, "flags"]
    assert values["policies"][2]["reward"] == {
        "mean": 0.3,
        "low": 0.25,
        "high": 0.35,
        "n": 100,
    }
    assert values["policies"][3]["gap_closed"]["value"] is None
    assert values["games"]["PbKD"]["slack"][2] is None
    assert values["losses"]["DPO"]["values"][1] == pytest.approx(0.6)
    assert values["settings"]["widths"] == [0, 1]
    assert [d["finding"] for d in values["differences"]] == ["higher", "not separated"]
    assert list(values["flags"]) == ["hack"]


def test_figures_lie_beside_the_page(folder):
    image = pytest.importorskip("matplotlib.image")
    names = {path.name for path in folder.iterdir()}
    figures = {"reward.png", "reward_vs_kl.png", "game_1.png", "losses.png"}
    assert names == {"report.html", "report.json"} | figures
    for name in figures:
        pixels = image.imread(io.BytesIO((folder / name).read_bytes()))
        assert pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.02  # something is drawn


def test_writing_again_replaces_and_a_failure_keeps_the_old(folder, monkeypatch):
    page = folder.parent / "again"
    write_report(page, Report("first"))
    write_report(page, Report("second"))
    assert "<h1>second</h1>" in (page / "report.html").read_text()

    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_report(page, Report("third"))
    assert "<h1>second</h1>" in (page / "report.html").read_text()
    assert json.loads((page / "report.json").read_text())["title"] == "second"
    assert {p.name for p in page.iterdir()} == {"report.html", "report.json"}


def test_an_empty_report_needs_no_matplotlib(tmp_path, monkeypatch, report):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    source = write_report(tmp_path, Report("nothing yet")).read_text()
    assert "<h2>" not in source
    with pytest.raises(ImportError, match="pip install matplotlib"):
        write_report(tmp_path, report)


def test_plots_draw_any_name_and_values_that_are_missing():
    pytest.importorskip("matplotlib")
    single = Interval(0.2, NAN, NAN, 1)
    report = Report(
        "x",
        policies=(Policy("a$^$b", reward=single, reverse_kl=single),),
        games={"$_$": GameCurves([], [], [], [], epsilon=0.1)},
        losses={"$\\x$": Series(range(50), [NAN] * 50)},
    )
    drawn = [plot.name for plot in plots.render(report, {})]
    assert drawn == ["reward", "reward_vs_kl", "game_1", "losses"]


def test_plots_leave_no_global_state(report):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = dict(pyplot.rcParams)
    plots.render(dataclasses.replace(report, games={}, losses={}), {})
    assert dict(pyplot.rcParams) == before
    assert pyplot.get_fignums() == []


def test_summary_is_aligned_plain_text(report):
    text = summary_table(report)
    lines = text.splitlines()
    table = lines[2:9]
    assert len({len(line) for line in table}) == 1
    assert table[0].split()[:2] == ["policy", "reward"]
    assert "0.30 ± 0.05  40% [31, 52]  70% [60, 78]" in text
    assert "! hack: text implausible to the teacher: NLL 4.40, start 1.90" in lines
    assert "DPO <b> - PbKD: reward +0.00 [-0.04, +0.04], not separated" in lines
    assert "[pass] PbKD improves: 5 < 6 & so on" in lines
    assert "nan" not in text
    assert not any(ord(c) < 32 for line in lines for c in line)


def test_flags_need_a_start_and_a_student():
    rows = policies()
    assert set(quality_flags(rows)) == {"hack"}
    assert len(quality_flags(rows)["hack"]) == 2
    assert quality_flags(rows[2:]) == {}
    start_collapsed = dataclasses.replace(rows[4], role="teacher")
    assert quality_flags((*rows[:4], start_collapsed)) == {}


def test_flags_see_text_that_became_too_predictable():
    rows = policies()
    loop = Policy("loop", teacher_nll=around(0.4, 0.01), distinct_2=0.41)
    flags = quality_flags((*rows[:2], loop))
    assert flags == {
        "loop": ("text too predictable to the teacher: NLL 0.40, start 1.90",)
    }
    assert quality_flags((*rows[:2], loop), nll_shift=1.6) == {}
    assert len(quality_flags((*rows[:2], loop), distinct_drop=0.6)["loop"]) == 2


def test_best_is_a_clean_student_and_kl_counts_downwards():
    rows = policies()
    best = best_policies(rows, quality_flags(rows))
    assert best == {"reward": "PbKD", "reverse_kl": "DPO <b>"}
    assert best_policies(rows, {})["reward"] == "hack"


def test_findings_follow_the_interval():
    findings = [
        Difference("a", "b", interval).finding
        for interval in (
            Interval(0.1, 0.01, 0.19, 9),
            Interval(-0.1, -0.19, -0.01, 9),
            Interval(0.1, -0.01, 0.21, 9),
            Interval(0.1, NAN, NAN, 1),
        )
    ]
    assert findings == ["higher", "lower", "not separated", "not separated"]


@pytest.mark.parametrize(
    ("interval", "percent", "expected"),
    [
        (around(0.5312, 0.0425), False, "0.53 ± 0.04"),
        (around(0.53, 0.0042), False, "0.530 ± 0.004"),
        (around(46.2, 2.2), False, "46 ± 2"),
        (around(-0.0004, 0.02), False, "0.00 ± 0.02"),
        (around(12345.6, 120.0), False, "12,346 ± 120"),
        (Interval(0.62, 0.41, 0.85, 9), True, "62% [41, 85]"),
        (Interval(0.71, NAN, NAN, 0), False, "0.71"),
        (Interval(0.93, NAN, NAN, 0), True, "93%"),
        (around(0.5, 0.0), False, "0.50 ± 0.00"),
        (None, False, "–"),
    ],
)
def test_numbers_have_the_decimals_they_deserve(interval, percent, expected):
    places = formatting.decimals([interval] if interval else [], percent=percent)
    assert formatting.as_text(interval, places, percent=percent) == expected


def test_durations():
    shown = [formatting.duration(s) for s in (0.04, 9.96, 59.6, 185, 7625)]
    assert shown == ["0.0 s", "10.0 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: GameCurves([1, 2], [1.0], [1.0, 1.0], [1.0, 1.0], 0.02),
            "1 values of gap for 2 steps",
        ),
        (lambda: Series([1], [1.0, 2.0]), "2 values for 1 steps"),
        (
            lambda: Report("x", policies=(Policy("a"), Policy("a"))),
            "two policies are called 'a'",
        ),
    ],
)
def test_bad_content_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
