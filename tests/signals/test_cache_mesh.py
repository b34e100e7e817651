"""A cache that several devices wrote is the one that a single device writes."""

import re

import jax
import numpy as np
import pytest

from rkd_jax.placement import jit_on, place_rows
from rkd_jax.sharding import MeshConfig, make_mesh, replicated, row_shards
from rkd_jax.signals.cache import CacheSettings, ShapingSettings
from rkd_jax.signals.cache_scores import make_teacher_scores
from tests.signals.tiny_cache import (
    KINDS,
    batch_of,
    demonstrations,
    open_cache,
    source,
    writer,
)

MESHES = {
    "all axes": MeshConfig(data=2, fsdp=2, tensor=2),
    "rows": MeshConfig(data=8),
    "other": MeshConfig(fsdp=3),
}
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MESHES["all axes"])


def same(folder, expected):
    """Ids and digests to the bit, numbers up to rounding."""
    found, expected = open_cache(folder), open_cache(expected)
    assert found.manifest.identity() == expected.manifest.identity()
    for one, two in zip(found, expected, strict=True):
        for here, there in zip(one.responses, two.responses, strict=True):
            assert (here.digest, here.length) == (there.digest, there.length)
            np.testing.assert_array_equal(here.checks, there.checks)
            np.testing.assert_array_equal(here.topk.ids, there.topk.ids)
            for name in ("log_probs", "log_tail"):
                np.testing.assert_allclose(
                    getattr(here.topk, name), getattr(there.topk, name), rtol=1e-5
                )
            assert here.values == pytest.approx(there.values, rel=1e-5, abs=1e-6)
    return True


@pytest.mark.parametrize("batch_size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_does_not_depend_on_the_devices(
    folders, tmp_path, mesh, kind, batch_size
):
    """Rows divide over them or not; teacher and reference need not be on the same."""
    meshes = mesh, make_mesh(MESHES["rows"])
    maker = writer(tmp_path, KINDS[kind](), meshes=meshes, batch_size=batch_size)
    assert maker.write().complete
    assert same(tmp_path, folders / kind)


def test_an_interrupted_cache_goes_on_on_other_devices(folders, tmp_path, mesh):
    records, told = demonstrations(), []
    three = make_mesh(MESHES["other"])

    def stop(count, tokens):
        told.append(count)
        if len(told) % 2 == 0:
            raise KeyboardInterrupt

    for meshes in ((mesh, None), (None, three), (three, mesh)):
        with pytest.raises(KeyboardInterrupt):
            writer(tmp_path, records, meshes=meshes).write(stop)
    maker = writer(tmp_path, records, meshes=(mesh, mesh))
    assert 0 < maker.done < len(records)
    assert maker.write().complete
    assert same(tmp_path, folders / "demonstrations")


def test_every_device_reads_its_own_rows_and_asks_no_other():
    mesh = make_mesh(MESHES["rows"])
    model, params = source(1)
    scores = make_teacher_scores(model, CacheSettings(5, shaping=ShapingSettings()))
    rows = place_rows(batch_of(demonstrations(16)).teacher_sequences, mesh)
    assert rows.tokens.shape[0] == 2 * row_shards(mesh)
    params = jax.device_put(params, replicated(mesh))
    text = jit_on(mesh, scores).lower(params, rows).compile().as_text()
    assert "while" in text
    assert not re.findall(COLLECTIVES, text)


def test_rows_that_do_not_divide_are_not_waited_for(tmp_path, mesh, monkeypatch):
    """The devices read the next batch while the host packs one."""
    seen = []

    def fetch(tree):
        raise AssertionError(f"waited for {tree}")

    def place(rows, where, *, place_rows=place_rows):
        seen.append((rows.tokens.shape[0], where))
        return place_rows(rows, where)

    monkeypatch.setattr("rkd_jax.placement.fetch", fetch)
    monkeypatch.setattr("rkd_jax.placement.place_rows", place)
    assert writer(tmp_path, demonstrations(), meshes=(mesh, mesh)).write().complete
    batches = 2 + 2 + 1  # of two records, in shards of three, three and one
    assert seen == [(4, mesh)] * 2 * batches  # of the reference, of the teacher
