"""What frozen models say of pairs: computed once in a run, whoever asks."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import drdo, references, tvkd
from experiments.baselines import Dpo, DpoConfig
from experiments.drdo import DrdoOracle
from experiments.edpo import EdpoConfig, Pdpo
from experiments.references import (
    checksums,
    kept,
    pair_log_probs,
    reference_log_probs,
)
from experiments.system import TOY_FIT
from experiments.tvkd import Tvkd
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.sharding import MeshConfig, make_mesh
from rkd_jax.training.metrics import read_metrics
from rkd_jax.training.run import RunMismatch

pytestmark = pytest.mark.usefixtures("compiled_programs")
PAIRS = [
    PreferenceRecord(f"Say {'it' * i}.", "yes " * (1 + i % 3), "no" * (1 + i % 4))
    for i in range(8)
]
OTHERS = PAIRS[::-1]


@pytest.fixture
def course(lab):
    texts = [DemonstrationRecord(pair.prompt, pair.chosen) for pair in PAIRS]
    return types.SimpleNamespace(
        start=lab.student_params,
        pairs=PAIRS,
        start_samples=lambda lab, desk: texts,
    )


class Counted:
    """A function, and how many texts it was asked about."""

    def __init__(self, function):
        self.function, self.texts = function, 0

    def __call__(self, params, rows):
        self.texts += len(rows.response_mask)
        return self.function(params, rows)


def test_a_second_method_reads_what_the_first_one_computed(lab, course, desk):
    scores, values = Counted(lab.reference_scores), Counted(lab.teacher_policy)
    counting = dataclasses.replace(lab, reference_scores=scores)
    fit = dataclasses.replace(TOY_FIT, batch_size=8)
    Dpo(counting, DpoConfig(fit)).train(desk, "4-dpo", course, steps=2, seed=0)
    asked = scores.texts
    assert asked > 0
    method = Tvkd(counting, tvkd.TvkdConfig(fit=fit))
    method.shaping = values = Counted(method.shaping)
    for stage in ("4-tvkd", "4-tvkd-again"):
        method.train(desk, stage, course, steps=2, seed=0)
    assert scores.texts == asked
    assert 0 < values.texts <= asked
    once, again = (
        [entry["metrics"]["student/loss"] for entry in read_metrics(desk.run.path / s)]
        for s in ("4-tvkd", "4-tvkd-again")
    )
    assert once == again
    Pdpo(counting, EdpoConfig(fit=fit)).train(desk, "4-pdpo", course, steps=1, seed=0)
    assert scores.texts == asked


def test_other_pairs_are_scored_and_keep_their_own_order(lab, desk):
    scores = Counted(lab.reference_scores)
    counting = dataclasses.replace(lab, reference_scores=scores)
    start = lab.student_params
    first = reference_log_probs(counting, desk, start, PAIRS)
    asked = scores.texts
    turned = reference_log_probs(counting, desk, start, OTHERS)
    assert scores.texts > asked
    np.testing.assert_array_equal(turned, first[::-1])
    np.testing.assert_array_equal(first, pair_log_probs(lab, start, PAIRS))


def test_other_weights_are_scored_anew(lab, desk):
    """A run is bound to where its weights are, and others may be there by now."""
    first = reference_log_probs(lab, desk, lab.student_params, PAIRS)
    other = jax.tree.map(lambda x: 1.5 * x, lab.student_params)
    found = reference_log_probs(lab, desk, other, PAIRS)
    np.testing.assert_array_equal(found, pair_log_probs(lab, other, PAIRS))
    assert np.abs(found - first).min() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checksums_know_every_number_and_its_place_on_any_mesh(dtype):
    values = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    array = jnp.asarray(values, dtype)
    (found,) = checksums([array])
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    for spec in (("fsdp", "tensor"), ("tensor",), (None, "tensor")):
        place = NamedSharding(mesh, PartitionSpec(*spec))
        assert checksums([jax.device_put(array, place)]) == [found]
    swapped = array.at[0].set(array[1]).at[1].set(array[0])
    turned = array.reshape(6, 8)
    changed = array.at[3, 4].set(array[3, 4] * 1.01)
    others = [checksums([x])[0] for x in (swapped, array.T, changed)]
    assert len({found, *others}) == 4
    assert checksums([turned]) == [found]  # its place is that in memory
    exact = sum(
        int(bits) * (2 * place + 1)
        for place, bits in enumerate(
            np.asarray(array).view("u4" if dtype == "float32" else "u2").ravel()
        )
    )
    assert found == exact % 2**32


def test_rewards_of_an_oracle_are_read_by_whoever_comes_next(lab, course, desk):
    options = dataclasses.replace(drdo.tiny().drdo, oracle_steps=2)
    oracle = DrdoOracle(lab, options)
    oracle._score = scores = Counted(oracle._score)
    first = oracle.of_pairs(desk, "4-a", course, seed=0)
    asked = scores.texts
    assert asked > 0
    np.testing.assert_array_equal(oracle.of_pairs(desk, "4-b", course, seed=0), first)
    assert scores.texts == asked
    assert first.shape == (len(PAIRS), 2, 1)
    assert np.unique(first).size > 2


def test_what_is_kept_depends_on_everything_that_is_named(desk):
    numbers = iter(range(10))

    def compute():
        return np.full(2, next(numbers), np.float32)

    found = [
        kept(desk, stage, of, compute)[0]
        for stage, of in (("a", 1), ("a", 2), ("b", 1), ("a", 1), ("a", [1]))
    ]
    assert found == [0, 1, 2, 0, 3]


def test_half_a_file_is_refused_by_name_and_an_unfinished_one_made_again(
    desk, monkeypatch
):
    def compute():
        return np.arange(4.0)

    kept(desk, "a", 0, compute)
    (path,) = desk.run.path.glob("a-*/values.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(RunMismatch, match=f"{path} is damaged"):
        kept(desk, "a", 0, compute)
    np.save(path, np.arange(3.0))
    with pytest.raises(RunMismatch, match="damaged"):
        kept(desk, "a", 0, compute)

    def stop(path, values):
        path.write_bytes(whole[:-8])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(references.np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            kept(desk, "b", 0, compute)
    np.testing.assert_array_equal(kept(desk, "b", 0, compute), np.arange(4.0))
