"""What `rkd cache` runs on, and what it leaves behind for the next command."""

import jax
import pytest

from tests.cli.small_command import cache_command

pytestmark = pytest.mark.usefixtures("users_cache")


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
