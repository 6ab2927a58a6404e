"""Texts that a model is looked at with: a file of JSON lines, or of plain text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import ConfigError
from tandem.models.tokenizer import Tokenizer

SEQUENCE_TOKENS = 512
LEAST_TOKENS = 16  # of a piece: what is shorter says little of the numbers that a matrix is given


def read_texts(path: Path, paragraphs: bool, flag: str = "--texts") -> list[str]:
    """Of a .jsonl file each line's "text"; of any other file its paragraphs, which empty lines part, or all as one.

    flag: that named it, for errors. ConfigError for a file without one, and for a line without a text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error}. Give a file of text, or of JSON lines.") from error
    if path.suffix == ".jsonl":
        lines = enumerate(content.split("\n"), 1)
        found = [_text(f"{flag} {path} line {number}", line) for number, line in lines if line.strip()]
    else:
        found = [" ".join(part.split()) for part in content.split("\n\n")] if paragraphs else [content]
    found = [text for text in found if text.strip()]
    if not found:
        raise ConfigError(f"{flag} {path} holds no text. Give JSON lines with a text each, or plain text.")
    return found


def _text(where: str, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} is no JSON: {error}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ConfigError(f'{where} has no "text". Each line is an object with one.')
    return str(row["text"])


@dataclass(frozen=True, slots=True)
class Pieces:
    """Of texts, none over two of them: what is taken, and how many there are.

    >>> Pieces(((1, 2, 3), (4, 5)), 7).tokens
    5
    """

    taken: tuple[Sequence[int], ...]
    of: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.taken))


def pieces(path: Path, count: int, tokenizer: Tokenizer, most_tokens: int) -> Pieces:
    """A file's texts in pieces of SEQUENCE_TOKENS, the last of each text shorter: `count`, taken evenly. A plain file
    is one text; pieces of less than LEAST_TOKENS are left out.

    most_tokens: positions of the model. ConfigError where no piece is left.
    """
    size = min(SEQUENCE_TOKENS, most_tokens)
    texts = [tokenizer.encode(text) for text in read_texts(path, paragraphs=False)]
    least = min(LEAST_TOKENS, size)
    found = [
        tokens[start : start + size]
        for tokens in texts
        for start in range(0, len(tokens), size)
        if len(tokens) - start >= least
    ]
    if not found:
        raise ConfigError(
            f"--texts {path} has no text of {least} tokens or more; its longest has {max(map(len, texts))}. Give "
            "longer texts, about as the model reads them in use."
        )
    taken = min(count, len(found))
    return Pieces(tuple(found[index * len(found) // taken] for index in range(taken)), len(found))
