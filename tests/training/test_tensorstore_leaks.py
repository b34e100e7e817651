"""What is replaced in tensorstore answers as it did, and is asked less often."""

import sys

import jax
import pytest
import tensorstore

from rkd_jax.training.checkpoint import Checkpoints
from rkd_jax.training.tensorstore_leaks import avoid_leaks
from tests.training import tiny_game

FOLDERS = [{"driver": "file", "path": f"/somewhere/{n}/"} for n in (1, 2)]


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Not replaced, whether or not a checkpoint was opened before."""
    collect = tensorstore.experimental_collect_matching_metrics
    to_json = tensorstore.KvStore.Spec.to_json
    collect = getattr(collect, "__wrapped__", collect)
    to_json = getattr(to_json, "__wrapped__", to_json)
    monkeypatch.setattr(tensorstore, "experimental_collect_matching_metrics", collect)
    monkeypatch.setattr(  # a built-in function would not be a method
        tensorstore.KvStore.Spec, "to_json", lambda *args, **kw: to_json(*args, **kw)
    )


def ask_as(module):
    """The counters as code of that module gets them."""
    scope = {"__name__": module, "tensorstore": tensorstore}
    code = "found = tensorstore.experimental_collect_matching_metrics('/tensorstore/')"
    exec(code, scope)
    return scope["found"]


def names(counters):
    return {counter["name"] for counter in counters}


def test_only_orbax_is_told_of_no_counters():
    tensorstore.KvStore.open("memory://").result().write("a", b"b").result()
    before = names(ask_as("orbax.checkpoint"))
    assert before
    avoid_leaks()
    assert ask_as("orbax.checkpoint") == ask_as("orbax") == []
    for module in ("rkd_jax.training", "orbaxed", "__main__"):
        assert names(ask_as(module)) >= before


def test_an_address_is_what_it_was():
    specs = [tensorstore.KvStore.Spec(folder) for folder in FOLDERS]
    plain = [spec.to_json() for spec in specs]
    whole = [spec.to_json(include_defaults=True) for spec in specs]
    assert plain == FOLDERS
    assert whole[0] != plain[0]
    avoid_leaks()
    for _ in range(2):
        assert [spec.to_json() for spec in specs] == plain
        assert [spec.to_json(include_defaults=True) for spec in specs] == whole
    specs[1].to_json()["path"] = "changed"
    assert specs[1].to_json() == plain[1]


def test_an_address_is_worked_out_once(monkeypatch):
    """Each time a dictionary would stay for good."""
    asked = []
    to_json = tensorstore.KvStore.Spec.to_json

    def counting(spec):
        asked.append(spec)
        return to_json(spec)

    monkeypatch.setattr(tensorstore.KvStore.Spec, "to_json", counting)
    avoid_leaks()
    for folder in FOLDERS:
        for _ in range(3):
            tensorstore.KvStore.Spec(folder).to_json()
    assert len(asked) == 2


def test_tensorstore_still_keeps_what_it_makes_of_json():
    """Without this leak nothing has to be replaced: the module can go."""
    made = tensorstore.KvStore.Spec(FOLDERS[0]).to_json()
    ours = {"path": "".join(made["path"])}
    assert ours["path"] == made["path"]
    assert sys.getrefcount(made["path"]) > sys.getrefcount(ours["path"])


def test_a_second_time_changes_nothing():
    avoid_leaks()
    first = tensorstore.experimental_collect_matching_metrics
    avoid_leaks()
    assert tensorstore.experimental_collect_matching_metrics is first


def test_a_checkpoint_asks_for_little(monkeypatch, tmp_path):
    """Not for each array, and for no counters at all."""
    asked = []
    to_json = tensorstore.KvStore.Spec.to_json

    def counters(prefix, **options):
        del options
        asked.append(prefix)
        return []

    def counting(spec):
        asked.append(spec)
        return to_json(spec)

    monkeypatch.setattr(tensorstore, "experimental_collect_matching_metrics", counters)
    monkeypatch.setattr(tensorstore.KvStore.Spec, "to_json", counting)
    state = tiny_game.start()
    assert len(jax.tree.leaves(state)) > 10
    with Checkpoints(tmp_path, config={}) as checkpoints:
        checkpoints.save(state, {})
    assert 0 < len(asked) <= 4
    assert not [prefix for prefix in asked if isinstance(prefix, str)]
