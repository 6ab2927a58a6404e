"""What is asked of all engines at once: pause and resume, weights, sleep, withdrawals, programs; and of one: drain.

Each engine decides who may (its keys, server.control). The answer is that of an engine, with `engines` beside: what
each said. 200 means what it means of one engine. Where some took other weights, these are served from then on, and who
missed them is asked for nothing until it has them; likewise who finds another adapter than the others in a folder.
Where an engine that is well refused anything else, that is told.
An engine that is away is told of a pause, of weights of a folder and of adapters when it comes back.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from tandem.server.front.client import Headers, Lost
from tandem.server.front.engines import Engine, digest_of, served_of
from tandem.server.front.forward import HOPS
from tandem.server.front.front import LOAD, Front
from tandem.server.refusal import Refusal, misfit
from tandem.server.wire import answer, received

FINISHES = ("/finish_weight_update", "/update_weights_from_disk")
HOLDS = ("/pause", "/pause_generation", "/sleep", "/release_memory_occupation")
UNLOAD = "/v1/unload_lora_adapter"
PART = "/update_weights"
PROGRAMS = "/programs"
FREES = ("/resume", "/continue_generation", "/wake_up", "/resume_memory_occupation")
POSTS = (
    *FINISHES,
    *HOLDS,
    *FREES,
    LOAD,
    UNLOAD,
    "/abort_requests",
    "/abort_request",
    "/start_weight_update",
    PART,
    PROGRAMS,
    "/finish_program",
    "/weight_checker",
)
GETS = ("/is_paused", "/is_sleeping", "/weight_info")
PART_S = 600.0  # for the body of a verb to come


class Said(NamedTuple):
    """Of one engine."""

    status: int  # 0: it gave no answer
    body: Any


class _Asked:
    """A verb at an engine, until that is lost."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)


class EngineBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /drain and /undrain."""

    engine: Annotated[str, Meta(min_length=1, max_length=256)]


async def everywhere(front: Front, request: Request) -> Response:
    """One verb, of all engines."""
    scope, path, config = request.scope, request.url.path, front.config
    if path == PROGRAMS:  # engines see the router call
        front.access.administer(request.state.holder, request.client)
    if path == PART and not request.state.holder.admin:  # as engines do, before so much is read
        raise Refusal(403, "this API key is not an admin's.", "admin_only")
    most, limit_s = (config.max_part_bytes, PART_S) if path == PART else (config.max_body_bytes, config.body_s)
    body = await received(request, most, limit_s)
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    headers = [pair for pair in request.headers.raw if pair[0] not in HOPS]
    asked = [one for one in front.engines if not one.given_up]

    async def ask(engine: Engine) -> Said:
        if engine.lost:
            return Said(0, engine.state)
        one = _Asked()
        engine.open.add(one)
        try:
            asking = asyncio.ensure_future(_said(engine, request.method, target, headers, body, front.route.answer_s))
            await asyncio.wait((asking, one.lost), return_when=asyncio.FIRST_COMPLETED)
            return asking.result() if asking.done() else Said(0, one.lost.result())
        finally:
            asking.cancel()
            engine.open.discard(one)

    was_well = {one for one in asked if one.well}
    finishes = path in FINISHES
    front.updating += finishes
    try:
        told = dict(zip(asked, await asyncio.gather(*map(ask, asked)), strict=True))
    finally:
        front.updating -= finishes
    took = {one: said for one, said in told.items() if said.status == 200}
    failed = {one: said for one, said in told.items() if said.status != 200}
    if took and finishes:
        served = {one: served_of(said.body) for one, said in took.items()}
        missed = {one: f"it answers {said.status} ({_words(said)})" for one, said in failed.items()}
        front.delivered(served, missed, body if path == FINISHES[1] else b"")
    if path in HOLDS and took:
        front.held = (target.decode("latin-1"), body)
        for one in took:
            one.told_held = front.held[0]
    elif path in FREES and took:
        front.held, front.freed = None, path
        for one in took:
            one.told_held = ""
    broken = {one: said for one, said in failed.items() if one in was_well and not (finishes and took)}
    if path == UNLOAD and took:  # who never had it has none
        broken = {one: said for one, said in broken.items() if said.status != 404}
    if path in (LOAD, UNLOAD) and took:
        said = msgspec.json.decode(body)  # as an engine has read it
        call = msgspec.json.encode({**said, "load_inplace": True}) if path == LOAD else None
        digests = {one: digest_of(each.body) for one, each in took.items()}
        front.adapted(said["lora_name"], call, digests, done=not broken)
    if broken or not took:
        return _refused(told, broken or failed, path)
    first = sorted(took, key=lambda one: bool(one.behind or one.lacks))  # whose answer is told is not behind
    return answer({**_merged([took[one] for one in first]), "engines": _each(told)})


async def _said(engine: Engine, method: str, target: bytes, headers: Headers, body: bytes, limit_s: float) -> Said:
    try:
        sent = await engine.client.ask(method, target, headers, body, limit_s)
    except Lost as error:
        return Said(0, str(error))
    try:
        return Said(sent.status, _read(await sent.whole(limit_s)))
    except Lost as error:
        return Said(0, str(error))
    finally:
        sent.close()


def _merged(said: list[Said]) -> dict[str, Any]:
    """An engine's answer: what is true of all is true, and lists are joined."""
    bodies = [one.body for one in said if isinstance(one.body, dict)] or [{}]
    found = dict(bodies[0])
    for name, value in bodies[0].items():
        if isinstance(value, bool):
            found[name] = all(one.get(name) for one in bodies)
        elif isinstance(value, list):
            found[name] = [part for one in bodies for part in one.get(name, [])]
    return found


def _refused(told: dict[Engine, Said], failed: dict[Engine, Said], path: str) -> Response:
    """The answer of the first that failed."""
    if not told:
        raise Refusal(503, "there is no engine.", "no_engine", retry_s=1)
    first = next((said for said in failed.values() if said.status), next(iter(failed.values())))
    each = "; ".join(f"{one.name}: {_words(said)}" for one, said in failed.items())
    done = ", ".join(one.name for one, said in told.items() if said.status == 200)
    said = f"{path} failed at {len(failed)} of {len(told)} engines. {each}" + (f" Done at: {done}." if done else "")
    error = first.body.get("error") if isinstance(first.body, dict) else None
    code = error.get("code") if isinstance(error, dict) else "engines_failed"
    refusal = Refusal(first.status or 502, said, code)
    return answer({**refusal.body(), "engines": _each(told)}, refusal.headers(), refusal.status)


def _each(told: dict[Engine, Said]) -> dict[str, Any]:
    return {one.name: {"status": said.status, "answer": said.body} for one, said in told.items()}


def _words(said: Said) -> str:
    error = said.body.get("error") if isinstance(said.body, dict) else said.body
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _read(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body) if body else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode("utf-8", "replace")


async def drain(front: Front, request: Request) -> Response:
    """Nothing new goes to the engine that is named; what it has it ends."""
    return await _drained(front, request, True)


async def undrain(front: Front, request: Request) -> Response:
    return await _drained(front, request, False)


async def _drained(front: Front, request: Request, drained: bool) -> Response:
    front.access.administer(request.state.holder, request.client)
    body = await received(request, front.config.max_body_bytes, front.config.body_s)
    try:
        engine = front.named(msgspec.json.decode(body, type=EngineBody).engine)
    except msgspec.ValidationError as error:
        raise misfit(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is no JSON: {error}.", "invalid_json") from error
    engine.drained = drained
    return answer({"engine": engine.name, "state": engine.state, "on_their_way": len(engine.open)})
