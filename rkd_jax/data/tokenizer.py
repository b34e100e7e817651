r"""Text to ids and back, and chat templates that cannot be injected into.

A thin layer over `tokenizers.Tokenizer` that removes three habits which silently spoil
training data:

* nothing is added behind your back: `Tokenizer.encode` never inserts BOS or EOS and
  ignores any truncation or padding stored in ``tokenizer.json``;
* text is text: ``<|im_end|>`` typed by a user becomes ordinary tokens and never the
  control token, alone as well as inside a chat template;
* padding is no id: `Tokenizer.pad_id` is informational, masks come from lengths.

>>> tokenizer = byte_tokenizer()
>>> tokenizer.encode("hi<|im_end|>")
[104, 105, 60, 124, 105, 109, 95, 101, 110, 100, 124, 62]
>>> tokenizer.encode_chat([{"role": "user", "content": "hi"}])
[256, 117, 115, 101, 114, 10, 104, 105, 257, 10]
>>> tokenizer.eos_id
257
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from rkd_jax.data import chat_template as chat
from rkd_jax.data import tokenizer_config
from rkd_jax.data.chat_template import CHATML, Message
from rkd_jax.data.records import RecordError
from rkd_jax.untrusted import one_line, refused

_MOST_IDS = 2**31  # a batch holds them as int32


class VocabularyMismatch(ValueError):
    """Two vocabularies give the same id to different tokens."""


class Tokenizer:
    """A vocabulary with its special tokens and, possibly, a chat template.

    Build one with `from_file`, `from_bpe`, `byte_tokenizer`, or around a
    `tokenizers.Tokenizer`. Instances are not changed after construction and can be
    pickled, so data-loading processes may carry one.

    Args:
        backend: the tokenizer proper; copied, so later changes to it have no effect.
        bos_token, eos_token, pad_token: names of vocabulary entries, or None.
        chat_template: a Jinja template in the dialect of Hugging Face, or None.

    Raises:
        ValueError: a named token is not in the vocabulary.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
    ):
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = {
            token.content: index
            for index, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        self._names = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "pad_token": pad_token,
        }
        for name in filter(None, self._names.values()):
            self.token_id(name)
        self.chat_template = chat_template

    def __reduce__(self):
        return _restore, (self._backend.to_str(), self._names, self.chat_template)

    def with_chat_template(self, template: str | None) -> Tokenizer:
        """The same vocabulary under another template, such as `CHATML`."""
        return Tokenizer(self._backend, **self._names, chat_template=template)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token, special ones included, with its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        """Largest id + 1. A model's head may be wider (padded), never narrower."""
        return max(self.vocabulary.values(), default=-1) + 1

    def token_id(self, token: str) -> int:
        """The id of one vocabulary entry; ValueError if there is none."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise ValueError(f"the vocabulary has no token {token!r}")
        return index

    def _named_id(self, role: str) -> int | None:
        name = self._names[f"{role}_token"]
        return None if name is None else self.token_id(name)

    @property
    def bos_id(self) -> int | None:
        """Id of the token that opens a sequence. Nothing here adds it by itself."""
        return self._named_id("bos")

    @property
    def eos_id(self) -> int | None:
        """Id of the token that ends a response; a training target when it does."""
        return self._named_id("eos")

    @property
    def pad_id(self) -> int | None:
        """What the vocabulary calls padding. Informational: it may equal `eos_id`."""
        return self._named_id("pad")

    def fingerprint(self) -> str:
        """SHA-256 of the token-to-id map, in hexadecimal."""
        entries = sorted((index, token) for token, index in self.vocabulary.items())
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()

    def encoding_fingerprint(self) -> str:
        """SHA-256 of all that decides a text's ids, as this `tokenizers` writes it."""
        rules = [self._backend.to_str(), self._names, self.chat_template]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of ``text``; no token is added at either end.

        Args:
            text: any string. Bytes that the vocabulary cannot express are dropped,
                as `tokenizers` does.
            parse_special: True reads control strings such as ``<|im_end|>`` as their
                control token. For text you wrote yourself, never for data. False cuts
                each of them after its first character and encodes the parts apart.

        Raises:
            RecordError: lone surrogates, or what a vocabulary without `UNK` lacks.
        """
        return self._encode_pieces([text] if parse_special else self._cut(text))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; an id outside the vocabulary becomes U+FFFD.

        Such an id can come from a model whose head is padded. It stays visible so that
        no reward function mistakes it for nothing.
        """
        parts, run = [], []
        for index in map(int, ids):
            known = 0 <= index < _MOST_IDS
            if known and self._backend.id_to_token(index) is not None:
                run.append(index)
                continue
            parts += [self._backend.decode(run, skip_special), "\ufffd"]
            run = []
        return "".join([*parts, self._backend.decode(run, skip_special)])

    def _encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        encode = self._backend.encode
        try:
            return [i for p in pieces for i in encode(p, add_special_tokens=False).ids]
        except Exception as error:  # tokenizers raises bare Exception
            reason = "text that the tokenizer cannot encode"
            raise RecordError(reason, one_line(error)) from error

    def _cut(self, text: str) -> list[str]:
        """``text`` in parts none of which holds a whole control string."""
        if self._control is None:
            return [text]
        cuts = [match.start() + 1 for match in self._control.finditer(text)]
        return [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        names = sorted(filter(None, self.special_tokens), key=len, reverse=True)
        # A lookahead matches at every start, overlapping control strings included.
        return re.compile(f"(?={'|'.join(map(re.escape, names))})") if names else None

    # Chat

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The chat template's text for ``messages``.

        For reading. Encode with `encode_chat`, which keeps contents from being taken
        for control tokens; encoding this string again cannot know which is which.

        Args:
            messages: mappings with a ``role`` and a text ``content``.
            add_generation_prompt: end with the opening of an assistant turn.
            **variables: further template variables (``tools``, ``date_string``, ...).
                Today's date is not offered: a data set must not depend on it.

        Raises:
            ValueError: no template, no messages, an unknown role, content that is
                not text; RecordError, a kind of it, where the template refuses.
        """
        tokens = {key: name or "" for key, name in self._names.items()}
        return chat.render(
            self._template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **(tokens | variables),
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Ids of the rendered chat; only the template can write control tokens.

        Equals ``encode(render(messages), parse_special=True)`` whenever the messages
        contain no control string. Arguments and errors: see `render`.
        """
        mark = chat.unused_mark((messages, variables))

        def guard(text: str) -> str:
            return mark.join(self._cut(text))

        text = self.render(
            chat.map_strings(messages, guard),
            add_generation_prompt=add_generation_prompt,
            **chat.map_strings(variables, guard),
        )
        return self._encode_pieces(text.split(mark))

    @cached_property
    def _template(self) -> Any:
        if self.chat_template is None:
            raise ValueError(
                "this tokenizer has no chat template; choose one, for example"
                " tokenizer.with_chat_template(rkd_jax.data.chat_template.CHATML),"
                " or give prompts as plain text"
            )
        return chat.compile_template(self.chat_template)

    # Files

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and its companions, as `transformers` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._names,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        template = folder / "chat_template.jinja"
        template.unlink(missing_ok=True)
        if self.chat_template is not None:
            template.write_text(self.chat_template, encoding="utf-8")


def from_file(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder.

    Reads ``tokenizer.json``, the special tokens of ``tokenizer_config.json`` and the
    template of ``chat_template.jinja`` (or, older, of ``tokenizer_config.json``).

    Raises:
        FileNotFoundError: no ``tokenizer.json``.
        ValueError: a file that cannot be read, named together with the reason.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = "convert other formats with AutoTokenizer(...).save_pretrained(folder)"
        raise FileNotFoundError(f"{path}: no such file; {hint}")
    with refused(f"{path}: not a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_file(str(path))
    config = tokenizer_config.read(folder)
    template = tokenizer_config.template(folder, config)
    with refused(f"{path} with {tokenizer_config.NAME}"):
        names = tokenizer_config.named_tokens(config)
        tokenizer = Tokenizer(backend, **names, chat_template=template)
    if tokenizer.vocab_size > _MOST_IDS:
        raise ValueError(f"{path}: id {tokenizer.vocab_size - 1} is no int32")
    return tokenizer


def from_bpe(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    *,
    special: Collection[int] = (),
    split_digits: bool = False,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """A byte-level BPE tokenizer from its tables.

    Args:
        tokens: entry i is the token with id i, in the byte-level alphabet of GPT-2.
        merges: pairs in order of priority.
        special: ids of the control tokens.
        split_digits: every digit is a pre-token of its own (SmolLM2).
        bos_id, eos_id, pad_id: ids, or None where there is no such token.
        chat_template: see `Tokenizer`.

    Raises:
        ValueError: a token occurs twice, or an id is out of range.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if vocabulary[t] != i)
        raise ValueError(f"the vocabulary contains {twice!r} twice")
    named = [i for i in (bos_id, eos_id, pad_id) if i is not None]
    if outside := [i for i in (*special, *named) if not 0 <= i < len(tokens)]:
        raise ValueError(f"token id {outside[0]} outside a table of {len(tokens)}")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, list(merges)))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(tokens[i], special=True, normalized=False) for i in sorted(special)]
    )
    ids = {"bos_token": bos_id, "eos_token": eos_id, "pad_token": pad_id}
    names = {key: None if i is None else tokens[i] for key, i in ids.items()}
    return Tokenizer(backend, **names, chat_template=chat_template)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, ``<|im_start|>`` = 256, ``<|im_end|>`` = 257 = EOS; ChatML.

    Needs no asset: for tests and tiny runs.
    """
    return from_bpe(
        [*_byte_alphabet(), "<|im_start|>", "<|im_end|>"],
        merges=[],
        special=(256, 257),
        bos_id=256,
        eos_id=257,
        chat_template=CHATML,
    )


def same_vocabulary(a: Tokenizer, b: Tokenizer) -> None:
    """Pass if both vocabularies give every id the same token.

    Says nothing about the width of a model's head, which may be padded.

    Raises:
        VocabularyMismatch: they differ; the message shows the first differing ids.
    """
    if a.vocabulary == b.vocabulary:
        return
    first, second = ({i: t for t, i in x.vocabulary.items()} for x in (a, b))
    differing = [
        f"{i}: {first.get(i)!r} against {second.get(i)!r}"
        for i in sorted(first.keys() | second.keys())
        if first.get(i) != second.get(i)
    ]
    raise VocabularyMismatch(
        f"vocabularies of {len(first)} and {len(second)} tokens differ in"
        f" {len(differing)} ids ({'; '.join(differing[:3])}): token-level distillation"
        " needs one vocabulary; use a cross-tokenizer method (sequence or reward level)"
    )


def _restore(definition: str, names: Mapping, chat_template: str | None) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(definition)
    return Tokenizer(backend, **names, chat_template=chat_template)


def _byte_alphabet() -> list[str]:
    """The character that stands for byte 0, 1, ..., 255 in byte-level BPE."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in shown]
    table = {byte: chr(byte) for byte in shown}
    table |= {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]
