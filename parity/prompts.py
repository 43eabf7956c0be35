"""What the two sides are asked: random tokens, token ids from a file, or text where there is a tokenizer."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oss_model.errors import InputError
from oss_model.files import parse_json


class Prompt(NamedTuple):
    """tokens: int64 [batch, length], shorter rows padded on the right. valid: bool [batch, length], False on padding.

    Attention only looks back, so padding on the right changes nothing before it; it is left out of every number.
    """

    tokens: np.ndarray
    valid: np.ndarray


def random_prompt(vocab: int, length: int, seed: int) -> Prompt:
    tokens = np.random.default_rng(seed).integers(0, vocab, (1, length))
    return Prompt(tokens, np.ones(tokens.shape, bool))


def unequal_prompt(vocab: int, length: int, seed: int) -> Prompt:
    """Two random rows, the second of them a quarter shorter."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (2, length))
    return Prompt(tokens, np.arange(length)[None] < np.array([[length], [length - length // 4]]))


def read_prompt(file: Path, vocab: int, tokenizer: Path) -> Prompt:
    """A JSON list of token ids, or of several such lists; or else text, one prompt.

    Args:
      file: the prompt.
      vocab: token ids lie below it.
      tokenizer: the checkpoint's tokenizer.json, for text.

    Raises:
      InputError: if the file cannot be read, is empty, holds ids outside the vocabulary, or is text that there is no
        tokenizer for.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: expected token ids as JSON, or text, found something unreadable ({e})") from None
    try:
        rows: Any = parse_json(text)
    except ValueError:
        rows = _encode(text, file, tokenizer)
    if not isinstance(rows, list):
        rows = _encode(text, file, tokenizer)
    rows = rows if rows and all(isinstance(row, list) for row in rows) else [rows]
    bad = [token for row in rows for token in row if type(token) is not int or not 0 <= token < vocab]
    if bad:
        raise InputError(f"{file}: expected token ids from 0 to {vocab - 1}, found {len(bad)} others, the first {bad[0]!r}")
    if not all(rows):
        raise InputError(f"{file}: expected at least one token a prompt, found an empty one")
    length = max(map(len, rows))
    valid = np.arange(length)[None] < np.array([len(row) for row in rows])[:, None]
    tokens = np.zeros(valid.shape, np.int64)
    tokens[valid] = [token for row in rows for token in row]
    return Prompt(tokens, valid)


def _encode(text: str, file: Path, tokenizer: Path) -> list[int]:
    if not tokenizer.is_file():
        raise InputError(f"{file}: expected a JSON list of token ids, found text, and there is no {tokenizer} to encode it")
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer)).encode(text).ids
