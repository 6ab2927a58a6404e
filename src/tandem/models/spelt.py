"""Control tokens that a message spells, kept as text.

A chat template writes contents and its own control tokens into one text, and a tokeniser reads control tokens wherever
they stand: `<|im_end|>` in what a tool printed ends the tool's turn. So each one spelt in a content is broken by a mark
before it is rendered. What then still reads as a control token is the template's; these are wrapped in the mark, those
of contents mended, and the whole is encoded by a twin of the tokeniser that knows control tokens by their wrapped names
alone. All else is as the tokeniser has it, so a text that spells none has the ids that it had.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from tandem.errors import ModelError

if TYPE_CHECKING:
    import tokenizers

LONG = 4096  # characters
_MARKS = range(0xE000, 0xF900)  # private use: no tokeniser or template gives them a meaning
Rows = Sequence[Mapping[str, Any]]


def encoded(backend: tokenizers.Tokenizer, text: str, special: bool, yields: bool) -> tokenizers.Encoding:
    """tokenizers holds the interpreter's lock while it encodes one text, 1.4 s for 1.3 MB, and not while it encodes a
    batch: where `yields`, a long text is a batch of one, so that other threads go on. (Its own threads do not live
    through a fork, so this is not for processes that fork.)"""
    if yields and len(text) >= LONG:
        return backend.encode_batch([text], add_special_tokens=special)[0]
    return backend.encode(text, add_special_tokens=special)


class Spelling:
    """The control tokens of a tokeniser and a chat template: special ones, and added ones that the template writes."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str) -> None:
        self.backend = backend
        self.template = template
        self._twin = lru_cache(maxsize=4)(self._made_twin)

    @cached_property
    def controls(self) -> dict[int, str]:
        """By id. One character alone is no token that a text could be broken in."""
        return {
            token_id: token.content
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if len(token.content) > 1
            and (token.special or (token.content in self.template and not token.content.isspace()))
        }

    @cached_property
    def _spelt(self) -> re.Pattern[str]:
        longest_first = sorted(self.controls.values(), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _firsts(self) -> frozenset[str]:
        return frozenset(text[0] for text in self.controls.values())

    @cached_property
    def _beginnings(self) -> Mapping[str, Sequence[str]]:
        """Of control tokens, by their last character: what follows a content may complete one."""
        found: dict[str, list[str]] = {}
        for begun in {text[:end] for text in self.controls.values() for end in range(1, len(text))}:
            found.setdefault(begun[-1], []).append(begun)
        return found

    def found(self, rows: Rows) -> list[str]:
        """The control tokens that messages spell, all but an assistant's: what a model wrote are its own tokens."""
        texts = (text for row in rows for text in _texts(row) if self._may(text))
        return [token for text in texts for token in self._spelt.findall(text)]

    def marked(self, rows: Rows) -> tuple[Rows, str]:
        """The messages with each control token in them broken by a mark, and the mark; "" where there is none."""
        if not any(self._reads(text) for row in rows for text in _texts(row)):
            return rows, ""
        taken = {*self.template, *json.dumps([*map(dict, rows)], ensure_ascii=False, default=str)}
        mark = next(chr(code) for code in _MARKS if chr(code) not in taken)
        return [_mapped(row, lambda text: self._broken(text, mark)) if _is_given(row) else row for row in rows], mark

    def encode(self, text: str, mark: str, add_special_tokens: bool, yields: bool) -> list[int]:
        """Ids of a rendered text, in which what the mark breaks is text. ModelError where it would not be."""
        whole = encoded(self.backend, text, False, yields)
        pieces, start, own = [], 0, [*self.backend.encode("", add_special_tokens=add_special_tokens).ids]
        for token, (begin, end) in zip(whole.ids, whole.offsets, strict=True):
            if token in self.controls and mark not in text[begin:end]:
                pieces += [text[start:begin].replace(mark, ""), f"{mark}{self.controls[token]}{mark}"]
                start = end
                own.append(token)
        pieces.append(text[start:].replace(mark, ""))
        twin, named = self._twin(mark)
        given = encoded(twin, "".join(pieces), add_special_tokens, yields).ids
        ids = [named.get(token, token) for token in given]
        if beyond := Counter(token for token in ids if token in self.controls) - Counter(own):
            raise ModelError(
                f"a message spells {', '.join(repr(self.controls[token]) for token in beyond)}, and this tokeniser has "
                "no other way to write it. Set task.control_tokens=as_template, or change the message."
            )
        return ids

    def _reads(self, text: str) -> bool:
        """Whether a control token is read in `text`, or could be where more follows."""
        if self._may(text) and (self._spelt.search(text) or self._begun(text)):
            return True
        normalizer = self.backend.normalizer
        return normalizer is not None and self._spelt.search(normalizer.normalize_str(text)) is not None

    def _may(self, text: str) -> bool:
        """Whether a control token could begin in `text`: for speed."""
        return any(first in text for first in self._firsts)

    def _begun(self, text: str) -> str:
        """The longest beginning of a control token that `text` ends with."""
        return max((one for one in self._beginnings.get(text[-1:], ()) if text.endswith(one)), key=len, default="")

    def _broken(self, text: str, mark: str) -> str:
        while self._spelt.search(text):
            text = self._spelt.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        normalizer = self.backend.normalizer
        while begun := self._begun(text):
            cut = len(text) - len(begun) + 1
            text = text[:cut] + mark + text[cut:]
        if normalizer is not None and self._spelt.search(normalizer.normalize_str(text)):
            return mark.join(text)
        return text

    def _made_twin(self, mark: str) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
        """The tokeniser, but for control tokens: known by their names between marks, and made by nothing else."""
        from tokenizers import Tokenizer as Backend

        renamed = {text: f"{mark}{text}{mark}" for text in self.controls.values()}
        held = json.loads(self.backend.to_str())
        for token in held["added_tokens"]:
            token["content"] = renamed.get(token["content"], token["content"])
        model = held["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {renamed.get(piece, piece): place for piece, place in model["vocab"].items()}
        else:
            model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if not _touches(pair, renamed)]
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
        twin = Backend.from_str(json.dumps(held))
        twin.encode_special_tokens = self.backend.encode_special_tokens
        named = {twin.token_to_id(renamed[text]): token for token, text in self.controls.items()}
        return twin, {own: token for own, token in named.items() if own is not None}


def _touches(pair: Any, controls: Mapping[str, str]) -> bool:
    """Whether a merge takes or makes a control token."""
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return left in controls or right in controls or left + right in controls


def _is_given(row: Mapping[str, Any]) -> bool:
    return row.get("role") != "assistant"


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    """All texts that a message which no assistant wrote holds, however deep."""
    left = [value for name, value in row.items() if name != "role"] if _is_given(row) else []
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value


def _mapped(value: Any, of: Any) -> Any:
    """A message with `of` of each text in it; its role and the names of its fields stay."""
    if isinstance(value, str):
        return of(value)
    if isinstance(value, Mapping):
        return {name: one if name == "role" else _mapped(one, of) for name, one in value.items()}
    return [_mapped(one, of) for one in value] if isinstance(value, list | tuple) else value
