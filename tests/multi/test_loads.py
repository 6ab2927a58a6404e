"""Regression caught: a load generator whose figures are not those of what came, or that loses an answer in silence."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.bench import callers, child, faulty, load, soak
from tandem.bench import serve as bench
from tandem.bench.child import Program, Server, peer_program
from tandem.bench.client import Answered, Ask, Plan, Result, ask_all
from tandem.cli.main import main
from tandem.errors import ConfigError, WorldError
from tandem.report.serving import serving_figure, soaked, written
from tests.serving import Server as Served
from tests.serving import serving as served

STUB = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN_S = float(sys.argv[3])

class Handler(BaseHTTPRequestHandler):
    count = 0

    def do_GET(self):
        body = json.dumps({"data": [{"id": "stub"}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        way, new = sys.argv[2], body["max_tokens"]
        if not body.get("stream"):
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
            return
        Handler.count += 1
        way = way if Handler.count % 4 == 0 else "well"
        self.send_response(429 if way == "refuses" else 200)
        self.send_header("connection", "close")
        self.end_headers()
        if way == "refuses":
            self.wfile.write(b"no room")
            return
        for place in range(new):
            if way == "breaks" and place == new // 2:
                return
            time.sleep(TOKEN_S)
            ends = "length" if place == new - 1 and way != "endless" else None
            self.tell({"choices": [{"text": "a", "finish_reason": ends}]})
        self.tell({"choices": [], "usage": {"completion_tokens": new - (way == "short")}})
        if way != "unended":
            self.wfile.write(b"data: [DONE]" + bytes([10, 10]))

    def tell(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + bytes([10, 10]))
        self.wfile.flush()

    def log_message(self, *_):
        pass

class Threads(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

Threads(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def stub(way: str, token_s: float = 0.002) -> Program:
    return Program("stub", (sys.executable, "-c", STUB, "{port}", way, str(token_s)))


def asks(count: int, new: int = 4) -> list[Ask]:
    return [Ask([1, 2, 3], new) for _ in range(count)]


@pytest.mark.parametrize(
    ("way", "outcomes", "said"),
    [
        ("well", {"answered": 8}, ""),
        ("refuses", {"answered": 6, "refused": 2}, "no room"),
        ("breaks", {"answered": 6, "lost": 2}, "closed"),
        ("unended", {"answered": 6, "lost": 2}, ""),
        ("endless", {"answered": 6, "lost": 2}, ""),
        ("short", {"answered": 6, "lost": 2}, "3 tokens came of 4"),
    ],
)
def test_an_answer_that_is_lost_is_in_the_account(way: str, outcomes: dict[str, int], said: str) -> None:
    """A stream that breaks off, or gives fewer tokens than were asked for, counts as answered: a rate of nothing."""
    with child.serving(stub(way)) as server:
        result = server.ask(Plan(server.url, server.model, asks(8), 2))
        assert (
            server.model == "stub" and server.start_s > 0 and server.cpu_s() > 0 and server.resident_bytes() > 1 << 20
        )
        again = Plan(server.url, server.model, asks(8), 2)
        if way == "well":
            assert load.account(server.ask(again), 8) == {"answered": 8}
        else:
            with pytest.raises(WorldError, match=r"^stub: of 8 calls 6 were answered"):
                bench.ask(server, again.asks, 2)
    assert Counter(one.outcome for one in result.answers) == outcomes
    assert said in "".join(one.said for one in result.answers)


def test_what_a_plan_has_no_answer_to_in_time_is_lost() -> None:
    """A server that never ends a stream keeps the bench for ever."""
    with child.serving(stub("well", token_s=60.0)) as server:
        result = server.ask(Plan(server.url, server.model, asks(3), deadline_s=0.5))
    assert [one.outcome for one in result.answers] == ["lost"] * 3
    assert all("within the plan's 0.5 s" in one.said for one in result.answers)
    with pytest.raises(WorldError, match="of 3 calls 0 were answered, 0 refused and 3 lost: 3 x not answered within"):
        load.account(result, 3)


def test_nobody_listens() -> None:
    """A connection that is refused ends the client in a trace, and its other calls with it."""
    result = ask_all(Plan(f"http://127.0.0.1:{child.free_port()}", "m", asks(2)))
    assert [one.outcome for one in result.answers] == ["lost"] * 2 and "no connection" in result.answers[0].said


def test_calls_are_as_many_at_once_as_is_said_and_when_they_are_due() -> None:
    """A sweep whose points have another number of streams; arrivals that wait for earlier answers."""
    with child.serving(stub("well", token_s=0.1)) as server:
        swept = server.ask(Plan(server.url, server.model, asks(9), 3)).answers
        due = [Ask([1], 4, 0.02 * place) for place in range(8)]
        arrived = server.ask(Plan(server.url, server.model, due)).answers
    at = sorted([(one.sent_s, 1) for one in swept] + [(one.end_s, -1) for one in swept])
    assert max(np.cumsum([change for _, change in at])) == 3
    assert [one.due_s for one in arrived] == [ask.due_s for ask in due]
    assert all(one.sent_s >= one.due_s - 0.005 for one in arrived)  # a loop's timer is coarse
    assert max(one.sent_s for one in arrived) < min(one.end_s for one in arrived)  # the last before the first had ended


def test_arrivals_are_poisson() -> None:
    """Gaps of another mean, or a clock's: bursts are what makes waits."""
    plan = load.poisson(asks(20_001), 5.0, 3)
    gaps = np.diff([one.due_s for one in plan])
    assert plan[0].due_s == 0.0 and np.mean(gaps) == pytest.approx(1 / 5, rel=0.03)
    assert np.std(gaps) == pytest.approx(1 / 5, rel=0.03) and np.mean(gaps > 2 / 5) == pytest.approx(
        math.exp(-2), rel=0.05
    )
    assert plan == load.poisson(asks(20_001), 5.0, 3) != load.poisson(asks(20_001), 5.0, 4)


def test_lengths_are_log_normal() -> None:
    """Another mean than is said beside the table; sides that are asked for other lengths."""
    drawn = load.sharegpt(20_000, 1)
    for lengths, of in (
        (load.SHAREGPT_IN, [len(a.prompt) for a in drawn]),
        (load.SHAREGPT_OUT, [a.new for a in drawn]),
    ):
        assert np.median(of) == pytest.approx(math.exp(lengths.mu), rel=0.05)
        assert np.mean(of) == pytest.approx(lengths.mean, rel=0.06) and (min(of), max(of)) == (4, 512)
    assert drawn[:50] == load.sharegpt(50, 1) != load.sharegpt(50, 2)


def answered(due_s: float, came_s: list[float], tokens: int) -> Answered:
    return Answered(due_s, due_s + 0.5, came_s, came_s[-1] + 0.25, tokens, "answered")


def test_a_summary_by_hand() -> None:
    """Times from the sending where calls waited; a rate over the sum of times; a gap between two streams."""
    run = Result([answered(0.0, [1.0, 2.0, 4.0], 5), answered(3.0, [4.0, 4.5], 2)], 0.125)
    slow = Result([answered(0.0, [2.0, 10.25], 7), answered(0.0, [2.0], 1)], 0.375)
    told = load.summary([run, slow])
    assert told["tok_s"] == pytest.approx((7 / (4.75 - 0.5) + 8 / (10.5 - 0.5)) / 2)
    assert told["ttft_s"] == pytest.approx(load.percentiles([1.0, 1.0, 2.0, 2.0]))
    assert told["itl_s"] == pytest.approx(load.percentiles([1.0, 2.0, 0.5, 8.25]))
    assert told["tpot_s"] == pytest.approx(load.percentiles([3 / 4, 0.5, 8.25 / 6]))
    assert told["e2e_s"] == pytest.approx(load.percentiles([4.25, 1.75, 10.5, 2.25]))
    assert (told["user_tok_s"], told["calls"], told["client_cpu_s"]) == (pytest.approx(4 / 3), 4, 0.25)
    values = np.random.default_rng(0).exponential(size=101)
    assert load.percentiles(list(values)) == {"p50": sorted(values)[50], "p99": sorted(values)[99]}


def test_a_bench_of_two_servers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """A ratio upside down, arrivals of the wrong side's saturation, two servers at once, tables of other rows."""
    alive: list[str] = []

    @contextmanager
    def alone(program: Program) -> Iterator[Server]:
        assert not alive, "two servers at once"
        alive.append(program.name)
        order.append(program.name)
        try:
            with child.serving(program) as server:
                server.start_s = 2.0 if program.name == "tandem" else 50.0
                yield server
        finally:
            alive.clear()

    order: list[str] = []
    monkeypatch.setattr(bench, "serving", alone)
    monkeypatch.setattr(bench, "own", lambda: Program("tandem", stub("well", 0.002).words))
    for name, value in (("CALLS", 6), ("ARRIVALS", 4), ("SWEEP", (1, 2)), ("SWEEP_NEW", 3), ("STREAMS", 2)):
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(load, "SHAREGPT_OUT", load.Lengths(3.0, 0.2, 2, 4))
    page = tmp_path / "serving.md"
    before = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    page.write_text(before, encoding="utf-8")
    peer, name = shlex.join(stub("well", 0.01).words), Path(sys.executable).name
    flags = ["--part", "start", "--part", "load", "--part", "sweep", "--rounds", "2", "--page", str(page)]
    assert main(["bench", "serve", "--peer", peer, *flags, "--out", str(tmp_path / "x.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert order == ["tandem", name, "tandem", name, "tandem"]
    theirs = found["load"]["sides"][name]["saturation"]
    assert found["load"]["call_s"] == pytest.approx(theirs["call_s"] / 2, rel=0.5) and theirs["calls"] == 12
    text = page.read_text(encoding="utf-8")
    assert f"2.0 s; {name} 50.0 s: **25.0 x**" in text
    kept = [each.partition("<!-- serve/overhead")[2].partition("<!-- end")[0] for each in (before, text)]
    assert kept[0] == kept[1] != ""  # overhead was not measured
    assert "| 6 calls, all at once | tandem |" in text and f"| 2 | {name} |" in text
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def side(value: float) -> dict[str, Any]:
    times = {"p50": value, "p99": 3 * value}
    names = ("tok_s", "user_tok_s", "client_cpu_s", "server_cpu_s")
    return {"calls": 4, **dict.fromkeys(names, 100 * value), "ttft_s": times, "itl_s": times, "e2e_s": times}


def test_ratios_are_tandems_over_the_peers(capsys: Any) -> None:
    """A peer that is twice as fast stands as half as fast."""
    ours, theirs = bench.Side(Program("tandem", ())), bench.Side(Program("vllm", ()))
    for one, slow in ((ours, 1.0), (theirs, 4.0)):
        one.starts_s = [3 * slow, 2 * slow]
        for work in ("saturation", "arrivals"):
            one.cpu_s[work] = [1.0]
            one.ran[work] = [Result([answered(0.0, [slow, 2 * slow], 2)], 0.0)]
    result: dict[str, Any] = {"rounds": 1, "wanted": bench.WANTED}
    bench._tell(result, [theirs, ours], ["start", "load"], 0.5)
    assert result["start"] == {"tandem": 2.0, "vllm": 8.0, "ratio": 4.0}
    assert result["load"]["ratio"] == pytest.approx((2 / 1.75) / (2 / 7.75))
    assert result["load"]["first_ratio"] == pytest.approx(4.0)
    axes = serving_figure(
        {"peer": "vllm", "sweep": [{"streams": n, "tandem": side(n), "vllm": side(2)} for n in (1, 4)]}
    )
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.axes[2].lines}
    assert drawn == {"tandem": [1000.0, 4000.0], "vllm": [2000.0, 2000.0]}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["serve", "--peer", "ls"], "does not say {port}"),
        (["serve", "--peer", "ls {port}", "--peer", "ls {port}"], "given 2 times"),
        (["serve", "--seconds", "5"], "--seconds is given to `bench serve`"),
        (["engine", "--part", "load"], "--part is given to `bench engine`"),
        (["serve", "--page", "README.md"], "can't take the tables"),
        (["serve", "--part", "start", "--out", "x.png"], "Add --part sweep"),
        (["soak", "--peer", "ls"], "has no peers"),
    ],
)
def test_flags_that_say_nothing_are_refused_first(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: list[str], said: str
) -> None:
    """Twelve minutes of measurement lost to a flag."""
    monkeypatch.setattr("tandem.bench.serve.measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr("tandem.bench.soak.soak", lambda *_: pytest.fail("it was measured"))
    assert main(["bench", *flags]) == 2 and said in capsys.readouterr().err
    with pytest.raises(ConfigError):
        peer_program("no-such-program {port}")


def test_a_server_that_ends_is_told_with_what_it_said() -> None:
    """A peer that dies at its start is waited for until the deadline, and nobody hears why."""
    ends = Program("stub", (sys.executable, "-c", "print('no such model'); raise SystemExit(3)"))
    with pytest.raises(WorldError, match=r"(?s)ended with 3 before it answered.*no such model"), child.serving(ends):
        pass
    with pytest.raises(WorldError, match="while it was asked"), child.serving(stub("well")) as server:
        os.killpg(server.pid, signal.SIGKILL)
        time.sleep(0.2)


def test_pages_keep_what_was_not_measured() -> None:
    """A bench of one part that wipes the tables of the others."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    found = {"wanted": bench.WANTED, "start": {"tandem": 1.5}}
    once = written(page, found)
    assert once.count("1.5 s | 20 x") == 1 and written(once, found) == once
    with pytest.raises(ValueError, match="serve/sweep"):
        written(page.replace("<!-- end of serve/sweep -->", ""), found)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("soaked")
    write_model(path, scale=10.0)
    given = {"server.control": "true", "server.max_requests": "12", "server.max_new_tokens": "64"}
    with served(path, **given) as running:
        yield running


def soaking(tiny: Served) -> Server:
    port = int(tiny.url.rpartition(":")[2])
    return Server("tandem", port, os.getpid(), "tiny")


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that a model of 64 positions answers."""
    bodies = {
        "completion": {"prompt": [65, 66], "max_tokens": 12, "ignore_eos": True},
        "generate": {"input_ids": [67, 68], "sampling_params": {"max_new_tokens": 9, "ignore_eos": True}},
    }
    kinds = {name: replace(callers.KINDS[name], body=body) for name, body in bodies.items()}
    monkeypatch.setattr(callers, "KINDS", kinds)
    for name, value in (("FLOOD", 40), ("FLOOD_S", 1.0), ("LOOK_S", 0.1), ("LINE_S", 1.0), ("CALLERS", 6)):
        monkeypatch.setattr(soak, name, value)
    monkeypatch.setattr(soak, "BUSY", 12)
    monkeypatch.setattr(soak, "train", lambda *_: None)


def test_a_soak_of_a_small_server(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A soak that asks nothing, loses what was refused, or lets another text pass for the same."""
    small(monkeypatch)
    lines: list[str] = []
    found = soak._soaked(soaking(tiny), 3.0, lines.append)
    total = found["total"]
    assert total["lost"] == found["differed"] == 0, found["said"]
    assert total["asked"] == total["answered"] + total["refused"] + total["withdrawn"]
    assert (
        found["calls"]["flood"]["answered"]
        and found["calls"]["vanished"]
        and found["calls"][soak.LAST]["answered"] == 12
    )
    assert found["repeated"] > 0 and lines and "| **all** |" in soaked(found)


def test_a_soak_tells_what_is_wrong() -> None:
    """An answer that is lost, or is not the first one's, in a soak that ends well."""
    account = soak.Account()
    account.begin("chat")
    account.same("chat", 0, "this")
    account.same("chat", 0, "this")
    steady = [(0.0, 100.0), (3600.0, 100.0)]
    found = soak.told(account, steady, 3600.0)
    assert found["total"] == {"asked": 1, "answered": 0, "refused": 0, "withdrawn": 0, "failed": 0, "lost": 1}
    assert found["failure"].startswith("1 calls were lost") and (found["repeated"], found["differed"]) == (1, 0)
    account.end("chat", "answered")
    assert soak.told(account, steady, 3600.0)["failure"] == ""
    account.same("chat", 0, "that")
    assert soak.told(account, steady, 3600.0)["failure"].startswith("1 seeded answers")


class Leaky:
    """A server of which a call took a place for ever: of four at once it answers three."""

    model = "m"

    def __init__(self, room: int) -> None:
        self.places = threading.Semaphore(room)

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        if path == "/load":
            return 200, b'{"running": 0, "waiting": 0}'
        if not self.places.acquire(blocking=False):
            return 429, b"no room"
        return 200, b'{"choices": [{"finish_reason": "length"}]}'


def test_a_place_that_is_never_given_back_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that refuses more and more, as calls that ended count for ever, soaks well: refusals are no loss."""
    monkeypatch.setattr(soak, "BUSY", 4)
    for room, lost in ((4, 0), (3, 1)):
        account, server = soak.Account(), Leaky(room)
        soak._left(server, account)  # type: ignore[arg-type]
        assert account.rows()[soak.LAST]["answered"] == room and account.lost == lost


@pytest.mark.parametrize("ends", [True, False])
def test_a_stream_that_does_not_say_how_it_ended_is_lost(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """The last event of an answer is dropped, all its text is there, and the soak ends well."""
    last = {"choices": [{"text": "b", "finish_reason": "length" if ends else None}]}
    told = [{"choices": [{"text": "a", "finish_reason": None}]}, last]
    lines = [b"data: " + json.dumps(one).encode() + b"\n" for one in told] + [b"data: [DONE]\n"]

    class Heard(list[bytes]):
        status = 200

        def close(self) -> None: ...

    account = soak.Account()
    caller = callers.Caller(Server("tandem", 1, 1), account, threading.Event(), 0)
    monkeypatch.setattr(caller, "_send", lambda *_: (Heard(), Heard(lines)))
    monkeypatch.setattr(caller, "_draw", lambda: ("completion", callers.KINDS["completion"], 1))
    caller.stream()
    assert account.ended == {("stream", "answered" if ends else "lost"): 1}


def test_what_fails_without_a_fault_is_lost() -> None:
    """An engine that fails by itself is excused by a fault that was made before or after; or nothing is excused."""
    account = soak.Account()
    body = json.dumps({"error": {"code": "engine_failed"}}).encode()
    account.called("before", lambda: callers.fate(500, body))
    account.faults.append(time.monotonic())
    account.called("amid", lambda: callers.fate(500, body))
    account.called("other", lambda: callers.fate(500, b"{}"))
    account.faults[:] = [time.monotonic() - callers.SLACK_S - 1]
    account.called("after", lambda: callers.fate(502, body))
    account.called("busy", lambda: callers.fate(429, b""))
    ended = {"before": "lost", "amid": "failed", "other": "lost", "after": "lost", "busy": "refused"}
    assert account.ended == Counter(dict.fromkeys(ended.items(), 1))
    restarted = soak.told(soak.Account(), [], 3600.0, {"engine": 1}, 2)["failure"]
    assert restarted.startswith("2 engines were started again, where 1 were killed")


def test_a_fault_is_of_one_step_of_an_engine_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that fails as it is measured at its start, at every step, or long after it was told."""
    from tandem.engine.engine import Engine
    from tandem.run import served as started

    monkeypatch.setattr(Engine, "step", lambda engine: [])
    monkeypatch.setattr(started, "alike", lambda config: [sys.executable, "-m", "tandem", "serve", "x"])
    told: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda *given: told.append(given))
    fault = faulty.Fault()
    fault.install()
    assert started.alike(None)[2:] == ["tandem.bench.faulty", "serve", "x"]  # type: ignore[arg-type]
    engine: Any = object.__new__(Engine)
    with ThreadPoolExecutor(1) as serving:
        for asked_s, raises in ((time.monotonic(), True), (None, False), (time.monotonic() - faulty.SOON_S, False)):
            if raises:
                told[0][1](faulty.FAULT, None)
                assert engine.step() == [], "it is this thread's"
                with pytest.raises(RuntimeError, match="has this step fail"):
                    serving.submit(engine.step).result()
            else:
                fault.asked_s = asked_s or fault.asked_s
                assert serving.submit(engine.step).result() == []


def test_memory_that_grows_fails_a_soak() -> None:
    """A leak that shows within an hour, or what a warm-up takes for one."""
    samples = [(60.0 * minute, 500.0 + min(minute, 10) * 50) for minute in range(61)]
    assert soak.told(soak.Account(), samples, 3600.0)["failure"] == ""
    leaking = [(at_s, mb + at_s / 36) for at_s, mb in samples]
    found = soak.told(soak.Account(), leaking, 3600.0)
    assert found["slope_mb_h"] == pytest.approx(100.0) and "grows by 100.0 MB an hour" in found["failure"]
