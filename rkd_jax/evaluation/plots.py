"""The figures of a report, as PNG bytes, on a light or a dark page.

Matplotlib is imported when a figure is drawn and used through its objects alone: no
pyplot, no global state, no display.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from rkd_jax.evaluation.content import GameCurves, Policy, Report, Series
from rkd_jax.evaluation.formatting import decimals, number
from rkd_jax.evaluation.labels import PLAIN, place_labels

_DPI = 180
_SMOOTH_FROM = 40  # points; shorter series are drawn as they are
_NAMED_POINTS = 8  # points; more are numbered
_DASHED, _DOTTED = (0, (5, 3)), (0, (1.5, 2))


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of one page background."""

    background: str
    text: str
    muted: str
    grid: str
    band: str
    warning: str
    palette: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    text="#1d2430",
    muted="#6b7482",
    grid="#e6e9ee",
    band="#f4f6f9",
    warning="#b45309",
    palette=("#2563c9", "#c2570c", "#0f8a6a", "#8145c4", "#c0304f", "#0e86a8"),
)
DARK = Theme(
    background="#171b22",
    text="#e4e8ee",
    muted="#98a2b1",
    grid="#2b313c",
    band="#1d222b",
    warning="#f0a94a",
    palette=("#6ea3ff", "#f59a56", "#43c9a3", "#b98cf2", "#f27a94", "#4fc1e0"),
)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A finished figure. Example: ``Plot("reward", "Mean reward", b"...", b"...")``."""

    name: str  # of the file, without .png
    caption: str
    light: bytes
    dark: bytes
    wide: bool = False


def render(report: Report, flags: Mapping[str, Sequence[str]]) -> list[Plot]:
    """Every figure the report has data for.

    Args:
        report: the content.
        flags: from `quality_flags`; flagged policies are drawn hollow.

    Raises:
        ImportError: matplotlib is missing; the message says what to install.
    """
    plots = []

    def add(name, caption, draw, *, wide=False):
        plots.append(Plot(name, caption, _png(draw, LIGHT), _png(draw, DARK), wide))

    scored = [p for p in report.policies if p.reward is not None]
    placed = [p for p in scored if p.reverse_kl is not None]
    if scored:
        add(
            "reward",
            "Mean reward per prompt, with intervals. Lines: start and teacher.",
            lambda theme: draw_rewards(scored, flags, theme),
        )
    if placed:
        add(
            "reward_vs_kl",
            "Reward against distance from the teacher: up and to the left is better.",
            lambda theme: draw_tradeoff(scored, flags, theme),
        )
    for count, (title, game) in enumerate(report.games.items(), start=1):
        add(
            f"game_{count}",
            f"{title}: gap of the reward player, its use of the confidence set, and "
            "the multiplier.",
            lambda theme, game=game, title=title: draw_game(game, title, theme),
        )
    if report.losses:
        add(
            "losses",
            "Training losses; thin: every logged step, thick: running mean.",
            lambda theme: draw_losses(report.losses, theme),
            wide=True,
        )
    return plots


def draw_rewards(policies: Sequence[Policy], flags, theme: Theme):
    """A dot and an interval per policy, in the table's order."""
    figure = _figure(theme, 5.6, _row_height(policies))
    axes = figure.add_subplot()
    _style(axes, theme, grid="x")
    colours = _colours(policies, theme)
    places = decimals([p.reward for p in policies])
    _reference_lines(axes.axvline, policies, theme)
    for row, policy in enumerate(policies):
        reward, colour = policy.reward, colours[policy.name]
        ends = [reward.low, reward.high]
        axes.plot(ends, [row, row], color=colour, lw=2.4, alpha=0.55)
        _dot(axes, reward.mean, row, colour, policy.name in flags, theme)
        axes.annotate(
            number(reward.mean, places),
            (1.0, row),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=theme.text,
        )
    axes.set_yticks(range(len(policies)), [p.name for p in policies], **PLAIN)
    axes.tick_params(axis="y", labelcolor=theme.text, labelsize=9)
    axes.set_ylim(len(policies) - 0.4, -0.6)
    axes.set_xlabel("reward")
    return figure


def draw_tradeoff(policies: Sequence[Policy], flags, theme: Theme):
    """Reward over reverse KL, every policy labelled; many by numbers and a key."""
    placed = [p for p in policies if p.reverse_kl is not None]
    many = len(placed) > _NAMED_POINTS
    height = max(3.8, (0.6 if many else 1.0) * _row_height(policies))
    figure = _figure(theme, 7.4 if many else 5.6, height)
    axes = figure.add_subplot()
    _style(axes, theme, grid="both")
    colours = _colours(policies, theme)
    teachers = [p for p in policies if p.role == "teacher"]
    _reference_lines(axes.axhline, teachers, theme)
    for policy in teachers:
        _edge_label(axes, policy.name, policy.reward.mean, theme.muted)
    for policy in placed:
        x, y, colour = policy.reverse_kl, policy.reward, colours[policy.name]
        axes.plot([x.low, x.high], [y.mean, y.mean], color=colour, lw=1.6, alpha=0.45)
        axes.plot([x.mean, x.mean], [y.low, y.high], color=colour, lw=1.6, alpha=0.45)
        _dot(axes, x.mean, y.mean, colour, policy.name in flags, theme)
    axes.margins(0.16, 0.14)
    axes.set_xlabel("reverse KL to the teacher, nats per token")
    axes.set_ylabel("reward")
    points = [(p.reverse_kl.mean, p.reward.mean) for p in placed]
    labels = [p.name for p in placed]
    if many:
        _key(axes, placed, colours)
        labels = [str(number) for number in range(1, len(placed) + 1)]
    shades = [colours[p.name] for p in placed]
    place_labels(figure, axes, points, labels, shades)
    return figure


def draw_game(game: GameCurves, title: str, theme: Theme):
    """Three panels over one axis of steps, phases as bands."""
    figure = _figure(theme, 5.6, 5.0)
    panels = figure.subplots(3, 1, sharex=True)
    steps = np.asarray(game.steps, float)
    used = np.asarray(game.slack, float) + game.epsilon
    curves = ((game.gap, "gap"), (used, "excess pair NLL"), (game.dual, "multiplier λ"))
    starts = [phase.start for phase in game.phases]
    for axes, (values, label) in zip(panels, curves, strict=True):
        _style(axes, theme, grid="y")
        # The multiplier is a sum over steps, smooth as it is.
        smooth = values is not game.dual
        _curve(axes, steps, values, theme.palette[0], smooth=smooth, breaks=starts)
        axes.set_ylabel(label)
        axes.margins(x=0.01, y=0.12)
        _phase_bands(axes, game, steps, theme)
    panels[1].axhline(game.epsilon, color=theme.warning, lw=1.2, ls=_DASHED)
    _edge_label(panels[1], f"ε = {game.epsilon:g}", game.epsilon, theme.warning)
    panels[0].set_title(
        title, loc="left", fontsize=10, color=theme.text, pad=18, **PLAIN
    )
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels(panels)
    return figure


def draw_losses(losses: Mapping[str, Series], theme: Theme):
    """One small panel per loss, each on its own scale."""
    columns = min(3, len(losses))
    rows = -(-len(losses) // columns)
    figure = _figure(theme, 3.8 * columns, 2.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, (name, series) in enumerate(losses.items()):
        axes = grid[index]
        _style(axes, theme, grid="y")
        _curve(axes, np.asarray(series.steps), series.values, theme.palette[0])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(name, loc="left", fontsize=9.5, color=theme.text, **PLAIN)
    for axes in grid[len(losses) :]:
        axes.set_axis_off()
    return figure


def _png(draw, theme: Theme) -> bytes:
    buffer = io.BytesIO()
    draw(theme).savefig(buffer, format="png", dpi=_DPI, facecolor=theme.background)
    return buffer.getvalue()


def _figure(theme: Theme, width: float, height: float):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure((width, height), facecolor=theme.background, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def _row_height(policies: Sequence[Policy]) -> float:
    """Inches of a figure with one row per policy."""
    return 0.42 * len(policies) + 1.0


def _style(axes, theme: Theme, *, grid: str) -> None:
    axes.set_facecolor(theme.background)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)
    axes.grid(axis=grid, color=theme.grid, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, labelcolor=theme.muted)
    axes.xaxis.label.set(color=theme.muted, fontsize=8.5)
    axes.yaxis.label.set(color=theme.muted, fontsize=8.5)


def _colours(policies: Sequence[Policy], theme: Theme) -> dict[str, str]:
    """Students in hues, teacher and start in greys."""
    students = [p.name for p in policies if p.role == "student"]
    hues = {n: theme.palette[i % len(theme.palette)] for i, n in enumerate(students)}
    greys = {"teacher": theme.text, "start": theme.muted}
    return {p.name: hues.get(p.name) or greys[p.role] for p in policies}


def _dot(axes, x, y, colour, flagged: bool, theme: Theme) -> None:
    """Filled, or hollow for a flagged policy."""
    axes.plot(
        x,
        y,
        "o",
        ms=7,
        mew=1.8,
        mec=colour if flagged else theme.background,
        mfc=theme.background if flagged else colour,
        zorder=4,
    )


def _reference_lines(line, policies: Sequence[Policy], theme: Theme) -> None:
    """A dashed line at the teacher's mean, a dotted one at the start's."""
    for policy in policies:
        if policy.role != "student":
            dashes = _DASHED if policy.role == "teacher" else _DOTTED
            line(policy.reward.mean, color=theme.muted, lw=1.0, ls=dashes, zorder=1)


def _edge_label(axes, text: str, height: float, colour: str) -> None:
    """Text at the right edge, just above a horizontal line."""
    axes.annotate(
        text,
        (1.0, height),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color=colour,
        **PLAIN,
    )


def _curve(axes, steps, values, colour, *, smooth=True, breaks=()) -> None:
    """The series, and in front of a long one its running mean, which heeds breaks."""
    values = np.asarray(values, float)
    if not smooth or len(values) < _SMOOTH_FROM:
        axes.plot(steps, values, color=colour, lw=1.7)
        return
    axes.plot(steps, values, color=colour, lw=0.7, alpha=0.35)
    window = np.ones(max(5, len(values) // 30))
    edges = [0, *np.searchsorted(steps, breaks), len(values)]
    for first, last in itertools.pairwise(sorted(edges)):
        if last - first < len(window):
            continue
        # Dividing by the count keeps both ends unbiased; NaN counts as absent.
        part = values[first:last]
        known = np.isfinite(part)
        total = np.convolve(np.where(known, part, 0.0), window, "same")
        count = np.convolve(known.astype(float), window, "same")
        mean = np.where(count > 0, total / np.maximum(count, 1.0), np.nan)
        axes.plot(steps[first:last], mean, color=colour, lw=1.8)


def _phase_bands(axes, game: GameCurves, steps, theme: Theme) -> None:
    """Every second phase shaded; names above the first panel."""
    ends = [phase.start for phase in game.phases[1:]] + [steps.max(initial=0)]
    first = axes.get_subplotspec().is_first_row()
    for index, (phase, end) in enumerate(zip(game.phases, ends, strict=False)):
        if index % 2 == 0:
            axes.axvspan(phase.start, end, color=theme.band, lw=0, zorder=0)
        if index:
            axes.axvline(phase.start, color=theme.grid, lw=1.2, zorder=1)
        if first:
            axes.annotate(
                phase.name,
                ((phase.start + end) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=theme.muted,
                **PLAIN,
            )


def _key(axes, policies: Sequence[Policy], colours) -> None:
    """What the numbers stand for, in a column to the right."""
    for row, policy in enumerate(policies):
        axes.annotate(
            f"{row + 1}  {policy.name}",
            (1.0, 1.0 - (row + 0.5) / len(policies)),
            xycoords="axes fraction",
            xytext=(14, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=colours[policy.name],
            **PLAIN,
        )
