"""Regression caught: the server's page shows other load than there is, or nobody can read it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser import PROGRAM, Browser
from tests.routing import Stub, routed, stubs
from tests.serving import Server, script, wait_for

BEYOND = """[...document.querySelectorAll('main *')].filter((one) => !one.closest('.scroll') && !one.closest('svg') &&
one.getBoundingClientRect().right > innerWidth + 0.5).map((one) => one.outerHTML.slice(0, 80))"""


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., None]) -> Path:
    write_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    browser = Browser(tmp_path / "chromium")
    yield browser
    browser.close()


LONG = "globex/an-extremely-long-team-name-that-goes-on/user.with.dots@example.org"


@pytest.fixture
def busy(folder: Path) -> Iterator[Server]:
    """Three answers of two tenants on their way, of which one waits, and one that has ended."""
    server = Server(folder, **{"engine.max_sequences": 2, "server.name": "a-model-with-a-name-of-some-length/" * 3})
    runner = script(server, "a" * 4000)
    server.start()
    try:
        with ExitStack() as open_, httpx.Client(timeout=60) as client:
            ended = {"prompt": [5] * 40, "max_tokens": 3, "program_id": "over", "tenant": LONG}
            client.post(f"{server.url}/v1/completions", json=ended)
            runner.step_s = 0.02
            for number, tenant in enumerate(("acme/search", "acme/search", LONG)):
                body = {"prompt": [6 + number] * 40, "max_tokens": 3000, "stream": True, "tenant": tenant}
                body["program_id"] = f"program-of-a-name-that-is-longer-than-a-narrow-window-{number}"
                sent = open_.enter_context(client.stream("POST", f"{server.url}/v1/completions", json=body))
                assert sent.status_code == 200
            wait_for("two to run", lambda: server.room.desk.num_running == 2)
            yield server
    finally:
        server.stop()


def test_the_page_shows_what_is_there(busy: Server, browser: Browser) -> None:
    """Figures of another moment, a tenant or a program that is missing, or a page wider than its window."""
    for width, dark in ((400, False), (1200, True), (1200, False), (400, True)):
        browser.look(width, 900, dark)
        browser.open(f"{busy.url}/")
        wait_for("two looks", lambda: browser.run("history.length") >= 2)
        assert browser.run("document.documentElement.scrollWidth") <= width and browser.run(BEYOND) == []
        texts = {name: browser.run(f"document.getElementById('{name}').textContent") for name in ("running", "waiting")}
        assert texts == {"running": "2", "waiting": "1"}
        assert float(browser.run("before.drawn")) > 0 and browser.run("history.at(-1).drawn") > 0
        assert float(browser.run("document.getElementById('rate').textContent")) > 0
        assert browser.run("document.getElementById('status').textContent") == "ok"
        rows = browser.run(
            "[...document.querySelectorAll('#tenants tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
        assert {row[0]: row[1:3] for row in rows} == {LONG: ["1", "1"], "acme/search": ["2", "0"]}
        assert [row[0] for row in rows] == sorted(row[0] for row in rows), "tenants change places with every look"
        cut = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth).length"
        assert browser.run(cut) == 0, "a column is out of sight"
        rows = browser.run(
            "[...document.querySelectorAll('#programs tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
        assert len(rows) == 4 and {row[0]: row[1].split()[0] for row in rows}["over"] == "idle"
        assert all(row[1] == "reasoning" for row in rows if row[0] != "over")
        lines = "[...document.querySelectorAll('svg path')].filter(one => one.getAttribute('d').includes('NaN')).length"
        assert browser.run(lines) == 0 and browser.run("document.querySelectorAll('svg path').length") == 6
    assert browser.errors == [] and all(url.startswith((busy.url, "about:", "data:")) for url in browser.requests)
    wait_for("those who left to be forgotten", lambda: busy.room.counts.watchers == 1)
    browser.run("location.href = 'about:blank'")
    wait_for("the last to be forgotten", lambda: busy.room.counts.watchers == 0)
    browser.run("history.back()")
    wait_for("who came back to look", lambda: busy.room.counts.watchers == 1)
    looks = browser.run("history.length")
    wait_for("looks to go on", lambda: browser.run("history.length") > looks)


def test_a_key_shows_its_own_tenant(folder: Path, browser: Browser, tmp_path: Path) -> None:
    """The page asks for no key, or shows one tenant what another does."""
    keys = tmp_path / "keys.toml"
    keys.write_text(
        '[[keys]]\nkey = "sk-search-1"\ntenant = "acme"\n[[keys]]\nkey = "sk-globex-1"\ntenant = "globex"\n'
    )
    server = Server(folder, **{"server.keys": str(keys)}).start()
    try:
        for key in ("sk-search-1", "sk-globex-1"):
            head = {"authorization": f"Bearer {key}"}
            sent = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "program_id": key}, headers=head)
            assert sent.status_code == 200
            look = httpx.get(f"{server.url}/load", headers=head).json()
            assert [row["name"] for row in look["programs"]] == [key] and len(look["tenants"]) == 1
        assert httpx.get(f"{server.url}/events").status_code == 401
        browser.look(1200, 900)
        browser.open(f"{server.url}/")
        assert browser.run("document.body.dataset.ready") == "key" and browser.run("login.hidden") is False
        twice = "login.requestSubmit(); login.requestSubmit()"  # an impatient reader
        browser.run(f"document.getElementById('key').value = 'sk-search-1'; {twice}")
        wait_for("a look", lambda: browser.run("history.length") > 0)
        assert browser.run("document.getElementById('programs').textContent").startswith("sk-search-1")
        assert "globex" not in browser.run("document.body.textContent") and browser.run("login.hidden") is True
        wait_for("one of the two to end", lambda: server.room.counts.watchers == 1)
    finally:
        server.stop()


def test_a_routers_page_shows_its_engines(busy: Server, browser: Browser) -> None:
    """Nobody sees which engine is away; or a page of one engine has a table of none."""
    with stubs(1) as others:
        others[0].look, others[0].model = {"step": 0, "digest": busy.room.fingerprint(None)}, busy.room.model
        _shown(busy, others[0], browser)


def _shown(busy: Server, other: Stub, browser: Browser) -> None:
    with routed(busy, other) as router:
        other.end()
        wait_for("the router to see it", lambda: not router.engines[1].ready)
        for width in (400, 1200):
            browser.look(width, 900)
            browser.open(f"{router.url}/")
            wait_for("a look", lambda: browser.run("history.length") > 0)
            assert browser.run("document.documentElement.scrollWidth") <= width and browser.run(BEYOND) == []
            rows = browser.run(
                "[...document.querySelectorAll('#engines tr')].map(r => [...r.cells].map(c => c.textContent))"
            )
            assert [row[:2] for row in rows][0] == ["engine-1", "ok"] and rows[1][1].startswith(
                "failing: no connection"
            )
            assert browser.run("document.getElementById('running').textContent") == "2"
            assert browser.run("document.getElementById('several').hidden") is False
        browser.open(f"{busy.url}/")
        wait_for("a look", lambda: browser.run("history.length") > 0)
        assert browser.run("document.getElementById('several').hidden") is True
    assert browser.errors == []


def test_looks_come_every_second(busy: Server) -> None:
    """A look is not an event of its own, or says less than the page reads of it."""
    with httpx.stream("GET", f"{busy.url}/events", timeout=30) as sent:
        assert sent.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in sent.iter_lines() if line)
        looks: list[dict[str, Any]] = [json.loads(next(lines).removeprefix("data: ")) for _ in range(2)]
    assert looks[1]["time"] > looks[0]["time"] and looks[1]["drawn"] >= looks[0]["drawn"]
    pages = looks[1]["pages"]
    assert sum(pages.values()) == busy.room.desk.engine.scheduler.pool.num_pages and pages["held"] > 0
