"""What a run wrote about itself, read back for the report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from experiments.lab import Lab
from experiments.settings import PairsConfig
from experiments.teacher_student import weights_path
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord, PromptRecord
from rkd_jax.data.sources import ReadReport, read_jsonl
from rkd_jax.data.tokenize import TokenizeReport, survey
from rkd_jax.evaluation.content import DataSource, GameCurves, Incident, Phase, Series
from rkd_jax.training.metrics import read_metrics
from rkd_jax.training.provenance import versions
from rkd_jax.training.run import RunFolder


def phases(pairs: PairsConfig) -> list[str]:
    """The stages in which the game is played, in order."""
    return ["4-offline", *(f"5-round-{i + 1}" for i in range(pairs.rounds))]


def parts(run: RunFolder, stage: str) -> list[str]:
    """The stage of a method, and those of its online rounds if it has any."""
    rounds = {
        path.name.rpartition("-")[2] for path in run.path.glob(f"{stage}-round-*")
    }
    numbers = sorted(int(number) for number in rounds if number.isdecimal())
    return [stage, *(f"{stage}-round-{number}" for number in numbers)]


def game_curves(run: RunFolder, epsilon: float, names: Sequence[str]) -> GameCurves:
    """Gap, slack and multiplier over the stages ``names`` of a game."""
    steps, rows, starts = [], [], []
    for name in names:
        entries = read_metrics(run.stage(name).path)
        title = name.partition("-")[2].replace("-", " ")
        starts.append(Phase(title, entries[0]["step"]))
        steps += [entry["step"] for entry in entries]
        rows += [entry["metrics"] for entry in entries]
    return GameCurves(
        steps=steps,
        gap=[row["critic/gap"] for row in rows],
        slack=[row["critic/slack"] for row in rows],
        dual=[row["dual"] for row in rows],
        epsilon=epsilon,
        phases=starts,
    )


def loss_curves(run: RunFolder, pairs: PairsConfig) -> dict[str, Series]:
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
        for name in phases(pairs)
    }
    found = {
        title: series(run, [stage], metric) for title, (stage, metric) in curves.items()
    }
    found["reward player: held-out NLL, nats/pair"] = series(
        run, phases(pairs), "held_out/nll"
    )
    return found


def series(run: RunFolder, stages: Sequence[str], metric: str) -> Series:
    """One metric over the training logs of some stages."""
    entries = [entry for name in stages for entry in read_metrics(run.stage(name).path)]
    return Series(
        [entry["step"] for entry in entries],
        [entry["metrics"][metric] for entry in entries],
    )


def data_sources(
    lab: Lab, run: RunFolder, pairs: PairsConfig, prompts: Sequence[DataSource]
) -> list[DataSource]:
    """Every data set of the run: what was left out of it, and what was cut."""
    sources = list(prompts)
    for name, record_type, path in _data_sets(run, pairs):
        counts = run.stage(name).result
        left_out = [
            Incident(reason.replace("_", " "), counts[reason])
            for reason in ("ties_dropped", "identical", "empty", "unscored")
            if counts.get(reason)
        ]
        records = read_jsonl(path, record_type)[0]
        cut = survey(records, lab.tokenizer, lab.rows)
        title = f"{name.replace('-', ' ')}: {path.stem}"
        sources.append(DataSource(title, counts["kept"], left_out, cuts(cut)))
    return sources


def prompt_source(
    name: str,
    records: Sequence[PromptRecord],
    lab: Lab,
    report: ReadReport | None,
    read: int,
) -> DataSource:
    """What became of the ``read`` prompts of a file, or of the built-in ones."""
    skipped = unread(report)
    if read > len(records):
        limit = "beyond the number of prompts asked for"
        skipped.append(Incident(limit, read - len(records), (len(records) + 1,)))
    cut = survey(records, lab.tokenizer, lab.rows)
    return DataSource(name, len(records), skipped, cuts(cut))


def unread(report: ReadReport | None) -> list[Incident]:
    """Lines of a file that are no record."""
    return [
        Incident(reason, entry.count, tuple(entry.places), entry.remedy)
        for reason, entry in (report.skipped if report else {}).items()
    ]


def cuts(report: TokenizeReport) -> list[Incident]:
    """Records that lost something when they became ids."""
    return [
        Incident(event, count, tuple(report.first[event]))
        for event, count in report.counts.items()
    ]


def _data_sets(run: RunFolder, pairs: PairsConfig):
    """(stage, kind of record, file) of everything the run wrote as JSON Lines."""
    for name in ("1-teacher", "1-teacher-plain"):
        if (path := run.path / name / "demonstrations.jsonl").exists():
            yield name, DemonstrationRecord, path
    for name in (
        "3-pairs",
        "3-pairs-held-out",
        *(f"{phase}-pairs" for phase in phases(pairs)[1:]),
    ):
        yield name, PreferenceRecord, run.path / name / "pairs.jsonl"


def package_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {name: value or "unknown" for name, value in versions().items()}


def asset_hashes(name: str) -> dict[str, str]:
    """sha256 of the weights that an option names, where they are one file."""
    path = weights_path(name)
    if path is None or not path.is_file():
        return {}
    with path.open("rb") as file:
        return {path.name: hashlib.file_digest(file, "sha256").hexdigest()}
