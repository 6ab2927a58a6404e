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
    first, tree = next(iter(of)), next(iter(of.values()))["terms"]
    for one, told in of.items():
        other = f"it has another tree of tenants (engine.shares) than {first.name}, whose holds"
        _noted(one, "" if told["terms"] == tree else other)
    local = local_terms(msgspec.convert(tree, dict[str, Terms]), [told["loads"] for told in of.values()])
    await asyncio.gather(
        *(_told(front, one, "POST", encode({"terms": own})) for one, own in zip(of, local, strict=True))
    )


async def _told(front: Front, engine: Engine, method: str, body: bytes) -> dict[str, Any] | None:
    """What it says; None of one that has no tree, says nothing, or may not be asked."""
    try:
        limit_s = front.route.health_deadline_s
        status, said = await engine.client.told(method, "/shares", front.key, body, limit_s)
    except Lost:
        return None
    if status == 403:
        _noted(engine, "it tells no shares of its tenants: give it keys, and the router an admin's (TANDEM_API_KEY)")
    found = msgspec.json.decode(said) if status == 200 else {}
    return found if isinstance(found, dict) and found.get("terms") is not None else None


def _noted(engine: Engine, wrong: str) -> None:
    """In the log, once until it is otherwise."""
    if wrong and wrong != engine.unshared:
        log.warning("engine %s: %s", engine.name, wrong)
    engine.unshared = wrong
