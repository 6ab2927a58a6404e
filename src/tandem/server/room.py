"""What the endpoints share: bodies in, who asks, and generations."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec
from starlette.requests import Request

from tandem.server import bodies, demand
from tandem.server.answers import version_spans
from tandem.server.config import ServerConfig, names_of
from tandem.server.counts import Counts
from tandem.server.desk import Call, Desk
from tandem.server.lease import Lease
from tandem.server.lineage import Lineage, arguments_of
from tandem.server.metrics import Metrics
from tandem.server.refusal import Refusal, misfit
from tandem.server.tenants import Access, Holder
from tandem.server.wire import received
from tandem.server.words import Words
from tandem.types import Completion, Constraint, Hints, Message, Sampling
from tandem.types import Request as Asked

T = TypeVar("T")
REMEMBERED = 4096  # labels of weights


@dataclass(frozen=True, slots=True)
class Asker:
    """Who makes a call, and for which program."""

    holder: Holder
    tenant: str
    program: str  # "": nobody said
    hints: Hints | None
    adapter: str = ""  # that the call's model is; "": the model itself


@dataclass(frozen=True, slots=True)
class Prompt:
    """Of a call: its tokens, and the units by which its program is known again (lineage.py)."""

    tokens: tuple[int, ...]
    units: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Terms:
    """What is asked of each answer of a call, beside how it is drawn."""

    constraint: Constraint | None = None
    likely: int = 0  # most likely tokens beside each
    scored: bool = False  # and log-probs of the prompt


class Room:
    """A server's parts."""

    def __init__(self, desk: Desk, words: Words, config: ServerConfig, model: str) -> None:
        self.desk = desk
        self.words = words
        self.config = config
        self.names = names_of(config, model)
        self.model = self.names[0]
        self.created = int(time.time())
        self.access = Access(config)
        self.lineage = Lineage()
        self.labels: dict[int, str] = {}  # of versions of the weights, where an update gave one
        self.lease = Lease()
        self.metrics = Metrics(desk, self.model)
        self.counts = Counts()
        desk.watchers.append(self.counts)

    @property
    def num_open(self) -> int:
        """Answers on their way."""
        return len(self.desk.open)

    async def drain(self) -> None:
        """Takes no more calls; those that are on their way have ended after it."""
        await self.desk.drain()

    def fingerprint(self, name: str | None) -> str:
        """Of the weights that answer now where a call asks for `name`: an adapter's with those of its base."""
        engine = self.desk.engine
        adapter = engine.adapters.get(name) if name is not None else None
        if adapter is None:
            return engine.version.digest[:16]
        return blake2b(f"{engine.version.digest} {name} {adapter.digest}".encode(), digest_size=8).hexdigest()

    def label(self, step: int) -> str:
        """What a version of the weights is called."""
        return self.labels.get(step, str(step))

    def labelled(self, step: int, label: str | None) -> None:
        """A version of the weights is called so from now on; by its number where there is no label."""
        self.labels.pop(step, None)
        if label is not None:
            self.labels[step] = label
        while len(self.labels) > REMEMBERED:
            del self.labels[next(iter(self.labels))]

    def spans(self, completion: Completion) -> list[dict[str, Any]]:
        """Which weights drew which tokens of an answer."""
        return version_spans(completion.columns["versions"].tolist(), self.label)

    async def read(self, request: Request, kind: type[T]) -> T:
        """The body of a call as `kind`. Refusal: too large, too slow, no JSON, or JSON of another kind."""
        sent = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if sent != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "a body must be plain JSON. Send the header Content-Type: application/json.", "not_json")
        body = await received(request, self.config.max_body_bytes, self.config.body_s)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            raise misfit(error) from error
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise Refusal(400, f"the body is no JSON: {error}.", "invalid_json") from error

    def asker(self, request: Request, body: bodies.Whose, messages: Sequence[Message] = ()) -> Asker:
        """Who asks, of body and headers, and for `messages`; the body is heard where both say."""
        holder = request.state.holder
        tenant = self.access.tenant(holder, body.tenant or request.headers.get("x-tenant"))
        self.check_model(body.model)
        program = body.program_id or request.headers.get("x-program-id", "")
        if len(program) > 256 or not program.isprintable():
            said = "program_id (X-Program-ID) is longer than 256 characters, or not printable."
            raise Refusal(400, said, "invalid_value", "program_id")
        hints = demand.hints_of(body.hints or self._hints(request))
        if called := arguments_of(messages):
            hints = replace(hints or Hints(), arguments=(hints and hints.arguments) or called)
        adapter = body.model if body.model in self.desk.engine.adapters else None
        return Asker(holder, tenant, program, hints, adapter or "")

    def check_model(self, name: str | None) -> None:
        """Refusal where neither the model nor an adapter on it is called so."""
        if name is not None and name not in self.names and name not in self.desk.engine.adapters:
            served = ", ".join((self.model, *self.desk.engine.adapters))
            raise Refusal(404, f"there is no model {name}. Served here: {served}.", "model_not_found", "model")

    def named(self, name: str | None) -> str:
        """What an answer says of the model that a call asked for."""
        return name if name is not None and name in self.desk.engine.adapters else self.model

    def _hints(self, request: Request) -> bodies.Hints | None:
        """Of the header, which is the JSON that the body's field would be."""
        given = request.headers.get("x-hints")
        try:
            return None if given is None else msgspec.json.decode(given.encode("latin-1"), type=bodies.Hints)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Refusal(400, f"X-Hints: {error}. Send hints as JSON.", "invalid_value", "hints") from error

    def id_of(self, request: Request, kind: str) -> str:
        """Of a call: of what its X-Request-Id says, where it says something."""
        given = request.headers.get("x-request-id", "")
        if len(given) > 128 or not given.isprintable():
            raise Refusal(400, "X-Request-Id is longer than 128 characters, or not printable.", "invalid_value")
        return f"{kind}-{given or secrets.token_hex(12)}"

    async def ask(
        self,
        asker: Asker,
        id: str,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        streams: bool,
        terms: Terms = Terms(),
    ) -> Asking:
        """Asks the engine for answers to the prompts, as many to each as it has seeds. Refusal: none is on its way."""
        requests, owners, several = list[Asked](), list[Prompt](), sum(map(len, seeds)) > 1
        for prompt, own in zip(prompts, seeds, strict=True):
            asked = sampling.max_new_tokens or None
            most = demand.room(self.desk.engine, self.config, len(prompt.tokens), asked)
            program = asker.program or self.lineage.program(asker.tenant, prompt.units)
            for seed in own:
                named = f"{id}/{len(requests)}" if several else id
                drawn = replace(sampling, max_new_tokens=most)
                group = id if several else ""
                one = Asked(named, program, prompt.tokens, drawn, seed, asker.tenant, adapter=asker.adapter)
                one = replace(one, group=group, hints=asker.hints)
                asks = (terms.constraint, terms.likely, terms.scored)
                requests.append(replace(one, constraint=asks[0], likely=asks[1], scored=asks[2]) if any(asks) else one)
                owners.append(prompt)
        if terms.constraint is not None:  # reading a schema takes a while, once
            await self.words.aside(partial(self.desk.engine.check, requests[0]))
        call = await self.desk.ask(id, requests, streams)
        return Asking(call, owners, not asker.program)

    def remember(self, asking: Asking, place: int, units: Sequence[bytes]) -> None:
        """An answer came, and with it these units have been said: who goes on from them is of the same program."""
        request = asking.call.requests[place]
        if asking.inferred and len(units) > len(asking.prompts[place].units):
            self.lineage.answered(request.tenant, units, request.program_id)


@dataclass(frozen=True, slots=True)
class Asking:
    """A call on its way."""

    call: Call
    prompts: Sequence[Prompt]  # of each answer
    inferred: bool  # nobody named the program

    @property
    def headers(self) -> dict[str, str]:
        return {"x-request-id": spelt(self.call.id), "x-program-id": spelt(self.call.requests[0].program_id)}


def spelt(name: str) -> str:
    """A name from a body as a header may have it.

    >>> spelt("ann/7 é\\r\\n")
    'ann/7 %C3%A9%0D%0A'
    """
    return quote(name, safe="!#$&'()*+,-./:;<=>?@[]^_`{|}~ ")


async def collected(call: Call) -> list[Completion]:
    """All answers of a call, which is withdrawn where nobody waits for them any more."""
    try:
        return await call.completions()
    finally:
        call.withdraw()
