"""`bench soak`: the server at mixed load with faults, for as long as is asked.

Callers in threads ask in all ways that there are: chats, completions, responses, forms, token ids, streams and whole
answers. Some vanish in the middle, some read slowly, some send what is no call; once in a while a flood comes, and a
trainer pauses, updates the weights (with those that are served) and resumes. Each call ends in one of four ways:
answered, refused (a status of the list that its kind allows), withdrawn (its caller left, or a trainer aborted it), or
lost, which is all else, and fails the soak. Seeded answers are compared with the first of their kind and seed.
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from tandem.bench.child import Server, own, serving
from tandem.errors import WorldError

CALLERS = 12
FLOOD = 400  # calls at once
FLOOD_S, TRAINER_S, LOOK_S, LINE_S = 120.0, 20.0, 5.0, 60.0  # between two of each
WARM_UP = 0.2  # of the time, in which memory may grow
GROWN_MB_H, LEAST_MB = 64.0, 64.0  # that memory may grow by after that: in an hour, and in all, whatever the time
KV_BYTES = 128 << 20  # little: pages are short, and the pool is all touched before the warm-up is over
SEEDS = 6  # of each kind
CALL_S = 120.0  # for a call, floods and pauses included
BUSY = 200  # server.max_requests: so many answers at once, and floods are refused
OUTCOMES = ("answered", "refused", "withdrawn", "lost")
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}, "even": {"type": "boolean"}},
    "required": ["sum", "even"],
    "additionalProperties": False,
}

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to ask: where, with what, and how its answer is read."""

    path: str
    body: Mapping[str, Any]
    read: Callable[[Any], Any]  # the text (or token ids) of a whole answer
    new: Callable[[Any], Any]  # that of an event, "" or [] where it has none
    seed: str = "seed"  # the name of the seed's field

    def call(self, seed: int, stream: bool) -> dict[str, Any]:
        body = {**self.body, "stream": stream}
        if self.seed == "sampling_seed":
            body["sampling_params"] = {**body["sampling_params"], "sampling_seed": seed}
        else:
            body["seed"] = seed
        return body


def _said(body: Any) -> str:
    choices = body["choices"]
    return (choices[0].get("message") or choices[0].get("delta") or choices[0]).get("content") or "" if choices else ""


def _continued(body: Any) -> str:
    return body["choices"][0]["text"] if body["choices"] else ""


def _responded(body: Any) -> str:
    return "".join(part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"])


def _response_delta(event: Any) -> str:
    return event["delta"] if event["type"] == "response.output_text.delta" else ""


def _ids(body: Any) -> list[int]:
    return list(body["output_ids"])


ASK = [{"role": "user", "content": "What is 17 + 25? Explain it step by step."}]
KINDS: Mapping[str, Kind] = {
    "chat": Kind("/v1/chat/completions", {"messages": ASK, "max_tokens": 48}, _said, _said),
    "completion": Kind(
        "/v1/completions",
        {"prompt": list(range(300, 340)), "max_tokens": 40, "temperature": 0.9, "ignore_eos": True},
        _continued,
        _continued,
    ),
    "response": Kind(
        "/v1/responses", {"input": "Say what a prime is.", "max_output_tokens": 40}, _responded, _response_delta
    ),
    "form": Kind(
        "/v1/chat/completions",
        {
            "messages": ASK,
            "max_tokens": 64,
            "response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}},
        },
        _said,
        _said,
    ),
    "generate": Kind(
        "/generate",
        {"input_ids": list(range(400, 430)), "sampling_params": {"max_new_tokens": 32, "ignore_eos": True}},
        _ids,
        _ids,
        "sampling_seed",
    ),
}
MALFORMED: tuple[tuple[str, bytes], ...] = (
    ("/v1/chat/completions", b'{"messages": ['),
    ("/v1/chat/completions", b'{"messages": "none"}'),
    ("/v1/completions", b'{"prompt": [999999999999]}'),
    ("/v1/completions", b'{"prompt": "a", "frequency_penalty": 2}'),
    ("/v1/responses", b"\xff\xfe"),
    ("/generate", b'{"input_ids": [], "sampling_params": {}}'),
    ("/v1/chat/completions", b'{"messages": [], "surprise": 1}'),
)


@dataclass(slots=True)
class Account:
    """What became of calls, from all threads."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    began: Counter[str] = field(default_factory=Counter)  # by kind
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind and outcome
    said: Counter[str] = field(default_factory=Counter)  # why calls were lost
    first: dict[tuple[str, int], Any] = field(default_factory=dict)  # texts of seeded answers
    repeated: int = 0
    differed: int = 0
    tokens: int = 0

    def begin(self, kind: str) -> None:
        with self.lock:
            self.began[kind] += 1

    def end(self, kind: str, outcome: str, said: str = "") -> None:
        with self.lock:
            self.ended[kind, outcome] += 1
            if outcome == "lost":
                self.said[f"{kind}: {said}"[:300]] += 1

    def same(self, kind: str, seed: int, text: Any) -> None:
        with self.lock:
            first = self.first.setdefault((kind, seed), text)
            self.repeated += 1
            self.differed += first != text

    @property
    def lost(self) -> int:
        """Calls that were lost, and those that began and of which nothing was heard."""
        return sum(n for (_, outcome), n in self.ended.items() if outcome == "lost") + (
            self.began.total() - self.ended.total()
        )

    def rows(self) -> dict[str, dict[str, int]]:
        rows = {}
        for kind in sorted(self.began):
            row = {"asked": self.began[kind], **{one: self.ended[kind, one] for one in OUTCOMES}}
            row["lost"] += row["asked"] - sum(row[one] for one in OUTCOMES)
            rows[kind] = row
        return rows


def events(response: HTTPResponse) -> Iterator[Any]:
    """Of a stream, up to its [DONE] or its `response.completed`; OSError where it ends before."""
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return
        event = json.loads(line[6:])
        yield event
        if event.get("type") in ("response.completed", "response.incomplete"):
            return
    raise OSError("the stream ended before its end")


class Caller:
    """One thread's calls."""

    def __init__(self, server: Server, account: Account, over: threading.Event, number: int) -> None:
        self.server, self.account, self.over = server, account, over
        self.rng = random.Random(f"caller/{number}")

    def run(self) -> None:
        ways = (self.whole, self.whole, self.stream, self.stream, self.vanish, self.dawdle, self.malformed)
        while not self.over.is_set():
            self.rng.choice(ways)()

    def _send(self, path: str, body: bytes) -> tuple[HTTPConnection, HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=CALL_S)
        try:
            connection.request("POST", path, body, {"content-type": "application/json"})
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _account(self, kind: str, call: Callable[[], tuple[str, str]]) -> None:
        """A call in the account, whatever comes of it."""
        self.account.begin(kind)
        outcome, said = "lost", "the caller failed"
        try:
            outcome, said = call()
        except (OSError, HTTPException, ValueError, KeyError, IndexError) as error:
            said = repr(error)
        finally:
            self.account.end(kind, outcome, said)

    def _draw(self) -> tuple[str, Kind, int]:
        name = self.rng.choice(sorted(KINDS))
        return name, KINDS[name], self.rng.randrange(SEEDS)

    def whole(self) -> None:
        name, kind, seed = self._draw()

        def call() -> tuple[str, str]:
            connection, response = self._send(kind.path, json.dumps(kind.call(seed, False)).encode())
            try:
                body = response.read()
            finally:
                connection.close()
            if response.status in (429, 503):
                return "refused", ""
            if response.status != 200:
                return "lost", f"{response.status} {body[:200]!r}"
            return self._heard(name, kind, seed, json.loads(body))

        self._account(name, call)

    def _heard(self, name: str, kind: Kind, seed: int, body: Any) -> tuple[str, str]:
        """An answer that came whole: those that a trainer aborted are shorter than their first."""
        if aborted(body):
            return "withdrawn", ""
        self.account.same(name, seed, kind.read(body))
        with self.account.lock:
            usage = body.get("usage") or body.get("meta_info") or {}
            self.account.tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))
        return "answered", ""

    def stream(self, way: str = "stream", pause_s: float = 0.0) -> None:
        name, kind, seed = self._draw()

        def call() -> tuple[str, str]:
            connection, response = self._send(kind.path, json.dumps(kind.call(seed, True)).encode())
            try:
                if response.status in (429, 503):
                    return "refused", ""
                if response.status != 200:
                    return "lost", f"{response.status} {response.read()[:200]!r}"
                parts, cut = [], False
                for event in events(response):
                    if event.get("error") or event.get("type") in ("error", "response.failed"):
                        return "lost", str(event)
                    parts.append(kind.new(event))
                    cut = cut or aborted(event)
                    time.sleep(pause_s)
            finally:
                connection.close()
            if cut:
                return "withdrawn", ""
            self.account.same(name, seed, sum(parts, []) if kind.new is _ids else "".join(parts))
            return "answered", ""

        self._account(way, call)

    def dawdle(self) -> None:
        """Reads slowly."""
        self.stream("slow stream", 0.05)

    def vanish(self) -> None:
        """Leaves after a few events, without a word."""
        _, kind, seed = self._draw()

        def call() -> tuple[str, str]:
            body = json.dumps(kind.call(seed, True)).encode()
            head = f"POST {kind.path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            with socket.create_connection(("127.0.0.1", self.server.port), CALL_S) as sock:
                sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                if self.rng.random() < 0.7 and not sock.recv(1 << 12):
                    return "lost", "the connection ended without an answer"
            return "withdrawn", ""

        self._account("vanished", call)

    def malformed(self) -> None:
        path, body = self.rng.choice(MALFORMED)

        def call() -> tuple[str, str]:
            connection, response = self._send(path, body)
            try:
                said = response.read()
            finally:
                connection.close()
            if response.status == 400 and "error" in json.loads(said):
                return "refused", ""
            return "lost", f"{response.status} for what is no call"

        self._account("malformed", call)


def aborted(body: Any) -> bool:
    """Whether an answer, or the event that ends a stream, says that a trainer cut it off."""
    if "choices" in body:
        return any(choice["finish_reason"] == "abort" for choice in body["choices"])
    if "output_ids" in body:
        return (body["meta_info"]["finish_reason"] or {}).get("type") == "abort"
    response = body.get("response", body)
    cut = response.get("status") == "incomplete" and response["incomplete_details"]["reason"] != "max_output_tokens"
    return bool(cut) or response.get("status") == "cancelled"


def flood(server: Server, account: Account) -> None:
    """More calls at once than the server takes: some are refused, none is lost."""
    body = {"model": server.model, "prompt": "What is 1 + 2?", "max_tokens": 4, "temperature": 1.0}

    def one() -> None:
        account.begin("flood")
        outcome, said = "lost", ""
        try:
            status, heard = server.call("POST", "/v1/completions", body)
            outcome = {200: "answered", 429: "refused", 503: "refused"}.get(status, "lost")
            if status == 200 and aborted(json.loads(heard)):
                outcome = "withdrawn"
            said = f"{status} {heard[:200]!r}"
        except (OSError, HTTPException, ValueError) as error:
            said = repr(error)
        finally:
            account.end("flood", outcome, said)

    threads = [threading.Thread(target=one, daemon=True) for _ in range(FLOOD)]
    for thread in threads:
        thread.start()
    until_s = time.monotonic() + 2 * CALL_S
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))


def train(server: Server, account: Account, number: int) -> None:
    """What a trainer does amid streams: pauses of each kind, other weights (the same model's), and goes on."""
    from tandem.bench.work import MODEL

    steps: tuple[tuple[str, Any], ...] = (
        (f"/pause?mode={('keep', 'wait', 'abort')[number % 3]}", None),
        ("/update_weights_from_disk", {"model_path": MODEL, "weight_version": f"soak-{number}"}),
        ("/resume", None),
    )
    for path, body in steps if number % 2 else steps[1:2]:
        kind = path.partition("?")[0]
        account.begin(kind)
        outcome, said = "lost", ""
        try:
            status, heard = server.call("POST", path, body)
            outcome, said = ("answered" if status == 200 else "lost"), f"{status} {heard[:200]!r}"
        except (OSError, HTTPException) as error:
            said = repr(error)
        finally:
            account.end(kind, outcome, said)


def slope(at_s: list[float], values: list[float]) -> float:
    """Of the line through the points by least squares, a second; 0 for fewer than two.

    >>> slope([0.0, 1.0, 2.0], [5.0, 7.0, 9.0])
    2.0
    """
    if len(set(at_s)) < 2:
        return 0.0
    return statistics.linear_regression(at_s, values).slope


def judged(found: dict[str, Any]) -> str:
    """Why a soak failed; "" where it did not."""
    if found["total"]["lost"]:
        return f"{found['total']['lost']} calls were lost: {'; '.join(found['said'])}"
    if found["differed"]:
        return f"{found['differed']} seeded answers are not those that were given first."
    if found["slope_mb_h"] > found["allowed_mb_h"]:
        grown = f"{found['slope_mb_h']:,.1f} MB an hour, where {found['allowed_mb_h']:,.1f} are allowed"
        return f"the server's memory grows by {grown}."
    return ""


def told(account: Account, memory: list[tuple[float, float]], seconds: float) -> dict[str, Any]:
    """The result, of what was asked and of (second, MB) samples of memory; its "failure" says why it failed."""
    late = [(at_s, mb) for at_s, mb in memory if at_s >= WARM_UP * seconds] or memory[-1:]
    rows = account.rows()
    found: dict[str, Any] = {
        "bench": "soak",
        "seconds": seconds,
        "calls": rows,
        "total": {name: sum(row[name] for row in rows.values()) for name in ("asked", *OUTCOMES)},
        "said": [f"{count} x {said}" for said, count in account.said.most_common(5)],
        "tokens": account.tokens,
        "repeated": account.repeated - len(account.first),
        "differed": account.differed,
        "resident_mb": late[0][1] if late else 0.0,
        "slope_mb_h": 3600 * slope([at_s for at_s, _ in late], [mb for _, mb in late]),
        "allowed_mb_h": max(GROWN_MB_H, LEAST_MB / max(1.0, (1 - WARM_UP) * seconds) * 3600),
        "memory": memory,
    }
    return {**found, "failure": judged(found)}


def soak(seconds: float, note: Note) -> dict[str, Any]:
    """A soak of a server child; a line a minute. WorldError where the server ends meanwhile."""
    settings = (f"server.max_requests={BUSY}", "server.control=true", "server.send_s=20")
    with serving(own(*settings, kv_bytes=KV_BYTES)) as server:
        note(f"a server answers after {server.start_s:.1f} s; {CALLERS} callers for {seconds:,.0f} s")
        return _soaked(server, seconds, note)


def _soaked(server: Server, seconds: float, note: Note) -> dict[str, Any]:
    account, over, memory = Account(), threading.Event(), list[tuple[float, float]]()
    callers = [Caller(server, account, over, number) for number in range(CALLERS)]
    threads = [threading.Thread(target=caller.run, daemon=True) for caller in callers]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    due = {"flood": FLOOD_S / 2, "train": TRAINER_S / 2, "line": LINE_S}
    trained = 0
    while (now_s := time.monotonic() - began_s) < seconds:
        memory.append((now_s, server.resident_bytes() / 1e6))
        if now_s >= due["flood"]:
            due["flood"] += FLOOD_S
            flood(server, account)
        if now_s >= due["train"]:
            due["train"] += TRAINER_S
            train(server, account, trained)
            trained += 1
        if now_s >= due["line"]:
            due["line"] += LINE_S
            ended = {name: sum(n for (_, one), n in account.ended.items() if one == name) for name in OUTCOMES}
            counts = ", ".join(f"{count:,} {name}" for name, count in ended.items())
            note(f"{now_s:7,.0f} s: {counts}; {account.differed} differed; {memory[-1][1]:,.0f} MB")
        over.wait(min(LOOK_S, max(0.0, seconds - now_s)))
    over.set()
    until_s = time.monotonic() + 2 * CALL_S
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))
    _left(server, account)
    return told(account, memory, time.monotonic() - began_s)


def _left(server: Server, account: Account) -> None:
    """The server's own account, once all have been answered: nothing is on its way."""
    until_s = time.monotonic() + CALL_S
    while time.monotonic() < until_s:
        status, body = server.call("GET", "/load")
        if status != 200:
            raise WorldError(f"/load gave {status} after the soak.")
        left = json.loads(body)
        if not left["running"] and not left["waiting"]:
            return
        time.sleep(0.5)
    account.begin("left behind")
    account.end("left behind", "lost", f"the server still has {body[:200]!r}")
