"""Programs behind a router: a paused one waits where it was, or an engine tells nobody what it has room for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tandem.engine.programs import Programs
from tests.multi.test_route_failures import ask
from tests.routing import routed, stubs
from tests.serving import DEADLINE_S, serving, wait_for


def test_a_paused_program_is_asked_of_an_engine_with_room() -> None:
    """A program waits for a place where it was paused, though another engine has room for it."""
    with stubs(2) as engines, routed(*engines) as router:

        def say(**more: Any) -> str:
            return str(ask(router, **more).json()["choices"][0]["message"]["content"])

        more: dict[str, Any] = {"program_id": "p", "tenant": "a"}
        home = next(one for one in engines if one.name == say(**more))
        other = next(one for one in engines if one is not home)
        at = {one.name: router.engines[place] for place, one in enumerate(engines)}
        assert say(**more) == home.name
        home.look = {"space": {"tokens": -200, "paused": {Programs.name("a", "p"): 500}}}
        other.look = {"space": {"tokens": 600, "paused": {}}}
        wait_for("the looks", lambda: at[home.name].space() and at[other.name].space())
        assert say(program_id="other", tenant="a") in (home.name, other.name)
        assert say(**more) == other.name
        home.look, other.look = {"space": None}, {"space": "odd"}
        wait_for("other looks", lambda: not (at[home.name].space() or at[other.name].space()))
        assert say(**more) == other.name, "it went back"
        assert at[other.name].counts["moved"] == 1 and at[home.name].counts["moved"] == 0
        told = httpx.get(f"{router.url}/metrics", timeout=DEADLINE_S).text
        assert f'tandem:route_moved_total{{engine="{at[other.name].name}",model_name="tiny"}} 1.0' in told


def test_an_engine_tells_its_room(tmp_path: Path, write_model: Callable[..., None]) -> None:
    """A router never hears of what an engine has room for, or a tenant's key of other tenants' programs."""
    write_model(tmp_path, scale=10.0)
    keys = tmp_path / "keys.toml"
    rows = [("sk-admin-1", "", True), ("sk-acme-12", "acme", False)]
    line = '[[keys]]\nkey = "{}"\ntenant = "{}"\nadmin = {}\n'
    keys.write_text("".join(line.format(*row).replace("True", "true").replace("False", "false") for row in rows))
    with serving(tmp_path, **{"engine.programs.mode": "enforce", "server.keys": str(keys)}) as server:

        def load(key: str) -> Any:
            head = {"authorization": f"Bearer {key}"}
            return httpx.get(f"{server.url}/load", headers=head, timeout=DEADLINE_S).json()

        tokens = server.room.desk.engine.scheduler.pool.num_pages * load("sk-admin-1")["page_tokens"]
        assert load("sk-admin-1")["space"] == {"tokens": tokens, "paused": {}}
        assert "space" not in load("sk-acme-12")
