"""`rkd` in this process, with models and data that are small."""

from rkd_jax import cli
from rkd_jax.data.records import PreferenceRecord
from rkd_jax.data.tokenize import TokenizeConfig
from rkd_jax.models.decoder import Decoder, DecoderConfig

MODEL = Decoder(
    DecoderConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=64,
    )
)
ROWS = TokenizeConfig(max_prompt=8, max_response=8)
PAIRS = [
    PreferenceRecord("Name a prime.", "7", "9"),
    PreferenceRecord("2 + 2?", "4", "five"),
    PreferenceRecord([{"role": "user", "content": "Hi"}], "Hello!", "What?"),
]
SMALL = ["--rows.max-prompt", "8", "--rows.max-response", "8", "--batch-size", "2"]


def rkd(*arguments):
    """Exit status of a command in this process."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def cache_command(files, out, *more):
    return rkd(
        *("cache", "--data", files / "pairs.jsonl", "--teacher", files / "teacher"),
        *("--out", out, *SMALL, *more),
    )
