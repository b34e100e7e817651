"""What `rkd cache` can be told: of what, on which devices, for the next command."""

import dataclasses
import typing

import jax
import numpy as np
import pytest

from rkd_jax.cli.cache import Shaping
from rkd_jax.data.collate import collate
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.signals.cache import ShapingSettings, TeacherCache
from rkd_jax.signals.values import ValueSource, make_shaping
from tests.cli.small_command import MODEL, PAIRS, ROWS, cache_command

pytestmark = pytest.mark.usefixtures("users_cache")
TOKENIZER = byte_tokenizer()


def open_cache(folder):
    return TeacherCache(folder, tokenizer=TOKENIZER, rows=ROWS)


def batch_of_all():
    rows = [tokenize_record(r, TOKENIZER, ROWS, i) for i, r in enumerate(PAIRS)]
    return collate(rows, ROWS)


def test_every_setting_of_the_shaping_can_be_said():
    options = dataclasses.asdict(Shaping())
    assert options.pop("keep") is False
    assert options == dataclasses.asdict(ShapingSettings())
    choices = typing.get_type_hints(Shaping)["value_source"]
    assert typing.get_args(choices) == typing.get_args(ValueSource)


@pytest.mark.parametrize("settings", [{"value_source": "raw_logits"}, {"support": 5}])
def test_the_values_of_the_shaping_are_what_the_options_say(files, tmp_path, settings):
    settings = {"gamma": 0.5, "terminal": "after_eos"} | settings
    options = [x for k, v in settings.items() for x in (f"--shaping.{k}", v)]
    options += ["--shaping.keep", "--top-k", "None"]
    assert cache_command(files, tmp_path, *options) == 0
    cache, batch = open_cache(tmp_path), batch_of_all()
    kept = cache.manifest.settings["shaping"]
    assert kept == dataclasses.asdict(ShapingSettings(**settings))
    read = make_shaping(MODEL, **settings)
    expected = read(MODEL.init(jax.random.key(0)), batch.teacher_sequences)
    found = cache.shaping(batch).shaping
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_programs_are_kept_unless_it_is_told_not_to(
    files, users_cache, tmp_path
):

    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    options = ("--top-k", "3", "--batch-size", "1")
    try:
        assert (
            cache_command(files, tmp_path / "a", *options, "--no-compilation-cache")
            == 0
        )
        assert not any(users_cache.iterdir())
        assert cache_command(files, tmp_path / "b", *options) == 0
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
    folder = users_cache / "rkd_jax" / "compiled"
    assert list(folder.glob("jit_teacher_scores-*-cache"))
