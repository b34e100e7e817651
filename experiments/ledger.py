"""What a run wrote about itself, read back for the report."""

from __future__ import annotations

import hashlib

from experiments.lab import teacher_path
from experiments.settings import GameConfig, ModelConfig
from rkd_jax.data.sources import ReadReport
from rkd_jax.evaluation.content import DataSource, GameCurves, Phase, Series, Skipped
from rkd_jax.training.metrics import read_metrics
from rkd_jax.training.provenance import versions
from rkd_jax.training.run import RunFolder


def phases(game: GameConfig) -> list[str]:
    """The stages in which the game is played, in order."""
    return ["4-offline", *(f"5-round-{i + 1}" for i in range(game.rounds))]


def game_curves(run: RunFolder, game: GameConfig) -> GameCurves:
    """Gap, slack and multiplier over all phases of the game."""
    entries, starts = [], []
    for name in phases(game):
        phase = read_metrics(run.stage(name).path)
        if phase:
            starts.append(Phase(name[2:].replace("-", " "), phase[0]["step"]))
        entries += phase
    return GameCurves(
        steps=[entry["step"] for entry in entries],
        gap=[entry["critic/gap"] for entry in entries],
        slack=[entry["critic/slack"] for entry in entries],
        dual=[entry["dual"] for entry in entries],
        epsilon=game.epsilon,
        phases=starts,
    )


def loss_curves(run: RunFolder, game: GameConfig) -> dict[str, Series]:
    """The curves of everything else that was trained."""
    curves = {
        "warm start: forward KL, nats/token": ("2-warm-start", "student/divergence"),
        "DPO: loss, nats/pair": ("6-dpo", "student/preference_loss"),
    }
    curves |= {
        f"anchor of {name[2:].replace('-', ' ')}: NLL, nats/pair": (
            f"{name}-anchor",
            "reward_model/nll",
        )
        for name in phases(game)
    }
    return {title: _series(run, *where) for title, where in curves.items()}


def label_sources(run: RunFolder, game: GameConfig) -> list[DataSource]:
    """Pairs kept and dropped, stage by stage."""
    names = ["3-pairs", *(f"{name}-pairs" for name in phases(game)[1:])]
    sources = []
    for name in names:
        counts = run.stage(name).result
        dropped = [
            Skipped(reason.replace("_", " "), counts[reason])
            for reason in ("ties_dropped", "identical", "empty")
            if counts[reason]
        ]
        sources.append(DataSource(name[2:].replace("-", " "), counts["kept"], dropped))
    return sources


def as_source(name: str, report: ReadReport) -> DataSource:
    """What became of the records of a file."""
    skipped = [
        Skipped(reason, entry.count, tuple(entry.places))
        for reason, entry in report.skipped.items()
    ]
    return DataSource(name, report.read, skipped)


def library_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: value or "unknown" for name, value in versions().items()}


def asset_hashes(models: ModelConfig) -> dict[str, str]:
    """sha256 of the teacher's weights, where they are one file."""
    path = teacher_path(models)
    if path is None or not path.is_file():
        return {}
    with path.open("rb") as file:
        return {path.name: hashlib.file_digest(file, "sha256").hexdigest()}


def _series(run: RunFolder, stage: str, metric: str) -> Series:
    entries = read_metrics(run.stage(stage).path)
    return Series([e["step"] for e in entries], [e[metric] for e in entries])
