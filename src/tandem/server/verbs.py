"""What trains a model asks of the server beside answers: pause and resume, withdraw, other weights, adapters, sleep.

The names are vLLM's, and SGLang's where it has its own for the same. All but the withdrawal of a caller's own requests
need server.control, and an admin's key where there are keys. But for `resume`, one is served at a time.

Other weights come between two steps of the engine: requests go on, over the keys and values that they have, and their
answers say which version drew which token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from tandem.engine.engine import Engine
from tandem.errors import ConfigError, DeliveryError
from tandem.server import bodies
from tandem.server.refusal import Refusal
from tandem.server.room import Room
from tandem.server.tenants import within
from tandem.server.wire import answer, log, received
from tandem.types import WeightVersion

T = TypeVar("T")
MODES = ("abort", "wait", "keep")
SGLANG_MODES = {"abort": "abort", "in_place": "keep", "retract": "retract"}
WAIT_S = 3600.0  # for what is on its way, before a pause that waits gives up
STEP_S = 600.0  # for a step to end
PART_S = 600.0  # for a part of the weights to come


@dataclass(frozen=True, slots=True)
class Ready:
    """Weights that can be served."""

    source: str
    digest: str
    weights: Any


class WeightStore(Protocol):
    """How other weights come; run/weights.py."""

    def begin(self) -> None: ...

    def take(self, sent: bytes) -> dict[str, str]: ...

    def ready(self, engine: Engine, folder: str) -> Ready: ...

    def serve(self, engine: Engine, ready: Ready, step: int) -> WeightVersion: ...

    def check_discard(self, engine: Engine) -> None: ...

    def discard(self, engine: Engine) -> None: ...

    def checksums(self, engine: Engine) -> Mapping[str, str]: ...

    def adapter(self, engine: Engine, name: str, folder: str) -> Any: ...

    def serve_adapter(self, engine: Engine, made: Any) -> WeightVersion: ...

    def drop_adapter(self, engine: Engine, name: str) -> None: ...


class Control:
    """The state of the verbs of one server."""

    def __init__(self, room: Room, store: WeightStore | None) -> None:
        self.room = room
        self._store = store
        self.lock = asyncio.Lock()
        self.updating = False  # parts are awaited
        self.asleep = False

    @property
    def store(self) -> WeightStore:
        if self._store is None:
            raise Refusal(403, "this server was started without a way to other weights.", "control_is_off")
        return self._store

    async def between(self, function: Callable[[Engine], T]) -> T:
        return await between(self.room, function)

    async def pause(self, mode: str, clears: bool) -> None:
        """Nothing new starts; what is on its way is withdrawn, awaited, or kept as it is until `resume`."""
        desk = self.room.desk
        desk.pause()
        if mode in ("keep", "retract"):
            desk.driver.hold(True)
            await self.between((lambda engine: engine.retract()) if mode == "retract" else (lambda engine: None))
            return
        if mode == "abort":
            for id in list(desk.open):
                desk.abort(id)
        if not await desk.idle(WAIT_S, lambda: not desk.paused):
            if not desk.paused:
                raise Refusal(409, "the pause was ended by a resume while it waited.", "resumed")
            said = (
                f"{len(desk.open)} requests are on their way after {WAIT_S:g} s; nothing new starts. Resume, or abort."
            )
            raise Refusal(409, said, "still_running")
        if clears:
            await self.between(lambda engine: engine.scheduler.empty())

    def resume(self) -> None:
        if self.asleep:
            raise Refusal(409, "the server sleeps. Wake it up.", "asleep")
        self.weights()
        self.room.desk.resume()

    async def update(self, folder: str, label: str | None, digest: str | None) -> WeightVersion:
        """The weights of a folder, or of the parts that came. 409, and nothing changed, where they are not `digest`."""
        room, store = self.room, self.store
        loop, engine = asyncio.get_running_loop(), self.room.desk.engine
        ready = await loop.run_in_executor(None, store.ready, engine, folder)
        if digest is not None and digest != ready.digest:
            said = f"the weights hash to {ready.digest}, not to {digest}. Nothing was changed; send them again."
            raise Refusal(409, said, "other_weights")
        step = engine.version.step + 1
        room.labelled(step, label)  # before a token is drawn with them
        try:
            version = await self.between(lambda engine: store.serve(engine, ready, step))
        except DeliveryError as error:
            log.exception("the engine serves other weights than were sent; it is paused")
            room.desk.weightless = True
            room.desk.pause()
            room.desk.driver.hold(True)
            raise Refusal(500, f"{error} The engine is paused.", "delivery_failed") from error
        room.desk.weightless = False
        return version

    def weights(self) -> None:
        """409 where there are none."""
        if self.room.desk.weightless:
            said = (
                "the weights were dropped (sleep at level 2), or arrived damaged. Bring others by "
                "/update_weights_from_disk, or by /start_weight_update and what follows it."
            )
            raise Refusal(409, said, "no_weights")

    async def sleep(self, level: int) -> None:
        """Withdraws what is on its way; gives back the memory of keys and values, and at level 2 of the weights."""
        if level == 2:
            self.store.check_discard(self.room.desk.engine)
        was, self.asleep = self.asleep, True  # from here on nobody resumes
        try:
            await self.pause("abort", False)
            await self.between(lambda engine: engine.release_memory())
        except BaseException:
            self.asleep = was
            raise
        if level == 2:
            self.room.desk.weightless = True
            await self.between(self.store.discard)

    def told(self) -> dict[str, Any]:
        version = self.room.desk.engine.version
        named = {"weight_version": self.room.label(version.step), "step": version.step, "digest": version.digest}
        state = {"updating": self.updating, "is_paused": self.room.desk.paused, "is_sleeping": self.asleep}
        return {**named, **state, "has_weights": not self.room.desk.weightless}


async def between(room: Room, function: Callable[[Engine], T]) -> T:
    """Between two steps of the engine. 503 where a step takes too long."""
    desk = room.desk
    desk.renew()
    try:
        async with asyncio.timeout(STEP_S):
            return await asyncio.wrap_future(desk.driver.call(lambda: function(desk.engine)))
    except TimeoutError as error:
        raise Refusal(503, f"the engine's step did not end within {STEP_S:g} s.", "engine_stalled") from error


def control(room: Room, request: Request) -> Control:
    """For who may. 403 else."""
    room.access.control(request.state.holder)
    found: Control = request.app.state.control
    return found


def query(request: Request, **allowed: tuple[str, ...]) -> dict[str, str]:
    """The query's values: the first allowed one where it says nothing. 400 for others."""
    for name, value in request.query_params.multi_items():
        few = allowed.get(name)
        if few is None or value not in few:
            said = (
                f"{name}={value} in the query. Allowed: "
                + (", ".join(few) if few else ", ".join(allowed) or "none")
                + "."
            )
            raise Refusal(400, said, "invalid_value", name)
    return {name: request.query_params.get(name, few[0]) for name, few in allowed.items()}


async def pause(room: Room, request: Request) -> Response:
    verbs = control(room, request)
    asked = query(request, mode=MODES, clear_cache=("", "true", "false"))
    mode, clears = asked["mode"], asked["clear_cache"]
    async with verbs.lock:
        await verbs.pause("retract" if mode == "keep" and clears == "true" else mode, clears != "false")
    return answer({"status": "paused", "mode": mode})


async def pause_generation(room: Room, request: Request) -> Response:
    verbs = control(room, request)
    body = await room.read(request, bodies.PauseBody)
    async with verbs.lock:
        await verbs.pause(SGLANG_MODES[body.mode], True)
    return answer({"status": "paused", "mode": body.mode})


async def resume(room: Room, request: Request) -> Response:
    """Not behind the lock: it ends a pause that waits."""
    control(room, request).resume()
    return answer({"status": "resumed"})


async def is_paused(room: Room, request: Request) -> Response:
    control(room, request)
    return answer({"is_paused": room.desk.paused})


async def abort_requests(room: Room, request: Request) -> Response:
    """By the ids of calls or of their answers; a caller's own. Without ids all, which is a verb of control."""
    body = await room.read(request, bodies.AbortBody)
    ids = [*(body.request_ids or ()), *([body.rid] if body.rid is not None else ())]
    if not ids:
        if not (body.abort_all or body.request_ids is None):
            return answer({"aborted": []})
        control(room, request)
    holder, desk = request.state.holder, room.desk
    found = [
        (id, one)
        for id, one in [*desk.open.items(), *desk.gated.items()]
        if (not ids or id in ids or one.call.id in ids) and within(one.request.tenant, holder.tenant)
    ]
    for id, _ in found:
        desk.abort(id)
    return answer({"aborted": [id for id, _ in found]})


async def start_weight_update(room: Room, request: Request) -> Response:
    verbs = control(room, request)
    async with verbs.lock:
        verbs.store.begin()
        verbs.updating = True
    return answer(verbs.told())


async def update_weights(room: Room, request: Request) -> Response:
    """A part of the weights: the body is a safetensors file."""
    verbs = control(room, request)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/octet-stream":
        raise Refusal(415, "a part is a safetensors file, as Content-Type: application/octet-stream.", "not_binary")
    sent = await received(request, room.config.max_part_bytes, PART_S)
    async with verbs.lock:
        _updating(verbs)
        hashes = await asyncio.get_running_loop().run_in_executor(None, verbs.store.take, sent)
    return answer({"received": hashes})


async def finish_weight_update(room: Room, request: Request) -> Response:
    verbs = control(room, request)
    body = await room.read(request, bodies.FinishBody)
    async with verbs.lock:
        _updating(verbs)
        verbs.updating = False
        await verbs.update("", body.weight_version, body.digest)
    return answer(verbs.told())


async def update_weights_from_disk(room: Room, request: Request) -> Response:
    verbs = control(room, request)
    body = await room.read(request, bodies.DiskBody)
    async with verbs.lock:
        if body.abort_all_requests:
            for id in list(room.desk.open):
                room.desk.abort(id)
        await verbs.update(body.model_path, body.weight_version, body.digest)
    return answer({"success": True, **verbs.told()})


def _updating(verbs: Control) -> None:
    if not verbs.updating:
        raise Refusal(409, "no update of the weights was started. Call /start_weight_update first.", "not_updating")


async def weight_info(room: Room, request: Request) -> Response:
    return answer(control(room, request).told())


async def weight_checker(room: Room, request: Request) -> Response:
    """Hashes of what the engine's products read now."""
    verbs = control(room, request)
    await room.read(request, bodies.CheckerBody)
    async with verbs.lock:
        verbs.weights()
        found = await verbs.between(verbs.store.checksums)
    return answer({"checksums": found, **verbs.told()})


async def load_lora_adapter(room: Room, request: Request) -> Response:
    """An adapter's folder, served as a model of its own name; in place of one of that name where the call says so."""
    verbs = control(room, request)
    body = await room.read(request, bodies.LoadAdapterBody)
    name, store = body.lora_name, verbs.store
    async with verbs.lock:
        verbs.weights()
        engine = room.desk.engine
        if name in room.names or (name in engine.adapters and not body.load_inplace):
            why = "is the model's own name" if name in room.names else "is loaded already (load_inplace replaces it)"
            raise Refusal(400, f"{name} {why}. Choose another name.", "name_in_use", "lora_name")
        made = await asyncio.get_running_loop().run_in_executor(None, store.adapter, engine, name, body.lora_path)
        version = await verbs.between(lambda engine: store.serve_adapter(engine, made))
    return answer({"status": "loaded", "lora_name": name, "digest": version.digest})


async def unload_lora_adapter(room: Room, request: Request) -> Response:
    """409 while answers by it are on their way."""
    verbs = control(room, request)
    name, store = (await room.read(request, bodies.UnloadAdapterBody)).lora_name, verbs.store
    async with verbs.lock:
        if name not in room.desk.engine.adapters:
            raise Refusal(404, f"there is no adapter {name}.", "model_not_found", "lora_name")
        try:
            await verbs.between(lambda engine: store.drop_adapter(engine, name))
        except ConfigError as error:
            raise Refusal(409, str(error), "still_running") from error
    return answer({"status": "unloaded", "lora_name": name})


async def sleep(room: Room, request: Request) -> Response:
    """Withdraws what is on its way; the memory of keys and values is given back, at level 2 that of the weights too."""
    verbs = control(room, request)
    level = int(query(request, level=("1", "2"), tags=("kv_cache",))["level"])
    async with verbs.lock:
        await verbs.sleep(level)
    return answer({"status": "asleep"})


async def wake_up(room: Room, request: Request) -> Response:
    """409 where there are no weights; tags=weights alone has them brought, and leaves it asleep."""
    verbs = control(room, request)
    query(request, tags=("kv_cache", "weights"))
    async with verbs.lock:
        if verbs.asleep and set(request.query_params.getlist("tags")) != {"weights"}:
            verbs.weights()
            verbs.asleep = False
            verbs.resume()  # a pause of one that is awake stays
    return answer({"status": "asleep" if verbs.asleep else "awake"})


async def is_sleeping(room: Room, request: Request) -> Response:
    return answer({"is_sleeping": control(room, request).asleep})
