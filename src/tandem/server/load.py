"""What the page at / shows: load, tenants, programs and page memory, a look a second."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tandem.server.counts import Row
from tandem.server.page import page as front_page
from tandem.server.refusal import Refusal
from tandem.server.room import Room
from tandem.server.tenants import within
from tandem.server.wire import EventStream, Visit, answer, event

LOOK_S = 1.0
SHOWN = 50  # of each
MOST_WATCHERS = 64


def look(room: Room, above: str) -> dict[str, Any]:
    """The server as it is now; of tenants and programs, those within `above`."""
    desk, now_s = room.desk, time.monotonic()
    pool, stats = desk.engine.scheduler.pool, desk.total()
    held = pool.num_pages - pool.num_available

    def rows(table: OrderedDict[Any, Row]) -> list[dict[str, Any]]:
        seen = [(key, row) for key, row in reversed(table.items()) if within(row.tenant, above)]
        return [
            {
                "name": key[1] if isinstance(key, tuple) else key,
                "tenant": row.tenant,
                "running": row.running,
                "answers": row.answers,
                "tokens": row.tokens,
                "context": row.context,
                "idle_s": round(now_s - row.heard_s, 1),
            }
            for key, row in seen[:SHOWN]
        ]

    version = desk.engine.version
    status = "draining" if desk.draining else "paused" if desk.paused else "ok" if desk.well else "failing"
    return {
        "time": time.time(),
        "model": room.model,
        "version": room.label(version.step),
        "step": version.step,
        "digest": version.digest[:16],
        "status": status,
        "running": desk.num_running,
        "waiting": desk.num_waiting,
        "pages": {"held": held, "cached": pool.num_available - pool.num_free, "free": pool.num_free},
        "page_tokens": pool.page_tokens,
        "drawn": stats.sampled_tokens,
        "prompt": stats.prefilled_tokens + stats.repeated_tokens,
        "cached": stats.cached_tokens,
        "preemptions": stats.preemptions,
        "tenants": rows(room.counts.tenants),
        "programs": rows(room.counts.programs),
    }


async def events(room: Room, request: Request) -> Response:
    """A look a second, of what the caller's key may see."""
    if room.counts.watchers >= MOST_WATCHERS:
        raise Refusal(429, f"{MOST_WATCHERS} look already. Close one.", "rate_limit_exceeded", retry_s=5)
    visit = Visit()
    return EventStream(_looks(room, visit, request.state.holder.tenant), visit, room.config.send_s, {})


async def _looks(room: Room, visit: Visit, above: str) -> AsyncIterator[bytes]:
    room.counts.watchers += 1
    try:
        while not visit.gone and (room.desk.open or not room.desk.draining):
            yield event(look(room, above))
            await visit.wait(LOOK_S)
    finally:
        room.counts.watchers -= 1


async def load(room: Room, request: Request) -> Response:
    """One look; for who may see all, with what programs that are paused have room for (engine/space.py)."""
    above = request.state.holder.tenant
    return answer(look(room, above) | ({} if above else {"space": room.desk.engine.space()}))


async def page(room: Room, request: Request) -> Response:
    return front_page()
