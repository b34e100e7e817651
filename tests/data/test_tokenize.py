"""Rows hold exactly the text, the masks exactly the tokens.

Expected ids are written down independently: the byte tokenizer's id of a byte is the
byte, 256 opens and 257 (EOS) closes a chat turn.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkd_jax.data.collate import batch_widths, collate
from rkd_jax.data.inspection import check_end_of_turn, describe_batch
from rkd_jax.data.records import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    RecordError,
)
from rkd_jax.data.tokenize import (
    TokenizeConfig,
    encode_prompt,
    survey,
    tokenize_record,
)
from rkd_jax.data.tokenizer import byte_tokenizer
from rkd_jax.types import DemonstrationBatch, PreferenceBatch, PromptBatch

START, EOS = 256, 257
TOKENIZER = byte_tokenizer()

texts = st.text(min_size=1, max_size=30).filter(str.strip) | st.sampled_from(
    ["x" * 500, "🙂" * 100, "<|im_end|>", "\x00\x00a", "é\u0301 ﷽ 日本", "\ue000a"]
)
preferences = st.builds(
    PreferenceRecord,
    texts,
    texts.map("+".__add__),
    texts.map("-".__add__),
    teacher_prompt=st.none() | texts,
    label=st.floats(0, 1, width=32),
)


def bytes_of(text):
    return list(text.encode("utf-8"))


def chat_bytes(role, text):
    return [START, *bytes_of(f"{role}\n{text}"), EOS, *bytes_of("\n")]


def padded(prompt, response, prompt_width, response_width):
    """A row by hand: tokens, token mask, response mask."""
    left, right = prompt_width - len(prompt), response_width - len(response)
    tokens = [0] * left + prompt + response + [0] * right
    real = [False] * left + [True] * (len(prompt) + len(response)) + [False] * right
    trained = [True] * len(response) + [False] * right
    return tokens, real, trained


def assert_row(sequences, at, prompt, response):
    width = sequences.response_mask.shape[-1]
    prompt_width = sequences.tokens.shape[-1] - width
    tokens, real, trained = padded(prompt, response, prompt_width, width)
    np.testing.assert_array_equal(sequences.tokens[at], tokens)
    np.testing.assert_array_equal(sequences.token_mask[at], real)
    np.testing.assert_array_equal(sequences.response_mask[at], trained)


@settings(max_examples=60, deadline=None)
@given(st.lists(preferences, min_size=1, max_size=4), st.integers(1, 40), st.data())
def test_every_row_is_its_record(records, limit, data):
    response_limit = data.draw(st.integers(1, 40))
    config = TokenizeConfig(
        limit,
        response_limit,
        prompt_buckets=sorted({1 + limit // 2, limit}),
        response_buckets=sorted({1 + response_limit // 2, response_limit}),
        max_teacher_prompt=limit + 3,
    )
    rows = [tokenize_record(r, TOKENIZER, config, i) for i, r in enumerate(records)]
    batch = collate(rows, config)
    for i, record in enumerate(records):
        teacher = record.teacher_prompt or record.prompt
        for n, text in enumerate((record.chosen, record.rejected)):
            prompt = bytes_of(record.prompt)[-limit:]
            teacher_prompt = bytes_of(teacher)[-(limit + 3) :]
            response = [*bytes_of(text), EOS][:response_limit]
            assert_row(batch.sequences, (i, n), prompt, response)
            assert_row(batch.teacher_sequences, (i, n), teacher_prompt, response)
            # Said again without the reference, as every loss relies on it.
            sequences = batch.sequences
            trained = sequences.targets[i, n][sequences.response_mask[i, n]]
            fits = len(bytes_of(text)) < response_limit
            assert (trained == EOS).sum() == fits
            assert len(trained) >= 1
            assert (sequences.prompts.mask[i, n]).sum() >= 1
            if fits:
                assert TOKENIZER.decode(trained) == text
    assert batch.sequences.tokens.dtype == np.int32
    assert batch.sequences.token_mask.dtype == np.bool_
    np.testing.assert_array_equal(batch.label, [r.label for r in records])
    assert batch.label.dtype == batch.rewards.dtype == np.float32
    assert np.isnan(batch.rewards).all()
    np.testing.assert_array_equal(batch.index, range(len(records)))


@settings(max_examples=40, deadline=None)
@given(st.lists(texts, min_size=1, max_size=5), st.data())
def test_widths_are_the_smallest_buckets_that_fit(prompts, data):
    buckets = tuple(sorted(data.draw(st.sets(st.integers(1, 60), min_size=1))))
    config = TokenizeConfig(buckets[-1], 4, prompt_buckets=buckets)
    rows = [tokenize_record(PromptRecord(p), TOKENIZER, config) for p in prompts]
    longest = min(max(len(bytes_of(p)) for p in prompts), buckets[-1])
    expected = min(width for width in buckets if width >= longest)
    assert batch_widths(rows, config)[:2] == (expected, expected)
    assert collate(rows, config).prompts.tokens.shape == (len(prompts), expected)


def test_kinds_of_batches():
    config = TokenizeConfig(8, 4)

    def batch(*records):
        rows = [tokenize_record(r, TOKENIZER, config, 7) for r in records]
        return collate(rows, config)

    prompts = batch(PromptRecord("p", "hint"), PromptRecord("q"))
    assert isinstance(prompts, PromptBatch)
    assert prompts.teacher_prompts.tokens[:, -4:].tolist() == [
        bytes_of("hint"),
        [0, 0, 0, *bytes_of("q")],
    ]
    assert isinstance(batch(DemonstrationRecord("p", "r")), DemonstrationBatch)
    pair = batch(PreferenceRecord("p", "a", "b", None, 0.5, -2, label=0.25))
    assert isinstance(pair, PreferenceBatch)
    assert (pair.rewards.tolist(), pair.label.tolist()) == ([[0.5, -2.0]], [0.25])
    assert pair.index.tolist() == [7]
    with pytest.raises(ValueError, match="mixes"):
        batch(PromptRecord("p"), DemonstrationRecord("p", "r"))
    with pytest.raises(ValueError, match="at least one row"):
        collate([], config)


def test_rows_of_another_configuration_are_refused():
    row = tokenize_record(PromptRecord("abcdef"), TOKENIZER, TokenizeConfig(6, 4))
    with pytest.raises(ValueError, match="a row of 6 tokens exceeds 5"):
        collate([row], TokenizeConfig(5, 4))


def test_text_prompts_are_raw_or_one_user_message():
    opening = [START, *bytes_of("assistant\n")]
    user = chat_bytes("user", "Hi")
    assert encode_prompt(TOKENIZER, "Hi", chat=False) == bytes_of("Hi")
    assert encode_prompt(TOKENIZER, "Hi", chat=True) == user + opening
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    for chat in (False, True):
        assert (
            encode_prompt(TOKENIZER, messages, chat=chat)
            == chat_bytes("system", "Be brief.") + user + opening
        )


def test_what_the_tokenizer_lacks_is_named():
    bare = TOKENIZER.with_chat_template(None)
    with pytest.raises(ValueError, match="chat template"):
        encode_prompt(bare, "Hi", chat=True)

    class Endless:
        """A tokenizer without BOS, EOS or template that drops what it cannot say."""

        eos_id = bos_id = None

        def encode(self, text):
            return [ord(c) for c in text if c.isascii()]

    config = TokenizeConfig(8, 8)
    record = DemonstrationRecord("p", "r")
    with pytest.raises(ValueError, match="append_eos.*no EOS"):
        tokenize_record(record, Endless(), config)
    with pytest.raises(ValueError, match="add_bos.*no BOS"):
        encode_prompt(Endless(), "Hi", chat=False, add_bos=True)
    no_eos = TokenizeConfig(8, 8, append_eos=False)
    assert tokenize_record(record, Endless(), no_eos).responses == ([114],)
    with pytest.raises(RecordError, match="record 5: prompt: encodes to no token"):
        tokenize_record(DemonstrationRecord("日", "r"), Endless(), no_eos, 5)
    with pytest.raises(RecordError, match="record 5: response: encodes to no token"):
        tokenize_record(DemonstrationRecord("p", "日"), Endless(), no_eos, 5)


def test_the_teacher_gets_the_whole_prompt_when_only_its_limit_allows():
    config = TokenizeConfig(3, 4, max_teacher_prompt=9)
    row = tokenize_record(PromptRecord("abcdef"), TOKENIZER, config)
    assert (bytes(row.prompt), bytes(row.teacher_prompt)) == (b"def", b"abcdef")
    assert row.events == ("prompt truncated",)


def test_truncation_side_of_prompts():
    record = PromptRecord("abcdef")

    def prompt(**changes):
        config = TokenizeConfig(3, 4, **changes)
        return bytes(tokenize_record(record, TOKENIZER, config).prompt[-3:])

    assert prompt() == b"def"
    assert prompt(truncate_prompt="right") == b"abc"


def test_chat_prompt_keeps_the_opening_of_the_answer():
    long_chat = PromptRecord([{"role": "user", "content": "x" * 50}])
    left = tokenize_record(long_chat, TOKENIZER, TokenizeConfig(20, 4))
    assert left.prompt[-11:] == [START, *bytes_of("assistant\n")]
    assert len(left.prompt) == 20
    config = TokenizeConfig(20, 4, truncate_prompt="right")
    with pytest.raises(RecordError, match="record 3: .*remove the assistant's opening"):
        tokenize_record(long_chat, TOKENIZER, config, 3)


def test_messages_that_the_template_is_not_for_are_the_records_fault():
    """It says so itself; a template that fails is at fault whatever the record."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}"
    tokenizer, broken = (
        TOKENIZER.with_chat_template(refuses + text)
        for text in ("{% endif %}u", "{% endif %}{{ 1 / 0 }}")
    )
    told = PromptRecord([{"role": "system", "content": "Be brief."}])
    plain = PromptRecord([{"role": "user", "content": "Hi"}])
    config = TokenizeConfig(20, 4)
    assert tokenize_record(plain, tokenizer, config).prompt == [ord("u")]
    reason = "record 7: the chat template refuses the messages: no"
    with pytest.raises(RecordError, match=reason) as caught:
        tokenize_record(told, tokenizer, config, 7)
    assert caught.value.reason == reason
    with pytest.raises(ValueError, match="the chat template fails on") as caught:
        tokenize_record(plain, broken, config, 7)
    assert not isinstance(caught.value, RecordError)


def test_report_counts_what_was_cut_and_names_the_records():
    records = [
        PreferenceRecord("short", "aaaa", "aaab"),
        PreferenceRecord("much too long", "a", "b", teacher_prompt="ok"),
        PreferenceRecord("ok", "<|im_end|>", "b", teacher_prompt="much too long"),
        PromptRecord("fits"),
    ]
    report = survey(records, TOKENIZER, TokenizeConfig(5, 3))
    assert report.to_json() == {
        "rows": 4,
        "counts": {
            "response truncated": 3,  # both of record 0, one of record 2
            "pair equal after truncation": 1,
            "prompt truncated": 1,
            "response spells the end token as text": 1,
            "teacher prompt truncated": 1,
        },
        "first": {
            "response truncated": [0, 2],
            "pair equal after truncation": [0],
            "prompt truncated": [1],
            "response spells the end token as text": [2],
            "teacher prompt truncated": [2],
        },
    }
    assert "response truncated: 3 (first records [0, 2])" in str(report)
    nothing = survey([PromptRecord("ok")], TOKENIZER, TokenizeConfig(5, 3))
    assert str(nothing) == "1 rows tokenized. Nothing was cut."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_prompt": 0}, "max_prompt is 0; at least 1"),
        ({"max_prompt": 1, "add_bos": True}, "max_prompt is 1; at least 2"),
        ({"max_response": 0}, "max_response is 0"),
        ({"max_teacher_prompt": 0}, "max_teacher_prompt is 0"),
        ({"prompt_buckets": (4, 7)}, "prompt_buckets .* end in max_prompt = 8"),
        ({"prompt_buckets": (8, 4)}, "prompt_buckets .* ascend"),
        ({"response_buckets": (0, 8)}, "response_buckets .* at least 1"),
        ({"response_buckets": (8, 8)}, "response_buckets .* ascend"),
        (
            {"teacher_prompt_buckets": (4, 8)},
            "teacher_prompt_buckets .* max_teacher_prompt = None",
        ),
        ({"truncate_prompt": "middle"}, "truncate_prompt is 'left' or 'right'"),
    ],
)
def test_bad_configuration_is_refused_with_the_field_named(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenizeConfig(**{"max_prompt": 8, "max_response": 8, **changes})


def make(*records, max_prompt=8, max_response=8):
    config = TokenizeConfig(max_prompt, max_response)
    rows = [
        tokenize_record(r, TOKENIZER, config, 10 + i) for i, r in enumerate(records)
    ]
    return collate(rows, config)


def test_description_shows_the_mask():
    batch = make(PreferenceRecord("hi", "yes", "no", teacher_prompt="hint"))
    assert describe_batch(TOKENIZER, batch).splitlines() == [
        "record 10, student, chosen: 2 prompt tokens of 8, 4 targets of 8",
        "hi⟦yes<|im_end|>⟧",
        "record 10, student, rejected: 2 prompt tokens of 8, 3 targets of 8",
        "hi⟦no<|im_end|>⟧",
        "record 10, teacher, chosen: 4 prompt tokens of 8, 4 targets of 8",
        "hint⟦yes<|im_end|>⟧",
        "record 10, teacher, rejected: 4 prompt tokens of 8, 3 targets of 8",
        "hint⟦no<|im_end|>⟧",
    ]
    batch = make(PromptRecord("hi"), PromptRecord("ho"))
    assert describe_batch(TOKENIZER, batch, row=1).splitlines() == [
        "record 11, student: 2 prompt tokens of 8",
        "ho",
        "record 11, teacher: 2 prompt tokens of 8",
        "ho",
    ]
    wrong = make(DemonstrationRecord("hi", "yes"))
    wrong.sequences.response_mask[0, 3] = False  # the fault of trl#7230
    assert "hi⟦yes⟧<|im_end|>" in describe_batch(TOKENIZER, wrong)


def test_end_of_turn_check_passes_good_batches():
    check_end_of_turn(TOKENIZER, make(DemonstrationRecord("hi", "yes")))
    check_end_of_turn(TOKENIZER, make(PreferenceRecord("hi", "yes", "x" * 99)))


def test_end_of_turn_check_names_the_fault():
    def broken(change):
        batch = make(DemonstrationRecord("p", "r"), DemonstrationRecord("hi", "yes"))
        change(batch.teacher_sequences)
        if change is empty:  # the mask is one array for both
            change(batch.sequences)
        return batch

    def outside(sequences):
        sequences.response_mask[1, 3] = False

    def missing(sequences):
        sequences.tokens[1, 8 + 3] = ord("!")

    def inside(sequences):
        sequences.tokens[1, 8 + 1] = EOS

    def empty(sequences):
        sequences.token_mask[1, 8:] = sequences.response_mask[1] = False

    def padding(sequences):
        sequences.response_mask[1, 4] = True

    for change, message in [
        (outside, r"record 11: response tokens \[257\] lie outside the mask"),
        (missing, "record 11: .*does not end in EOS"),
        (inside, "record 11: EOS stands inside"),
        (empty, "record 11: the response is empty"),
        (padding, "record 11: the mask covers padding"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_end_of_turn(TOKENIZER, broken(change))
    with pytest.raises(ValueError, match="no response of the batch ends in EOS"):
        check_end_of_turn(TOKENIZER, make(DemonstrationRecord("p", "x" * 99)))
