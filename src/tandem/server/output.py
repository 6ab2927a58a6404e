"""The output of a response: its items, and the events that tell of them as they come."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from tandem.program.formats.parsed import dumps
from tandem.server.answers import call_id
from tandem.server.turn import Delta
from tandem.types import ToolCall

Event = dict[str, Any]
PARTS = {"message": "output_text", "reasoning": "reasoning_text"}  # kind of an item -> of what it holds


class Output:
    """Takes a turn's deltas, and gives the events; `items` are what has come so far."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open = ""  # the kind of the last item, while it grows

    @property
    def text(self) -> str:
        """Of its messages."""
        return "".join(one["content"][0]["text"] for one in self.items if one["type"] == "message")

    def take(self, delta: Delta, logprobs: list[Event]) -> Iterator[Event]:
        """What is new."""
        if delta.reasoning:
            yield from self._grow("reasoning", delta.reasoning, [])
        if delta.content or (logprobs and self._open == "message"):
            yield from self._grow("message", delta.content, logprobs)
        for call in delta.calls:
            yield from self._close("completed")
            yield from self._called(call)

    def finish(self, status: str) -> Iterator[Event]:
        """The turn is over. An answer that said nothing is an empty message."""
        if not self.items:
            yield from self._grow("message", "", [])
        yield from self._close(status)

    def _grow(self, kind: str, text: str, logprobs: list[Event]) -> Iterator[Event]:
        if self._open != kind:
            yield from self._close("completed")
            yield from self._begin(kind)
        item = self.items[-1]
        part = item["content"][0]
        part["text"] += text
        more: Event = {}
        if kind == "message":
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        if text:
            yield self._of(f"response.{PARTS[kind]}.delta", delta=text, **more)

    def _begin(self, kind: str) -> Iterator[Event]:
        self._open = kind
        item: dict[str, Any] = {"id": _id("msg" if kind == "message" else "rs"), "type": kind, "status": "in_progress"}
        item |= {"role": "assistant", "content": []} if kind == "message" else {"summary": [], "content": []}
        self.items.append(item)
        yield {
            "type": "response.output_item.added",
            "output_index": len(self.items) - 1,
            "item": {**item, "content": []},
        }
        part: dict[str, Any] = {"type": PARTS[kind], "text": ""}
        more: Event = {"annotations": [], "logprobs": []} if kind == "message" else {}
        item["content"].append(part | {name: [] for name in more})  # which grows
        yield self._of("response.content_part.added", part=part | more)

    def _close(self, status: str) -> Iterator[Event]:
        if not self._open:
            return
        kind, self._open = self._open, ""
        item = self.items[-1]
        part = item["content"][0]
        more = {"logprobs": part["logprobs"]} if kind == "message" else {}
        yield self._of(f"response.{PARTS[kind]}.done", text=part["text"], **more)
        yield self._of("response.content_part.done", part=part)
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _called(self, call: ToolCall) -> Iterator[Event]:
        written = dumps(call.arguments)
        item = {"id": _id("fc"), "type": "function_call", "call_id": call.id or call_id(), "name": call.name}
        item |= {"arguments": written, "status": "completed"}
        self.items.append(item)
        place = {"output_index": len(self.items) - 1}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield {"type": "response.output_item.added", **place, "item": begun}
        of = {"item_id": item["id"], **place}
        yield {"type": "response.function_call_arguments.delta", **of, "delta": written}
        yield {"type": "response.function_call_arguments.done", **of, "name": call.name, "arguments": written}
        yield {"type": "response.output_item.done", **place, "item": item}

    def _of(self, kind: str, **more: Any) -> Event:
        """An event of the part that grows."""
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}
        return {"type": kind, **place, **more}


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
