"""Preferences in files: pairs of answers, answers that were liked or not, and answers with scores.

A pair's row has `prompt`, `chosen` and `rejected` (texts, or messages of which the sides' may hold the prompt too, as
TRL and UltraFeedback have them), or the two sides alone: messages that begin alike, or texts of "Human:" and
"Assistant:" turns, as Anthropic's HH has them. A rated answer's has `prompt`, `completion` and a `label` (true: liked)
or a `score`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tandem.columns import Columns
from tandem.corpus import chats
from tandem.corpus.config import PREFERRED, CorpusConfig
from tandem.corpus.lines import Rows, finite
from tandem.corpus.reader import refused
from tandem.corpus.turns import Trained, check_rendered, spoken
from tandem.program.formats.parsed import Tools
from tandem.program.reward import clipped
from tandem.types import Message

if TYPE_CHECKING:
    from tandem.program.render import Renderer

PAIR, RATED = ("prompt", "chosen", "rejected"), ("prompt", "completion", "label", "score")
_SPEAKER = re.compile(r"\n\n(Human|Assistant):[ \n]?")


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """An answer to a prompt."""

    prompt: tuple[Message, ...]
    said: tuple[Message, ...]  # the assistant's turns, and what tools answered between them
    columns: Columns  # tokens and loss_mask, which all of the answer's turns are in
    tools: Tools = ()
    task: str | None = None


class Words:
    """Answers as tokens."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        self._rendered: set[object] = set()  # kinds of messages that the template is known to write

    def told(
        self, asked: Sequence[Mapping[str, Any]], said: Sequence[Mapping[str, Any]], row: Mapping[str, Any], place: str
    ) -> Told:
        """Of messages. CorpusError for turns that no program could have had, or that are no one sequence of tokens."""
        if said[0].get("role") != "assistant" or said[-1].get("role") != "assistant":
            raise refused("roles out of order", place, "an answer begins and ends with a turn of the assistant's.")
        chat = chats.openai([*asked, *said], row.get("system"), row.get("tools"), place)
        first = len(chat.messages) - len(said)
        check_rendered(self.renderer, chat.messages, chat.tools, self._rendered, place)
        turns = frozenset(n for n, one in enumerate(chat.messages) if n >= first and one.role == "assistant")
        segments = spoken(self.renderer, chat.messages, chat.tools, Trained(turns), place).segments
        if len(segments) > 1:
            raise refused(
                "several sequences",
                place,
                "the chat template rewrites the answer's earlier turns once later ones are there, so it is no one "
                "sequence. Let answers have one turn each, or use another template.",
            )
        task = None if row.get("task") is None else str(row["task"])
        return Told(chat.messages[:first], chat.messages[first:], segments[0], tuple(chat.tools), task)


class _Rows:
    """Rows of a file by tandem's names."""

    left_out: Mapping[str, int] = {}

    def __init__(self, rows: Rows, config: CorpusConfig, words: Words) -> None:
        self.rows, self.words, self.digest = rows, words, rows.digest
        self._names = {config.field(name): name for name in (*PREFERRED, "tools", "system", "task")}

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, number: int) -> str:
        return self.rows.place(number)

    def row(self, number: int) -> dict[str, Any]:
        """Without what is null."""
        found = self.rows.row(number)
        return {self._names.get(name, name): value for name, value in found.items() if value is not None}

    def _with(self, number: int, what: str, names: Sequence[str]) -> dict[str, Any]:
        row = self.row(number)
        if lacking := [name for name in names if name not in row]:
            raise refused(
                f"not {what}",
                self.place(number),
                f"it has no {' and no '.join(lacking)}, only {', '.join(row) or 'nothing'}. Mend or remove it; "
                f"corpus.fields gives fields other names: --set corpus.fields={lacking[0]}=NAME",
            )
        return row


class PairRows(_Rows):
    """Pairs."""

    def sides(self, number: int) -> tuple[Told, Told, float]:
        """The chosen answer, the rejected one, and by how much the first is better, 0 where that is not known."""
        place, row = self.place(number), self._with(number, "a pair", PAIR[1:])
        chosen, rejected = row["chosen"], row["rejected"]
        if isinstance(chosen, str) and isinstance(rejected, str) and "prompt" not in row:
            chosen, rejected = _hh(chosen, place), _hh(rejected, place)
        one, other = messages(chosen, "assistant", "chosen", place), messages(rejected, "assistant", "rejected", place)
        if one[0].get("role") == other[0].get("role") == "assistant":
            if "prompt" not in row:
                raise refused("not a pair", place, "it has no prompt, and its sides are answers alone.")
            asked = messages(row["prompt"], "user", "prompt", place)
        else:
            alike = next(
                (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(min(one, other, key=len))
            )
            asked, one, other = one[:alike], one[alike:], other[alike:]
            if not one or not other:
                fault = "equal sides" if not one and not other else "an empty side"
                raise refused(fault, place, "one side has no message that the other has not. Remove the row.")
            if any(side[0].get("role") != "assistant" for side in (one, other)):
                raise refused("not a pair", place, "its sides answer different prompts. Remove the row.")
        better = self.words.told(asked, one, row, f"{place}, chosen")
        return better, self.words.told(asked, other, row, f"{place}, rejected"), _margin(row, place)


class RatedRows(_Rows):
    """Rated answers, as what was liked and by their scores."""

    def told(self, number: int) -> Told:
        place, row = self.place(number), self._with(number, "a rated answer", RATED[:2])
        asked = messages(row["prompt"], "user", "prompt", place)
        return self.words.told(asked, messages(row["completion"], "assistant", "completion", place), row, place)

    def rated(self, number: int) -> tuple[Told, bool]:
        label = self.row(number).get("label")
        if not isinstance(label, bool) and label not in (0, 1):
            raise refused("no label", self.place(number), f"its label is {clipped(label)}; true or false is needed.")
        return self.told(number), bool(label)

    def score(self, number: int) -> float:
        """The score, or 1 and 0 for what was liked and what was not."""
        row = self.row(number)
        if "score" not in row and row.get("label") in (0, 1):
            return float(row["label"])
        return finite(row, "score", self.place(number))

    def asked(self, number: int) -> str:
        """What names the prompt: answers to it are compared."""
        row = self.row(number)
        return repr((row.get("system"), messages(row.get("prompt"), "user", "prompt", self.place(number))))


def messages(value: Any, role: str, name: str, place: str) -> list[Mapping[str, Any]]:
    """A text as one message of `role`, a message, or several. CorpusError for nothing, and for anything else."""
    empty = "an empty side" if role == "assistant" else "an empty prompt"
    if isinstance(value, str):
        if not value.strip():
            raise refused(empty, place, f"its {name} is empty. Remove the row.")
        return [{"role": role, "content": value}]
    rows = [value] if isinstance(value, Mapping) else value
    if not isinstance(rows, list) or not all(isinstance(one, Mapping) for one in rows):
        raise refused("wrong type", place, f"its {name} is {clipped(value)}; a text or a list of messages is needed.")
    if not rows:
        raise refused(empty, place, f"its {name} is empty. Remove the row.")
    return rows


def _margin(row: Mapping[str, Any], place: str) -> float:
    """What the row says, or what the scores of its sides do."""
    if "margin" in row:
        return finite(row, "margin", place)
    if {"score_chosen", "score_rejected"} <= row.keys():
        return finite(row, "score_chosen", place) - finite(row, "score_rejected", place)
    return 0.0


def _hh(text: str, place: str) -> list[dict[str, str]]:
    """A dialogue of "Human:" and "Assistant:" turns as messages.

    >>> _hh("\\n\\nHuman: Hi?\\n\\nAssistant: Yes.", "a")
    [{'role': 'user', 'content': 'Hi?'}, {'role': 'assistant', 'content': 'Yes.'}]
    """
    before, *parts = _SPEAKER.split("\n\n" + text.lstrip("\n"))
    if not parts or before.strip():
        raise refused(
            "not a pair",
            place,
            'it has no prompt, and its sides are no dialogue of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." turns.',
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]
