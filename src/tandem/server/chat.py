"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tandem.server import answers, bodies, demand
from tandem.server.answers import Answer, Step
from tandem.server.lineage import of_messages
from tandem.server.room import Asking, Prompt, Room, Terms, collected
from tandem.server.wire import DONE, EventStream, answer, attended, event
from tandem.server.words import messages_of, tools_of
from tandem.types import Completion, Message, ToolCall


class Chat:
    """One call: what it says of each answer, whole or as it comes."""

    def __init__(self, room: Room, body: bodies.ChatBody, id: str) -> None:
        demand.unserved(body)
        self.room, self.body, self.id = room, body, id
        room.words.check_chat(body.messages, body.tools or (), demand.context_of(room.desk.engine))
        self.messages = messages_of(body.messages)
        tools = demand.chosen(body.tools or (), body.tool_choice)
        self.tools = tools_of(tools)
        calls = demand.called_as(tools, body.tool_choice, body.parallel_tool_calls, room.words.renderer.format)
        constraint = demand.either(demand.constraint_of(body), calls, tools)
        self.terms = Terms(constraint, likely=body.top_logprobs or 0)
        self.created = int(time.time())
        self.scored = body.temperature == 0 and bool(body.logprobs)
        if body.top_logprobs is not None and not body.logprobs:
            demand.needs("top_logprobs", "logprobs", "true")
        if body.stream_options is not None and not body.stream:
            demand.needs("stream_options", "stream", "true")

    async def asked(self, request: Request) -> Asking:
        """The engine has it."""
        body, room = self.body, self.room
        asker = room.asker(request, body, self.messages)
        n = demand.choices(room.config, 1, body.n or 1)
        tokens = await room.words.chat(self.messages, self.tools)
        most = body.max_completion_tokens or body.max_tokens
        own = room.words.renderer.stop_token_ids
        self.sampling = sampling = demand.sampling_of(body, most, own, bool(body.logprobs))
        seeds = demand.seeds(demand.seed_of(body.seed), 0, n)
        prompt = Prompt(tokens, of_messages(self.messages))
        return await room.ask(asker, self.id, [prompt], sampling, [seeds], bool(body.stream), self.terms)

    def answer(self, asking: Asking, place: int) -> Answer:
        return Answer(self.room.words, asking.call.requests[place], self.room.words.turn(self.tools))

    def calls(self, step: Step, first: int) -> list[dict[str, Any]]:
        one = self.body.parallel_tool_calls is False
        return answers.called(step.delta.calls[: 1 - first if one else None], first, answers.call_id)

    def told(self, asking: Asking, place: int, said: Message, completion: Completion) -> None:
        self.room.remember(asking, place, of_messages((*self.messages, said)))

    def tokens(self, step: Step, completion: Completion | None) -> dict[str, Any]:
        """What return_token_ids and logprobs add to a choice."""
        words, body = self.room.words, self.body
        more: dict[str, Any] = {"logprobs": None}
        if body.logprobs:
            ends = words.ends(self.sampling)
            more["logprobs"] = answers.chat_logprobs(words, step.drawn, self.scored, ends)
        if body.return_token_ids:
            more["token_ids"] = step.drawn["tokens"].tolist() if len(step.drawn) else []
            if completion is not None:
                more["weight_versions"] = self.room.spans(completion)
        return more

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.room.named(self.body.model),
            "system_fingerprint": self.room.fingerprint(self.body.model),
        }

    def whole(self, asking: Asking, completions: list[Completion]) -> dict[str, Any]:
        """The body of an answer that does not stream."""
        choices = []
        for place, completion in enumerate(completions):
            one = self.answer(asking, place)
            step = one.whole(completion)
            calls = [{key: value for key, value in call.items() if key != "index"} for call in self.calls(step, 0)]
            message: dict[str, Any] = {"role": "assistant", "content": step.delta.content, "refusal": None}
            if calls:
                message |= {"tool_calls": calls, "content": step.delta.content or None}
            if step.delta.reasoning:
                message["reasoning_content"] = step.delta.reasoning
            self.told(asking, place, Message("assistant", step.delta.content, step.delta.calls), completion)
            finish = answers.finish_reason(completion, bool(calls))
            choice = {"index": place, "message": message, "finish_reason": finish, **one.unmet(completion)}
            choices.append(choice | self.tokens(step, completion))
        prompt = asking.prompts[0].tokens
        body = {**self.head("chat.completion"), "choices": choices}
        body["usage"] = answers.usage(completions, [len(prompt)])
        return body | ({"prompt_token_ids": list(prompt)} if self.body.return_token_ids else {})

    async def blocks(self, asking: Asking) -> AsyncIterator[bytes]:
        """The events of an answer that streams."""
        call, options = asking.call, self.body.stream_options
        counted = bool(options and options.include_usage)
        head = self.head("chat.completion.chunk") | ({"usage": None} if counted else {})
        readers = [self.answer(asking, place) for place in range(len(call.requests))]
        said: list[tuple[list[str], list[ToolCall]]] = [([], []) for _ in readers]
        ended: dict[int, Completion] = {}
        first = {"role": "assistant", "content": "", "refusal": None}
        opening = [_choice(place, first) for place in range(len(readers))]
        ids = {"prompt_token_ids": list(asking.prompts[0].tokens)} if self.body.return_token_ids else {}
        yield b"".join(event({**head, "choices": [choice], **ids}) for choice in opening)
        while not call.over:
            new = await call.pieces()
            events = [] if new else [b": waiting\n\n"]
            for place, piece in new.items():
                step, before = readers[place].take(piece), readers[place].called
                calls = self.calls(step, before - len(step.delta.calls))
                said[place][0].append(step.delta.content)
                said[place][1].extend(step.delta.calls)
                delta: dict[str, Any] = {"reasoning_content": step.delta.reasoning} if step.delta.reasoning else {}
                delta |= {"content": step.delta.content} if step.delta.content else {}
                delta |= {"tool_calls": calls} if calls else {}
                finish = None
                if piece.completion is not None:
                    ended[place] = piece.completion
                    finish = answers.finish_reason(piece.completion, bool(said[place][1]))
                    message = Message("assistant", "".join(said[place][0]), tuple(said[place][1]))
                    self.told(asking, place, message, piece.completion)
                more = self.tokens(step, piece.completion)
                if piece.completion is not None:
                    more |= readers[place].unmet(piece.completion)
                shows = delta or finish or more.get("token_ids") or (more["logprobs"] or {}).get("content")
                if shows:
                    events.append(
                        event({**head, "choices": [{**_choice(place, delta), **more, "finish_reason": finish}]})
                    )
            if events and not call.gone:
                yield b"".join(events)
        if call.gone:
            return
        if counted:
            total = answers.usage([ended[place] for place in sorted(ended)], [len(asking.prompts[0].tokens)])
            yield event({**head, "choices": [], "usage": total})
        yield DONE


def _choice(place: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": place, "delta": delta, "logprobs": None, "finish_reason": None}


async def chat(room: Room, request: Request) -> Response:
    body = await room.read(request, bodies.ChatBody)
    one = Chat(room, body, room.id_of(request, "chatcmpl"))
    asking = await attended(request, one.asked(request))
    if body.stream:
        return EventStream(one.blocks(asking), asking.call, room.config.send_s, asking.headers)
    completions = await attended(request, collected(asking.call))
    return answer(one.whole(asking, completions), asking.headers)
