"""Shares of tenants over the engines behind a router: each is given terms by the loads that all have.

What engines report is remembered by them (server/shares.py), and the terms are a function of what all
report (engine/cluster.py): several routers before the same engines come to the same.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from tandem.engine.cluster import local_terms
from tandem.engine.share import Terms
from tandem.server.front.client import Lost
from tandem.server.front.engines import Engine
from tandem.server.front.front import Front, repeated
from tandem.server.wire import encode, log

SYNC_S = 1.0  # between two askings


async def balance(front: Front) -> None:
    """For ever, where engines share by a tree."""
    await repeated(SYNC_S, lambda: once(front), "shares over engines")


async def once(front: Front) -> None:
    """Asks each what it has, and tells each its terms. An engine that says nothing is done without."""
    there = [one for one in front.engines if one.well]
    if len(there) < 2:
        return
    said = await asyncio.gather(*(_told(front, one, "GET", b"") for one in there))
    of = {one: told for one, told in zip(there, said, strict=True) if told is not None}
    if len(of) < 2:
        return
    tree = next(iter(of.values()))["terms"]
    if any(told["terms"] != tree for told in of.values()):
        log.warning("engines have different trees of tenants (engine.shares): that of %s holds", next(iter(of)).name)
    local = local_terms(msgspec.convert(tree, dict[str, Terms]), [told["loads"] for told in of.values()])
    await asyncio.gather(
        *(_told(front, one, "POST", encode({"terms": own})) for one, own in zip(of, local, strict=True))
    )


async def _told(front: Front, engine: Engine, method: str, body: bytes) -> dict[str, Any] | None:
    """What it says; None of one that has no tree, or says nothing."""
    try:
        limit_s = front.route.health_deadline_s
        status, said = await engine.client.told(method, "/shares", front.key, body, limit_s)
    except Lost:
        return None
    found = msgspec.json.decode(said) if status == 200 else {}
    return found if isinstance(found, dict) and found.get("terms") is not None else None
