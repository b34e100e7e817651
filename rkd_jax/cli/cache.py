"""``rkd cache``: a teacher reads a data set once, and what it says is kept."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from rkd_jax.cli.usage import UsageError, said_by_options

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from rkd_jax.data.records import Record
    from rkd_jax.data.tokenize import TokenizeConfig
    from rkd_jax.data.tokenizer import Tokenizer
    from rkd_jax.signals.cache import CacheSettings, CacheWriter, Manifest, Source
    from rkd_jax.signals.oracles import Oracle
    from rkd_jax.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Rows:
    """How records become rows of ids; training has to use the same."""

    max_prompt: int = 512
    """Longest prompt in tokens; of a longer one the end is kept."""
    max_response: int = 512
    """Longest response in tokens, end of sequence included."""
    max_teacher_prompt: int | None = None
    """Longest prompt of the teacher; as the student's if not given."""
    prompt_buckets: tuple[int, ...] = ()
    """Widths that prompts are padded to, ascending; each pair of widths is compiled."""
    response_buckets: tuple[int, ...] = ()
    """Widths that responses are padded to, ascending."""
    chat: bool = False
    """Make prompts that are text one user message of the chat template."""
    add_bos: bool = False
    """Begin with the token that opens a sequence."""
    append_eos: bool = True
    """End a response that fits with the token that ends a sequence."""


@dataclasses.dataclass(frozen=True)
class Shaping:
    """The teacher's values, summed per response (TVKD)."""

    keep: bool = False
    """Keep the shaping of every response."""
    gamma: float = 0.7
    """Discount, in [0, 1]."""
    power: float = 0.7
    """Of the probabilities in a soft value; not 1."""
    scale: float = 1.0
    """Of a soft value."""
    value_source: Literal["log_probs", "raw_logits"] = "log_probs"
    """What values are taken of: probabilities, or logits as they are."""
    support: int | None = None
    """Most likely tokens whose probabilities are told apart, one bucket for all others;
    None tells all apart."""
    terminal: Literal["zero", "last_prefix", "after_eos"] = "zero"
    """Value after the last target."""
    center: float = 0.0
    """Subtracted from every value."""


@dataclasses.dataclass(frozen=True)
class OracleCalls:
    """How patiently an oracle is asked; one that fails in the end stops the command."""

    timeout: float = 600.0
    """Seconds that one call may take, about the responses of one batch."""
    retries: int = 3
    """Calls after the first one, about those responses that have no reward yet."""
    backoff: float = 1.0
    """Seconds before the first of them; each further wait is twice as long."""
    max_backoff: float = 60.0
    """Seconds, the longest wait."""


@dataclasses.dataclass(frozen=True)
class CacheCommand:
    """Let a teacher read a data set once and keep what it says, for any training.

    The same command again goes on after an interruption.
    """

    after_interrupt: ClassVar[str] = (
        "the same command goes on from the last finished batch"
    )

    data: Path
    """Demonstrations or preferences, as JSON Lines."""
    out: Path
    """Folder of the cache."""
    teacher: Path | None = None
    """Folder with config.json and safetensors, or a GGUF file. Where neither lists nor
    shaping are kept nothing but its tokenizer is read; then it may be left out if there
    is a reference."""
    top_k: int | None = 50
    """Most likely tokens kept at every target; None keeps none."""
    log_prob_dtype: Literal["float32", "float16", "uint8"] = "uint8"
    """How their log-probs are kept."""
    temperature: float = 1.0
    """Divides the logits of teacher and reference."""
    shaping: Shaping = dataclasses.field(default_factory=Shaping)
    reference: Path | None = None
    """Model whose log-prob of each response is kept: the student before training."""
    oracle: str | None = None
    """Reward every response by this oracle: vader, or module:attribute."""
    oracle_calls: OracleCalls = dataclasses.field(default_factory=OracleCalls)
    records: Literal["auto", "demonstrations", "preferences"] = "auto"
    """What a line of the data is; auto looks at the first."""
    on_error: Literal["raise", "skip"] = "raise"
    """Stop at a line or record that cannot be used, or leave it out and count it;
    experiments.from_cache leaves it out too, a pipeline of your own stops there."""
    rows: Rows = dataclasses.field(default_factory=Rows)
    chat_template: str | None = None
    """chatml, or a file with a Jinja template, in place of the tokenizer's own."""
    param_dtype: str | None = None
    """Type of the parameters, such as bfloat16; as stored if not given."""
    dtype: str | None = None
    """Type the models compute in; float32 if not given."""
    mesh: tuple[int, int, int] = (1, 1, 1)
    """Devices along data, fsdp and tensor that share the models; -1 is all that remain.
    An interrupted cache may go on with others."""
    batch_size: int = 8
    """Records per forward pass, as many as fit: what an interruption can cost. Its
    responses should divide over data x fsdp devices."""
    shard_records: int = 1024
    """Records per file."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder, for the next command."""

    def run(self) -> None:
        """Write the cache and say what is in it."""
        from rkd_jax.losses.domain import check_choice
        from rkd_jax.models.config import DTYPES
        from rkd_jax.training.compiled_programs import keep_compiled_programs
        from rkd_jax.training.progress import Progress

        for name in ("batch_size", "shard_records"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)}; at least 1 is needed")
        if self.param_dtype is not None:
            with said_by_options():
                check_choice("param_dtype", self.param_dtype, DTYPES)

        if self.compilation_cache:
            keep_compiled_programs()
        with Progress() as progress:
            mesh = self._open_mesh(progress)
            writer = self._writer(mesh, progress)
            manifest = writer.write(
                lambda records, tokens: progress.advance(records, tokens=tokens),
                begin=lambda name, all_, done: progress.stage(name, all_, done=done),
            )
        print(_summary(self.out, manifest))

    def _open_mesh(self, progress: Progress) -> Mesh | None:
        """Where the models go; None is one device."""
        from rkd_jax.placement import describe_mesh
        from rkd_jax.sharding import MeshConfig, make_mesh
        from rkd_jax.signals.cache_sources import check_one_process

        check_one_process()
        mesh = make_mesh(MeshConfig(*self.mesh))
        if mesh.size == 1:
            return None
        progress.note(f"mesh: {describe_mesh(mesh)}")
        return mesh

    def _writer(self, mesh: Mesh | None, progress: Progress) -> CacheWriter:
        from rkd_jax.signals.cache import CacheWriter

        settings, rows, oracle = self._settings(), self._row_layout(), self._ask()
        tokenizer, records = self._tokenizer(settings), self._read(progress)
        teacher, reference = (
            None if path is None else functools.partial(self._load, path, mesh)
            for path in (self.teacher, self.reference)
        )
        return CacheWriter(
            self.out,
            records,
            tokenizer,
            rows,
            settings,
            teacher=teacher if settings.needs_teacher else None,
            reference=reference,
            oracle=oracle,
            batch_size=self.batch_size,
            shard_records=self.shard_records,
            on_error=self.on_error,
        )

    def _ask(self) -> Oracle | None:
        """The oracle, asked again where it fails."""
        from rkd_jax.signals.oracles import load_oracle
        from rkd_jax.signals.retrying_oracle import RetryConfig, RetryingOracle

        with said_by_options():
            calls = RetryConfig(**dataclasses.asdict(self.oracle_calls))
        if self.oracle is None:
            return None
        return RetryingOracle(load_oracle(self.oracle), calls)

    def _settings(self) -> CacheSettings:
        from rkd_jax.signals.cache import CacheSettings, ShapingSettings

        shaping = dataclasses.asdict(self.shaping)
        keep = shaping.pop("keep")
        if not keep and self.shaping != Shaping():
            raise UsageError("options of --shaping without --shaping.keep: add it")
        with said_by_options():
            return CacheSettings(
                top_k=self.top_k,
                log_prob_dtype=self.log_prob_dtype,
                temperature=self.temperature,
                shaping=ShapingSettings(**shaping) if keep else None,
                reference=self.reference is not None,
                oracle=self.oracle,
            )

    def _row_layout(self) -> TokenizeConfig:
        from rkd_jax.data.tokenize import TokenizeConfig

        with said_by_options():
            return TokenizeConfig(**dataclasses.asdict(self.rows))

    def _read(self, progress: Progress) -> list[Record]:
        """The records; what was left out is said."""
        from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
        from rkd_jax.data.sources import read_jsonl

        kinds = {"demonstrations": DemonstrationRecord, "preferences": PreferenceRecord}
        kind = kinds[_kind(self.data) if self.records == "auto" else self.records]
        records, report = read_jsonl(self.data, kind, on_error=self.on_error)
        progress.note(str(report))
        return records

    def _load(self, path: Path, mesh: Mesh | None) -> Source:
        from rkd_jax.interop import load_model
        from rkd_jax.signals.cache import Source

        model, params, _ = load_model(path, param_dtype=self.param_dtype, mesh=mesh)
        if self.dtype is not None:
            with said_by_options():
                config = dataclasses.replace(model.config, dtype=self.dtype)
            model = dataclasses.replace(model, config=config)
        return Source(model, params)

    def _tokenizer(self, settings: CacheSettings) -> Tokenizer:
        """The teacher's, or the reference's if there is no teacher."""
        from rkd_jax.data.chat_template import named_template
        from rkd_jax.data.tokenizer import same_vocabulary
        from rkd_jax.interop import load_tokenizer

        if settings.needs_teacher and self.teacher is None:
            raise UsageError("--teacher is missing; without one give --top-k None")
        paths = [path for path in (self.teacher, self.reference) if path is not None]
        if not paths:
            raise UsageError("give --teacher or --reference, whose tokenizer is used")
        found = [load_tokenizer(path) for path in paths]
        if None in found:
            path = paths[found.index(None)]
            raise UsageError(f"{path} holds no tokenizer; put tokenizer.json beside it")
        tokenizer = found[0]
        same_vocabulary(tokenizer, found[-1])
        if self.chat_template is None:
            return tokenizer
        with said_by_options():
            template = named_template(self.chat_template)
        return tokenizer.with_chat_template(template)


def _kind(path: Path) -> str:
    """What the first line of a file is."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check --data")
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        keys = set(json.loads(first))
    except (ValueError, TypeError):
        keys = set()
    for kind, key in (("preferences", "chosen"), ("demonstrations", "response")):
        if key in keys:
            return kind
    raise UsageError(
        f"{path}: the first line has neither 'response' nor 'chosen'; say what the "
        "lines are with --records"
    )


def _summary(folder: Path, manifest: Manifest) -> str:
    """What a finished cache holds, in one line."""
    from rkd_jax.signals.cache_manifest import few_reasons

    each = manifest.bytes / max(manifest.tokens, 1)
    reasons = few_reasons(manifest.skipped, most=3)
    left_out = [f"{count} skipped ({reason})" for reason, count in reasons.items()]
    parts = [
        f"{manifest.records} record{'s' * (manifest.records != 1)}",
        *left_out,
        f"{manifest.tokens:,} tokens",
        f"{manifest.bytes / 1e6:.1f} MB",
        f"{each:.1f} bytes per token",
        f"teacher {manifest.teacher}",
    ]
    return f"{folder}: {', '.join(parts)}"
