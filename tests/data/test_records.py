"""Records refuse what cannot be trained on, and survive JSON."""

import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd_jax.data.records import (
    ROLES,
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    RecordError,
    to_demonstration,
    to_prompt,
)

USER = {"role": "user", "content": "Name a prime."}

texts = st.text(min_size=1, max_size=40).filter(str.strip)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": st.text(max_size=20)}
)
chats = st.lists(messages, max_size=3).flatmap(
    lambda head: texts.map(lambda text: [*head, {"role": "user", "content": text}])
)
prompts = texts | chats


@settings(max_examples=25, deadline=None)
@given(prompts, prompts | st.none(), st.tuples(texts, texts), st.floats(0, 1))
def test_json_round_trip_gives_an_equal_record(prompt, teacher, responses, label):
    records = [
        PromptRecord(prompt, teacher),
        DemonstrationRecord(prompt, responses[0], teacher),
    ]
    if responses[0] != responses[1]:
        records.append(PreferenceRecord(prompt, *responses, teacher, label=label))
    for record in records:
        data = json.loads(json.dumps(record.to_json()))
        assert type(record).from_json(data) == record


def test_json_keys_are_the_field_names_and_defaults_are_left_out():
    record = PreferenceRecord("p", "a", "b", chosen_reward=1, rejected_reward=-0.5)
    assert record.to_json() == {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "chosen_reward": 1.0,
        "rejected_reward": -0.5,
    }
    assert PromptRecord("p").to_json() == {"prompt": "p"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptRecord(""), "prompt: empty"),
        (lambda: PromptRecord(" \n\t"), "prompt: empty"),
        (lambda: PromptRecord([]), "prompt: empty"),
        (lambda: PromptRecord(7), "prompt: a int"),
        (lambda: PromptRecord(None), "prompt: a null"),
        (lambda: PromptRecord("p", teacher_prompt=""), "teacher_prompt: empty"),
        (lambda: PromptRecord("\ud800"), "prompt: invalid Unicode"),
        (lambda: PromptRecord(["hi"]), "prompt: a message is a str"),
        (lambda: PromptRecord([{"role": "user"}]), "prompt: a message has 'role'"),
        (lambda: PromptRecord([USER | {"name": "x"}]), "'name'"),
        (lambda: PromptRecord([USER | {"role": "bot"}]), "unknown role 'bot'"),
        (lambda: PromptRecord([USER | {"role": ["user"]}]), "unknown role"),
        (lambda: PromptRecord([USER | {"content": None}]), "prompt: a null instead"),
        (lambda: PromptRecord([USER | {"content": " "}]), "prompt: empty"),
        (
            lambda: PromptRecord([USER, {"role": "assistant", "content": "7"}]),
            "prompt: ends with an assistant message",
        ),
        (lambda: DemonstrationRecord("p", ""), "response: empty"),
        (lambda: DemonstrationRecord("p", b"r"), "response: a bytes"),
        (lambda: PreferenceRecord("p", "", "b"), "chosen: empty"),
        (lambda: PreferenceRecord("p", "a", None), "rejected: a null"),
        (lambda: PreferenceRecord("p", "a", "a"), "chosen equals rejected"),
        (
            lambda: PreferenceRecord("p", "a", "b", chosen_reward=1.0),
            "rejected_reward: missing",
        ),
        (
            lambda: PreferenceRecord(
                "p", "a", "b", chosen_reward=float("nan"), rejected_reward=0.0
            ),
            "chosen_reward: not finite",
        ),
        (
            lambda: PreferenceRecord(
                "p", "a", "b", chosen_reward=0.0, rejected_reward=10**400
            ),
            "rejected_reward: not finite",
        ),
        (
            lambda: PreferenceRecord(
                "p", "a", "b", chosen_reward=True, rejected_reward=0.0
            ),
            "chosen_reward: a bool",
        ),
        (
            lambda: PreferenceRecord(
                "p", "a", "b", chosen_reward="1", rejected_reward=0.0
            ),
            "chosen_reward: a str",
        ),
        (lambda: PreferenceRecord("p", "a", "b", label=1.5), "label: not a prob"),
        (lambda: PreferenceRecord("p", "a", "b", label=None), "label: a null"),
    ],
)
def test_bad_records_are_refused_with_the_field_named(make, message):
    with pytest.raises(RecordError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(RecordError, match="unknown 'weight'.*'chosen'"):
        PreferenceRecord.from_json(
            {"prompt": "p", "chosen": "a", "rejected": "b", "weight": 2}
        )
    with pytest.raises(RecordError, match="missing 'rejected'.*'prompt', 'chosen'"):
        PreferenceRecord.from_json({"prompt": "p", "chosen": "a"})
    with pytest.raises(RecordError, match='a list instead of an object.*"response"'):
        DemonstrationRecord.from_json([1])
    record = PromptRecord.from_json({"prompt": "p", "id": 3}, allow_extra=True)
    assert record == PromptRecord("p")


def test_errors_stay_short_whatever_the_data_holds():
    data = {"prompt": [USER | {"role": "x" * 10_000}]}
    with pytest.raises(RecordError) as caught:
        PromptRecord.from_json(data)
    assert len(str(caught.value)) < 200
    with pytest.raises(RecordError) as caught:
        PromptRecord.from_json({"prompt": "p"} | {f"{i}" * 50: i for i in range(999)})
    assert len(str(caught.value)) < 800


def test_records_are_frozen_and_own_their_messages():
    chat = [dict(USER)]
    record = PromptRecord(chat)
    chat[0]["content"] = "changed"
    assert record.prompt[0]["content"] == "Name a prime."
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.prompt = "other"


def test_an_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RecordError("chosen: empty", "fill it")))
    assert str(error) == "chosen: empty; fill it"


def test_conversions_keep_both_prompts():
    record = PreferenceRecord([USER], "7", "9", teacher_prompt="hint")
    assert to_prompt(record) == PromptRecord([USER], "hint")
    assert to_demonstration(record) == DemonstrationRecord([USER], "7", "hint")
