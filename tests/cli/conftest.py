"""What tests of commands read, written once for each of their files."""

import signal

import jax
import pytest

from rkd_jax.data.sources import write_jsonl
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.interop import save_model
from tests.cli.small_command import MODEL, PAIRS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two models with a tokenizer, and data."""
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate(("teacher", "student")):
        params = MODEL.init(jax.random.key(seed))
        save_model(folder / name, MODEL.config, params, tokenizer=byte_tokenizer())
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    return folder


@pytest.fixture
def ctrl_c_is_heard():
    """A job in the background has it ignored, and hands that on to its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
