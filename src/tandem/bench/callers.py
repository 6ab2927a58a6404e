"""Who asks a server in a soak (soak.py): in all ways that there are, with each call in an account.

A call ends in one of five ways: answered, up to its finish reason; refused, by a status that its kind allows;
withdrawn, as its caller left or a trainer aborted it; failed, by a fault that the soak itself made while it was on its
way, in the words that such a failure has; or lost, which is all else. Seeded answers are compared with the first of
their kind and seed.
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from tandem.bench.child import Server

SEEDS = 6  # of each kind
CALL_S = 120.0  # for a call, floods and pauses included
SLACK_S = 5.0  # from when a fault is asked for to when it comes
OUTCOMES = ("answered", "refused", "withdrawn", "failed", "lost")
FAULTS = ("engine_failed", "engine_lost", "engines_failed", "server_error")  # codes of what a failed engine leaves
TENANTS = {"a": "sk-soak-tenant-a", "b/x": "sk-soak-tenant-x", "b/y": "sk-soak-tenant-y"}  # and their keys
TURNS = 4  # of an agent's program
TOOL_S = 0.5  # that its tool takes, in the mean
FATES = {"worked": 0.7, "failed": 0.2, "died": 0.1}  # of a tool's call; as it dies, the program is left as it is
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}, "even": {"type": "boolean"}},
    "required": ["sum", "even"],
    "additionalProperties": False,
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {name: {"type": "integer", "minimum": 0, "maximum": 99} for name in ("a", "b")},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    }
]


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
    faults: list[float] = field(default_factory=list)  # when one was made
    tools: Counter[str] = field(default_factory=Counter)  # by what became of their calls
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

    def excused(self, began_s: float) -> bool:
        """Whether a fault was made while a call was on its way that began then and ends now."""
        with self.lock:
            return any(at_s >= began_s - SLACK_S for at_s in self.faults)

    def called(self, kind: str, call: Callable[[], tuple[str, str]]) -> None:
        """A call, whatever comes of it: "failed" is what call says of a failed engine, and lost without a fault."""
        self.begin(kind)
        began_s, outcome, said = time.monotonic(), "lost", "the caller failed"
        try:
            outcome, said = call()
        except (OSError, HTTPException, ValueError, KeyError, IndexError) as error:
            said = repr(error)
        finally:
            if outcome == "failed" and not self.excused(began_s):
                outcome = "lost"
            self.end(kind, outcome, said)

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


def headers(key: str) -> dict[str, str]:
    return {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}


def fate(status: int, body: bytes) -> tuple[str, str]:
    """(outcome, why) of a call that has no answer."""
    said = f"{status} {body[:200]!r}"
    if status in (429, 503):
        return "refused", said
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = ""
    return ("failed" if status in (500, 502) and code in FAULTS else "lost"), said


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
        self.server, self.account, self.over, self.number = server, account, over, number
        self.rng = random.Random(f"caller/{number}")
        self.tenant = sorted(TENANTS)[number % len(TENANTS)]
        self.key = TENANTS[self.tenant] if server.key else ""
        self.programs = 0

    def run(self) -> None:
        ways = [self.whole, self.whole, self.stream, self.stream, self.vanish, self.dawdle, self.malformed]
        if self.key:  # of a server with keys, tenants and programs
            ways += [self.agent, self.agent, self.stranger]
        while not self.over.is_set():
            self.rng.choice(ways)()

    def _send(self, path: str, body: bytes, key: str = "") -> tuple[HTTPConnection, HTTPResponse]:
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=CALL_S)
        try:
            connection.request("POST", path, body, headers(key or self.key))
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _told(self, path: str, body: Any, key: str = "") -> tuple[int, bytes]:
        """Status and body of a whole answer."""
        connection, response = self._send(path, json.dumps(body).encode(), key)
        try:
            return response.status, response.read()
        finally:
            connection.close()

    def _draw(self) -> tuple[str, Kind, int]:
        name = self.rng.choice(sorted(KINDS))
        return name, KINDS[name], self.rng.randrange(SEEDS)

    def whole(self) -> None:
        name, kind, seed = self._draw()

        def call() -> tuple[str, str]:
            status, body = self._told(kind.path, kind.call(seed, False))
            return self._heard(name, kind, seed, json.loads(body)) if status == 200 else fate(status, body)

        self.account.called(name, call)

    def _heard(self, name: str, kind: Kind, seed: int, body: Any) -> tuple[str, str]:
        """An answer that came whole: those that a trainer aborted are shorter than their first."""
        if aborted(body):
            return "withdrawn", ""
        if not ended(body):
            return "lost", f"an answer without an end: {str(body)[:200]}"
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
                if response.status != 200:
                    return fate(response.status, response.read())
                parts, cut, over = [], False, False
                for event in events(response):
                    error = event.get("error") or (event.get("response") or {}).get("error")
                    if error or event.get("type") in ("error", "response.failed"):
                        code = error.get("code") if error else event.get("code")
                        return ("failed" if code in FAULTS else "lost"), str(event)[:200]
                    parts.append(kind.new(event))
                    cut, over = cut or aborted(event), over or ended(event)
                    time.sleep(pause_s)
            finally:
                connection.close()
            if cut:
                return "withdrawn", ""
            if not over:
                return "lost", "a stream did not say how it ended"
            self.account.same(name, seed, sum(parts, []) if kind.new is _ids else "".join(parts))
            return "answered", ""

        self.account.called(way, call)

    def dawdle(self) -> None:
        """Reads slowly."""
        self.stream("slow stream", 0.05)

    def vanish(self) -> None:
        """Leaves after a few events, without a word."""
        _, kind, seed = self._draw()

        def call() -> tuple[str, str]:
            body = json.dumps(kind.call(seed, True)).encode()
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers(self.key).items())
            head = f"POST {kind.path} HTTP/1.1\r\nhost: x\r\n{lines}"
            with socket.create_connection(("127.0.0.1", self.server.port), CALL_S) as sock:
                sock.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                if self.rng.random() < 0.7 and not sock.recv(1 << 12):
                    return "lost", "the connection ended without an answer"
            return "withdrawn", ""

        self.account.called("vanished", call)

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
            if response.status in (429, 500, 502, 503):
                return fate(response.status, said)
            return "lost", f"{response.status} for what is no call"

        self.account.called("malformed", call)

    def stranger(self) -> None:
        """Asks with a key that there is not, or for another's tenant."""
        other = self.rng.choice([name for name in TENANTS if name != self.tenant])
        wanted, key, tenant = self.rng.choice([(401, "sk-soak-nobody", self.tenant), (403, self.key, other)])

        def call() -> tuple[str, str]:
            status, body = self._told("/v1/completions", {"prompt": [1, 2], "max_tokens": 1, "tenant": tenant}, key)
            if status == wanted and "error" in json.loads(body):
                return "refused", ""
            return fate(status, body) if status in (429, 500, 502, 503) else ("lost", f"{status} for a stranger")

        self.account.called("stranger", call)

    def agent(self) -> None:
        """A program whose turns call a tool that works, says that it failed, or dies and the program with it."""
        self.programs += 1
        program = f"agent-{self.number}-{self.programs}"
        talk: list[dict[str, Any]] = [{"role": "user", "content": "What is 17 + 25? Use the tool, then say it."}]
        for turn in range(TURNS):
            said: list[dict[str, Any]] = []
            self.account.called("agent", partial(self._turn, program, talk, said, TURNS - 1 - turn))
            if not said or not said[0].get("tool_calls"):
                break
            self.over.wait(self.rng.expovariate(1 / TOOL_S))
            became = self.rng.choices(list(FATES), list(FATES.values()))[0]
            with self.account.lock:
                self.account.tools[became] += 1
            if became == "died" or self.over.is_set():
                return
            told = "42" if became == "worked" else "Error: the tool could not be reached."
            talk += [
                said[0],
                *({"role": "tool", "tool_call_id": c["id"], "content": told} for c in said[0]["tool_calls"]),
            ]

        def call() -> tuple[str, str]:
            status, body = self._told("/finish_program", {"program_id": program})
            return ("answered", "") if status == 200 else fate(status, body)

        self.account.called("finish", call)

    def _turn(self, program: str, talk: list[dict[str, Any]], said: list[dict[str, Any]], left: int) -> tuple[str, str]:
        """One turn; its message into `said`."""
        body = {"messages": talk, "max_tokens": 64, "seed": left, "program_id": program}
        if left:
            body |= {"tools": TOOLS, "tool_choice": "required"}
        status, heard = self._told("/v1/chat/completions", {**body, "hints": {"tools": ["add"], "turns_left": left}})
        if status != 200:
            return fate(status, heard)
        answer = json.loads(heard)
        if aborted(answer):
            return "withdrawn", ""
        if not ended(answer):
            return "lost", f"a turn without an end: {str(answer)[:200]}"
        said.append(answer["choices"][0]["message"])
        return "answered", ""


def ended(body: Any) -> bool:
    """Whether an answer, or an event of a stream, says how an answer ended.

    >>> ended({"choices": [{"finish_reason": None}]}), ended({"choices": [{"finish_reason": "stop"}]})
    (False, True)
    """
    if "choices" in body:
        return any(choice["finish_reason"] for choice in body["choices"])
    if "output_ids" in body:
        return body["meta_info"]["finish_reason"] is not None
    return (body.get("response") or body).get("status") in ("completed", "incomplete")


def aborted(body: Any) -> bool:
    """Whether an answer, or the event that ends a stream, says that a trainer cut it off."""
    if "choices" in body:
        return any(choice["finish_reason"] == "abort" for choice in body["choices"])
    if "output_ids" in body:
        return (body["meta_info"]["finish_reason"] or {}).get("type") == "abort"
    response = body.get("response", body)
    cut = response.get("status") == "incomplete" and response["incomplete_details"]["reason"] != "max_output_tokens"
    return bool(cut) or response.get("status") == "cancelled"
