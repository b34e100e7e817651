"""The arithmetic task: its problems, its verifier, its teacher, and a system on it."""

import dataclasses
import json
import operator
import re

import jax
import numpy as np
import pytest

from rkd_jax.data.collate import collate
from rkd_jax.data.records import PromptRecord
from rkd_jax.data.sources import read_jsonl
from rkd_jax.data.tokenize import survey, tokenize_record
from rkd_jax.interop import load_model
from rkd_jax.models.sampling import SamplingConfig, make_sampler
from rkd_jax.signals.oracles import OracleError, label_preferences, load_oracle, score
from rkd_jax.training.run import RunMismatch

pytest.importorskip(
    "reasoning_gym", reason="reasoning-gym is not installed: pip install '.[eval]'"
)

from experiments import arithmetic_problems as problems
from experiments import arithmetic_task as arithmetic
from experiments.baselines import Dpo, DpoConfig
from experiments.course import divide
from experiments.lab import open_lab
from experiments.settings import ExperimentConfig
from experiments.system import TOY_FIT, SystemConfig, run_system

pytestmark = pytest.mark.usefixtures("compiled_programs")

CONFIG = problems.ProblemsConfig(seed=3, lessons=96, train=32, held_out=48)


def result_of(prompt: str) -> int:
    """Python's own arithmetic on ``a+b=`` and ``a-b=``."""
    first, sign, second = re.fullmatch(r"(\d+)([+-])(\d+)=", prompt).groups()
    return {"+": operator.add, "-": operator.sub}[sign](int(first), int(second))


@pytest.fixture(scope="module")
def found():
    return problems.make_problems(CONFIG)


@pytest.fixture(scope="module")
def oracle():
    return load_oracle("experiments.arithmetic_problems:Verifier")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The tiny task, prepared."""
    out = tmp_path_factory.mktemp("arithmetic") / "task"
    task = dataclasses.replace(arithmetic.tiny(), out=str(out))
    arithmetic.prepare(task)
    return task


def test_every_answer_is_the_integer_result(found):
    assert [len(part) for part in found] == [96, 32, 48]
    for prompt, answer in (*found.lessons, *found.train, *found.held_out):
        assert answer == str(result_of(prompt))
        assert re.fullmatch(r"\d\d[+-]\d\d=", prompt)


def test_no_two_problems_are_the_same_in_any_order(found):
    kinds = set()
    for prompt, _ in (*found.lessons, *found.train, *found.held_out):
        first, sign, second = re.split(r"([+-])", prompt.rstrip("="))
        operands = (first, second) if sign == "-" else sorted((first, second))
        kinds.add((sign, *operands))
    assert len(kinds) == 96 + 32 + 48


def test_the_seed_decides_everything_and_more_lessons_change_nothing_else(found):
    more = problems.make_problems(dataclasses.replace(CONFIG, lessons=120))
    assert more.lessons[:96] == found.lessons
    assert (more.train, more.held_out) == (found.train, found.held_out)
    # Item i of seed s is drawn from the stream s + i: without distance between them,
    # seed 4 would repeat all but one of the problems of seed 3.
    other = problems.make_problems(dataclasses.replace(CONFIG, seed=4))
    assert len(set(other.held_out) & set(found.held_out)) < 8


def test_more_problems_than_there_are():
    kinds = {
        tuple(sorted((a, sign * b)))
        for a in range(10)
        for b in range(10)
        for sign in (1, -1)
    }
    config = problems.ProblemsConfig(digits=1, lessons=398, train=1, held_out=1)
    with pytest.raises(ValueError, match=f"gave {len(kinds)}: ask for fewer"):
        problems.make_problems(config)


def test_the_verifier_agrees_with_integer_arithmetic(found, oracle):
    prompts = [problem.prompt for problem in found.train]
    right = [result_of(prompt) for prompt in prompts]
    assert score(oracle, prompts, list(map(str, right))).tolist() == [1.0] * 32
    for wrong in (
        [str(value + 1) for value in right],
        [str(value - 10) for value in right],
        [str(-value) if value else "1" for value in right],
        [f"1{abs(value)}" for value in right],  # contains the right digits
        [f"{value}=" for value in right],
        ["" for _ in right],
        ["+-" for _ in right],
    ):
        assert score(oracle, prompts, wrong).tolist() == [0.0] * 32
    # Numerically equal spellings are right in the data set's own eyes.
    padded = [f"{'-' if value < 0 else ''}0{abs(value)}" for value in right]
    assert score(oracle, prompts, padded).tolist() == [1.0] * 32


@pytest.mark.parametrize("prompt", ["1+1", "x", [{"role": "user", "content": "1+1="}]])
def test_the_verifier_refuses_what_is_no_sum(oracle, prompt):
    with pytest.raises(OracleError, match="no prompt of the arithmetic task"):
        oracle([prompt], ["2"])


def test_pairs_are_a_right_and_a_wrong_answer(oracle):
    prompts = ["10+11=", "20-30=", "5+5=", "1+1="]
    records, report = label_preferences(
        oracle, prompts, ["21", "7", "10", "7"], ["7", "-10", "10", "8"]
    )
    assert [(r.chosen, r.rejected) for r in records] == [("21", "7"), ("-10", "7")]
    assert (report.identical, report.ties_dropped) == (1, 1)


@pytest.mark.parametrize(
    ("digits", "terms", "prompt", "answer"),
    [
        (2, 2, "99+99=", "198"),
        (2, 2, "10-99=", "-89"),
        (1, 2, "0-9=", "-9"),
        (1, 3, "0-9-9=", "-18"),
        (2, 3, "10-99-99=", "-188"),
    ],
)
def test_the_longest_row_fits_with_one_to_spare(digits, terms, prompt, answer):
    config = problems.ProblemsConfig(digits=digits, terms=terms)
    rows = problems.row_layout(config)
    assert problems.result(prompt) == answer
    assert rows.max_prompt == len(prompt)
    assert rows.max_response == len(answer) + 2


def test_text_and_ids():
    tokenizer = problems.make_tokenizer()
    ids = [3, 7, 11, 4, 8, 12]
    assert tokenizer.encode("37-48=") == ids
    message = [{"role": "user", "content": "37-48="}]
    assert tokenizer.encode_chat(message, add_generation_prompt=True) == ids
    assert tokenizer.decode([11, 1, 1, tokenizer.eos_id]) == "-11"
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (14, 13)


def test_the_folder_holds_a_teacher_that_has_learnt(task):
    """What is saved, loaded again, gives the recorded accuracy by another route."""
    path = arithmetic.prepare(task)  # a second time: nothing is made again
    recorded = json.loads(path.read_text("utf-8"))["held_out_accuracy"]
    model, params, tokenizer = load_model(f"{task.out}/teacher")
    assert tokenizer.vocabulary == problems.make_tokenizer().vocabulary
    held_out = problems.make_problems(task.problems).held_out
    rows = problems.row_layout(task.problems)
    guessed = np.mean([14.0 ** -(len(p.answer) + 1) for p in held_out])
    assert recorded > 4 * guessed

    prompts = read_jsonl(f"{task.out}/held_out.jsonl", PromptRecord)[0]
    assert [record.prompt for record in prompts] == [p.prompt for p in held_out]
    layout = [tokenize_record(record, tokenizer, rows) for record in prompts]
    sampler = make_sampler(
        model,
        SamplingConfig(
            max_new_tokens=rows.max_response,
            eos_ids=(tokenizer.eos_id,),
            samples_per_prompt=128,
        ),
    )
    samples = sampler(params, collate(layout, rows).prompts, jax.random.key(0))
    lengths = np.asarray(samples.sequences.response_mask).sum(-1)
    targets = np.asarray(samples.sequences.targets)
    verify = problems.Verifier()
    rewards = [
        verify([record.prompt], [tokenizer.decode(targets[i, g, : lengths[i, g]])])[0]
        for i, record in enumerate(prompts)
        for g in range(128)
    ]
    error = np.sqrt(recorded * (1 - recorded) / len(rewards))
    assert abs(np.mean(rewards) - recorded) < 5 * error


def test_a_folder_of_another_task_is_refused(task):
    other = dataclasses.replace(task.problems, seed=1)
    with pytest.raises(RunMismatch, match="another run"):
        arithmetic.prepare(dataclasses.replace(task, problems=other))


def test_an_epoch_shows_every_lesson_once():
    rows = problems.row_layout(CONFIG)
    lessons = problems.make_problems(CONFIG).lessons
    batches = arithmetic._epochs(arithmetic._tabulate(lessons, rows), 32, seed=0)
    epochs = [[next(batches).index for _ in range(3)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(96))
    assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()


@pytest.mark.parametrize("task", [arithmetic.ArithmeticConfig(), arithmetic.tiny()])
def test_no_training_prompt_has_two_uses_and_few_have_none(task):
    config = ExperimentConfig(**arithmetic.experiment(task))
    parts = divide(range(task.problems.train), config)
    used = [*parts[0], *(i for fresh in parts[1] for i in fresh), *parts[2]]
    assert used == list(range(len(used)))
    assert 0.9 * task.problems.train - 4 <= len(used) < 0.95 * task.problems.train
    assert len(parts[1]) == 3


def test_any_system_runs_on_the_task(task, tmp_path):
    config = SystemConfig(
        **arithmetic.experiment(task), out=str(tmp_path / "run"), updates=2
    )
    lab = open_lab(config)
    assert lab.student.config.num_layers == lab.teacher.config.num_layers - 1
    cut = survey(
        [PromptRecord(p.prompt) for p in problems.make_problems(task.problems).train],
        lab.tokenizer,
        lab.rows,
    )
    assert cut.counts == {}
    run_system(
        config,
        "arithmetic",
        "DPO on arithmetic",
        lambda lab, config: {"DPO": Dpo(lab, DpoConfig(TOY_FIT))},
    )
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    names = [policy["name"] for policy in report["policies"]]
    assert names == ["teacher (steered)", "warm start", "DPO"]
    teacher = json.loads(arithmetic.prepare(task).read_text("utf-8"))
    interval = report["policies"][0]["reward"]
    assert interval["low"] <= teacher["held_out_accuracy"] <= interval["high"]
    for sample in report["samples"]:
        for response in sample["responses"]:
            right = problems.Verifier()([sample["prompt"]], [response["text"]])
            assert right == [response["reward"]]


def test_bad_configurations():
    with pytest.raises(ValueError, match="multiple of 32"):
        arithmetic.make_decoder(arithmetic.LessonsConfig(width=40))
    rows, lessons = problems.row_layout(CONFIG), problems.make_problems(CONFIG).lessons
    batches = arithmetic._epochs(arithmetic._tabulate(lessons, rows), 97, seed=0)
    with pytest.raises(ValueError, match="batch_size 97 exceeds the 96 lessons"):
        next(batches)
