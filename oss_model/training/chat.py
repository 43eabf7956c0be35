"""Chats to train on: rendered by the checkpoint's own template, with the assistant's tokens marked.

gpt-oss's template (https://github.com/openai/harmony) marks no spans, and leaves out what an assistant thought before its last
turn: what a prefix of a chat renders to is no prefix of the whole. So the whole is rendered and tokenized once, and answers
are found in it by the ids of the role markers.
"""

import dataclasses
import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oss_model.errors import InputError, raise_all
from oss_model.files import parse_json

START, ENDS = "<|start|>assistant", ("<|end|>", "<|return|>", "<|call|>")  # of an answer, in harmony
END_OF_TEXT = "<|endoftext|>"  # after a document that is no chat
SHOWN = 8  # faults of a file


@dataclasses.dataclass(frozen=True)
class Document:
    """
    Attributes:
      tokens: int32 [length].
      counted: bool [length], the tokens whose loss counts: of a chat those of the answers, of plain text all.
    """

    tokens: np.ndarray
    counted: np.ndarray


class ChatTemplate:
    """A Jinja template as checkpoints carry it, in the environment that transformers gives one.

    A template is a stranger's code: it runs in jinja2's ImmutableSandboxedEnvironment.

    Args:
      source: the template.
      today: what `strftime_now` says, so that a resumed run renders what it rendered before.
    """

    def __init__(self, source: str, today: datetime.date):
        try:
            from jinja2 import TemplateError
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ModuleNotFoundError:
            raise InputError(
                "chats: expected the package jinja2, to render them with, found none; pip install jinja2"
            ) from None

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def to_json(value: Any, **options: Any) -> str:
            return json.dumps(value, ensure_ascii=False, **options)  # jinja2's own escapes for HTML

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = to_json
        environment.globals |= {"raise_exception": refuse, "strftime_now": today.strftime}
        self._errors = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InputError(f"chat template: expected one that Jinja reads, found {error}") from None

    @classmethod
    def of(cls, checkpoint: Path, today: datetime.date) -> "ChatTemplate":
        """That of a checkpoint: chat_template.jinja, or what tokenizer_config.json says."""
        file, config = checkpoint / "chat_template.jinja", checkpoint / "tokenizer_config.json"
        if file.is_file():
            return cls(file.read_text("utf-8"), today)
        try:
            source = parse_json(config.read_bytes())["chat_template"] if config.is_file() else None
        except (ValueError, TypeError, KeyError):
            source = None
        if isinstance(source, list):  # several, by name
            source = next((one.get("template") for one in source if one.get("name") == "default"), None)
        if not isinstance(source, str):
            raise InputError(f"{checkpoint}: expected chat_template.jinja, to render chats with, found none")
        return cls(source, today)

    def render(self, messages: Sequence[dict], **more: Any) -> str:
        """The whole of a chat, ending with its last message.

        Raises:
          InputError: with what the template says of these messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=False, **more)
        except self._errors as error:
            raise InputError(f"the template refuses it: {error}") from None


class Answers:
    """Which tokens are an assistant's, found by ids: what follows `start` up to one of `ends`, which counts too.

    Args:
      start: ids with which an answer's header begins; what comes after them is the model's to write, the channel included.
      ends: ids, any of which ends an answer.
    """

    def __init__(self, start: Sequence[int], ends: Sequence[int]):
        self.start, self.ends = np.array(start), np.array(ends)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """bool [length] of int32 [length]."""
        width, length = len(self.start), len(tokens)
        counted, at = np.zeros(length, bool), 0
        if length < width:
            return counted
        begins = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(tokens, width) == self.start).all(axis=1)) + width
        ends = np.flatnonzero(np.isin(tokens, self.ends))
        for begin in begins:
            if begin >= at:
                later = ends[np.searchsorted(ends, begin) :]
                at = int(later[0]) + 1 if len(later) else length
                counted[begin:at] = True
        return counted


class Tokenizer:
    """The checkpoint's tokenizer.json.

    Raises:
      InputError: if it, or the package that reads it, is not there.
    """

    def __init__(self, checkpoint: Path):
        file = checkpoint / "tokenizer.json"
        if not file.exists():
            raise InputError(f"{checkpoint}: expected tokenizer.json, found none")
        try:
            from tokenizers import Tokenizer as Reader
        except ModuleNotFoundError:
            raise InputError(
                f"{file}: expected the package tokenizers, to read it with, found none; pip install tokenizers"
            ) from None
        try:
            self._tokenizer = Reader.from_file(str(file))
        except Exception as error:  # the library raises no other kind
            raise InputError(f"{file}: expected a tokenizer, found {str(error).splitlines()[0]}") from None
        self.file = file
        self.controls = sorted(token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special)

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens]; control tokens are read where their names stand."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def answers(self) -> Answers:
        """
        Raises:
          InputError: if the control tokens of harmony are not in it.
        """
        missing = [token for token in ("<|start|>", *ENDS[:1]) if self.id_of(token) is None]
        if missing:
            raise InputError(f"{self.file}: expected the control token {missing[0]}, to find answers by, found none")
        ends = [number for token in ENDS if (number := self.id_of(token)) is not None]
        return Answers(self.encode(START).tolist(), ends)


def read_documents(file: Path, checkpoint: Path, today: datetime.date) -> list[Document]:
    """The documents of a JSONL file, a line each: {"messages": [...], "tools": [...]}, or {"text": "..."}.

    Of a chat the assistant's tokens count. What else a chat's line holds is handed to the template (`reasoning_effort`, say).

    Raises:
      InputError: naming each line that is no such thing, or whose text holds a control token: it would be read as one.
    """
    tokenizer, found, faults = Tokenizer(checkpoint), [], []
    template: ChatTemplate | None = None
    answers: Answers | None = None
    end = tokenizer.id_of(END_OF_TEXT)
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            try:
                value = parse_json(line)
            except ValueError as error:
                raise InputError(f"expected JSON, found none ({error})") from None
            held = next((token for text in _texts(value) for token in tokenizer.controls if token in text), None)
            if held is not None:
                raise InputError(f"expected text, found the control token {held} in it")
            match value:
                case {"messages": [_, *_] as messages, **more} if all(isinstance(message, dict) for message in messages):
                    template = template or ChatTemplate.of(checkpoint, today)
                    answers = answers or tokenizer.answers()
                    tokens = tokenizer.encode(template.render(messages, **more))
                    counted = answers(tokens)
                    if not counted.any():
                        raise InputError("expected an answer of the assistant, found none")
                case {"text": str(text)} if text:
                    tokens = np.append(tokenizer.encode(text), [] if end is None else [end]).astype(np.int32)
                    counted = np.ones(len(tokens), bool)
                case _:
                    raise InputError('expected {"messages": [...]} or {"text": "..."}, found ' + _shown(value))
            found.append(Document(tokens, counted))
        except InputError as error:
            faults += [f"{where}: {fault}" for fault in error.faults]
    if len(faults) > SHOWN:
        faults = [*faults[:SHOWN], f"{file}: {len(faults) - SHOWN} more lines that are wrong"]
    if not found and not faults:
        faults = [f"{file}: expected a document a line, found none"]
    raise_all(faults)
    return found


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for one in value.values():
                yield from _texts(one)
        case list():
            for one in value:
                yield from _texts(one)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
