"""POST /v1/completions: a text, or token ids, continued."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response

from tandem.columns import Columns
from tandem.server import answers, bodies, demand
from tandem.server.answers import Answer, Places, Step
from tandem.server.lineage import of_tokens
from tandem.server.refusal import Refusal
from tandem.server.room import Asking, Prompt, Room, Terms, collected
from tandem.server.wire import DONE, EventStream, answer, attended, event
from tandem.types import Completion, StopReason

MOST = 16  # tokens where a call says nothing, as OpenAI's


class Continuation:
    """One call."""

    def __init__(self, room: Room, body: bodies.CompletionBody, id: str) -> None:
        demand.unserved(body)
        self.room, self.body, self.id = room, body, id
        self.created = int(time.time())
        self.n = body.n or 1
        if body.best_of is not None and body.best_of != self.n:
            raise Refusal(400, f"best_of is not served. Allowed: n, which is {self.n}.", "unsupported_value", "best_of")
        if body.echo and body.logprobs is not None and body.stream:
            said = "echo with logprobs in a stream: log-probs of a prompt are told at the end. Take one of them out."
            raise Refusal(400, said, "unsupported_value", "echo")
        if body.max_tokens == 0 and not body.echo:
            raise Refusal(400, "max_tokens is 0: nothing is asked for without echo.", "invalid_value", "max_tokens")
        if body.stream_options is not None and not body.stream:
            demand.needs("stream_options", "stream", "true")
        scores = bool(body.echo) and body.logprobs is not None
        self.terms = Terms(demand.constraint_of(body), likely=body.logprobs or 0, scored=scores)
        self.scored = body.temperature == 0 and body.logprobs is not None
        self.texts = list[str]()  # of the prompts, where they are echoed

    async def asked(self, request: Request) -> Asking:
        """The engine has it."""
        body, room = self.body, self.room
        asker = room.asker(request, body)
        prompts = _prompts(body.prompt)
        demand.choices(room.config, len(prompts), self.n)
        context = demand.context_of(room.desk.engine)
        room.words.check_length(max(map(len, prompts)), context)
        tokens = [await room.words.plain(one) if isinstance(one, str) else tuple(one) for one in prompts]
        own, scored = room.words.renderer.stop_token_ids, body.logprobs is not None
        most = MOST if body.max_tokens is None else max(1, body.max_tokens)
        sampling = demand.sampling_of(body, most, own, scored)
        seed = demand.seed_of(body.seed)
        seeds = [demand.seeds(seed, number, self.n) for number in range(len(tokens))]
        asks = [Prompt(one, of_tokens(one)) for one in tokens]
        asking = await room.ask(asker, self.id, asks, sampling, seeds, bool(body.stream), self.terms)
        if body.echo:
            decode = room.words.tokenizer.decode
            self.texts = [one if isinstance(one, str) else decode(one) for one in prompts]
        return asking

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.room.named(self.body.model),
            "system_fingerprint": self.room.fingerprint(self.body.model),
        }

    def choice(self, asking: Asking, place: int, step: Step, places: Places) -> dict[str, Any]:
        """A choice, or what is new of it; places: of its tokens."""
        body, completion = self.body, step.completion
        more: dict[str, Any] = {"logprobs": None}
        if body.logprobs is not None:
            more["logprobs"] = self._logprobs(step, places)
        if body.return_token_ids:
            more["token_ids"] = step.drawn["tokens"].tolist() if len(step.drawn) else []
            if completion is not None:
                more["weight_versions"] = self.room.spans(completion)
        finish = None
        if completion is not None:
            finish = answers.finish_reason(completion)
            units = of_tokens((*asking.prompts[place].tokens, *completion.tokens))
            self.room.remember(asking, place, units)
        return {"index": place, "text": step.delta.content, "finish_reason": finish, **more}

    def _logprobs(self, step: Step, places: Places) -> dict[str, Any]:
        words, known = self.room.words, step.drawn
        logprobs: list[float | None] = [*answers.logprobs_of(known, self.scored)]
        if step.completion is not None and (prompt := step.completion.prompt) is not None:
            _, *others = prompt["logprobs"].tolist()
            logprobs = [None, *others, *logprobs]
            known = Columns.concat([prompt, known]) if len(known) else prompt
            places = Places(words, 0)
        return answers.plain_logprobs(words, known, logprobs, places)

    def ids(self, asking: Asking, place: int) -> dict[str, Any]:
        """What return_token_ids says of the prompt of a choice."""
        return {"prompt_token_ids": list(asking.prompts[place].tokens)} if self.body.return_token_ids else {}

    def _kept(self, completion: Completion) -> Completion:
        """An answer as it was asked for: one of no tokens drew one."""
        if self.body.max_tokens != 0:
            return completion
        return replace(completion, columns=completion.columns.slice(0, 0), stop_reason=StopReason.LENGTH)

    def whole(self, asking: Asking, completions: list[Completion]) -> dict[str, Any]:
        choices = []
        completions = [self._kept(one) for one in completions]
        for place, completion in enumerate(completions):
            reader = Answer(self.room.words, asking.call.requests[place], None)
            echoed = self.texts[place // self.n] if self.body.echo else ""
            places = Places(self.room.words, len(echoed))
            choice = self.choice(asking, place, reader.whole(completion), places) | reader.unmet(completion)
            choice["text"] = echoed + choice["text"]
            choices.append(choice | self.ids(asking, place))
        prompts = [len(prompt.tokens) for prompt in asking.prompts[:: self.n]]
        return {**self.head(), "choices": choices, "usage": answers.usage(completions, prompts)}

    async def blocks(self, asking: Asking) -> AsyncIterator[bytes]:
        """The events of a stream."""
        call, options = asking.call, self.body.stream_options
        counted = bool(options and options.include_usage)
        head = self.head() | ({"usage": None} if counted else {})
        readers = [Answer(self.room.words, request, None) for request in call.requests]
        texts = [self.texts[place // self.n] if self.body.echo else "" for place in range(len(readers))]
        places = [Places(self.room.words, len(text)) for text in texts]
        ids = {place: self.ids(asking, place) for place in range(len(readers))}  # that are to be told
        ended: dict[int, Completion] = {}
        if self.body.echo:
            for place, text in enumerate(texts):
                echoed = {"index": place, "text": text, "finish_reason": None, "logprobs": None, **ids.pop(place)}
                yield event({**head, "choices": [echoed]})
        while not call.over:
            new = await call.pieces()
            events = [] if new else [b": waiting\n\n"]
            for place, piece in new.items():
                if self.body.max_tokens == 0:
                    piece.drawn = []
                if piece.completion is not None:
                    piece.completion = ended[place] = self._kept(piece.completion)
                step = readers[place].take(piece)
                choice = self.choice(asking, place, step, places[place])
                if piece.completion is not None:
                    choice |= readers[place].unmet(piece.completion)
                if choice["text"] or choice["finish_reason"] or choice.get("token_ids") or choice["logprobs"]:
                    choice |= ids.pop(place, {})
                    events.append(event({**head, "choices": [choice]}))
            if events and not call.gone:
                yield b"".join(events)
        if call.gone:
            return
        if counted:
            prompts = [len(prompt.tokens) for prompt in asking.prompts[:: self.n]]
            yield event(
                {**head, "choices": [], "usage": answers.usage([ended[place] for place in sorted(ended)], prompts)}
            )
        yield DONE


def _prompts(given: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """400 for prompts of several kinds, and for an empty one of token ids."""
    if isinstance(given, str):
        return [given]
    if all(isinstance(one, int) for one in given):
        return [cast(list[int], given)]
    if len({type(one) for one in given}) > 1 or not all(one or isinstance(one, str) for one in given):
        said = "prompt is mixed, or has an empty list. Give a text, token ids, or a list of either."
        raise Refusal(400, said, "invalid_value", "prompt")
    return cast(list[str | list[int]], given)


async def completions(room: Room, request: Request) -> Response:
    body = await room.read(request, bodies.CompletionBody)
    one = Continuation(room, body, room.id_of(request, "cmpl"))
    asking = await attended(request, one.asked(request))
    if body.stream:
        return EventStream(one.blocks(asking), asking.call, room.config.send_s, asking.headers)
    done = await attended(request, collected(asking.call))
    return answer(one.whole(asking, done), asking.headers)
