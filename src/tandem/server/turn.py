"""An assistant's text taken apart as it comes: reasoning, content, calls of tools.

Where tools may be called, content is given up to what may be the beginning of a call; what is behind it is read when
the turn is over, by program/formats, and its calls come whole. A turn that did not stream is taken apart the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tandem.program.formats.parsed import Parsed
from tandem.server.text import overlap
from tandem.types import ToolCall

MARKERS = {  # a call begins with it; formats that have none are read whole
    "hermes": "<tool_call>",
    "qwen3_coder": "<tool_call>",
    "mistral": "[TOOL_CALLS]",
    "fenced": "```",
}
TAGS = ("<think>", "</think>")  # of reasoning
TAGS_OF = {"mistral": ("[THINK]", "[/THINK]")}


class Delta(NamedTuple):
    """What is new of a turn."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[ToolCall, ...] = ()


class Turn:
    """`opened`: what the chat template wrote of the reasoning's opening. `parse`: reads calls; None where no tool may
    be called. `marker`: see MARKERS; None: all is read at the end.

    >>> turn = Turn("", None, None)
    >>> turn.feed("<think>why"), turn.feed("</think>\\n\\n4"), turn.finish()
    (Delta(reasoning='why', content='', calls=()), Delta(reasoning='', content='4', calls=()), \
Delta(reasoning='', content='', calls=()))
    """

    def __init__(
        self,
        opened: str,
        parse: Callable[[str], Parsed] | None,
        marker: str | None,
        tags: tuple[str, str] = TAGS,
    ) -> None:
        self._parse = parse
        self._marker = marker
        self._opening, self._closing = tags
        self._whole = [opened]
        self._held = opened  # not given yet
        self._state = "start"  # start, reasoning, behind (its end), content, rest
        self._led = False  # some of the reasoning is out
        self._sent = ""  # of the content, where calls are read

    def feed(self, text: str) -> Delta:
        """What of it is certain."""
        self._whole.append(text)
        self._held += text
        if self._parse is not None and self._marker is None:
            return Delta()
        return Delta(self._reasoning(False), self._content(False))

    def finish(self) -> Delta:
        """The rest, when the turn is over."""
        if self._parse is None:
            return Delta(self._reasoning(True), self._content(True))
        if self._marker is None:
            parsed = self._parse("".join(self._whole))
            return Delta(parsed.reasoning, parsed.content, parsed.calls)
        reasoning = self._reasoning(True)
        parsed = self._parse("".join(self._whole))
        content = parsed.content.lstrip()
        rest = content[len(self._sent) :] if content.startswith(self._sent) else ""
        return Delta(reasoning, rest, parsed.calls)

    def _reasoning(self, over: bool) -> str:
        if self._state == "start":
            begins = self._held.lstrip()
            if begins.startswith(self._opening):
                self._held, self._state = begins.removeprefix(self._opening), "reasoning"
            elif over or not self._opening.startswith(begins):
                self._state = "content"
        if self._state != "reasoning":
            return ""
        if not self._led:
            self._held = self._held.lstrip("\n")
            self._led = bool(self._held)
        given, closed, rest = self._held.partition(self._closing)
        if closed:
            self._held, self._state = rest, "behind"
            return given.rstrip("\n")
        if over:
            self._held = ""
            return given.rstrip("\n")
        sure = given[: len(given) - overlap(given, self._closing)].rstrip(
            "\n"
        )  # as it is without those before the closing
        self._held = given[len(sure) :]
        return sure

    def _content(self, over: bool) -> str:
        if self._state == "behind":
            self._held = self._held.lstrip("\n")
            if self._held or over:
                self._state = "content"
        if self._state != "content":
            return ""
        if self._parse is None:
            given, self._held = self._held, ""
            return given
        assert self._marker is not None
        if not self._sent:
            self._held = self._held.lstrip()
        given, called, _ = self._held.partition(self._marker)
        if called:
            self._state = "rest"
        else:
            given = given[: len(given) - overlap(given, self._marker)]
        given = given.rstrip()
        self._held = self._held[len(given) :]
        self._sent += given
        return given
