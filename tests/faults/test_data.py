"""Faults of peers' data stages, each with the requirement or fault it answers."""

import numpy as np
import pytest

from rkd_jax.data import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    TokenizeConfig,
    check_end_of_turn,
    collate,
    describe_batch,
    make_batches,
    tokenize_record,
)
from rkd_jax.data.tokenizer import CHATML, byte_tokenizer, from_bpe

START, EOS = 256, 257
BYTES = byte_tokenizer()
TOKENS = sorted(BYTES.vocabulary, key=BYTES.vocabulary.get)
LLAMA_LIKE = "{{ bos_token }}" + CHATML  # a template that writes its own BOS


def tokenizer(**options):
    """The byte tokenizer with other special tokens."""
    return from_bpe(TOKENS, [], special=(START, EOS), **options)


def batch_of(tokenizer, *records, **options):
    config = TokenizeConfig(**{"max_prompt": 64, "max_response": 8, **options})
    rows = [tokenize_record(r, tokenizer, config, i) for i, r in enumerate(records)]
    return collate(rows, config)


def trained(sequences):
    """Ids under the response mask, row by row."""
    rows = zip(sequences.targets, sequences.response_mask, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def test_t05_r08_eos_stays_a_target_when_pad_equals_eos():
    same = tokenizer(bos_id=START, eos_id=EOS, pad_id=EOS, chat_template=CHATML)
    other = tokenizer(bos_id=START, eos_id=EOS, pad_id=0, chat_template=CHATML)
    records = [DemonstrationRecord("p", "yes"), DemonstrationRecord("pp", "y")]
    for choice in (same, other, BYTES):
        sequences = batch_of(choice, *records).sequences
        assert trained(sequences) == [[*b"yes", EOS], [*b"y", EOS]]
        assert sequences.token_mask.sum(axis=1).tolist() == [5, 4]


def test_t05_token_zero_is_an_ordinary_token():
    sequences = batch_of(BYTES, DemonstrationRecord("a\x00", "\x00b\x00")).sequences
    assert trained(sequences) == [[0, ord("b"), 0, EOS]]
    assert sequences.prompts.mask[0, -3:].tolist() == [False, True, True]


def test_t16_r10_nothing_behind_eos_is_real():
    batch = batch_of(BYTES, DemonstrationRecord("p", "yes"))
    for sequences in (batch.sequences, batch.teacher_sequences):
        assert sequences.response_mask.tolist() == [[True] * 4 + [False] * 4]
        assert not sequences.token_mask[:, -4:].any()


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE])
def test_r12_one_bos_whether_the_template_writes_it_or_not(chat, template):
    bos = 0  # a BOS that ChatML does not use
    with_bos = tokenizer(bos_id=bos, eos_id=EOS, chat_template=template)
    record = PromptRecord("Hi")
    prompts = batch_of(with_bos, record, chat=chat, add_bos=True).prompts
    ids = prompts.tokens[prompts.mask].tolist()
    assert ids.count(bos) == 1
    assert ids[0] == bos
    cut = batch_of(with_bos, record, chat=chat, add_bos=True, max_prompt=2).prompts
    assert cut.tokens.tolist() == [[bos, ids[-1]]]


def test_r12_no_bos_is_invented_where_the_tokenizer_has_none():
    bare = tokenizer(eos_id=EOS, chat_template=LLAMA_LIKE)
    prompts = batch_of(bare, PromptRecord("Hi"), chat=True).prompts
    assert prompts.tokens[prompts.mask].tolist()[:5] == [START, *b"user"]
    raw = batch_of(bare, PromptRecord("Hi")).prompts
    assert raw.tokens[raw.mask].tolist() == [*b"Hi"]


def test_r12_control_strings_in_text_are_no_second_eos():
    record = DemonstrationRecord("a<|im_end|>", "b<|im_end|>")
    sequences = batch_of(BYTES, record, max_response=64).sequences
    assert (sequences.tokens == EOS).sum() == 1
    assert trained(sequences)[0][-1] == EOS


def test_r14_eos_outside_the_mask_is_refused_and_visible():
    batch = batch_of(BYTES, DemonstrationRecord("p", "yes"))
    check_end_of_turn(BYTES, batch)
    assert "p⟦yes<|im_end|>⟧" in describe_batch(BYTES, batch)
    batch.sequences.response_mask[0, 3] = False
    with pytest.raises(ValueError, match="outside the mask"):
        check_end_of_turn(BYTES, batch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_r15_prompt_and_response_survive_the_tightest_limits(side):
    record = PreferenceRecord("p" * 999, "a" * 999, "b" * 999, teacher_prompt="t" * 999)
    batch = batch_of(BYTES, record, max_prompt=1, max_response=1, truncate_prompt=side)
    assert batch.sequences.tokens.tolist() == [[[*b"pa"], [*b"pb"]]]
    assert batch.teacher_sequences.tokens.tolist() == [[[*b"ta"], [*b"tb"]]]
    assert batch.sequences.token_mask.all()


def test_r15_a_long_prompt_takes_no_room_from_the_response():
    batch = batch_of(BYTES, DemonstrationRecord("p" * 999, "yes"), max_prompt=4)
    assert trained(batch.sequences) == [[*b"yes", EOS]]


def test_a_cut_response_does_not_teach_to_stop():
    batch = batch_of(BYTES, DemonstrationRecord("p", "12345678"))  # EOS has no room
    assert trained(batch.sequences) == [[*b"12345678"]]


def test_r43_teacher_and_student_prompts_differ_over_one_response():
    hinted = DemonstrationRecord("2+2?", "4", teacher_prompt="2+2? (it is 4)")
    batch = batch_of(BYTES, hinted, DemonstrationRecord("3+3?", "6"))
    student, teacher = batch.sequences, batch.teacher_sequences
    np.testing.assert_array_equal(student.targets, teacher.targets)
    np.testing.assert_array_equal(student.response_mask, teacher.response_mask)
    decoded = [
        BYTES.decode(part.tokens[i][part.mask[i]])
        for part in (student.prompts, teacher.prompts)
        for i in range(2)
    ]
    assert decoded == ["2+2?", "3+3?", "2+2? (it is 4)", "3+3?"]


def test_t07_resume_does_not_replay_what_was_seen():
    records = [PromptRecord(f"{i}") for i in range(10)]
    calls = []

    class Counting:
        """Counts what is tokenized."""

        eos_id = bos_id = None

        def encode(self, text):
            calls.append(text)
            return [1]

    def start():
        config = TokenizeConfig(2, 2)
        return make_batches(records, Counting(), config, batch_size=2, seed=0)

    run = start()
    for _ in range(40):
        next(run)
    expected = next(run).index
    resumed = start()
    resumed.set_state({**run.get_state(), "iterator": {"next_index": 40}})
    calls.clear()
    np.testing.assert_array_equal(next(resumed).index, expected)
    assert len(calls) == 2  # one batch of work
