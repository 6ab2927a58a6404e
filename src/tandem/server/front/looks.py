"""What all engines together are like: a look a second for the page, and counts for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from tandem.server.front.client import Lost
from tandem.server.front.engines import Engine
from tandem.server.front.front import Front
from tandem.server.refusal import Refusal
from tandem.server.tenants import within
from tandem.server.wire import EventStream, Visit, answer, event

LOOK_S = 1.0
SHOWN = 50  # tenants, and programs
MOST_WATCHERS = 64
SUMS = ("running", "waiting", "drawn", "prompt", "cached", "preemptions")
MOST_OF = ("tandem:weight_version", "tandem:paused")  # gauges of which the most is told, and not the sum
MEANS = ("vllm:kv_cache_usage_perc",)

Key = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name, and its labels


def look(front: Front, above: str) -> dict[str, Any]:
    """As load.py's of one engine, of all that are well, with `engines` beside; of tenants and programs, those within
    `above`."""
    looks = [one.look for one in front.engines if one.well and one.look]
    pages: defaultdict[str, int] = defaultdict(int, held=0, cached=0, free=0)
    for one in looks:
        for name, count in one.get("pages", {}).items():
            pages[name] += count
    had = front.had
    return {
        "time": time.time(),
        "model": front.model,
        "version": next((one.get("version", "") for one in looks if had and one.get("digest") == had.digest), ""),
        "step": had.step if had is not None else 0,
        "digest": front.had_digest,
        "status": "draining" if front.draining else _status(front, looks),
        **{name: sum(one.get(name, 0) for one in looks) for name in SUMS},
        "pages": dict(pages),
        "page_tokens": next((one["page_tokens"] for one in looks if "page_tokens" in one), 0),
        "tenants": _rows(looks, "tenants", above),
        "programs": _rows(looks, "programs", above),
        "engines": [_row(front, one) for one in front.engines],
    }


def _status(front: Front, looks: list[dict[str, Any]]) -> str:
    if not front.well:
        return "failing"
    return "paused" if looks and all(one.get("status") == "paused" for one in looks) else "ok"


def _row(front: Front, engine: Engine) -> dict[str, Any]:
    names = ("calls", "again", "moved", "failed", "broken", "restarts")
    seen = {name: engine.look.get(name, 0) for name in ("running", "waiting")}
    return {
        "name": engine.name,
        "url": engine.client.url,
        "state": engine.state,
        "on_their_way": len(engine.open),
        "load": round(engine.load(), 4),
        "digest": engine.served.digest if engine.served is not None else "",
        **seen,
        **{name: engine.counts[name] for name in names},
    }


def _rows(looks: list[dict[str, Any]], kind: str, above: str) -> list[dict[str, Any]]:
    """Of tenants or programs, one each: what it has on all engines; those last heard of first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for one in looks:
        for row in one.get(kind, []):
            if not within(row["tenant"], above):
                continue
            there = found.setdefault((row["name"], row["tenant"]), {**row, "running": 0, "answers": 0, "tokens": 0})
            for name in ("running", "answers", "tokens"):
                there[name] += row[name]
            there["context"] = max(there["context"], row["context"])
            there["idle_s"] = min(there["idle_s"], row["idle_s"])
    return sorted(found.values(), key=lambda row: row["idle_s"])[:SHOWN]


async def load(front: Front, request: Request) -> Response:
    """One look."""
    return answer(look(front, request.state.holder.tenant))


async def events(front: Front, request: Request) -> Response:
    """A look a second, of what the caller's key may see."""
    if front.watchers >= MOST_WATCHERS:
        raise Refusal(429, f"{MOST_WATCHERS} look already. Close one.", "rate_limit_exceeded", retry_s=5)
    visit = Visit()
    return EventStream(_looks(front, visit, request.state.holder.tenant), visit, front.config.send_s, {})


async def _looks(front: Front, visit: Visit, above: str) -> AsyncIterator[bytes]:
    front.watchers += 1
    try:
        while not visit.gone and not front.draining:
            yield event(look(front, above))
            await visit.wait(LOOK_S)
    finally:
        front.watchers -= 1


class Sums(Collector):
    """Engines' samples, added up. A count that falls, of an engine that began anew, goes on from where it was; that of
    one that gives no answer stays."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self._families: dict[str, tuple[str, str]] = {}  # name -> type and words
        self._last: dict[Engine, dict[Key, float]] = {}
        self._before: dict[Engine, defaultdict[Key, float]] = {}
        self._gauges: dict[Engine, dict[Key, float]] = {}
        self._of: dict[Key, str] = {}  # family

    def told(self, engine: Engine, text: str) -> None:
        """What an engine's /metrics says."""
        last = self._last.setdefault(engine, {})
        before = self._before.setdefault(engine, defaultdict(float))
        gauges = self._gauges[engine] = {}
        for family in text_string_to_metric_families(text):
            self._families[family.name] = (family.type, family.documentation)
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                if sample.name.endswith("_created"):
                    continue
                self._of[key] = family.name
                if family.type in ("counter", "histogram", "summary"):
                    if sample.value < last.get(key, 0.0):
                        before[key] += last[key]
                    last[key] = sample.value
                else:
                    gauges[key] = sample.value

    def silent(self, engine: Engine) -> None:
        """It gives no answer: its counts stay, and it has nothing now."""
        self._gauges.pop(engine, None)

    def collect(self) -> Iterable[Metric]:
        made = {name: Metric(name, words, kind) for name, (kind, words) in self._families.items()}
        sums: dict[Key, list[float]] = {}
        for engine, last in self._last.items():
            for key, value in last.items():
                sums.setdefault(key, []).append(value + self._before[engine][key])
        for gauges in self._gauges.values():
            for key, value in gauges.items():
                sums.setdefault(key, []).append(value)
        for key in sorted(sums, key=lambda one: (self._of[one], one[0], _bound(one))):
            values, family = sums[key], self._of[key]
            total = max(values) if family in MOST_OF else sum(values) / (len(values) if family in MEANS else 1)
            made[family].add_sample(key[0], dict(key[1]), total)
        yield from made.values()
        yield from self._own()

    def _own(self) -> Iterable[Metric]:
        front = self.front
        for name, said, kind, of in (
            ("tandem:route_up", "1 where the engine may be asked for something new.", "gauge", lambda one: one.ready),
            ("tandem:route_on_their_way", "Calls that the engine has from here.", "gauge", lambda one: len(one.open)),
            ("tandem:route_calls", "Calls that the engine was asked for.", "counter", lambda one: one.counts["calls"]),
            ("tandem:route_again", "Of those, asked of another before.", "counter", lambda one: one.counts["again"]),
            ("tandem:route_moved", "Of those, of paused programs.", "counter", lambda one: one.counts["moved"]),
            ("tandem:route_failed", "Calls that it failed at.", "counter", lambda one: one.counts["failed"]),
            ("tandem:route_broken", "Streams that broke.", "counter", lambda one: one.counts["broken"]),
            (
                "tandem:route_restarts",
                "Times that it was started again.",
                "counter",
                lambda one: one.counts["restarts"],
            ),
        ):
            family = Metric(name, said, kind)
            for engine in front.engines:
                labels = {"model_name": front.model, "engine": engine.name}
                family.add_sample(name + ("_total" if kind == "counter" else ""), labels, float(of(engine)))
            yield family
        refused = Metric("tandem:route_refused", "Calls that the router refused.", "counter")
        for code, count in front.refusals.items():
            refused.add_sample("tandem:route_refused_total", {"model_name": front.model, "code": code}, float(count))
        yield refused


def _bound(key: Key) -> tuple[list[tuple[str, str]], float]:
    """Buckets in the order of their bounds."""
    labels = dict(key[1])
    bound = labels.pop("le", "0")
    return sorted(labels.items()), float(bound)


async def metrics(front: Front, sums: Sums) -> Response:
    async def ask(engine: Engine) -> None:
        try:
            limit_s = front.route.health_deadline_s
            status, body = await engine.client.told("GET", "/metrics", front.key, limit_s=limit_s)
        except Lost:
            status, body = 0, b""
        if status == 200:
            sums.told(engine, body.decode("utf-8", "replace"))
        else:
            sums.silent(engine)

    await asyncio.gather(*(ask(one) for one in front.engines if not one.given_up))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(sums)
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)
