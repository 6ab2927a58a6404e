"""POST /v1/responses. Nothing is stored: a conversation is given whole in each call."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tandem.server import answers, bodies, demand, structured
from tandem.server.answers import Answer, Step
from tandem.server.lineage import of_messages
from tandem.server.output import Output
from tandem.server.refusal import Refusal
from tandem.server.room import Asking, Prompt, Room, Terms, collected
from tandem.server.wire import EventStream, answer, attended, encode
from tandem.server.words import messages_of, tools_of
from tandem.types import Completion, Message, StopReason

LOGPROBS = "message.output_text.logprobs"


class Reply:
    """One call."""

    def __init__(self, room: Room, body: bodies.ResponseBody, id: str) -> None:
        _unserved(body)
        self.room, self.body, self.id = room, body, id
        said = said_in(body)
        room.words.check_chat(said, body.tools or (), demand.context_of(room.desk.engine))
        self.messages = messages_of(said)
        functions = [
            bodies.Tool(
                function=bodies.Function(
                    name=one.name, description=one.description, parameters=one.parameters, strict=one.strict
                )
            )
            for one in body.tools or ()
        ]
        choice = body.tool_choice
        named = (
            bodies.Chosen(function=bodies.ChosenFunction(name=choice.name))
            if isinstance(choice, bodies.Named)
            else choice
        )
        tools = demand.chosen(functions, named)
        self.tools = tools_of(tools)
        calls = demand.called_as(tools, named, body.parallel_tool_calls, room.words.renderer.format)
        with demand.heard("text.format"):
            given = body.text.format if body.text is not None else None
            whole = structured.of_format(given, "text.format") if given is not None else None
        constraint = demand.either(whole, calls, tools)
        if body.top_logprobs and LOGPROBS not in (body.include or ()):
            demand.needs("top_logprobs", "include", f"[{LOGPROBS!r}]")
        self.terms = Terms(constraint, likely=body.top_logprobs or 0)
        self.created = int(time.time())
        self.told = LOGPROBS in (body.include or ())
        self.output = Output()
        self.called = 0

    async def asked(self, request: Request) -> Asking:
        """The engine has it."""
        body, room = self.body, self.room
        asker = room.asker(request, body, self.messages)
        tokens = await room.words.chat(self.messages, self.tools)
        drawn = bodies.Drawing(temperature=body.temperature, top_p=body.top_p)
        sampling = demand.sampling_of(drawn, body.max_output_tokens, room.words.renderer.stop_token_ids, self.told)
        seeds = demand.seeds(demand.seed_of(body.seed), 0, 1)
        prompt = Prompt(tokens, of_messages(self.messages))
        return await room.ask(asker, self.id, [prompt], sampling, [seeds], bool(body.stream), self.terms)

    def reader(self, asking: Asking) -> Answer:
        return Answer(self.room.words, asking.call.requests[0], self.room.words.turn(self.tools))

    def take(self, step: Step) -> list[dict[str, Any]]:
        """The events of what is new."""
        logprobs: list[dict[str, Any]] = []
        if self.told:
            words = self.room.words
            scored, ends = self.body.temperature == 0, frozenset(words.renderer.stop_token_ids)
            logprobs = answers.chat_logprobs(words, step.drawn, scored, ends)["content"]
        delta = step.delta
        if self.body.parallel_tool_calls is False:
            delta = delta._replace(calls=delta.calls[: max(0, 1 - self.called)])
        self.called += len(delta.calls)
        return list(self.output.take(delta, logprobs))

    def ended(self, asking: Asking, completion: Completion, calls: Sequence[Any]) -> list[dict[str, Any]]:
        said = Message("assistant", self.output.text, tuple(calls))
        self.room.remember(asking, 0, of_messages((*self.messages, said)))
        return list(self.output.finish("completed" if _whole(completion) else "incomplete"))

    def response(self, status: str, completion: Completion | None, prompt: int, **more: Any) -> dict[str, Any]:
        """The response as it is now."""
        body = self.body
        incomplete = None
        if completion is not None and not _whole(completion):
            reason = "max_output_tokens" if completion.stop_reason is StopReason.LENGTH else "aborted"
            incomplete = {"reason": reason}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.room.named(self.body.model),
            "output": self.output.items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (body.text.format if body.text is not None else None) or {"type": "text"}},
            "tool_choice": msgspec.to_builtins(body.tool_choice or "auto"),
            "tools": [msgspec.to_builtins(one) for one in body.tools or ()],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": _usage(completion, prompt),
            "user": body.user,
            "metadata": body.metadata or {},
            **more,
        }

    def whole(self, asking: Asking, completion: Completion) -> dict[str, Any]:
        reader = self.reader(asking)
        step = reader.whole(completion)
        self.take(step)
        self.ended(asking, completion, step.delta.calls)
        status = "completed" if _whole(completion) else "incomplete"
        return self.response(status, completion, len(asking.prompts[0].tokens), **reader.unmet(completion))

    async def blocks(self, asking: Asking) -> AsyncIterator[bytes]:
        """The events of a stream."""
        call, prompt, number = asking.call, len(asking.prompts[0].tokens), 0

        def told(events: list[dict[str, Any]]) -> bytes:
            nonlocal number
            lines = []
            for one in events:
                body = encode({**one, "sequence_number": number})
                lines.append(b"event: " + one["type"].encode() + b"\ndata: " + body + b"\n\n")
                number += 1
            return b"".join(lines)

        begun = self.response("in_progress", None, prompt, output=[])
        yield told([{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")])
        reader, calls = self.reader(asking), list[Any]()
        try:
            while not call.over:
                new = await call.pieces()
                events: list[dict[str, Any]] = []
                for piece in new.values():
                    step = reader.take(piece)
                    calls += step.delta.calls
                    events += self.take(step)
                    if piece.completion is not None:
                        events += self.ended(asking, piece.completion, calls)
                        status = "completed" if _whole(piece.completion) else "incomplete"
                        response = self.response(status, piece.completion, prompt, **reader.unmet(piece.completion))
                        events.append({"type": f"response.{status}", "response": response})
                if not call.gone and (events or not new):
                    yield told(events) or b": waiting\n\n"
        except Refusal as refusal:
            error = {"code": "server_error", "message": refusal.message}
            yield told([{"type": "response.failed", "response": self.response("failed", None, prompt, error=error)}])


def said_in(body: bodies.ResponseBody) -> list[bodies.Said]:
    """The input as a chat's messages: calls and reasoning are of the assistant's message that they stand beside."""
    said: list[bodies.Said] = []
    if body.instructions is not None:
        said.append(bodies.Said(role="system", content=body.instructions))
    if isinstance(body.input, str):
        return [*said, bodies.Said(role="user", content=body.input)]
    thought = ""
    for place, one in enumerate(body.input):
        where = f"input[{place}]"
        last = said[-1] if said and said[-1].role == "assistant" else None
        if one.type == "message" and one.role is not None:
            before = thought if one.role == "assistant" else ""
            said.append(bodies.Said(role=one.role, content=one.content, reasoning_content=before or None))
        elif one.type == "function_call" and one.name and one.call_id:
            if last is None:
                last = bodies.Said(role="assistant", content="", tool_calls=[], reasoning_content=thought or None)
                said.append(last)
            function = bodies.CalledFunction(name=one.name, arguments=one.arguments or "{}")
            last.tool_calls = [*(last.tool_calls or ()), bodies.Called(id=one.call_id, function=function)]
        elif one.type == "function_call_output" and one.call_id and one.output is not None:
            said.append(bodies.Said(role="tool", content=one.output, tool_call_id=one.call_id))
        elif one.type == "reasoning":
            parts = one.content if isinstance(one.content, list) else []
            thought = "".join(part.text or "" for part in parts)
            continue
        else:
            served = "message, function_call, function_call_output, reasoning"
            raise Refusal(400, f"{where} is {one.type!r}, or lacks a field. Served: {served}.", "invalid_value", where)
        thought = ""
    return said


def _unserved(body: bodies.ResponseBody) -> None:
    """400 for what asks for more than is here."""
    demand.unserved(body)
    allowed: dict[str, tuple[Any, ...]] = {
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "max_tool_calls": (),
        "truncation": ("disabled",),
    }
    demand.neutral(body, allowed)
    if body.text is not None:
        demand.neutral(body.text, {"verbosity": ()}, "text.")
    for name, value in (body.reasoning or {}).items():
        if value is not None:
            raise Refusal(400, f"reasoning.{name} is not served. Leave it out.", "unsupported_value", "reasoning")
    for name in body.include or ():
        if name not in (LOGPROBS, "reasoning.encrypted_content"):
            raise Refusal(400, f"include has {name!r}. Allowed: {LOGPROBS}.", "unsupported_value", "include")


def _whole(completion: Completion) -> bool:
    return completion.stop_reason in (StopReason.STOP_TOKEN, StopReason.STOP_STRING)


def _usage(completion: Completion | None, prompt: int) -> dict[str, Any] | None:
    if completion is None:
        return None
    drawn = len(completion.columns)
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": completion.cached_tokens},
        "output_tokens": drawn,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + drawn,
    }


async def responses(room: Room, request: Request) -> Response:
    body = await room.read(request, bodies.ResponseBody)
    one = Reply(room, body, room.id_of(request, "resp"))
    asking = await attended(request, one.asked(request))
    if body.stream:
        return EventStream(one.blocks(asking), asking.call, room.config.send_s, asking.headers)
    (completion,) = await attended(request, collected(asking.call))
    return answer(one.whole(asking, completion), asking.headers)
