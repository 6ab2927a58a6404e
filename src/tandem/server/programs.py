"""Programs on a running server: their policy's kill switch, and that one is over."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tandem.server import bodies
from tandem.server.room import Room
from tandem.server.verbs import between
from tandem.server.wire import answer


class ProgramsBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /programs. mode: engine.programs.mode from now on, where it was not "off"."""

    mode: Literal["shadow", "advisory", "enforce"]


class FinishedBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /finish_program."""

    program_id: bodies.Name
    tenant: bodies.Name | None = None


async def programs(room: Room, request: Request) -> Response:
    """For an admin, or where there are no keys, for callers on the same machine. Between two steps; "shadow" undoes at
    once what is kept and paused. 400 where programs are not followed."""
    room.access.administer(request.state.holder, request.client)
    mode = (await room.read(request, ProgramsBody)).mode
    await between(room, lambda engine: engine.set_programs_mode(mode))
    return answer({"mode": mode})


async def finished(room: Room, request: Request) -> Response:
    """A program of the caller's tenant asks for nothing more: what is kept for it may go. Of one that is not known,
    and where programs are not followed, nothing is kept."""
    body = await room.read(request, FinishedBody)
    tenant = room.access.tenant(request.state.holder, body.tenant or request.headers.get("x-tenant"))
    room.desk.driver.finish(body.program_id, tenant)
    return answer({"program_id": body.program_id})
