"""Any text, any limits: a row is right, or there is an error of ours.

Cases are drawn by hypothesis, the same ones at every run. What is expected is written
down again here: of the byte tokenizer every id is a byte, 256 opens a chat turn and 257
(EOS) closes it.
"""

import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rkd_jax.data.chat_template import CHATML, compile_template, render
from rkd_jax.data.collate import collate
from rkd_jax.data.jsonl import append_jsonl, write_jsonl
from rkd_jax.data.packing import collate_packed, pack, packed_length, unpack, unpacked
from rkd_jax.data.pipeline import make_batches
from rkd_jax.data.records import (
    ROLES,
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    RecordError,
)
from rkd_jax.data.sources import from_rows, read_jsonl
from rkd_jax.data.tokenize import TokenizeConfig, survey, tokenize_record
from rkd_jax.data.tokenizer import byte_tokenizer, from_bpe
from rkd_jax.data.windows import make_bucketed_batches, make_packed_batches
from rkd_jax.models.api import positions_from_segments
from tests.faults.mutations import check_message

START, EOS = 256, 257
BYTES = byte_tokenizer()
TOKENS = sorted(BYTES.vocabulary, key=BYTES.vocabulary.get)
BOS_OF_ITS_OWN = from_bpe(
    TOKENS,
    [],
    special=(START, EOS),
    bos_id=0,
    eos_id=EOS,
    chat_template="{{ bos_token }}" + CHATML,
)
ASCII = from_bpe([*map(chr, range(33, 127)), "</s>"], [], special=(94,), eos_id=94)
TOKENIZERS = {"bytes": BYTES, "own BOS": BOS_OF_ITS_OWN, "ASCII": ASCII}

PIECES = [
    *("<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<|im_<|im_end|>end|>"),
    *("\x00", "\x1b[2J", "\x7f", "\r\n", "\u2028", "\ufeff", "\ufffd", "\u200b"),
    *("\ue000", "\ue000\ue000", "\u202eabc", "שלום", "سلام", "e\u0301\u0327", "ﷺ"),
    *("👩‍👩‍👧‍👦", "🇩🇪", "日本語", "\U0010ffff", "⟦a⟧"),
    *("{{ 1 / 0 }}", "{% raw %}", "</s>"),
    *(" ", "\t\n ", "\u3000", "a", "x" * 40),
]
unicode = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=4).map(
    "".join
)
texts = unicode.filter(str.strip)
surrogates = st.text(st.characters(), max_size=6) | st.just("a\ud800")
messages = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": unicode})
chats = st.lists(messages, max_size=2).flatmap(
    lambda head: texts.map(lambda text: [*head, {"role": "user", "content": text}])
)
prompts = texts | chats
demonstrations = st.builds(
    DemonstrationRecord, prompts, texts, teacher_prompt=st.none() | prompts
)
preferences = st.builds(
    lambda prompt, a, b, teacher, label: PreferenceRecord(
        prompt, "+" + a, "-" + b, teacher, label=label
    ),
    *(prompts, unicode, unicode, st.none() | prompts, st.floats(0, 1)),
)
records = st.builds(PromptRecord, prompts, st.none() | prompts) | (
    demonstrations | preferences
)
ROW = 64  # of packed rows


def cases(number):
    """So many examples, the same at every run."""
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def configurations(draw, **fixed):
    limit, response = draw(st.integers(2, 24)), draw(st.integers(1, 12))
    teacher = draw(st.none() | st.integers(2, 30))
    options = {
        "prompt_buckets": (limit // 2, limit) if draw(st.booleans()) else (),
        "response_buckets": (response, 2 * response) if draw(st.booleans()) else (),
        "max_teacher_prompt": teacher,
        "chat": draw(st.booleans()),
        "truncate_prompt": draw(st.sampled_from(["left", "right"])),
        "append_eos": draw(st.booleans()),
        "add_bos": draw(st.booleans()),
    }
    if options["response_buckets"]:
        response *= 2
    return TokenizeConfig(limit, response, **(options | fixed))


def bytes_of(text):
    return list(text.encode("utf-8"))


def turns(prompt, config):
    """Ids of a prompt, uncut."""
    if isinstance(prompt, str):
        if not config.chat:
            return bytes_of(prompt)
        prompt = [{"role": "user", "content": prompt}]
    ids = [
        [START, *bytes_of(f"{turn['role']}\n{turn['content']}"), EOS, *bytes_of("\n")]
        for turn in prompt
    ]
    return [*itertools.chain(*ids), START, *bytes_of("assistant\n")]


def cut(ids, limit, config):
    """A prompt of ``ids`` with its BOS, at most ``limit`` long."""
    if config.add_bos and ids[0] != START:
        ids = [START, *ids]
    if len(ids) <= limit:
        return ids
    if config.truncate_prompt == "right":
        return ids[:limit]
    return ids[:1] + ids[1 - limit :] if config.add_bos else ids[-limit:]


def texts_of(record):
    if isinstance(record, PreferenceRecord):
        return [record.chosen, record.rejected]
    return [record.response] if isinstance(record, DemonstrationRecord) else []


# Records

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.binary(max_size=3)
    | surrogates
    | unicode,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]) | unicode, inner)
        | st.fixed_dictionaries(
            {"role": st.sampled_from(ROLES) | inner, "content": inner}
        )
    ),
    max_leaves=6,
)
FIELDS = ["prompt", "response", "chosen", "rejected", "teacher_prompt"]
NUMBERS = ["chosen_reward", "rejected_reward", "label"]
fields = st.fixed_dictionaries(
    {"prompt": prompts | anything},
    optional=dict.fromkeys(FIELDS[1:], texts | anything)
    | dict.fromkeys(NUMBERS, st.floats(0, 1) | anything)
    | {"new\nline": anything},
)


@cases(450)
@given(
    st.sampled_from([PromptRecord, DemonstrationRecord, PreferenceRecord]),
    fields | anything,
    st.booleans(),
)
def test_any_value_is_a_record_or_a_record_error(kind, value, allow_extra):
    try:
        record = kind.from_json(value, allow_extra=allow_extra)
    except RecordError as error:
        check_message(error, "")
        found, report = from_rows([value], kind, allow_extra=False, on_error="skip")
        assert len(found) + report.total_skipped == 1
        return
    data = json.loads(json.dumps(record.to_json()))
    assert kind.from_json(data) == record
    for name in ("prompt", "teacher_prompt"):
        prompt = getattr(record, name, None)
        if isinstance(prompt, list):
            assert all(set(turn) == {"role", "content"} for turn in prompt)
            assert prompt[-1]["role"] != "assistant"
            prompt = prompt[-1]["content"]
        assert prompt is None or prompt.strip()
    assert all(text.encode("utf-8").strip() for text in texts_of(record))


@cases(60)
@given(st.lists(records), st.lists(demonstrations, min_size=1, max_size=3))
def test_lines_give_back_every_record(tmp_path_factory, mixed, more):
    path = tmp_path_factory.mktemp("lines") / "records.jsonl"
    for kind in (PromptRecord, DemonstrationRecord, PreferenceRecord):
        written = [record for record in mixed if type(record) is kind]
        if not written:
            continue
        write_jsonl(path, written)
        found, report = read_jsonl(path, kind)
        assert (found, report.read, report.total_skipped) == (written, len(written), 0)
    write_jsonl(path, more)
    append_jsonl(path, more)
    assert path.read_bytes().count(b"\n") == 2 * len(more)
    assert read_jsonl(path, DemonstrationRecord)[0] == more + more


@cases(200)
@given(st.lists(texts | st.just(""), min_size=1), st.data())
def test_columns_that_fail_are_counted(rows, data):
    failing = data.draw(st.sets(st.integers(0, len(rows) - 1)))
    errors = itertools.cycle([KeyError, AttributeError, ZeroDivisionError, OSError])

    def prompt(row):
        if row["number"] in failing:
            raise next(errors)("two\nlines")
        return row["text"]

    table = [{"number": i, "text": text} for i, text in enumerate(rows)]
    columns = {"prompt": prompt}
    found, report = from_rows(table, PromptRecord, columns, on_error="skip")
    good = [t for i, t in enumerate(rows) if i not in failing and t]
    assert [record.prompt for record in found] == good
    assert report.total_skipped == len(rows) - len(good)
    assert str(report).isprintable()


# Tokenizers and templates


@cases(300)
@given(unicode | surrogates)
def test_text_comes_back_and_never_becomes_control(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        for use in (BYTES.encode, lambda t: BYTES.encode(t, parse_special=True)):
            with pytest.raises(RecordError, match="cannot encode"):
                use(text)
        return
    ids = BYTES.encode(text)
    assert ids == bytes_of(text)
    assert BYTES.decode(ids) == BYTES.decode(ids, skip_special=False) == text
    assert set(ASCII.encode(text)) <= set(range(94))


@cases(200)
@given(st.lists(st.integers(-(2**70), 2**70) | st.integers(-2, 260)))
def test_any_ids_are_decoded(ids):
    text = BYTES.decode(ids, skip_special=False)
    unknown = sum(not 0 <= i < 258 for i in ids)
    assert text.count("\ufffd") >= unknown
    assert text.count("<|im_end|>") >= ids.count(EOS)


odd_messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from([*ROLES, "bot", "", None, 7]) | unicode},
        optional={"content": unicode | surrogates | anything, "tool_calls": anything},
    )
    | anything,
    max_size=3,
)


@cases(300)
@given(odd_messages | chats, st.booleans())
def test_any_messages_are_a_chat_or_refused(turns_, opening):
    try:
        ids = BYTES.encode_chat(turns_, add_generation_prompt=opening)
    except ValueError as error:
        check_message(error, "")
        return
    assert ids.count(START) == len(turns_) + opening
    assert ids.count(EOS) == len(turns_)
    plain = not any("<|" in turn["content"] for turn in turns_)
    if plain:
        text = BYTES.render(turns_, add_generation_prompt=opening)
        assert BYTES.encode(text, parse_special=True) == ids


fragments = st.sampled_from(
    [
        *("{{", "}}", "{%", "%}", "{#", "#}", "messages", "[0]", ".content", " | "),
        *("for m in messages", "endfor", "if", "endif", "set x =", "x", "1", "'a'"),
        *("+", "*", "**", "/", "(", ")", "tojson", "loop.index", "raise_exception"),
        *("macro f()", "endmacro", "f()", "m.role", "%", "~", "-%}", "{%-", "range"),
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
    ]
)


@cases(400)
@given(st.lists(fragments | unicode, max_size=8).map(" ".join))
def test_any_template_is_text_or_refused(template):
    try:
        text = render(compile_template(template), [{"role": "user", "content": "x"}])
    except ValueError as error:
        check_message(error, "template")
        return
    assert isinstance(text, str)


# Rows


def tokenized(record, name, config):
    """The row, or None where there is none and an error of ours says so."""
    tokenizer = TOKENIZERS[name]
    try:
        return tokenize_record(record, tokenizer, config, 5)
    except RecordError as error:
        check_message(error, "record 5: ")
        chat = config.chat or not isinstance(record.prompt, str)
        chat = chat or isinstance(record.teacher_prompt, list)
        assert name == "ASCII" or (chat and config.truncate_prompt == "right")
    except ValueError as error:  # what only ASCII lacks
        check_message(error, "")
        assert name == "ASCII"
    return None


@cases(600)
@given(records, configurations(), st.sampled_from(sorted(TOKENIZERS)))
def test_any_record_is_a_row_within_its_limits(record, config, name):
    row = tokenized(record, name, config)
    if row is None:
        return
    limits = config.prompt_widths[-1], config.teacher_prompt_widths[-1]
    for prompt, limit in zip((row.prompt, row.teacher_prompt), limits, strict=True):
        assert 1 <= len(prompt) <= limit
        if config.add_bos:
            assert prompt[0] == TOKENIZERS[name].bos_id
    assert all(1 <= len(ids) <= config.max_response for ids in row.responses)
    assert len(row.responses) == len(texts_of(record))
    if name != "bytes":
        return
    teacher = record.prompt if record.teacher_prompt is None else record.teacher_prompt
    assert row.prompt == cut(turns(record.prompt, config), limits[0], config)
    assert row.teacher_prompt == cut(turns(teacher, config), limits[1], config)
    for text, ids in zip(texts_of(record), row.responses, strict=True):
        whole = bytes_of(text) + [EOS] * config.append_eos
        assert ids == whole[: config.max_response]
        if len(whole) <= config.max_response:
            assert BYTES.decode(ids) == text
    lengths = [len(bytes_of(t)) + config.append_eos for t in texts_of(record)]
    too_long = sum(length > config.max_response for length in lengths)
    assert row.events.count("response truncated") == too_long


@st.composite
def tables(draw, kinds=(demonstrations, preferences)):
    """Records of one kind, the rows they make, and the configuration."""
    config = draw(configurations(truncate_prompt="left"))
    drawn = draw(st.lists(draw(st.sampled_from(kinds)), min_size=1, max_size=7))
    rows = [tokenize_record(r, BYTES, config, i) for i, r in enumerate(drawn)]
    return drawn, rows, config


def views(batch):
    """(tokens, token mask, response mask, member, whose prompt) of every response."""
    for name in ("sequences", "teacher_sequences"):
        sequences = getattr(batch, name)
        assert sequences.tokens.dtype == np.int32
        assert sequences.token_mask.dtype == sequences.response_mask.dtype == np.bool_
        assert sequences.tokens.shape == sequences.token_mask.shape
        assert sequences.response_mask.shape[:-1] == sequences.tokens.shape[:-1]
        leaves = (sequences.tokens, sequences.token_mask, sequences.response_mask)
        prompt = "prompt" if name == "sequences" else "teacher_prompt"
        if sequences.tokens.ndim == 2:
            yield prompt, 0, leaves
        else:
            for member in range(2):
                yield prompt, member, [leaf[:, member] for leaf in leaves]


@cases(200)
@given(tables())
def test_any_rows_make_a_batch_that_holds_each_once(table):
    _, rows, config = table
    batch = collate(rows, config)
    assert batch.index.tolist() == list(range(len(rows)))
    for prompt_name, member, (tokens, real, trained) in views(batch):
        width = trained.shape[-1]
        left = tokens.shape[-1] - width
        assert width in config.response_widths
        widths = {
            "prompt": config.prompt_widths,
            "teacher_prompt": config.teacher_prompt_widths,
        }
        assert left in widths[prompt_name]
        # No padding is trained on, and every token of a response is.
        np.testing.assert_array_equal(trained, real[:, left:])
        assert not tokens[~real].any()
        for row, ids, mask in zip(rows, tokens, real, strict=True):
            prompt, response = getattr(row, prompt_name), row.responses[member]
            columns = range(left - len(prompt), left + len(response))
            assert np.flatnonzero(mask).tolist() == list(columns)
            assert ids[mask].tolist() == [*prompt, *response]


@cases(150)
@given(tables(), st.integers(0, 20))
def test_any_rows_are_packed_without_touching_each_other(table, spare):
    _, rows, config = table
    assume(max(map(packed_length, rows)) <= ROW)
    bins = pack(rows, ROW)
    bins += [[]] * (len(rows) + 1 - len(bins))
    in_order = [row for records_ in bins for row in records_]
    batch = collate_packed(bins, ROW)
    for prompt_name in ("prompt", "teacher_prompt"):
        student = prompt_name == "prompt"
        view = batch.sequences if student else batch.teacher_sequences
        ids, segments = view.tokens, view.segment_ids
        trained = np.pad(view.response_mask, ((0, 0), (1, 0)))
        assert (view.token_mask.dtype, trained.dtype) == (np.bool_, np.bool_)
        np.testing.assert_array_equal(view.token_mask, segments > 0)
        assert not (trained & (segments == 0)).any()
        assert not ids[segments == 0].any()
        positions = np.zeros_like(segments)
        for b, records_ in enumerate(bins):
            members = [
                (row, response) for row in records_ for response in row.responses
            ]
            assert set(segments[b].tolist()) - {0} == set(range(1, len(members) + 1))
            for segment, (row, response) in enumerate(members, 1):
                columns = np.flatnonzero(segments[b] == segment)
                prompt = getattr(row, prompt_name)
                assert (np.diff(columns) == 1).all()
                assert ids[b, columns].tolist() == [*prompt, *response]
                assert trained[b, columns].tolist() == [False] * len(prompt) + (
                    [True] * len(response)
                )
                positions[b, columns] = np.arange(len(columns))
        fixed = np.zeros((8, ROW), np.int32)  # one shape: compiled once
        fixed[: len(segments)] = segments
        found = np.asarray(positions_from_segments(fixed))[: len(segments)]
        np.testing.assert_array_equal(found[segments > 0], positions[segments > 0])
    one_by_one = unpacked(batch)
    assert jax.tree.structure(one_by_one) == jax.tree.structure(collate(rows, config))
    for row, again in zip(in_order, unpack(batch), strict=True):
        same = ("index", "prompt", "teacher_prompt", "responses")
        assert all(getattr(row, name) == getattr(again, name) for name in same)
        assert again.label == np.float32(row.label)
    assert one_by_one.index.tolist() == [row.index for row in in_order]


MAKERS = {
    "plain": lambda *a, **k: make_batches(*a, **k),
    "packed": lambda *a, **k: make_packed_batches(*a, row_length=ROW, window=3, **k),
    "bucketed": lambda *a, **k: make_bucketed_batches(*a, window_batches=2, **k),
}


@pytest.mark.parametrize("make", MAKERS)
@cases(60)
@given(table=tables(), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_every_record_is_handed_out_or_counted(make, table, seed, data):
    drawn, rows, config = table
    if make == "packed":
        assume(max(map(packed_length, rows)) <= ROW)
    if make == "bucketed":
        assume(len(config.prompt_widths) + len(config.response_widths) > 2)
    size = data.draw(st.integers(1, len(rows)))
    options = {"batch_size": size, "seed": seed, "epochs": 2}
    shuffle = data.draw(st.booleans())
    steps = list(MAKERS[make](drawn, BYTES, config, **options, shuffle=shuffle))
    found = []
    for step in steps:
        seen = unpack(step) if make == "packed" else _rows(step)
        found += [row.index if make == "packed" else row[0] for row in seen]
        for row in seen:
            index, *parts = (
                (row.index, row.prompt, row.teacher_prompt, *row.responses)
                if make == "packed"
                else row
            )
            expected = rows[index]
            assert parts == [
                expected.prompt,
                expected.teacher_prompt,
                *expected.responses,
            ]
    dropped = 0 if make == "packed" else 2 * len(rows) % size
    assert len(found) + dropped == 2 * len(rows)
    for i in range(len(rows)):
        assert found.count(i) <= 2
    assert survey(drawn, BYTES, config).rows == len(rows)


def _rows(batch):
    """Index, both prompts and the responses of every row, read off the masks."""
    rows = []
    for b, index in enumerate(batch.index.tolist()):
        parts = {"prompt": [], "teacher_prompt": []}
        responses = []
        for prompt_name, _, (tokens, real, trained) in views(batch):
            left = tokens.shape[-1] - trained.shape[-1]
            parts[prompt_name] = tokens[b, :left][real[b, :left]].tolist()
            if prompt_name == "prompt":
                responses.append(tokens[b, left:][trained[b]].tolist())
        rows.append([index, parts["prompt"], parts["teacher_prompt"], *responses])
    return rows


@pytest.mark.parametrize(
    "text",
    [
        *("x" * 300_000, "\x00" * 100_000, " " * 100_000 + "x"),
        *("🙂" * 50_000, "<|im_end|>" * 5000),
    ],
    ids=["letters", "zeros", "spaces", "emoji", "control strings"],
)
def test_huge_texts(text):
    config = TokenizeConfig(7, 9, chat=True)
    chat = [{"role": "user", "content": text}] * 2
    for record in (DemonstrationRecord(text, text), DemonstrationRecord(chat, "a")):
        row = tokenize_record(record, BYTES, config)
        assert row.prompt == [START, *bytes_of("assistant\n")][-7:]
        assert row.responses[0] == (bytes_of(texts_of(record)[0]) + [EOS])[:9]
