"""Shares of an engine in another process: what tenants are promised reaches its tree, and that of its successor."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tandem.engine.cluster import local_terms
from tandem.engine.driver import Driver
from tandem.engine.engine import Engine
from tandem.engine.share import Terms
from tandem.kernels.build.toolchain import compiler
from tandem.rollout.balance import Balance
from tandem.rollout.router import Replica, Router
from tandem.run.apart import RemoteEngine
from tandem.run.config import RunConfig
from tandem.run.parts import build_parts
from tandem.run.workers import Local
from tandem.types import Completion, Request, Sampling
from tests.placed import APART, pid, tiny

pytestmark = pytest.mark.skipif(compiler() is None, reason="the reference kernels are not batch-invariant")
COST = {"base_s": 1e-3, "decode_token_s": 1e-3, "prefill_token_s": 1e-4, "held_token_s": 1e-12}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., None]) -> RunConfig:
    """Tenants a and b of one weight, and places for eight requests."""
    folder = tmp_path_factory.mktemp("shares")
    made = tiny(folder, write_model)
    (folder / "shares.json").write_text(json.dumps({"tenants": {"a": {}, "b": {}}, "cost": COST}))
    shares = str(folder / "shares.json")
    return replace(made, engine=replace(made.engine, order="shares", shares=shares, max_sequences=8))


@contextmanager
def engines_of(config: RunConfig, count: int = 1) -> Iterator[list[Engine]]:
    run = replace(config, engine=replace(config.engine, replicas=count), workers=APART)
    with (
        closing(Local(APART)) as backend,
        closing(build_parts(run.model, run.engine, run=run, workers=backend)) as parts,
    ):
        yield list(parts.sampling)


def request(tenant: str, number: int, group: str = "") -> Request:
    name, tokens = f"{tenant}#{number}", (3 + number % 50, 7 + number % 40, *range(10, 20))
    return Request(name, name, tokens, Sampling(max_new_tokens=16), seed=number, tenant=tenant, group=group)


def ended(engine: Engine, until: Callable[[Counter[str]], bool]) -> Counter[str]:
    """Requests that ended, by tenant, until then."""
    found, done = Counter[str](), list[Completion]()
    while engine.has_work and not until(found):
        done += engine.step()
        found = Counter(one.request_id.partition("#")[0] for one in done)
    return found


@pytest.mark.parametrize("dies", [False, True])
def test_what_is_promised_reaches_a_worker_and_who_takes_its_place(
    config: RunConfig, dies: bool, tmp_path: Path
) -> None:
    """An engine in another process goes on by the weights of its file; or its successor does, or looks for a file that
    its machine has not."""
    own = Path(shutil.copy(config.engine.shares, tmp_path))
    with engines_of(replace(config, engine=replace(config.engine, shares=str(own)))) as (engine,):
        own.unlink()
        assert isinstance(engine, RemoteEngine)
        for number in range(40):
            for tenant in "ba":
                engine.submit(request(tenant, number))
        assert engine.loads() == {"a": 40, "b": 40}
        engine.promise({"a": Terms(7.0), "b": Terms(1.0)})
        if dies:
            assert ended(engine, lambda found: found.total() >= 4).total() < 16
            os.kill(pid(engine), signal.SIGKILL)
            with pytest.warns(match="In its place another is started"):
                found = ended(engine, lambda found: found["a"] >= 30)
        else:
            found = ended(engine, lambda found: found["a"] >= 35)
        assert found["b"] <= 12  # 5, and what ran as the last of a's ended; as many as of a's by the file
        for name in [*engine._live]:
            engine.abort(name)


def test_a_router_balances_engines_in_other_processes(config: RunConfig) -> None:
    """A router reaches the trees of engines in its own process alone, and a tenant has its share of each."""
    now, terms = [0.0], {"a": Terms(4.0), "b": Terms(1.0)}
    with engines_of(config, 2) as engines:
        replicas = [
            Replica(f"e{number}", Driver(engine), lambda engine=engine: engine.version, 2000)  # type: ignore[misc]
            for number, engine in enumerate(engines)
        ]
        router = Router(replicas, balance=Balance(terms, lambda: now[0]))
        futures = [router.submit(request("ab"[n % 3 == 0], n, group=f"g{n}")) for n in range(24)]
        loads = [Counter[str](), Counter[str]()]
        for one, load in zip(replicas, loads, strict=True):
            load.update(tried.asked.request.tenant for tried in one.open.values())
        for _ in range(3):
            router.progress(0, 0.0)
            now[0] += 1.0
        wanted = local_terms(terms, loads)
        for engine, local in zip(engines, wanted, strict=True):
            assert isinstance(engine, RemoteEngine)
            assert {name: one.weight for name, one in engine._terms.items()} == pytest.approx(
                {name: one.weight for name, one in local.items()}, rel=0.5
            )
        while not all(future.done() for future in futures):
            router.progress(0, 0.1)
        assert all(len(future.result().columns) for future in futures)
