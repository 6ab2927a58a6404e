"""How much of what the policy of programs decides is done, changed on a running server: its kill switch.

For an admin, or where there are no keys, for callers on the same machine.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tandem.server.room import Room
from tandem.server.verbs import between
from tandem.server.wire import answer


class ProgramsBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /programs. mode: engine.programs.mode from now on, where it was not "off"."""

    mode: Literal["shadow", "advisory", "enforce"]


async def programs(room: Room, request: Request) -> Response:
    """Between two steps; "shadow" undoes at once what is kept and paused. 400 where programs are not followed."""
    room.access.administer(request.state.holder, request.client)
    mode = (await room.read(request, ProgramsBody)).mode
    await between(room, lambda engine: engine.set_programs_mode(mode))
    return answer({"mode": mode})
