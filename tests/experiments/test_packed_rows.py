"""Packed rows in an experiment: the same updates as with a row for each record."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

from experiments import abstract_games, tvkd  # noqa: F401 - registers the games' shapes
from experiments.abstract_inputs import inputs_of
from experiments.baselines import Dpo, DpoConfig, Gkd, GkdConfig, Kd, SeqKd, Sft
from experiments.drdo import Drdo, DrdoConfig, DrdoOracle
from experiments.edpo import EdpoConfig, RewardDistillation
from experiments.game import TextBook, tabulate
from experiments.lab import READINGS, open_lab
from experiments.pbkd import Pbkd
from experiments.reward_models import OracleRewards, RewardModels
from experiments.settings import FitConfig, GameConfig, SettingsError
from experiments.warm_start import warm_start
from rkd_jax.data.collate import collate
from rkd_jax.data.packing import collate_packed, pack
from rkd_jax.data.records import DemonstrationRecord, PreferenceRecord
from rkd_jax.data.tokenize import tokenize_record
from rkd_jax.models.heads import RewardModel
from rkd_jax.packed import target_segments
from rkd_jax.training.metrics import read_metrics
from rkd_jax.training.run import RunFolder

pytestmark = pytest.mark.usefixtures("compiled_programs")
ROW = 900  # columns
PAIRS = [
    PreferenceRecord(
        f"Say {'more ' * (i % 3)}about {'it' * i}.",
        "yes " * (1 + i % 3),
        "no" * (1 + i % 4),
        teacher_prompt=f"Be kind. Say something about {'it' * (7 - i)}.",
        chosen_reward=0.5 * i,
        rejected_reward=1.0 - i % 3,
    )
    for i in range(8)
]
TEXTS = [
    DemonstrationRecord(pair.prompt, pair.chosen, pair.teacher_prompt) for pair in PAIRS
]


@pytest.fixture(scope="module")
def course(lab):
    """What a `Trainer` reads of one."""
    return types.SimpleNamespace(
        start=lab.student_params,
        pairs=PAIRS,
        demonstrations=TEXTS,
        held_out_pairs=PAIRS[:2],
    )


def rows_of(lab, records) -> int:
    """How many packed rows all records take."""
    found = [tokenize_record(r, lab.tokenizer, lab.rows) for r in records]
    return len(pack(found, ROW))


def assert_same_updates(packed, plain):
    """Two of them, on all records: loss and gradient, and what the first one did."""
    assert [entry["step"] for entry in packed] == [1, 2]
    for found, expected in zip(packed, plain, strict=True):
        found, expected = found["metrics"], expected["metrics"]
        assert found["tokens"] == expected["tokens"] > 0
        for name in ("student/loss", "student/grad_norm"):
            np.testing.assert_allclose(found[name], expected[name], rtol=2e-5)


METHODS = {
    "sft": (Sft, TEXTS),
    "seqkd": (SeqKd, TEXTS),
    "kd": (Kd, TEXTS),
    "dpo": (lambda lab, fit: Dpo(lab, DpoConfig(fit)), PAIRS),
    "tvkd": (lambda lab, fit: tvkd.Tvkd(lab, tvkd.TvkdConfig(fit)), PAIRS),
    "drdo": (lambda lab, fit: Drdo(lab, DrdoConfig(fit), OracleRewards()), PAIRS),
    "drdo oracle": (lambda lab, fit: AsMethod(lab, DrdoConfig(fit)), PAIRS),
    "d-dpo": (
        lambda lab, fit: RewardDistillation(
            lab, EdpoConfig(fit, kappa=0.0), OracleRewards()
        ),
        PAIRS,
    ),
}


class AsMethod(DrdoOracle):
    """The oracle, trained in the folder it is asked to be in."""

    def train(self, desk, stage, course, *, steps, seed):
        head = self.model.head.init(jax.random.key(seed), 32)
        start = {"trunk": course.start, "head": head}
        given = (desk, stage, start, course.pairs)
        return self.trainer.train(*given, steps=steps, seed=seed)


@pytest.mark.parametrize("name", METHODS)
def test_packed_rows_give_the_updates_of_single_ones(lab, course, desk, name):
    make, records = METHODS[name]
    rows = rows_of(lab, records)
    assert rows < len(records)
    logs = {}
    for name, row_length, size in (("packed", ROW, rows), ("plain", 0, len(records))):
        # A micro-batch for every row, however many records it holds.
        fit = FitConfig(1e-3, size, accumulation=size, row_length=row_length)
        make(lab, fit).train(desk, name, course, steps=2, seed=0)
        logs[name] = read_metrics(desk.run.path / name)
    assert_same_updates(logs["packed"], logs["plain"])


@pytest.fixture(scope="module")
def labs(lab, compiled_programs):
    """By what the reward player trains."""
    config = tvkd.tiny()
    whole = dataclasses.replace(config.reward, trunk="trained", l2=0.0)
    return {
        "frozen": (lab, config.reward),
        "trained": (open_lab(dataclasses.replace(config, reward=whole)), whole),
    }


def both_rewards(options, lab):
    """The same reward models on packed rows and on plain ones."""
    for name, row_length, size in (
        ("packed", ROW, rows_of(lab, PAIRS)),
        ("plain", 0, len(PAIRS)),
    ):
        yield (
            name,
            dataclasses.replace(
                options,
                batch_size=size,
                row_length=row_length,
                steps=2,
                learning_rate=1e-3,  # Adam makes steps of gradients of rounding too
            ),
        )


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_reward_models_are_fitted_to_packed_pairs(labs, course, desk, trunk, level):
    """An ensemble: pairs have the weights of their records, wherever they lie."""
    lab, options = labs[trunk]
    on_states, on_text = READINGS[level]
    rewards = (
        on_states(lab.reward_head)
        if trunk == "frozen"
        else functools.partial(on_text, RewardModel(lab.trunk, lab.reward_head))
    )
    lab = dataclasses.replace(lab, token_rewards=rewards)
    logs, found = {}, {}
    for name, sized in both_rewards(options, lab):
        models = RewardModels(lab, sized, 2)
        found[name] = models.train(desk, name, course, seed=0)
        logs[name] = read_metrics(desk.run.path / name)
    assert_same_updates(logs["packed"], logs["plain"])
    assert_close(found["packed"], found["plain"])
    head = found["packed"]["head"] if trunk == "trained" else found["packed"]
    assert np.abs(head["output"]["kernel"]).max() > 1e-3
    spreads = [entry["metrics"]["reward_model/spread"] for entry in logs["packed"]]
    assert spreads[1] > 0.0  # the members' weights differ


@pytest.mark.parametrize("trunk", ["frozen", "trained"])
def test_the_game_is_played_on_packed_pairs(labs, course, desk, trunk):
    """Micro-batches of seven pairs and of one, against all eight in one."""
    lab, options = labs[trunk]
    logs, found = {}, {}
    for name, sized in both_rewards(options, lab):
        parts = 2 if sized.row_length else 1
        config = GameConfig(
            pairs_per_step=sized.batch_size,
            row_length=sized.row_length,
            accumulation=parts,
            critic_steps=2,
            learning_rate=1e-3,
            epsilon=1e-3,
        )
        method = Pbkd(lab, config, sized)
        # With seeds 0 and 1 one gradient of the policy is rounding alone, of which Adam
        # makes a step like of any other.
        found[name] = method.train(desk, name, course, steps=2, seed=2)
        logs[name] = read_metrics(desk.run.path / name)
        anchors = read_metrics(desk.run.path / f"{name}-anchor")
        logs[f"{name} anchor"] = anchors
    assert_same_updates(logs["packed anchor"], logs["plain anchor"])
    for packed, plain in zip(logs["packed"], logs["plain"], strict=True):
        packed, plain = packed["metrics"], plain["metrics"]
        for metric in ("critic/nll", "critic/slack", "critic/loss", "dual"):
            np.testing.assert_allclose(
                packed[metric], plain[metric], rtol=2e-5, atol=2e-6
            )
        assert packed["tokens"] == plain["tokens"] > 0
        assert packed.keys() == plain.keys()
    assert_close(found["packed"], found["plain"])
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), found["packed"], course.start
    )
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_the_game_names_the_option_of_a_row_that_need_not_hold_a_pair(
    labs, course, desk
):
    lab, options = labs["frozen"]
    sized = dataclasses.replace(options, steps=1, batch_size=2, row_length=663)
    with pytest.raises(SettingsError, match="--reward: row_length 663.* takes 664 col"):
        Pbkd(lab, GameConfig(pairs_per_step=2, accumulation=1), sized).train(
            desk, "game", course, steps=1, seed=0
        )


def test_features_are_those_of_the_table_at_the_columns_of_each_target(lab):
    """Bitwise; 0 in between."""
    table = tabulate(lab, TextBook(lab.features), PAIRS)
    rows = [
        tokenize_record(pair, lab.tokenizer, lab.rows, i)
        for i, pair in enumerate(PAIRS)
    ]
    batch = collate_packed(pack(rows, ROW), ROW)
    found = table.features(batch)
    plain = table.features(collate(rows, lab.rows))
    assert plain.shape[:3] == (8, 2, 12)
    targets = target_segments(batch.sequences)
    counted = np.zeros(batch.sequences.response_mask.shape, bool)
    for row, m in np.argwhere(batch.index >= 0).tolist():
        for n in range(2):
            mine = (targets[row] == 2 * m + n + 1) & batch.sequences.response_mask[row]
            np.testing.assert_array_equal(
                found[row, mine], plain[batch.index[row, m], n, : mine.sum()]
            )
            counted[row] |= mine
    np.testing.assert_array_equal(counted, batch.sequences.response_mask)
    assert not found[~counted].any()
    np.testing.assert_allclose(
        found, lab.features(batch.sequences), rtol=1e-5, atol=1e-5
    )


def test_so_does_the_warm_start(lab, desk, tmp_path):
    logs = {}
    for name, row_length, size in (
        ("packed", ROW, rows_of(lab, TEXTS)),
        ("plain", 0, len(TEXTS)),
    ):
        config = dataclasses.replace(
            tvkd.tiny().warm_start, steps=2, batch_size=size, row_length=row_length
        )
        run = RunFolder.open(tmp_path / name, {})
        warm_start(lab, dataclasses.replace(desk, run=run), config, TEXTS, seed=0)
        logs[name] = read_metrics(run.path / "2-warm-start")
    assert_same_updates(logs["packed"], logs["plain"])


@pytest.mark.parametrize("row_length", [331, 1025])
def test_a_row_that_need_not_hold_a_record_or_exceeds_the_context(
    lab, course, desk, row_length
):
    method = Sft(lab, FitConfig(batch_size=2, accumulation=1, row_length=row_length))
    message = f"row_length {row_length}.* takes 332 columns.* context has 1024"
    with pytest.raises(SettingsError, match=message):
        method.train(desk, "sft", course, steps=1, seed=0)


def test_fewer_records_than_rows_of_a_batch(lab, course, desk):
    for records, size in ((TEXTS, 9), ([], 1)):
        method = SeqKd(lab, FitConfig(batch_size=size, row_length=ROW, accumulation=1))
        few = types.SimpleNamespace(start=course.start, demonstrations=records)
        with pytest.raises(SettingsError, match=f"{len(records)} records for batches"):
            method.train(desk, "seqkd", few, steps=1, seed=0)


def test_two_responses_need_twice_the_room(lab, course, desk):
    method = Dpo(
        lab, DpoConfig(FitConfig(batch_size=2, accumulation=1, row_length=663))
    )
    with pytest.raises(SettingsError, match="takes 664 columns"):
        method.train(desk, "dpo", course, steps=1, seed=0)


def test_who_reads_a_row_for_each_record_says_so(lab):
    with pytest.raises(SettingsError, match="gkd: row_length 900, but it reads a row"):
        Gkd(lab, GkdConfig(FitConfig(row_length=ROW)))


def test_a_penalty_on_samples_reads_a_row_for_each_record(lab):
    with pytest.raises(SettingsError, match="dpdpo: row_length 900, but it reads a r"):
        RewardDistillation(lab, EdpoConfig(FitConfig(row_length=ROW)), OracleRewards())


def test_ahead_of_time_there_are_no_packed_shapes(lab):
    with pytest.raises(SettingsError, match="sft: row_length 900, but shapes are"):
        inputs_of(Sft(lab, FitConfig(row_length=ROW)), None)
    game = Pbkd(lab, GameConfig(row_length=ROW, accumulation=1), tvkd.tiny().reward)
    with pytest.raises(SettingsError, match="pbkd: row_length 900, but shapes are"):
        inputs_of(game, None)
