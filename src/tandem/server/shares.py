"""Shares of an engine that is one of several: it tells a router what its tenants have, and is told what they get here.

For an admin, or where there are no keys, for callers on the same machine. Terms that are not told again are a while
later the tree's own: the router has gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tandem.engine.deal import Deals
from tandem.engine.share import Terms
from tandem.server.refusal import Refusal
from tandem.server.room import Room
from tandem.server.verbs import between
from tandem.server.wire import answer

LEASE_S = 30.0  # for which terms hold that were told


class SharesBody(msgspec.Struct, forbid_unknown_fields=True):
    """POST /shares. terms: what tenants are promised of this engine, by path."""

    terms: dict[str, Terms]


async def shares(room: Room, request: Request) -> Response:
    """What tenants have here, and what the tree promises them; none without engine.order=shares."""
    own = _own(room)
    if own is None:
        return answer({"loads": {}, "terms": None})
    room.access.administer(request.state.holder, request.client)
    loads = await between(room, lambda engine: engine.loads())
    return answer({"loads": room.lease.demand.told(loads, time.monotonic()), "terms": own})


async def promise(room: Room, request: Request) -> Response:
    """Other terms from now on, for LEASE_S."""
    room.access.administer(request.state.holder, request.client)
    terms, lease = (await room.read(request, SharesBody)).terms, room.lease
    if _own(room) is None:
        raise Refusal(409, "this engine has no tree of tenants. Start it with engine.order=shares.", "no_shares")
    lease.told |= terms.keys()
    await between(room, lambda engine: engine.promise(terms))
    if lease.ends is not None:
        lease.ends.cancel()
    lease.ends = asyncio.get_running_loop().call_later(LEASE_S, _end, room)
    return answer({"told": len(terms)})


def _end(room: Room) -> None:
    """Nobody says any more what holds."""
    own, told = _own(room), room.lease.told
    if own is not None and not room.desk.draining:
        room.lease.told = set()
        room.desk.renew()
        engine = room.desk.engine
        room.desk.driver.call(lambda: engine.promise({path: own.get(path, Terms()) for path in told}))


def _own(room: Room) -> Mapping[str, Terms] | None:
    """The tree's own terms."""
    order = room.desk.engine.scheduler.order
    return order.tree.shares.tenants if isinstance(order, Deals) else None
